"""HPSv2.1 against the recorded outputs of the public code; all tolerances are those of the fixtures' README."""

from __future__ import annotations

import json

import pytest
import torch

from reward_lab.reward_models import clip, hpsv2, preprocess
from reward_lab.reward_models.loader import load_reward_model

FILES = ("hps_tiny.pt", "hps_tiny.safetensors")
COSINE = 1e-5


@pytest.fixture(scope="module")
def load(scorers):
    """The tiny HPS with options; each file is read once."""
    folder, networks = scorers.folder / "hps", {}

    def get(file="hps_tiny.pt", dtype=torch.float32, **options):
        if (file, dtype) not in networks:
            networks[file, dtype] = load_reward_model("hpsv2.1", folder / file, config=folder / "config.json", dtype=dtype).network
        return hpsv2.HPSv2Reward(networks[file, dtype], **options)

    return get


def test_the_loader_hands_options_on(scorers):
    folder = scorers.folder / "hps"
    model = load_reward_model("hpsv2.1", folder / "hps_tiny.pt", config=folder / "config.json", resize="crop", antialias=False)
    assert (model.prepare.resize, model.prepare.use_antialias) == ("crop", False)


def table(model, pictures, prompts) -> torch.Tensor:
    """Scores [pictures, prompts]; the fixtures include an empty prompt, which `score` refuses, so vectors are compared here."""
    text_PD = model.text_vectors(prompts)
    return torch.cat([model.picture_vectors(picture[None]) @ text_PD.T for picture in pictures])


@pytest.mark.parametrize("file", FILES)
def test_scores_of_every_picture_and_prompt(scorers, load, file):
    pictures = scorers.pictures.values()
    for options, field in (
        ({}, "score_antialias_on"),
        ({"use_antialias": False}, "score_antialias_off"),
        ({"resize": "squash"}, "score_squash_antialias_on"),
    ):
        got = table(load(file, **options), pictures, scorers.hps["prompts"])
        torch.testing.assert_close(got, torch.tensor(scorers.hps[field]), rtol=0, atol=COSINE)


def test_score_through_the_protocol(scorers, load):
    model = load()
    for row, picture in enumerate(scorers.pictures.values()):
        for column, prompt in enumerate(scorers.hps["prompts"]):
            if prompt.strip():
                output = model.score(picture[None, None], [prompt])
                assert output.per_video.item() == pytest.approx(scorers.hps["score_antialias_on"][row][column], abs=COSINE)
                assert set(output.parts) == {"hps_letterbox"}


def test_token_ids(scorers):
    assert clip.tokenize(scorers.hps["prompts"]).tolist() == scorers.hps["token_ids"]
    cleaning = scorers.hps["text_cleaning"]
    assert clip.tokenize(cleaning["prompts"]).tolist() == cleaning["token_ids"]


def test_text_cleaning_scores(scorers, load):
    cleaning = scorers.hps["text_cleaning"]
    got = table(load(), scorers.pictures.values(), cleaning["prompts"])
    torch.testing.assert_close(got, torch.tensor(cleaning["score_antialias_on"]), rtol=0, atol=COSINE)


def test_unit_vectors(scorers, load):
    model = load()
    got = torch.cat([model.picture_vectors(picture[None]) for picture in scorers.pictures.values()])
    torch.testing.assert_close(got, torch.tensor(scorers.hps["image_features_antialias_on"]), rtol=0, atol=COSINE)
    torch.testing.assert_close(model.text_vectors(scorers.hps["prompts"]), torch.tensor(scorers.hps["text_features"]), rtol=0, atol=COSINE)


def test_preprocessing(scorers):
    for expected in scorers.hps["preprocessing"]:
        height, width = expected["input_height"], expected["input_width"]
        new_height, new_width, left, top = preprocess.letterbox_size(height, width, 224)
        assert (new_height, new_width) == (expected["resized_height"], expected["resized_width"])
        assert (left, top) == (expected["pad_left"], expected["pad_top"])
        assert (224 - new_width - left, 224 - new_height - top) == (expected["pad_right"], expected["pad_bottom"])
        for name, use_antialias in (("on", True), ("off", False)):
            got = preprocess.prepare(scorers.pictures[expected["file"]][None], 224, resize="letterbox", use_antialias=use_antialias)[0]
            for channel, row, column, value in expected[f"points_antialias_{name}"]:
                assert got[channel, row, column].item() == pytest.approx(value, abs=2e-5)
            assert got.mean(dim=(1, 2)).tolist() == pytest.approx(expected[f"channel_mean_antialias_{name}"], abs=2e-5)


@pytest.mark.parametrize("index", [0, 1])
def test_gradient_with_respect_to_the_picture(scorers, load, gradient_check, index):
    expected = scorers.hps["gradient"][index]
    picture = scorers.pictures[expected["file"]].clone().requires_grad_()
    output = load(use_antialias=expected["antialias"]).score(picture[None, None], [scorers.hps["prompts"][expected["prompt_index"]]])
    output.per_video.sum().backward()
    assert output.per_video.item() == pytest.approx(expected["score"], abs=COSINE)
    gradient_check(picture.grad, expected)


def test_video(scorers, load):
    expected = scorers.hps["video"]
    picture = scorers.pictures[expected["file"]]
    clip_1FCHW = torch.stack([picture, picture.flip(-1), picture.flip(-2)])[None]
    prompt = [scorers.hps["prompts"][expected["prompt_index"]]]
    squash = load(resize="squash").score(clip_1FCHW, prompt)
    assert squash.per_frame[0].tolist() == pytest.approx(expected["per_frame"], abs=COSINE)
    assert squash.per_video.item() == pytest.approx(expected["reward_mean"], abs=COSINE)
    assert abs(squash.per_video.item() - 1) == pytest.approx(expected["loss_with_target_1"], abs=COSINE)
    letterbox = load().score(clip_1FCHW, prompt)
    assert letterbox.per_frame[0].tolist() == pytest.approx(expected["letterbox_per_frame"], abs=COSINE)
    assert letterbox.per_video.item() == pytest.approx(expected["letterbox_mean"], abs=COSINE)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 0.003), (torch.bfloat16, 0.03)])
def test_half_precision_towers(scorers, load, dtype, tolerance):
    model = load(dtype=dtype)
    assert model.network.visual.conv1.weight.dtype == dtype
    assert model.network.visual.ln_pre.weight.dtype == torch.float32
    got = table(model, scorers.pictures.values(), scorers.hps["prompts"])
    assert got.dtype == torch.float32
    assert (got - torch.tensor(scorers.hps["score_antialias_on"])).abs().max() < tolerance


def test_hugging_face_layout_of_the_same_weights_scores_the_same(scorers, load, tmp_path):
    from safetensors.torch import load_file, save_file

    from reward_lab.reward_models import layouts

    state = load_file(scorers.folder / "hps" / "hps_tiny.safetensors")
    renamed = layouts.open_clip_to_hf(state)
    assert set(layouts.hf_to_open_clip(renamed)) == set(state)
    config = json.loads((scorers.folder / "hps" / "config.json").read_text())
    save_file(renamed, tmp_path / "hf.safetensors", metadata={"config": json.dumps(config)})
    save_file({f"module.model.{key}": value for key, value in state.items()}, tmp_path / "wrapped.safetensors", metadata={"config": json.dumps(config)})
    picture = next(iter(scorers.pictures.values()))[None, None]
    prompt = scorers.hps["prompts"][:1]
    wanted = load().score(picture, prompt).per_video
    for name in ("hf", "wrapped"):
        assert torch.equal(load_reward_model("hpsv2", tmp_path / f"{name}.safetensors").score(picture, prompt).per_video, wanted)

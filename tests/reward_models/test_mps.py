"""MPS against the recorded outputs of the public code; all tolerances are those of the fixtures' README."""

from __future__ import annotations

import pytest
import torch

from reward_lab.reward_models import mps, preprocess
from reward_lab.reward_models.loader import load_reward_model

FILES = ("mps_tiny_whole.pth", "mps_tiny_state_dict.pth", "mps_tiny.safetensors", "mps_tiny_imscore.safetensors")
RAW, COSINE = 2e-4, 1e-5


@pytest.fixture(scope="module")
def load(scorers):
    """The tiny MPS with options; each file is read once."""
    folder, networks = scorers.folder / "mps", {}

    def get(file="mps_tiny_whole.pth", dtype=torch.float32, **options):
        if (file, dtype) not in networks:
            networks[file, dtype] = load_reward_model("mps", folder / file, config=folder / "config.json", dtype=dtype).network
        return mps.MPSReward(networks[file, dtype], **options)

    return get


def test_the_loader_hands_options_on(scorers):
    folder = scorers.folder / "mps"
    options = {"resize": "squash", "condition": "quality", "threshold": 0.3, "normalise": "batch", "scale": "cosine"}
    model = load_reward_model("mps", folder / "mps_tiny.safetensors", config=folder / "config.json", antialias=False, **options)
    assert (model.threshold, model.normalise, model.scale) == (0.3, "batch", "cosine")
    assert model.conditions == (("quality", mps.CONDITIONS["quality"], 1.0),)
    assert (model.prepare.resize, model.prepare.use_antialias) == ("squash", False)
    assert model.is_experimental


def table(model, pictures, prompts) -> torch.Tensor:
    """Rewards [pictures, prompts], one pair at a time as upstream; goes round `score` because of the empty prompt."""
    prepared = [model.prepare(picture[None])[None] for picture in pictures]
    return torch.stack([torch.stack([model.score_prepared(pixels, [prompt]).per_video[0] for prompt in prompts]) for pixels in prepared])


@pytest.mark.parametrize("file", FILES)
def test_raw_scores_from_every_file_form(scorers, load, file):
    got = table(load(file), scorers.pictures.values(), scorers.mps["prompts"])
    torch.testing.assert_close(got, torch.tensor(scorers.mps["raw_score"]["overall"]["0.01"]), rtol=0, atol=RAW)


@pytest.mark.parametrize(("condition", "threshold"), [("overall", 0.3), ("aesthetics", 0.01), ("aesthetics", 0.3)])
def test_raw_scores_of_conditions_and_thresholds(scorers, load, condition, threshold):
    model = load(condition=condition, threshold=threshold)
    got = table(model, scorers.pictures.values(), scorers.mps["prompts"])
    torch.testing.assert_close(got, torch.tensor(scorers.mps["raw_score"][condition][str(threshold)]), rtol=0, atol=RAW)


def test_conditions_are_the_recorded_texts(scorers):
    for name, text in scorers.mps["conditions"].items():
        assert mps.CONDITIONS[name] == text
        assert mps.tokenize([text])[0].tolist() == scorers.mps["condition_token_ids"][name]


def test_token_ids(scorers):
    assert mps.tokenize(scorers.mps["prompts"]).tolist() == scorers.mps["token_ids"]
    check = scorers.mps["tokenizer_check"]
    assert mps.tokenize(check["prompts"]).tolist() == check["token_ids"]


@pytest.mark.parametrize("condition", ["overall", "aesthetics"])
def test_masks(scorers, load, condition):
    expected, prompts = scorers.mps["mask"][condition], scorers.mps["prompts"]
    model = load(condition=condition)
    with torch.no_grad():
        states_BPD = model.network.text_states(mps.tokenize(prompts))
        condition_BPD = model.network.text_states(mps.tokenize([mps.CONDITIONS[condition]]))
    similarity_BP = mps.best_similarity(states_BPD, condition_BPD)
    torch.testing.assert_close(similarity_BP.amax(dim=1), torch.tensor(expected["similarity_max_per_prompt"]), rtol=0, atol=1e-4)
    own = similarity_BP / similarity_BP.amax(dim=1, keepdim=True)
    torch.testing.assert_close(own, torch.tensor(expected["ratio_own"]), rtol=0, atol=5e-5)
    torch.testing.assert_close(similarity_BP / similarity_BP.max(), torch.tensor(expected["ratio_batch"]), rtol=0, atol=5e-5)
    for normalise, name in (("sample", "own"), ("batch", "batch")):
        for threshold in (0.01, 0.3):
            kept = load(condition=condition, threshold=threshold, normalise=normalise).masks(prompts)
            assert kept.int().tolist() == expected[f"kept_{name}_{threshold}"]


def pairs(model, pictures, prompts) -> torch.Tensor:
    """Rewards [B] of picture i with prompt i in one call."""
    prepared = torch.stack([model.prepare(picture[None]) for picture in pictures])
    return model.score_prepared(prepared, prompts).per_video


@pytest.mark.parametrize("condition", ["overall", "aesthetics"])
@pytest.mark.parametrize("threshold", [0.01, 0.3])
def test_batches_under_both_normalisations(scorers, load, condition, threshold):
    expected, prompts = scorers.mps["batch"][condition][str(threshold)], scorers.mps["prompts"]
    pictures = list(scorers.pictures.values())
    for normalise, name, order in (
        ("batch", "batch_normalised", 1),
        ("sample", "own_normalised", 1),
        ("batch", "batch_normalised_second_set", -1),
    ):
        model = load(condition=condition, threshold=threshold, normalise=normalise)
        assert model.mixes_prompts is (normalise == "batch")
        got = pairs(model, pictures[::order], prompts)
        torch.testing.assert_close(got, torch.tensor(expected[name]), rtol=0, atol=RAW)


def test_pair_probability(scorers, load):
    expected = scorers.mps["pair_probability"]
    prompt = scorers.mps["prompts"][expected["prompt_index"]]
    rewards = torch.cat([load().score(scorers.pictures[file][None, None], [prompt]).per_video for file in expected["files"]])
    assert rewards.softmax(0).tolist() == pytest.approx(expected["probability"], abs=5e-5)


def test_stages(scorers, load):
    expected = scorers.mps["stages"]
    model, prompt = load(), scorers.mps["prompts"][expected["prompt_index"]]
    with torch.no_grad():
        image_BTD = model.network.image_tokens(model.prepare(scorers.pictures[expected["file"]][None]))
        ids_BP = mps.tokenize([prompt])
        text_BPD = model.network.text_states(ids_BP)
        output_BTD = model.network.cross_model(image_BTD, text_BPD, model.masks([prompt]))
    assert image_BTD.shape[1] == expected["image_token_count"]
    for got, name in (
        (image_BTD[0, :3], "projected_image_tokens_first3"),
        (text_BPD[0, :3], "projected_text_tokens_first3"),
        (text_BPD[0, mps.end_positions(ids_BP)[0]], "text_eos"),
        (output_BTD[0, 0], "cross_output_token0"),
    ):
        torch.testing.assert_close(got, torch.tensor(expected[name]), rtol=5e-5, atol=5e-5)


def test_preprocessing_is_pillow_exact(scorers):
    for expected in scorers.mps["preprocessing"]:
        height, width, left, top = preprocess.crop_size(expected["input_height"], expected["input_width"], 224)
        assert (height, width) == (expected["resized_height"], expected["resized_width"])
        assert (left, top) == (expected["crop_left"], expected["crop_top"])
        got = preprocess.prepare(scorers.pictures[expected["file"]][None], 224, resize="crop", is_pillow=True)[0]
        for channel, row, column, value in expected["points"]:
            assert got[channel, row, column].item() == pytest.approx(value, abs=2e-5)
        assert got.mean(dim=(1, 2)).tolist() == pytest.approx(expected["channel_mean"], abs=2e-5)


@pytest.mark.parametrize("index", range(4))
def test_gradient_with_respect_to_the_model_input(scorers, load, gradient_check, index):
    expected = scorers.mps["gradient_model_input"][index]
    model = load(condition=expected["condition"], threshold=expected["threshold"])
    pixels = model.prepare(scorers.pictures[expected["file"]][None])[0].requires_grad_()
    output = model.score_prepared(pixels[None, None], [scorers.mps["prompts"][expected["prompt_index"]]])
    output.per_video.sum().backward()
    assert output.per_video.item() == pytest.approx(expected["raw_score"], abs=RAW)
    gradient_check(pixels.grad, expected)


@pytest.mark.parametrize("condition", ["overall", "aesthetics"])
def test_videox_style_cosines(scorers, load, condition):
    expected = scorers.mps["videox_style"]
    model = load(resize="squash", condition=condition, threshold=expected["threshold"], scale="cosine")
    got = table(model, scorers.pictures.values(), scorers.mps["prompts"])
    torch.testing.assert_close(got, torch.tensor(expected["cosine"][condition]), rtol=0, atol=COSINE)


def test_videox_style_clips(scorers, load):
    expected = scorers.mps["videox_style"]["batch"]
    picture = scorers.pictures[expected["file"]]
    prompts = scorers.mps["prompts"]
    clips = torch.stack([picture, picture.flip(-1)])[None].expand(len(prompts), -1, -1, -1, -1)
    for normalise, name in (("batch", "batch"), ("sample", "own")):
        model = load(resize="squash", normalise=normalise, scale="cosine")
        prepared = model.prepare(clips.flatten(0, 1)).unflatten(0, clips.shape[:2])
        got = model.score_prepared(prepared, prompts).per_video
        torch.testing.assert_close(got, torch.tensor(expected[f"cosine_{name}_normalised"]), rtol=0, atol=COSINE)
        if normalise == "batch":
            assert got.mean().item() == pytest.approx(expected["mean_reward_batch_normalised"], abs=COSINE)
            assert (got - 1).abs().mean().item() == pytest.approx(expected["loss_with_target_1_batch_normalised"], abs=COSINE)


def test_videox_style_gradient(scorers, load, gradient_check):
    expected = scorers.mps["videox_style"]["gradient"]
    picture = scorers.pictures[expected["file"]].clone().requires_grad_()
    model = load(resize="squash", scale="cosine")
    output = model.score(picture[None, None], [scorers.mps["prompts"][expected["prompt_index"]]])
    output.per_video.sum().backward()
    assert output.per_video.item() == pytest.approx(expected["cosine"], abs=COSINE)
    gradient_check(picture.grad, expected)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 0.003), (torch.bfloat16, 0.03)])
def test_half_precision_towers(scorers, load, dtype, tolerance):
    prompts = scorers.mps["prompts"]
    got = table(load(dtype=dtype, scale="cosine"), scorers.pictures.values(), prompts)
    wanted = torch.tensor(scorers.mps["raw_score"]["overall"]["0.01"]) / scorers.mps["exp_logit_scale"]
    flips = (load(dtype=dtype).masks(prompts) != load().masks(prompts)).any(dim=1)
    # A prompt of which a mask flag flipped is another computation; the README allows that in bfloat16 only.
    assert dtype == torch.bfloat16 or not flips.any()
    assert (got - wanted)[:, ~flips].abs().max() < tolerance


def test_raw_score_by_the_official_example(scorers, load):
    """`image_text_score`, which training of a small MPS uses, is the same computation as the frozen scorer."""
    model, prompt = load(), scorers.mps["prompts"][0]
    pixels = model.prepare(next(iter(scorers.pictures.values()))[None])
    trained = model.network.image_text_score(pixels, mps.tokenize([prompt]), mps.tokenize([mps.CONDITIONS["overall"]]))
    assert trained.item() == pytest.approx(scorers.mps["raw_score"]["overall"]["0.01"][0][0], abs=RAW)


def test_export_gives_the_published_layout(scorers, load):
    from safetensors.torch import load_file

    published = load_file(scorers.folder / "mps" / "mps_tiny.safetensors")
    exported = mps.export_state_dict(load().network)
    assert set(exported) == set(published)
    for key, value in published.items():
        torch.testing.assert_close(exported[key].float(), value.float(), rtol=0, atol=0, msg=key)


@pytest.mark.parametrize("options", [{"threshold": 1.0}, {"normalise": "own"}, {"scale": "x100"}, {"condition": "  "}, {"resize": "stretch"}])
def test_impossible_options_are_refused(load, options):
    with pytest.raises(ValueError, match=str(next(iter(options)))):
        load(**options)


def test_weights_per_dimension_are_the_weighted_sum(tiny_mps, make_frames):
    frames, prompts = make_frames(2, 3), ["a red square", "a quantity of things"]
    singles = {}
    for name in ("aesthetics", "quality"):
        singles[name] = mps.MPSReward(tiny_mps.network, use_antialias=False, condition=name, threshold=0.3).score(frames, prompts)
    model = mps.MPSReward(tiny_mps.network, use_antialias=False, condition="aesthetics=0.3, quality=-0.7", threshold=0.3)
    output = model.score(frames, prompts)
    expected = 0.3 * singles["aesthetics"].per_video - 0.7 * singles["quality"].per_video
    torch.testing.assert_close(output.per_video, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(output.parts["mps_cosine_quality"], singles["quality"].parts["mps_cosine"])
    assert model.is_experimental and mps.parse_condition("a text, with = in it") == (("own", "a text, with = in it", 1.0),)
    for wrong in ("quality=much", "quality=0", "quality=inf"):
        with pytest.raises(ValueError, match="condition is 'quality="):
            mps.MPSReward(tiny_mps.network, condition=wrong)

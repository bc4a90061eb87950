"""Random tiny configs against independent code: open_clip's own model, transformers' CLIP, and what imscore answered.

open_clip and transformers are there wherever the pack runs (ComfyUI needs the latter). imscore is not: `oracles.json` holds what its HPSv2 and its MPS
cross model gave for the models of `oracle_cases.py`, recorded by `record_oracles.py`.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
from torch.nn import functional

from reward_lab.reward_models import clip, hpsv2, layouts, mps, pickscore, preprocess
from reward_lab.reward_models.weights import load_into
from reward_lab.tests.reward_models import oracle_cases as cases
from reward_lab.tests.reward_models.oracle_cases import CONFIGS, PROMPTS

RECORDED = json.loads(Path(__file__).with_name("oracles.json").read_text(encoding="utf-8"))


def assert_gradient(gradient: torch.Tensor, expected: dict) -> None:
    """Norm and recorded points, to a thousandth of the norm's share: both sides are float32 with sums in different order."""
    found = cases.digest(gradient)
    assert found["norm"] == pytest.approx(expected["norm"], rel=1e-3)
    assert found["points"] == pytest.approx(expected["points"], abs=1e-3 * expected["norm"] / gradient.numel() ** 0.5 + 1e-7, rel=1e-3)


def plain_clip(config: dict) -> CLIP:
    """open_clip's own model with the cases' weights."""
    model = CLIP(config["embed_dim"], CLIPVisionCfg(**config["vision_cfg"]), CLIPTextCfg(**config["text_cfg"])).eval()
    model.load_state_dict(cases.fill(model.state_dict(), 0.4), strict=False)
    return model


def own_hps(config: dict, oracle: CLIP, **options) -> hpsv2.HPSv2Reward:
    network = hpsv2.build(config)
    load_into(network, {key: value for key, value in oracle.state_dict().items() if key != "attn_mask"}, "oracle")
    return hpsv2.HPSv2Reward(network, **options)


@pytest.mark.parametrize("sizes", CONFIGS)
def test_hps_is_open_clips_cosine_with_gradient(sizes, make_frames):
    config = cases.open_clip_config(sizes)
    oracle = plain_clip(config)
    model = own_hps(config, oracle)
    frames = make_frames(2, 2, 33, 47).requires_grad_()
    found = model.score(frames, PROMPTS).per_frame
    pixels = preprocess.normalise(preprocess.letterbox(frames.flatten(0, 1), config["vision_cfg"]["image_size"]))
    picture, text = oracle.encode_image(pixels, normalize=True), oracle.encode_text(clip.tokenize(PROMPTS), normalize=True)
    expected = (picture.unflatten(0, (2, 2)) * text[:, None]).sum(-1)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    one, other = (torch.autograd.grad(value.sum(), frames, retain_graph=True)[0] for value in (found, expected))
    assert float((one - other).norm() / other.norm()) < 1e-4


@pytest.mark.parametrize("index", range(len(CONFIGS)))
def test_hps_is_what_imscore_recorded(index):
    expected, config = RECORDED["hps"][index], cases.imscore_config(CONFIGS[index])
    frames = cases.frames(2, 180, 301).requires_grad_()
    found = own_hps(config, plain_clip(config)).score(frames, PROMPTS).per_video
    assert found.tolist() == pytest.approx(expected["scores"], abs=1e-5)
    assert abs(expected["scores"][0] - expected["scores"][1]) > 1e-3, "else any mix-up of the two would pass"
    assert_gradient(torch.autograd.grad(found.sum(), frames)[0], expected["gradient"])


@pytest.mark.parametrize("index", range(len(CONFIGS)))
@pytest.mark.parametrize("threshold", cases.THRESHOLDS)
def test_mps_is_what_imscores_cross_model_on_transformers_clip_recorded(index, threshold):
    expected, config = RECORDED["mps"][index][str(threshold)], cases.mps_config(CONFIGS[index])
    with torch.device("meta"):
        network = mps.build(config)
    published = cases.fill(mps.export_state_dict(network), 0.35)
    network = mps.build(config)
    load_into(network, layouts.mps_to_own(published), "oracle")
    pixels = cases.prepared(CONFIGS[index]["vision"][0]).requires_grad_()
    ids, condition = mps.tokenize(PROMPTS), mps.tokenize([mps.CONDITIONS["overall"]])
    found = network.image_text_score(pixels, ids, condition, threshold=threshold)
    assert found.tolist() == pytest.approx(expected["scores"], rel=1e-4, abs=1e-4)
    assert_gradient(torch.autograd.grad(found.sum(), pixels)[0], expected["gradient"])


def test_the_recorded_thresholds_mask_something_but_not_all():
    """Else the comparison above would not see a threshold that is passed over."""
    assert all(case["0.01"]["masked"] < case["0.8"]["masked"] < len(PROMPTS) * clip.CONTEXT_LENGTH for case in RECORDED["mps"])


@pytest.mark.parametrize("sizes", CONFIGS)
def test_pickscore_is_transformers_clip(sizes, make_frames):
    config = cases.hugging_face_config(sizes)
    towers = transformers.CLIPModel(transformers.CLIPConfig(**config)).eval()
    towers.load_state_dict(cases.fill(dict(towers.named_parameters()), 0.4), strict=False)
    network = hpsv2.build(clip.from_hf_config(config))
    load_into(network, layouts.hf_to_open_clip(towers.state_dict()), "oracle")
    frames = make_frames(2, 1, 40, 30)
    found = pickscore.PickScoreReward(network).score(frames, PROMPTS).per_frame[:, 0]
    pixels = preprocess.normalise(preprocess.crop_as_pillow(frames[:, 0], sizes["vision"][0]))
    with torch.no_grad():
        picture = towers.visual_projection(towers.vision_model(pixel_values=pixels).pooler_output)
        text = towers.text_projection(towers.text_model(input_ids=clip.tokenize(PROMPTS, is_plain=True)).pooler_output)
        expected = towers.logit_scale.exp() * functional.cosine_similarity(picture, text)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)

"""A mix is the weighted, centred, scaled sum; chunks, gradients, the measured baseline and the spec keep to it."""

from __future__ import annotations

import math

import pytest
import torch

from reward_lab.reward_models import base, mix
from reward_lab.reward_models.measures import Measure
from reward_lab.reward_models.spec import RewardModelSpec

PROMPTS = ["a red square", "a green circle"]


@pytest.fixture
def mixed(tiny_hps, tiny_mps):
    """A mix of frame rewards and a video measure."""
    rows = ((tiny_hps, "hps", 1.0, 0.1, 0.05), (tiny_mps, "mps", -0.5, 2.0, 3.0), (Measure("flicker"), "flicker", 0.25, -4.0, 2.0))
    return mix.MixReward([mix.Component(model=model, name=name, weight=w, centre=c, scale=s) for model, name, w, c, s in rows])


def test_the_sum_and_its_parts(mixed, make_frames):
    frames = make_frames(2, 5)
    output = mixed.score(frames, PROMPTS)
    singles = {component.name: component.model.score(frames, PROMPTS) for component in mixed.components}
    expected = sum(c.weight * (singles[c.name].per_video - c.centre) / c.scale for c in mixed.components)
    torch.testing.assert_close(output.per_video, expected)
    assert {"hps", "hps.hps_letterbox", "mps", "mps.mps_raw", "mps.mps_cosine", "flicker", "flicker.flicker"} <= set(output.parts)
    torch.testing.assert_close(output.parts["mps"], singles["mps"].per_frame)
    assert mixed.needs_whole_video and "0.25 x (flicker - -4) / 2" in mixed.range_note


@pytest.mark.parametrize("frames_per_chunk", [1, 3, 100])
def test_chunks_and_gradient_are_exact(mixed, make_frames, frames_per_chunk):
    frames = make_frames(2, 5)
    whole = mixed.score(frames, PROMPTS)
    leaf = frames.clone().requires_grad_()
    (expected,) = torch.autograd.grad(mixed.score(leaf, PROMPTS).per_video.sum(), leaf)
    cut = base.score_in_chunks(mixed, frames, PROMPTS, frames_per_chunk)
    output, gradient = base.reward_and_frame_gradient(mixed, frames, PROMPTS, frames_per_chunk)
    for found in (cut, output):
        torch.testing.assert_close(found.per_video, whole.per_video.detach(), rtol=0, atol=1e-5)
        assert set(found.parts) == set(whole.parts)
    assert float((gradient - expected).norm() / expected.norm()) < 1e-5


def test_baseline_makes_the_base_videos_zero_and_one():
    rewards = [3.0, 5.0, 4.0, 8.0]
    measured = mix.measure_baseline(rewards)
    normalised = [(reward - measured.centre) / measured.scale for reward in rewards]
    assert sum(normalised) == pytest.approx(0) and math.sqrt(sum(x * x for x in normalised) / 3) == pytest.approx(1) and measured.videos == 4


@pytest.mark.parametrize(
    ("rewards", "message"), [([], "0 base videos"), ([1.0], "1 base videos"), ([2.0, 2.0], "same reward 2"), ([1.0, math.nan], "not finite")]
)
def test_baselines_that_cannot_be_measured(rewards, message):
    with pytest.raises(ValueError, match=message):
        mix.measure_baseline(rewards)


def test_what_makes_no_mix(tiny_hps):
    with pytest.raises(ValueError, match="at least one reward"):
        mix.MixReward([])
    with pytest.raises(ValueError, match="different names"):
        mix.MixReward([mix.Component(name="a", model=tiny_hps), mix.Component(name="a", model=tiny_hps)])
    for field, number in (("scale", 0.0), ("scale", -1.0), ("weight", math.nan), ("centre", math.inf)):
        with pytest.raises(ValueError, match=f"{field} of a"):
            mix.Component(name="a", model=tiny_hps, **{field: number})


def test_spec_of_a_mix_travels_as_json_and_names_its_files(scorers, tmp_path):
    import json

    folder = scorers.folder / "hps"
    hps = RewardModelSpec(kind="hpsv2", path=str(folder / "hps_tiny.pt"), options={"config": str(folder / "config.json")})
    rows = [
        {"name": "looks", "reward": hps.to_dict(), "weight": 2.0, "centre": 0.2, "scale": 0.1},
        {"name": "steady", "reward": {"kind": "drift", "path": "", "options": {}}, "weight": 1},
    ]
    spec = RewardModelSpec.from_dict(json.loads(json.dumps(RewardModelSpec(kind="mix", path="", options={"rows": rows}).to_dict())))
    assert spec.files() == [str(folder / "hps_tiny.pt")]
    model = spec.load()
    assert [component.name for component in model.components] == ["looks", "steady"] and model.components[1].model.name == "drift"
    frames = torch.rand(1, 3, 3, 20, 30)
    single = hps.load().score(frames, ["x"]).per_video
    drift = Measure("drift").score(frames, ["x"]).per_video
    torch.testing.assert_close(model.score(frames, ["x"]).per_video, 2 * (single - 0.2) / 0.1 + drift)


def test_the_stamp_of_a_model_changes_with_every_file_that_decides_its_numbers(tmp_path):
    faces, config, weights = tmp_path / "faces", tmp_path / "sizes.json", tmp_path / "w.pt"
    (faces / "one").mkdir(parents=True)
    for file in (config, weights, faces / "a.png", tmp_path / "r.onnx"):
        file.write_bytes(b"x")
    face = RewardModelSpec(kind="face", path=str(tmp_path / "r.onnx"), options={"reference": str(faces)})
    clip = RewardModelSpec(kind="hpsv2.1", path=str(weights), options={"config": str(config)})
    specs = (face, clip, RewardModelSpec(kind="mix", path="", options={"rows": [{"reward": face.to_dict()}, {"reward": clip.to_dict()}]}))
    before = [spec.stamp() for spec in specs]
    assert [spec.stamp() for spec in specs] == before
    for changed, file in ((0, faces / "a.png"), (0, faces / "one" / "b.png"), (1, config), (1, weights), (1, weights.with_suffix(".json"))):
        file.write_bytes(b"something else")
        after = [spec.stamp() for spec in specs]
        assert [one != other for one, other in zip(before, after, strict=True)] == [changed == 0, changed == 1, True], file
        before = after
    assert RewardModelSpec(kind="mps", path=str(weights), options={"config": '{"embed_dim": 8}'}).stamp() == clip.stamp()[:2]

"""The check for fooled rewards: what it changes, that it leaves the reward alone, and that it finds an attack on the pocket rewards."""

from __future__ import annotations

import pytest
import torch

from reward_lab.reward_models import base, mps, stability
from reward_lab.reward_models.loader import load_reward_model
from reward_lab.reward_models.spec import RewardModelSpec

PROMPTS = ["a red square", "a green circle"]


def test_changes_move_and_blur_and_keep_flat_frames():
    frames = torch.zeros(1, 2, 3, 32, 128)
    frames[..., 16, 60] = 1
    up, down, soft = stability.changed(frames)
    # A sixty-fourth of the longer side is two pixels.
    assert up[0, 0, :, 18, 62].tolist() == [1, 1, 1] and down[0, 1, :, 14, 58].tolist() == [1, 1, 1] and up.sum() == down.sum() == 6
    torch.testing.assert_close(soft.sum(), frames.sum())
    assert 0.05 < soft.max() < 0.5 and soft.argmax() == frames.argmax()
    flat = torch.full((1, 1, 3, 5, 7), 0.25)
    for changed in stability.changed(flat):
        torch.testing.assert_close(changed, flat)


def test_reward_and_gradient_are_the_models_own(tiny_hps, make_frames):
    frames = make_frames(2, 5)
    checked = stability.StabilityCheck(tiny_hps)
    plain, output = tiny_hps.score(frames, PROMPTS), checked.score(frames, PROMPTS)
    assert torch.equal(output.per_video, plain.per_video)
    expected = plain.per_frame - sum(tiny_hps.score(changed, PROMPTS).per_frame for changed in stability.changed(frames)) / 3
    torch.testing.assert_close(output.parts[stability.PART], expected)
    in_chunks = base.score_in_chunks(checked, frames, PROMPTS, 2)
    torch.testing.assert_close(in_chunks.parts[stability.PART], expected, rtol=0, atol=1e-6)
    gradients = [base.reward_and_frame_gradient(model, frames, PROMPTS, 2)[1] for model in (tiny_hps, checked)]
    assert torch.equal(*gradients)


def test_a_batch_of_prompts_reaches_the_model(tiny_mps, make_frames):
    frames = make_frames(2, 1)
    checked = stability.StabilityCheck(mps.MPSReward(tiny_mps.network, use_antialias=False, normalise="batch", threshold=0.3))
    together = checked.score(frames, PROMPTS)
    alone = checked.in_batch_of(PROMPTS).score(frames[:1], PROMPTS[:1])
    torch.testing.assert_close(alone.parts[stability.PART], together.parts[stability.PART][:1], rtol=1e-4, atol=1e-4)


def test_it_is_an_option_of_picture_rewards(scorers):
    folder = scorers.folder / "hps"
    spec = RewardModelSpec(kind="hpsv2.1", path=str(folder / "hps_tiny.pt"), options={"config": str(folder / "config.json"), "stability": True})
    model = spec.load()
    assert isinstance(model, stability.StabilityCheck) and model.name == "hpsv2.1" and model.network is model.model.network
    with pytest.raises(ValueError, match="stability cannot be set for flicker"):
        load_reward_model("flicker", stability=True)


@pytest.mark.host
@pytest.mark.parametrize("kind", ["hpsv2.1", "mps"])
def test_an_attack_on_a_pocket_reward_is_found(comfyui, pocket_models, kind):
    from reward_lab.benchmarks import stability as bench

    measured = bench.measure(bench.adversarial.WEIGHTS, kind, count=12, steps=20)
    assert measured["false_alarms"] <= 0.25, "3 of 12; the alarm is set on 12 others"
    assert measured["attack"]["fooled"] > 0.3, "else there is no attack to find"
    assert measured["attack"]["found_of_the_fooled"] > 0.8

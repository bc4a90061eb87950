"""Reward flow on the toys: measured centre and scale, and what it refuses. Its gradients: test_gradients.py."""

from __future__ import annotations

import pytest
import torch

from reward_lab.lora_train import checkpoint, objectives, run
from reward_lab.lora_train.draws import draw_batch, prompt_sampler
from reward_lab.lora_train.objectives.reward_flow import RewardFlow

CENTRE, SCALE = 0.2, 0.5


def _config(toy, **changes):
    flow = {"first_step": 4, "last_step": 5, "measure_videos": 0, "centre": CENTRE, "scale": SCALE}
    values = {"method": "reward_flow", "expert": "low", "objective": {"decode": "all", "kl_weight": 0.5, "reward_scale": 0.7}, "reward_flow": flow}
    for key, value in changes.items():
        values[key] = {**values[key], **value} if isinstance(value, dict) and key in values else value
    return toy.config(**values)


def test_centre_and_scale_are_those_of_base_videos_and_survive_a_resume(toy, tmp_path):
    config = _config(toy, reward_flow={"measure_videos": 12, "centre": 0.0, "scale": 1.0}, steps=4)
    measured = RewardFlow(config, toy.parts(config)).measure()
    rewards = []
    for number in range(1, 7):
        parts = toy.parts(config)
        draw = draw_batch(config, prompt_sampler(config), None, "low", number, 0)
        latent = parts.experts.roll(draw.start_BCFHW, config.sampling.sigmas(), parts.contexts.batch(draw.prompts))
        rewards += parts.reward.score(parts.decoder.decode(latent), draw.prompts).per_video.tolist()
    rewards = torch.tensor(rewards, dtype=torch.float64)
    assert measured["centre"] == pytest.approx(float(rewards.mean()), rel=1e-5)
    assert measured["scale"] == pytest.approx(float(rewards.std()), rel=1e-4)

    def trained(folder, *stops):
        for stop in stops:
            parts = toy.parts(config, stop_after=stop)
            toy.events.clear()
            run.train(config, parts, objectives.create(config, parts), folder, resume=folder.exists())
        return (folder / checkpoint.FOLDER / "step-000004.state.safetensors").read_bytes()

    assert trained(tmp_path / "whole", None) == trained(tmp_path / "halves", 1, None)


def test_rewards_all_alike_cannot_be_scaled(toy):
    config = _config(toy, reward_flow={"measure_videos": 4})
    parts = toy.parts(config)
    parts.decoder.decode = lambda latent, selection=None: torch.full((latent.shape[0], 5, 3, 4, 4), 0.5)
    config = toy.config(**{**config.to_dict(), "prompts": [{"text": "one"}]})
    with pytest.raises(ValueError, match="the same|for all 4 measured videos"):
        RewardFlow(config, toy.parts(config, decoder=parts.decoder)).measure()


def test_steps_must_be_the_trained_experts(toy):
    with pytest.raises(ValueError, match="reward_flow.first_step and last_step leave the low-noise expert none"):
        _config(toy, reward_flow={"first_step": 0, "last_step": 1})
    assert list(_config(toy, reward_flow={"first_step": -1, "last_step": -1}).gradient_steps("low")) == [3, 4, 5]

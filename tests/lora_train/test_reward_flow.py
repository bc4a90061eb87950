"""Reward flow on the toys: back-propagation through time against one unrolled graph and finite differences, measured centre and scale, clip."""

from __future__ import annotations

import math
from contextlib import ExitStack

import pytest
import torch

from reward_lab.lora_train import checkpoint, objectives, run
from reward_lab.lora_train.draws import draw_batch
from reward_lab.lora_train.lora.adapter import new_adapter
from reward_lab.lora_train.lora.linears import install
from reward_lab.lora_train.lora.targets import select_targets
from reward_lab.lora_train.objectives.reward_flow import RewardFlow
from reward_lab.lora_train.prompts import PromptSampler
from reward_lab.lora_train.trainee import new_trainee

CENTRE, SCALE = 0.2, 0.5


def _config(toy, **changes):
    flow = {"first_step": 4, "last_step": 5, "measure_videos": 0, "centre": CENTRE, "scale": SCALE}
    values = {"method": "reward_flow", "expert": "low", "objective": {"decode": "all", "kl_weight": 0.5, "reward_scale": 0.7}, "reward_flow": flow}
    for key, value in changes.items():
        values[key] = {**values[key], **value} if isinstance(value, dict) and key in values else value
    return toy.config(**values)


def _trainee(config, parts, stack):
    linears = parts.experts.backbones[config.expert].linears()
    adapter = new_adapter(linears, select_targets(linears, (), config.lora.skip), rank=3, alpha=1.5, seed=3, device=torch.device("cpu"))
    for index, layer in enumerate(adapter.layers.values()):
        layer.up_OR.data.normal_(0, 0.3, generator=torch.Generator().manual_seed(index))
        layer.down_RI.data, layer.up_OR.data = layer.down_RI.data.double(), layer.up_OR.data.double()
    return new_trainee(config.expert, adapter, stack.enter_context(install(linears, adapter)), config.optimiser)


def _unrolled_loss(config, parts, trainee, draw):
    """One graph through all steps with gradient; only the KL's reference is a constant."""
    context = parts.contexts.batch(draw.prompts)
    guidance = config.reward_flow.guidance or config.sampling.guidance
    latent, kl = draw.start_BCFHW, 0.0
    for index in range(draw.steps[-1] + 1):
        sigma, is_selected = draw.sigmas[index], index in draw.steps
        with torch.set_grad_enabled(is_selected):
            velocity = parts.experts.velocity(latent, sigma, context, guidance=guidance)
        if is_selected:
            with trainee.switch.disabled(), torch.no_grad():
                base = parts.experts.velocity(latent.detach(), sigma, context, guidance=guidance)
            kl = kl + (velocity - base).square().mean() / (2 * max(sigma, 0.1) ** 2) / len(draw.steps)
        target = 0.0 if index == draw.steps[-1] else draw.sigmas[index + 1]
        latent = latent + (target - sigma) * velocity
    rewards = parts.reward.score(parts.decoder.decode(latent), draw.prompts).per_video
    scaled = (rewards - CENTRE) / SCALE
    if config.reward_flow.reward_clip:
        scaled = torch.where(scaled <= config.reward_flow.reward_clip, scaled, scaled.detach())
    return -config.objective.reward_scale * scaled.mean() + config.objective.kl_weight * kl


@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"expert": "high", "reward_flow": {"first_step": 0, "last_step": 2}},
        {"reward_flow": {"guidance": 1.0, "reward_clip": 0.01}, "objective": {"kl_weight": 0.0}},
        {"objective": {"rollout_steps": 2}},
    ],
)
def test_gradient_equals_one_unrolled_graph(toy, changes, recompute):
    config = _config(toy, **changes)
    config = toy.config(**{**config.to_dict(), "reward_flow": {**config.to_dict()["reward_flow"], "recompute": recompute}})
    parts = toy.parts(config, torch.float64)
    draw = draw_batch(config, PromptSampler(config.prompts, 0), None, config.expert, 1, 0)
    with ExitStack() as stack:
        trainee = _trainee(config, parts, stack)
        outcome = RewardFlow(config, parts).add_gradient(trainee, 1, 0)
        found = [parameter.grad.clone() for parameter in trainee.adapter.parameters()]
        loss = _unrolled_loss(config, parts, trainee, draw)
        expected = torch.autograd.grad(loss, trainee.adapter.parameters())
    for ours, naive in zip(found, expected, strict=True):
        # Reward gradients pass through fp32 where the trainer asks the reward for them.
        assert (ours - naive).norm() <= 1e-6 * naive.norm()
    if not config.reward_flow.reward_clip:
        assert outcome.loss == pytest.approx(float(loss.detach()), rel=1e-6)


def test_gradient_equals_finite_differences(toy):
    """Without KL, whose reference is a constant, and with the steps before it run by the unmoved expert (the other one): a true derivative."""
    config = _config(toy, objective={"kl_weight": 0.0}, reward_flow={"first_step": 3})
    parts = toy.parts(config, torch.float64)
    draw = draw_batch(config, PromptSampler(config.prompts, 0), None, "low", 1, 0)
    assert draw.steps[0] == len([sigma for sigma in draw.sigmas if sigma >= 0.875])
    with ExitStack() as stack:
        trainee = _trainee(config, parts, stack)
        RewardFlow(config, parts).add_gradient(trainee, 1, 0)
        parameter = trainee.adapter.parameters()[1]
        origin, gradient = parameter.detach().clone(), parameter.grad.clone()
        direction = torch.randn(origin.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        values = []
        for sign in (1, -1):
            parameter.data.copy_(origin + sign * 1e-4 * direction)
            values.append(float(_unrolled_loss(config, parts, trainee, draw).detach()))
    assert math.isclose(values[0] - values[1], 2e-4 * float((gradient * direction).sum()), rel_tol=1e-5)


def test_centre_and_scale_are_those_of_base_videos_and_survive_a_resume(toy, tmp_path):
    config = _config(toy, reward_flow={"measure_videos": 12, "centre": 0.0, "scale": 1.0}, steps=4)
    measured = RewardFlow(config, toy.parts(config)).measure()
    rewards = []
    for number in range(1, 7):
        parts = toy.parts(config)
        draw = draw_batch(config, PromptSampler(config.prompts, 0), None, "low", number, 0)
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

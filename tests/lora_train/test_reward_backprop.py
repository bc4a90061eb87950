"""Gradients of the objective against a naive unrolled form and finite differences; stop, resume and failure of the loop."""

from __future__ import annotations

import math
from contextlib import ExitStack

import pytest
import torch

from reward_lab.lora_train import checkpoint, objectives, run
from reward_lab.lora_train.draws import draw_batch
from reward_lab.lora_train.flow import expert_of
from reward_lab.lora_train.lora.adapter import new_adapter
from reward_lab.lora_train.lora.linears import install
from reward_lab.lora_train.lora.targets import select_targets
from reward_lab.lora_train.objectives.reward_backprop import RewardBackprop
from reward_lab.lora_train.prompts import PromptSampler
from reward_lab.lora_train.run import NonFiniteError
from reward_lab.lora_train.selection import choose_frames
from reward_lab.lora_train.trainee import new_trainee

OBJECTIVES = [
    {"mode": "chain", "strategy": "tail", "grad_steps": 1},
    {"mode": "chain", "strategy": "tail", "grad_steps": 2, "truncate": False},
    {"mode": "chain", "strategy": "random", "grad_steps": 2, "truncate": True, "decode": "last", "decode_history": 0, "kl_weight": 0.5},
    {"mode": "chain", "strategy": "uniform", "grad_steps": 2, "truncate": False, "decode": "all", "kl_weight": 0.2, "reward_scale": 3.0},
    {"mode": "x0", "strategy": "random", "grad_steps": 2, "decode": "random", "kl_weight": 0.3},
    {"mode": "x0", "strategy": "last", "decode": "all", "score_frames": 2},
]


def train(config, parts, folder, **options):
    return run.train(config, parts, objectives.create(config, parts), folder, **options)


def _trainee(config, parts, expert, stack):
    linears = parts.experts.backbones[expert].linears()
    adapter = new_adapter(linears, select_targets(linears, (), config.lora.skip), rank=3, alpha=1.5, seed=3, device=torch.device("cpu"))
    for index, layer in enumerate(adapter.layers.values()):
        layer.up_OR.data.normal_(0, 0.3, generator=torch.Generator().manual_seed(index))
    return new_trainee(expert, adapter, stack.enter_context(install(linears, adapter)), config.optimiser)


def _naive_loss(config, parts, trainee, draw, sigmas):
    """The same loss as one expression: every step in one graph, no merging, no two phases; frozen steps detached."""
    context = parts.contexts.batch(draw.prompts)
    objective, guidance = config.objective, config.sampling.guidance
    latent, kl, rewards = draw.start_BCFHW, 0.0, []

    def velocity_of(x, sigma):
        backbone = parts.experts.backbones[expert_of(sigma, config.sampling.boundary)]
        given, without = backbone.velocity(x, sigma, context.prompt_BPD), backbone.velocity(x, sigma, context.negative_BPD)
        return without + guidance * (given - without)

    def reward_of(z):
        start = max(0, draw.latents.start - objective.decode_history) if objective.decode_history >= 0 else 0
        frames = parts.decoder.decode(z[:, :, start:], range(draw.latents.start - start, draw.latents.stop - start))
        frames = frames[:, list(choose_frames(frames.shape[1], objective.score_frames))]
        return parts.reward.score(frames, draw.prompts).per_video.mean()

    for index, sigma in enumerate(sigmas[:-1]):
        is_selected = index in draw.steps
        cut = is_selected and (objective.truncate or objective.mode == "x0")
        source = latent.detach() if cut or not is_selected else latent
        velocity = velocity_of(source, sigma)
        if is_selected:
            with trainee.switch.disabled():
                base = velocity_of(source, sigma).detach()
            kl = kl + (velocity - base).square().mean() / (2 * max(sigma, 0.1) ** 2) / len(draw.steps)
            if objective.mode == "x0":
                rewards.append(reward_of(source - sigma * velocity))
        else:
            velocity = velocity.detach()
        latent = latent + (sigmas[index + 1] - sigma) * velocity
    reward = sum(rewards) / len(rewards) if rewards else reward_of(latent)
    return -objective.reward_scale * reward + objective.kl_weight * kl


@pytest.mark.parametrize("expert", ["high", "low"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_gradient_equals_naive_unrolled_form_and_finite_differences(toy, expert, objective):
    config = toy.config(expert=expert, objective=objective)
    parts = toy.parts(config, torch.float64)
    draw = draw_batch(config, PromptSampler(config.prompts, 0), None, expert, 1, 0)
    sigmas = draw.sigmas
    with ExitStack() as stack:
        trainee = _trainee(config, parts, expert, stack)
        parameters = trainee.adapter.parameters()
        RewardBackprop(config, parts).add_gradient(trainee, 1, 0)
        found = [parameter.grad.clone() for parameter in parameters]

        expected = torch.autograd.grad(_naive_loss(config, parts, trainee, draw, sigmas), parameters)
        for ours, naive in zip(found, expected, strict=True):
            assert (ours - naive).norm() <= 2e-6 * naive.norm()

        if objective["mode"] == "x0" or objective.get("grad_steps", 1) == 1:
            _check_finite_differences(config, parts, trainee, draw, sigmas, found)


def _check_finite_differences(config, parts, trainee, draw, sigmas, found):
    """Only where no selected step feeds the input of another: there the straight-through loss is not the true one's derivative.

    Frozen steps see the moved latent in a true difference, so the difference is taken of one selected step with everything after it held fixed.
    """
    if config.objective.mode == "chain" and draw.steps[-1] != len(sigmas) - 2:
        return
    if config.objective.mode == "x0" and len(draw.steps) > 1:
        return
    if config.objective.kl_weight:
        return
    parameter, gradient = trainee.adapter.parameters()[1], found[1]
    before = parameter.detach().clone()
    direction = torch.randn(before.shape, generator=torch.Generator().manual_seed(1))
    values, points = [], []
    for sign in (1, -1):
        parameter.data.copy_(before + sign * 1e-3 * direction)
        points.append(parameter.detach().double().clone())
        with OnlyAt(trainee, parts, draw, sigmas, before, parameter):
            values.append(float(_naive_loss(config, parts, trainee, draw, sigmas).detach()))
    parameter.data.copy_(before)
    predicted = float((gradient.double() * (points[0] - points[1])).sum())
    assert math.isclose(values[0] - values[1], predicted, rel_tol=1e-4, abs_tol=1e-12)


class OnlyAt:
    """Within: earlier steps of the trained expert run with the unmoved parameter, as constants of the loss."""

    def __init__(self, trainee, parts, draw, sigmas, before, parameter):
        self.backbone = parts.experts.backbones[trainee.expert]
        self.sigma, self.before, self.parameter = sigmas[draw.steps[-1]], before, parameter

    def __enter__(self):
        self.plain = self.backbone.velocity

        def velocity(x, sigma, context):
            moved = self.parameter.detach().clone()
            if sigma != self.sigma:
                self.parameter.data.copy_(self.before)
            out = self.plain(x, sigma, context)
            self.parameter.data.copy_(moved)
            return out

        self.backbone.velocity = velocity

    def __exit__(self, *_):
        del self.backbone.velocity


@pytest.mark.parametrize("mode", ["chain", "x0"])
def test_reward_rises(toy, tmp_path, mode):
    objective = {"mode": mode, "strategy": "random", "decode": "all"}
    held_out = {"every": 40, "prompts": ["x", "a red square"], "seeds": 4}
    config = toy.config(objective=objective, expert="low", steps=40, optimiser={"lr": 3e-2}, held_out=held_out)
    train(config, toy.parts(config), tmp_path)
    last = [event for event in toy.events if event.name == "step"][-1]
    assert last.held_out > last.held_out_base + 0.5


@pytest.mark.parametrize("changes", [{"expert": "high"}, {"expert": "both", "optimiser": {"lr": 1e-2, "ema_decay": 0.9, "accumulate": 2, "warmup": 3}}])
def test_stopped_and_resumed_run_gives_the_same_bytes(toy, tmp_path, changes):
    config = toy.config(steps=6, **changes)
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    train(config, toy.parts(config), whole)
    full = [event for event in toy.events if event.name == "step"]
    toy.events.clear()
    stopped = train(config, toy.parts(config, stop_after=3), halves)
    assert stopped.reason == "stopped" and stopped.step == 3
    finished = train(config, toy.parts(config), halves, resume=True)
    assert finished.reason == "completed" and finished.step == 6

    def timeless(event):
        return {**vars(event), "seconds": 0}

    assert [timeless(event) for event in toy.events if event.name == "step"] == [timeless(event) for event in full]
    names = sorted(path.name for path in whole.iterdir() if path.is_file())
    assert len(names) == len(config.trained_experts)
    for name in [*names, "checkpoints/step-000006.state.safetensors"]:
        assert (whole / name).read_bytes() == (halves / name).read_bytes()


def test_stop_before_the_first_step_leaves_a_usable_lora(toy, tmp_path):
    config = toy.config()
    finished = train(config, toy.parts(config, stop_after=0), tmp_path)
    assert finished.reason == "stopped" and finished.step == 0
    assert (tmp_path / "toy-high-noise-toy.safetensors").is_file()
    assert len(checkpoint.states(tmp_path)) == 1


def test_nan_stops_with_step_sigma_and_last_rewards_and_keeps_the_checkpoint(toy, tmp_path):
    config = toy.config(steps=6)
    parts = toy.parts(config)
    plain, calls = parts.reward.score, []

    def score(frames, prompts):
        calls.append(1)
        output = plain(frames, prompts)
        if len(calls) == 4:
            output.per_frame = output.per_frame * float("nan")
            output.per_video = output.per_video * float("nan")
        return output

    parts.reward.score = score
    with pytest.raises(NonFiniteError, match=r"step 4 at sigma 0\.\d+ .*last three rewards: -?\d\S+, -?\d\S+, nan"):
        train(config, parts, tmp_path)
    assert [path.name for path in checkpoint.states(tmp_path)] == ["step-000002.state.safetensors"]


def test_other_settings_do_not_resume(toy, tmp_path):
    config = toy.config(steps=2)
    train(config, toy.parts(config), tmp_path)
    other = toy.config(steps=4, seed=1)
    with pytest.raises(ValueError, match="other settings"):
        train(other, toy.parts(other), tmp_path, resume=True)


def test_old_checkpoints_go(toy, tmp_path):
    config = toy.config(steps=5, checkpoint_every=1, keep_checkpoints=2)
    train(config, toy.parts(config), tmp_path)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        "step-000004.state.safetensors",
        "step-000005.state.safetensors",
        "toy-high-noise-toy-step000004.safetensors",
        "toy-high-noise-toy-step000005.safetensors",
    ]

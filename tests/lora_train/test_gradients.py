"""Every objective's gradient in float64, against the loss written as one naive graph (no merging, no phases, nothing run again) and its finite differences."""

from __future__ import annotations

import copy
import itertools
import math
import random
from contextlib import ExitStack
from dataclasses import replace

import pytest
import torch

from reward_lab.lora_train.draws import draw_batch, prompt_sampler
from reward_lab.lora_train.flow import expert_of
from reward_lab.lora_train.objectives import create
from reward_lab.lora_train.objectives.pavrm import PavrmObjective
from reward_lab.lora_train.pavrm_config import PavrmConfig
from reward_lab.lora_train.pavrm_data import Draws, Example, LatentVideo, Learnable, Sample
from reward_lab.lora_train.prompts import derived_seed
from reward_lab.lora_train.real import RealLatents, write_real
from reward_lab.lora_train.selection import choose_frames
from reward_lab.lora_train.solvers import SOLVERS, gradient_scale

from .gradients import assert_gradients, trainee_of
from .test_prfl import ToyLatentReward

PHOTO = "photo.png"
_FIRST = torch.randn(16, 1, 2, 4, generator=torch.Generator().manual_seed(8))


def _check(config, parts, loss_of):
    """Let the objective add its gradient, and compare it with `loss_of(trainee, draw, held)`."""
    expert = config.expert
    draw = draw_batch(config, prompt_sampler(config), parts.real, expert, 1, 0)
    with ExitStack() as stack:
        trainee = trainee_of(config, parts, expert, stack)
        create(config, parts).add_gradient(trainee, 1, 0)
        found = [parameter.grad.clone() for parameter in trainee.adapter.parameters()]
        assert_gradients(found, lambda held: loss_of(trainee, draw, held), trainee.adapter.parameters())
    return draw


def _velocity(config, parts, draw, guidance, told_of=lambda sigma: sigma):
    """Guided velocity, branch by branch; a start image is put in place, told noise level 0, and led to."""
    context = parts.contexts.batch(draw.prompts)
    is_known = torch.tensor([bool(image) for image in draw.images]).view(-1, 1, 1, 1, 1)

    def of(x, sigma):
        backbone = parts.experts.backbones[expert_of(sigma, config.sampling.boundary)]
        seen, known_BF = x, None
        if bool(is_known.any()):
            first = torch.where(is_known, _FIRST.to(x.dtype), x[:, :, :1])
            seen = torch.cat([first, x[:, :, 1:]], dim=2)
            known_BF = is_known.view(-1, 1) & (torch.arange(x.shape[2]) == 0)
        velocity = backbone.velocity(seen, told_of(sigma), context.prompt_BPD, known_BF)
        if guidance != 1:
            without = backbone.velocity(seen, told_of(sigma), context.negative_BPD, known_BF)
            velocity = without + guidance * (velocity - without)
        if known_BF is None:
            return velocity
        led = torch.where(is_known, (x[:, :, :1] - _FIRST) / sigma, velocity[:, :, :1])
        return torch.cat([led, velocity[:, :, 1:]], dim=2)

    return of


def _kl(config, trainee, velocity_of, source, velocity, sigma, held):
    with trainee.switch.disabled():
        base = held(velocity_of(source, sigma))
    return (velocity - base).square().mean() / (2 * max(sigma, 0.1) ** 2)


def _decoded_reward(config, parts, draw, latent):
    history = config.objective.decode_history
    start = max(0, draw.latents.start - history) if history >= 0 else 0
    frames = parts.decoder.decode(latent[:, :, start:], range(draw.latents.start - start, draw.latents.stop - start))
    return parts.reward.score(frames[:, list(choose_frames(frames.shape[1], config.objective.score_frames))], draw.prompts).per_video


# --- reward backpropagation ---


def backprop_loss(config, parts, trainee, draw, held):
    """Frozen steps are constants (straight-through), and so are cut inputs."""
    objective, latent, kl, rewards = config.objective, draw.start_BCFHW.double(), 0.0, []
    velocity_of = _velocity(config, parts, draw, config.sampling.guidance)
    for index, sigma in enumerate(draw.sigmas[:-1]):
        is_selected = index in draw.steps
        cut = not is_selected or objective.truncate or objective.mode == "x0"
        source = held(latent) if cut else latent
        velocity = velocity_of(source, sigma)
        if is_selected:
            kl = kl + _kl(config, trainee, velocity_of, source, velocity, sigma, held) / len(draw.steps)
            if objective.mode == "x0":
                rewards.append(_decoded_reward(config, parts, draw, source - sigma * velocity).mean())
        else:
            velocity = held(velocity)
        latent = latent + (draw.sigmas[index + 1] - sigma) * velocity
    reward = sum(rewards) / len(rewards) if rewards else _decoded_reward(config, parts, draw, latent).mean()
    return -objective.reward_scale * reward + objective.kl_weight * kl


FORMS = [{"mode": "chain", "truncate": True}, {"mode": "chain", "truncate": False}, {"mode": "x0"}]
STRATEGIES = [
    {"strategy": "last"},
    {"strategy": "tail", "grad_steps": 2, "decode": "last", "decode_history": 0, "kl_weight": 0.5},
    {"strategy": "uniform", "grad_steps": 2, "decode": "all", "kl_weight": 0.2, "reward_scale": 3.0},
    {"strategy": "random", "grad_steps": 2, "decode": "random", "score_frames": 2},
    {"strategy": "list", "decode": "all", "score_frames": 2},
]


@pytest.mark.parametrize("guidance", [1.0, 2.0])
@pytest.mark.parametrize("expert", ["high", "low"])
@pytest.mark.parametrize(("form", "strategy"), itertools.product(FORMS, STRATEGIES))
def test_reward_backpropagation(toy, form, strategy, expert, guidance):
    steps = {"step_list": [0, 2] if expert == "high" else [3, 5]} if strategy["strategy"] == "list" else {}
    config = toy.config(expert=expert, objective={**form, **strategy, **steps}, sampling={"guidance": guidance})
    parts = toy.parts(config, torch.float64)
    _check(config, parts, lambda trainee, draw, held: backprop_loss(config, parts, trainee, draw, held))


@pytest.mark.parametrize("form", FORMS)
def test_reward_backpropagation_with_start_images(toy, form):
    """Of a model that sees them in place of noise; one prompt in three has one."""
    prompts = [{"text": "a red square", "image": PHOTO}, {"text": "a blue circle moves"}, {"text": "x"}]
    config = toy.config(prompts=prompts, batch=3, objective={**form, "strategy": "tail", "grad_steps": 2, "decode": "all", "kl_weight": 0.3})
    parts = toy.parts(config, torch.float64, first_frames={PHOTO: _FIRST})
    _check(config, parts, lambda trainee, draw, held: backprop_loss(config, parts, trainee, draw, held))


def test_shortened_rollouts_and_real_starts(toy, tmp_path):
    for objective in ({"rollout_steps": 1}, {"start": "real"}):
        path = tmp_path / "real.safetensors"
        write_real(path, torch.randn(3, 16, 2, 2, 4, generator=torch.Generator().manual_seed(6)), ["one", "two", "three"])
        config = toy.config(expert="low", objective={"mode": "x0", "strategy": "list", "step_list": [4], **objective}, real={"path": str(path)})
        parts = toy.parts(config, torch.float64, more_prompts=["one", "two", "three"], real=RealLatents(path))
        draw = _check(config, parts, lambda trainee, draw, held: backprop_loss(config, parts, trainee, draw, held))  # noqa: B023 (called at once)
        assert len(draw.sigmas) < 7


# --- PRFL ---


def prfl_loss(config, parts, trainee, draw, held, real_sigma):
    """A trajectory of constants; every point's own step, reward and KL; and the flow-matching loss on real latents."""
    velocity_of = _velocity(config, parts, draw, config.prfl.guidance, config.prfl.told)
    solver, latent, loss, context = SOLVERS[config.prfl.solver](draw.sigmas), draw.start_BCFHW.double(), 0.0, parts.contexts.batch(draw.prompts)
    scales = [gradient_scale(config.prfl.solver, config.sampling.sigmas(), step) for step in config.gradient_steps(config.expert)]
    for index in range(draw.steps[-1] + 1):
        sigma, source = draw.sigmas[index], held(latent)
        velocity = velocity_of(source, sigma)
        if index in draw.steps:
            moved = copy.copy(solver).step(index, source, velocity)
            logit = parts.latent_reward.score(moved, config.prfl.told(draw.sigmas[index + 1]), context.prompt_BPD).logit_B
            value = torch.relu(config.prfl.hinge_limit - logit.sigmoid()) if config.prfl.loss == "hinge" else -logit
            factor = sum(scales) / len(scales) / gradient_scale(config.prfl.solver, draw.sigmas, index) if config.prfl.even_gradient else 1.0
            kl = _kl(config, trainee, velocity_of, source, velocity, sigma, held)
            loss = loss + (config.objective.reward_scale * factor * value.mean() + config.objective.kl_weight * kl) / len(draw.steps)
        latent = solver.step(index, source, held(velocity))
    return loss + config.prfl.real_weight * real_loss(config, parts, real_sigma) if config.prfl.real_weight else loss


def drawn_real_sigma(config):
    """The noise level of the real latents in update 1: uniform, shifted, drawn until it is the trained expert's."""
    draws = random.Random(derived_seed(config.seed, "real draw", 1, 0))
    while True:
        u, shift = draws.random(), config.sampling.shift
        sigma = shift * u / (1 + (shift - 1) * u)
        if (sigma >= config.sampling.boundary) == (config.expert == "high"):
            return sigma


def real_loss(config, parts, sigma):
    """mean((v - (noise - x0))^2)."""
    clean, prompts = parts.real.draw(derived_seed(config.seed, "real"), 0, config.batch)
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(derived_seed(config.seed, "real noise", 1, 0)))
    backbone = parts.experts.backbones[config.expert]
    told = math.floor(1000 * sigma) / 1000 if config.prfl.whole_timesteps else sigma
    velocity = backbone.velocity((1 - sigma) * clean + sigma * noise, told, parts.contexts.batch(prompts).prompt_BPD)
    return (velocity - (noise - clean)).square().mean()


PRFL = [
    {"prfl": {"solver": "euler", "loss": "logit"}, "expert": "high"},
    {"prfl": {"solver": "unipc", "loss": "hinge", "even_gradient": False}, "expert": "low", "objective": {"reward_scale": 0.1}},
    {"prfl": {"solver": "unipc", "loss": "logit", "points": 2, "guidance": 2.0}, "expert": "low"},
    {"prfl": {"solver": "unipc", "loss": "hinge", "points": 3}, "expert": "high", "objective": {"kl_weight": 0.2}},
    {"prfl": {"solver": "euler", "points": 2, "whole_timesteps": False}, "expert": "high", "objective": {"kl_weight": 0.4}},
    {"prfl": {"solver": "unipc"}, "expert": "low", "objective": {"rollout_steps": 2}},
    {"prfl": {"solver": "euler"}, "expert": "low", "objective": {"start": "real"}},
    {"prfl": {"solver": "unipc", "real_weight": 0.7}, "expert": "low"},
    {"prfl": {"solver": "euler", "real_weight": 2.0, "loss": "hinge", "guidance": 3.0}, "expert": "high"},
]


@pytest.mark.parametrize("changes", PRFL)
def test_prfl(toy, tmp_path, changes):
    path = tmp_path / "real.safetensors"
    names = [f"clip {index}" for index in range(5)]
    write_real(path, torch.randn(5, 16, 2, 2, 4, generator=torch.Generator().manual_seed(6)), names)
    config = toy.config(**{"method": "prfl", "reward": {"kind": "pavrm", "path": "x"}, "real": {"path": str(path)}, **changes})
    parts = toy.parts(config, torch.float64, more_prompts=names, latent_reward=ToyLatentReward(torch.float64), real=RealLatents(path))
    _check(config, parts, lambda trainee, draw, held: prfl_loss(config, parts, trainee, draw, held, drawn_real_sigma(config)))


# --- reward flow ---


def flow_loss(config, parts, trainee, draw, held):
    """One graph through all steps with gradient."""
    flow, latent, kl = config.reward_flow, draw.start_BCFHW.double(), 0.0
    velocity_of = _velocity(config, parts, draw, flow.guidance or config.sampling.guidance)
    for index in range(draw.steps[-1] + 1):
        sigma = draw.sigmas[index]
        source = latent if index > draw.steps[0] else held(latent)
        velocity = velocity_of(source, sigma)
        if index in draw.steps:
            kl = kl + _kl(config, trainee, velocity_of, source, velocity, sigma, held) / len(draw.steps)
        target = 0.0 if index == draw.steps[-1] else draw.sigmas[index + 1]
        latent = source + (target - sigma) * (velocity if index in draw.steps else held(velocity))
    scaled = (_decoded_reward(config, parts, draw, latent) - flow.centre) / flow.scale
    if flow.reward_clip:
        scaled = torch.where(scaled <= flow.reward_clip, scaled, held(scaled))
    return -config.objective.reward_scale * scaled.mean() + config.objective.kl_weight * kl


FLOW = [
    {},
    {"expert": "high", "reward_flow": {"first_step": 0, "last_step": 2}},
    {"reward_flow": {"guidance": 1.0, "reward_clip": 0.6}, "objective": {"kl_weight": 0.0}},
    {"reward_flow": {"first_step": 3, "fixed_noise": True}, "objective": {"decode": "random", "decode_history": 0}},
    {"objective": {"rollout_steps": 2}},
]


@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize("changes", FLOW)
def test_reward_flow(toy, changes, recompute):
    flow = {"first_step": 4, "last_step": 5, "measure_videos": 0, "centre": 0.2, "scale": 0.5, "recompute": recompute}
    objective = {"decode": "all", "kl_weight": 0.5, "reward_scale": 0.7}
    values = {"expert": "low", **changes, "objective": {**objective, **changes.get("objective", {})}, "reward_flow": {**flow, **changes.get("reward_flow", {})}}
    config = toy.config(method="reward_flow", **values)
    parts = toy.parts(config, torch.float64)
    _check(config, parts, lambda trainee, draw, held: flow_loss(config, parts, trainee, draw, held))


# --- PAVRM ---


class ToyScorer:
    """A small network of mean latent, noise level and mean text, in float64."""

    device = torch.device("cpu")

    def __init__(self):
        generator = torch.Generator().manual_seed(2)
        sizes = {"blocks": (7, 4 + 1 + 3), "head": (7,)}
        self.parameters = {
            name: torch.nn.Parameter(torch.randn(size, generator=generator, dtype=torch.float64) * 0.4) for name, size in sizes.items()
        }

    def logits(self, latent_BCFHW, timestep_B, videos, captions):
        text = torch.stack([video.texts_PD[caption].mean(0) for video, caption in zip(videos, captions, strict=True)])
        seen = torch.cat([latent_BCFHW.square().mean((2, 3, 4)), timestep_B[:, None] / 1000, text], dim=1).double()
        return torch.tanh(seen @ self.parameters["blocks"].t()) @ self.parameters["head"]

    def groups(self):
        return {name: {name: parameter} for name, parameter in self.parameters.items()}


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("loss", ["ce", "bt", "both"])
def test_pavrm(loss, accumulate):
    """-log p of the label, and -log sigmoid(winner - loser), video by video; the two of a pair share noise and noise level."""
    values = {"models": {"trunk": "x"}, "data": {"source": "x", "caption": "either"}, "sigma": {"kind": "uniform"}}
    config = PavrmConfig.from_dict({**values, "loss": loss, "batch": 3, "optimiser": {"accumulate": accumulate}})
    generator = torch.Generator().manual_seed(1)

    def sample(index):
        texts = {name: torch.randn(2 + index, 3, generator=generator) for name in ("short", "long")}
        # Two shapes, so that a batch falls into parts.
        video = LatentVideo(latent_CFHW=torch.randn(4, 2, 2, 2 + 2 * (index // 6), generator=generator), texts_PD=texts)
        return Sample(id=str(index), shape=tuple(video.latent_CFHW.shape), read=lambda: video)

    learnable = Learnable(train=tuple(Example(sample=sample(index), label=index % 2) for index in range(12)), held_out=())
    scorer, draws = ToyScorer(), Draws(learnable, config.data, config.seed)
    objective, parameters = PavrmObjective(config, scorer, draws), list(scorer.parameters.values())
    for micro in range(accumulate):
        objective.add_gradient(1, micro)
    found = [parameter.grad.clone() for parameter in parameters]

    def logit(entry):
        timestep = torch.tensor([int(entry.sigma * 1000)])
        return scorer.logits(entry.latent_CFHW[None], timestep, [entry.video], [entry.caption])[0]

    def loss_of(held):
        total = 0.0
        for position in range(3 * accumulate):
            if loss != "bt":
                (example,) = draws.examples(position, 1)
                chance = torch.sigmoid(logit(objective._noisy([example.sample], "ce", position)[0]))
                total = total - torch.log(chance if example.label else 1 - chance)
            if loss != "ce":
                (pair,) = draws.pairs(position, 1)
                winner, loser = objective._noisy([pair.winner, pair.loser], "bt", position)
                assert winner.sigma == loser.sigma
                total = total - torch.log(torch.sigmoid(logit(winner) - logit(loser)))
        return total / (3 * accumulate)

    assert_gradients(found, loss_of, parameters, naive=1e-6, differences=1e-6)


def test_the_comparison_would_notice(toy):
    """A naive loss with another guidance, or another KL, is not the objective's."""
    config = toy.config(expert="low", objective={"mode": "x0", "kl_weight": 0.5})
    parts = toy.parts(config, torch.float64)
    for other in (replace(config, sampling=replace(config.sampling, guidance=2.01)), replace(config, objective=replace(config.objective, kl_weight=0.51))):
        with pytest.raises(AssertionError):
            _check(config, parts, lambda trainee, draw, held: backprop_loss(other, parts, trainee, draw, held))  # noqa: B023 (called at once)

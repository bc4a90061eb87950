"""Process reward feedback learning: a PAVRM scores the noisy latent after one step of the rollout, and its gradient goes into that step.

One update, in order: draw prompts, noise and a step s; roll to s without gradient; one velocity with gradient; one solver step; the PAVRM's logit at the
next sigma; and, if asked for, a flow-matching loss on real latents, in the same update. Nothing is decoded, and a high-noise LoRA needs the high-noise
expert alone.

Source: Tencent-Hunyuan/HY-Video-PRFL@59ab9d7:scripts/prfl/train_prfl.py (Apache-2.0), paper arXiv 2511.21541. Differs in: the latent stays fp32; reward and
flow-matching gradients are clipped and applied together, once per update; the loss may be the logit, whose gradient does not die where the
PAVRM is sure; each step's gradient may be brought to one size; several points on a trajectory; one noise level per micro-batch in the
flow-matching loss.

Shapes: B batch, C F H W latent, P D text.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch

from ..config import TrainConfig
from ..draws import NULL_PROMPT, Draw, draw_batch, prompt_sampler
from ..flow import expert_of, shift_sigma
from ..prompts import derived_seed
from ..protocols import Objective, Outcome
from ..rollout import PromptContext
from ..run import Parts
from ..solvers import SOLVERS, Solver, gradient_scale
from ..trainee import Trainee
from .common import Velocity, backward, kl_to_base


@dataclass(frozen=True, kw_only=True)
class RewardStep:
    """The step with gradient: `next_BCFHW` carries a graph to the trained weights; `gradient_BCFHW` is d(loss)/d(next latent)."""

    velocity_BCFHW: torch.Tensor
    next_BCFHW: torch.Tensor
    logit_B: torch.Tensor
    probability_B: torch.Tensor
    loss: float
    gradient_BCFHW: torch.Tensor


class Prfl(Objective):
    """Objective `prfl`; see the module's docstring."""

    def __init__(self, config: TrainConfig, parts: Parts) -> None:
        self._config, self._parts = config, parts
        self._sampler = prompt_sampler(config)

    def add_gradient(self, trainee: Trainee, step: int, micro: int) -> Outcome:
        """Add one micro-batch's share of the update's gradient to the trainee's parameters."""
        config, parts = self._config, self._parts
        draw = draw_batch(config, self._sampler, parts.real, trainee.expert, step, micro)
        context = parts.contexts.batch(draw.prompts, draw.images)
        velocity_of = prfl_velocity(config, parts, context)
        solver, latent, at, outcomes = SOLVERS[config.prfl.solver](draw.sigmas), draw.start_BCFHW.to(parts.device), 0, []
        for index in draw.steps:
            latent, at = _rolled(solver, velocity_of, draw.sigmas, latent, at, index), index
            done = reward_step(config, parts, solver, velocity_of, draw.sigmas, index, latent, context)
            kl = kl_to_base(config, trainee, velocity_of, latent, done.velocity_BCFHW, draw.sigmas[index])
            factor = self._evened(trainee.expert, draw, index)
            backward(config, done.next_BCFHW, done.gradient_BCFHW * factor, kl, share=1 / len(draw.steps))
            outcomes.append((float(done.probability_B.mean()), done.loss, float(kl.detach()), draw.sigmas[index]))
            latent, at = done.next_BCFHW.detach(), index + 1
        reward, loss, kl, sigma = (sum(values) / len(outcomes) for values in zip(*outcomes, strict=True))
        real = self._add_real_gradient(trainee, step, micro) if config.prfl.real_weight > 0 else 0.0
        return Outcome(reward=reward, loss=loss + config.objective.kl_weight * kl + config.prfl.real_weight * real, kl=kl, sigma=sigma)

    def _evened(self, expert: str, draw: Draw, index: int) -> float:
        """Mean of |dx_next / dv| over the expert's steps, over that of this one."""
        config = self._config
        if not config.prfl.even_gradient:
            return 1.0
        sigmas = config.sampling.sigmas()
        scales = [gradient_scale(config.prfl.solver, sigmas, step) for step in config.gradient_steps(expert)]
        return sum(scales) / len(scales) / gradient_scale(config.prfl.solver, draw.sigmas, index)

    def _add_real_gradient(self, trainee: Trainee, step: int, micro: int) -> float:
        """Add the flow-matching loss on real latents: mean((v - (noise - x0))^2) at a sigma of the trained expert, without guidance; where prompts have
        start images, the clips' own first frames are known as well."""
        config, parts = self._config, self._parts
        draws = random.Random(derived_seed(config.seed, "real draw", step, micro))
        position = ((step - 1) * config.optimiser.accumulate + micro) * config.batch
        place = (derived_seed(config.seed, "real"), position, config.batch)
        clean, prompts = parts.real.draw(*place)
        condition = parts.real.conditions(*place) if parts.contexts.takes_conditions else None
        noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(derived_seed(config.seed, "real noise", step, micro)))
        sigma = _sigma_of_expert(config, trainee.expert, draws)
        clean, noise = clean.to(parts.device), noise.to(parts.device)
        texts = [NULL_PROMPT if draws.random() < config.prfl.null_rate else prompt for prompt in prompts]
        context = parts.contexts.of_clips(texts, clean, condition)
        velocity = parts.experts.velocity((1 - sigma) * clean + sigma * noise, sigma, context, guidance=1.0, told_sigma=config.prfl.told(sigma))
        loss = (velocity - (noise - clean)).square().mean()
        (loss * config.prfl.real_weight / config.optimiser.accumulate).backward()
        return float(loss.detach())


def _sigma_of_expert(config: TrainConfig, expert: str, draws: random.Random) -> float:
    while True:
        sigma = shift_sigma(draws.random(), config.sampling.shift)
        if expert_of(sigma, config.sampling.boundary) == expert:
            return sigma


def prfl_velocity(config: TrainConfig, parts: Parts, context: PromptContext) -> Velocity:
    """Velocity as a function of latent and sigma, with this method's guidance and timesteps."""
    return lambda latent, sigma: parts.experts.velocity(latent, sigma, context, guidance=config.prfl.guidance, told_sigma=config.prfl.told(sigma))


@torch.no_grad()
def _rolled(solver: Solver, velocity_of: Velocity, sigmas: list[float], latent: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    for index in range(start, stop):
        latent = solver.step(index, latent, velocity_of(latent, sigmas[index]))
    return latent


def reward_step(
    config: TrainConfig,
    parts: Parts,
    solver: Solver,
    velocity_of: Velocity,
    sigmas: list[float],
    index: int,
    latent_BCFHW: torch.Tensor,
    context: PromptContext,
) -> RewardStep:
    """The step with gradient and its reward.

    Args:
        solver: has made all steps before `index`.
        latent_BCFHW: at sigmas[index].
    """
    velocity = velocity_of(latent_BCFHW, sigmas[index])
    moved = solver.step(index, latent_BCFHW, velocity)
    leaf = moved.detach().requires_grad_()
    scores = parts.latent_reward.score(leaf, config.prfl.told(sigmas[index + 1]), context.prompt_BPD, context.condition_BCFHW)
    logit_B = scores.logit_B.float()
    loss_B = torch.relu(config.prfl.hinge_limit - logit_B.sigmoid()) if config.prfl.loss == "hinge" else -logit_B
    loss = config.objective.reward_scale * loss_B.mean()
    (gradient,) = torch.autograd.grad(loss, leaf)
    return RewardStep(
        velocity_BCFHW=velocity, next_BCFHW=moved, logit_B=logit_B.detach(), probability_B=logit_B.detach().sigmoid(),
        loss=float(loss.detach()), gradient_BCFHW=gradient,
    )  # fmt: skip

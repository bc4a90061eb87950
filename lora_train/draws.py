"""Everything random of one micro-batch, as a function of (seed, step, micro): prompts, where the trajectory starts, its sigmas, its gradient steps."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .config import TrainConfig
from .prompts import PromptSampler, derived_seed
from .real import RealLatents
from .selection import choose_latents, choose_steps

NULL_PROMPT = ""


@dataclass(frozen=True, kw_only=True)
class Draw:
    """One micro-batch.

    start_BCFHW: the latent at sigmas[0].
    sigmas: the trajectory's own, which leaves out of the schedule what is not rolled out.
    steps: indices into `sigmas` of the steps with gradient, rising.
    latents: latent frames to decode.
    """

    prompts: list[str]
    start_BCFHW: torch.Tensor
    sigmas: list[float]
    steps: list[int]
    latents: range


def draw_batch(config: TrainConfig, sampler: PromptSampler, real: RealLatents | None, expert: str, step: int, micro: int) -> Draw:
    """The micro-batch number `micro` of update `step` (from 1), for any method."""
    draws = random.Random(derived_seed(config.seed, "draw", step, micro))
    is_fixed = config.method == "reward_flow" and config.reward_flow.fixed_noise
    generator = torch.Generator().manual_seed(derived_seed(config.seed, "noise", *((0, 0) if is_fixed else (step, micro))))
    position = ((step - 1) * config.optimiser.accumulate + micro) * config.batch
    steps = _gradient_steps(config, expert, draws)
    sigmas = config.sampling.sigmas()
    if config.objective.start == "real":
        clean, prompts = real.draw(config.seed, position, config.batch)
        noise = torch.randn(clean.shape, generator=generator)
        sigma = sigmas[steps[0]]
        start = (1 - sigma) * clean + sigma * noise
        sigmas, steps = sigmas[steps[0] :], [index - steps[0] for index in steps]
    else:
        prompts = sampler.draw(position, config.batch)
        start = torch.randn(config.video.latent_shape(config.batch), generator=generator)
        sigmas, steps = shortened(sigmas, steps, config.objective.rollout_steps)
    if config.method == "prfl":
        prompts = [NULL_PROMPT if draws.random() < config.prfl.null_rate else prompt for prompt in prompts]
    latents = choose_latents(config.objective, start.shape[2], draws)
    return Draw(prompts=prompts, start_BCFHW=start, sigmas=sigmas, steps=steps, latents=latents)


def _gradient_steps(config: TrainConfig, expert: str, draws: random.Random) -> list[int]:
    eligible = config.gradient_steps(expert)
    if config.method == "prfl":
        return sorted(draws.sample(list(eligible), config.prfl.points))
    if config.method == "reward_flow":
        return list(eligible)
    return choose_steps(config.objective, eligible, draws)


def shortened(sigmas: Sequence[float], steps: Sequence[int], most: int) -> tuple[list[float], list[int]]:
    """Leave sigmas out before the first gradient step, so that at most `most` steps lead to it (0: all of them).

    Returns:
        The sigmas that are left, and the gradient steps' indices among them.
    """
    first = steps[0]
    if most == 0 or first <= most:
        return list(sigmas), list(steps)
    kept = [index * first // most for index in range(most)]
    return [*(sigmas[index] for index in kept), *sigmas[first:]], [index - first + most for index in steps]

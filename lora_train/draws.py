"""Everything random of one micro-batch, as a function of (seed, step, micro): prompts, where the trajectory starts, its sigmas, its gradient steps."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from .config import TrainConfig
from .prompts import PromptSampler, derived_seed
from .real import Clips
from .selection import choose_latents, choose_steps

NULL_PROMPT = ""
# Parts a prompt from its start image in what is drawn; no text has it.
_SEPARATOR = "\x1f"


@dataclass(frozen=True, kw_only=True)
class Draw:
    """One micro-batch.

    start_BCFHW: the latent at sigmas[0].
    sigmas: the trajectory's own, which leaves out of the schedule what is not rolled out.
    steps: indices into `sigmas` of the steps with gradient, rising.
    latents: latent frames to decode.
    images: paths of start images, one each, empty for none.
    captions: the prompts, also of videos whose own was taken away (`null_rate`).
    velocity_BCFHW: noise - x0 of a noised clip, which is what flow matching aims at; None where the start is noise.
    """

    prompts: list[str]
    start_BCFHW: torch.Tensor
    sigmas: list[float]
    steps: list[int]
    latents: range
    images: list[str] = field(default_factory=list)
    captions: list[str] = field(default_factory=list)
    velocity_BCFHW: torch.Tensor | None = None


def prompt_sampler(config: TrainConfig) -> PromptSampler:
    """Draws prompts together with their start images."""
    return PromptSampler([replace(prompt, text=f"{prompt.text}{_SEPARATOR}{prompt.image}") for prompt in config.prompts], config.seed)


def null_rate(config: TrainConfig) -> float:
    """Share of prompts that are replaced by the empty one."""
    return {"prfl": config.prfl.null_rate, "one_pass": config.one_pass.null_rate}.get(config.method, 0.0)


def parted(drawn: Sequence[str]) -> tuple[list[str], list[str]]:
    """Prompts and start images of what such a sampler drew."""
    prompts, images = zip(*(key.split(_SEPARATOR) for key in drawn), strict=True)
    return list(prompts), list(images)


def draw_batch(config: TrainConfig, sampler: PromptSampler, real: Clips | None, expert: str, step: int, micro: int) -> Draw:
    """The micro-batch number `micro` of update `step` (from 1), for any method.

    Args:
        sampler: of `prompt_sampler`.
    """
    draws = random.Random(derived_seed(config.seed, "draw", step, micro))
    is_fixed = config.method == "reward_flow" and config.reward_flow.fixed_noise
    generator = torch.Generator().manual_seed(derived_seed(config.seed, "noise", *((0, 0) if is_fixed else (step, micro))))
    position = ((step - 1) * config.optimiser.accumulate + micro) * config.batch
    steps = _gradient_steps(config, expert, draws)
    sigmas, velocity = config.sampling.sigmas(), None
    if config.starts_from_clips:
        clean, prompts = real.draw(config.seed, position, config.batch)
        images = [""] * len(prompts)
        noise = torch.randn(clean.shape, generator=generator)
        sigma = sigmas[steps[0]]
        start, velocity = (1 - sigma) * clean + sigma * noise, noise - clean
        sigmas, steps = sigmas[steps[0] :], [index - steps[0] for index in steps]
    else:
        prompts, images = parted(sampler.draw(position, config.batch))
        start = torch.randn(config.video.latent_shape(config.batch), generator=generator)
        sigmas, steps = shortened(sigmas, steps, config.objective.rollout_steps)
    captions = prompts
    if null_rate(config) > 0:
        prompts = [NULL_PROMPT if draws.random() < null_rate(config) else prompt for prompt in prompts]
    latents = choose_latents(config.objective, start.shape[2], draws)
    return Draw(
        prompts=prompts, start_BCFHW=start, sigmas=sigmas, steps=steps, latents=latents, images=images, captions=captions, velocity_BCFHW=velocity
    )  # fmt: skip


def _gradient_steps(config: TrainConfig, expert: str, draws: random.Random) -> list[int]:
    eligible = config.gradient_steps(expert)
    if config.method == "prfl":
        return sorted(draws.sample(list(eligible), config.prfl.points))
    if config.method == "reward_flow":
        return list(eligible)
    if config.method == "one_pass":
        return [draws.choice(eligible)]
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

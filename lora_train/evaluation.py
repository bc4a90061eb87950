"""Reward on held-out prompts and sample videos, always with the same seeds, so that steps can be compared.

Videos are sampled to the end with the LoRAs as they are; nothing here gives gradient.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ..reward_models.base import score_in_chunks
from . import events
from .config import TrainConfig
from .prompts import derived_seed
from .trainee import Trainee

if TYPE_CHECKING:
    from .run import Parts

FRAMES_PER_CHUNK = 64
_SHOWN = 4


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Mean reward over videos and its standard error."""

    mean: float
    standard_error: float


def evaluate(config: TrainConfig, parts: Parts, trainees: Mapping[str, Trainee]) -> Evaluation:
    """Score every held-out prompt with every held-out seed."""
    items = [(prompt, seed) for prompt in config.held_out.prompts for seed in range(config.held_out.seeds)]
    rewards: list[float] = []
    spent = parts.experts.count.total
    for prompts, frames_BFCHW in _videos(config, parts, trainees, items, config.held_out.latents):
        rewards += score_in_chunks(parts.reward, frames_BFCHW, prompts, FRAMES_PER_CHUNK).per_video.tolist()
    parts.experts.count.total = spent  # looking is not training
    mean = sum(rewards) / len(rewards)
    variance = sum((reward - mean) ** 2 for reward in rewards) / max(1, len(rewards) - 1)
    return Evaluation(mean=mean, standard_error=math.sqrt(variance / len(rewards)))


def show_samples(config: TrainConfig, parts: Parts, trainees: Mapping[str, Trainee], step: int) -> None:
    """Write videos of the sample prompts (else of the first held-out or training prompts) and report them."""
    if parts.writer is None:
        return
    prompts = sample_prompts(config)
    spent = parts.experts.count.total
    videos = [frames for _, frames in _videos(config, parts, trainees, [(prompt, 0) for prompt in prompts])]
    parts.experts.count.total = spent
    videos_BTHWC = torch.cat(videos).mul(255).round().to(torch.uint8).permute(0, 1, 3, 4, 2).cpu()
    files = parts.writer.write(videos_BTHWC, prompts, step)
    parts.sink(events.Sample(time=parts.clock(), step=step, files=files, prompts=prompts))


def sample_prompts(config: TrainConfig) -> list[str]:
    """The prompts that samples show."""
    return list(config.sample_prompts or config.held_out.prompts[:_SHOWN] or [prompt.text for prompt in config.prompts[:_SHOWN]])


def all_prompts(config: TrainConfig) -> list[str]:
    """Every text that the run will ever encode, the negative prompt apart, each once."""
    return list(dict.fromkeys([*(prompt.text for prompt in config.prompts), *config.held_out.prompts, *config.sample_prompts]))


@torch.no_grad()
def _videos(
    config: TrainConfig, parts: Parts, trainees: Mapping[str, Trainee], items: Sequence[tuple[str, int]], latents: int = 0
) -> Iterator[tuple[list[str], torch.Tensor]]:
    batch = config.held_out.batch or config.batch
    shape = config.video.latent_shape(1)
    with ExitStack() as merged:
        for trainee in trainees.values():
            merged.enter_context(trainee.switch.merged())
        for start in range(0, len(items), batch):
            part = items[start : start + batch]
            noise = [torch.randn(shape, generator=torch.Generator().manual_seed(derived_seed(config.seed, "held out", text, seed))) for text, seed in part]
            prompts = [text for text, _ in part]
            latent = parts.experts.roll(torch.cat(noise).to(parts.device), config.sampling.sigmas(), parts.contexts.batch(prompts))
            yield prompts, parts.decoder.decode(latent, range(min(latents or latent.shape[2], latent.shape[2])))

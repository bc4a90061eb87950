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
from .config import Prompt, TrainConfig
from .draws import NULL_PROMPT, null_rate
from .needs import looks_at_videos, scores_latents, shown_prompts
from .prompts import derived_seed
from .rollout import PromptContext
from .solvers import SOLVERS
from .trainee import Trainee

if TYPE_CHECKING:
    from .run import Parts

FRAMES_PER_CHUNK = 64
_SCORED = 4  # latents of a rollout that a PAVRM scores in a look


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Mean reward over videos and its standard error; mean dynamic degree and judge's reward where the config asks for them."""

    mean: float
    standard_error: float
    motion: float | None = None
    judge: float | None = None

    @property
    def curve(self) -> float:
        """What early stopping watches."""
        return self.mean if self.judge is None else self.judge


def evaluate(config: TrainConfig, parts: Parts, trainees: Mapping[str, Trainee]) -> Evaluation:
    """Score every held-out prompt with every held-out seed."""
    items = [(prompt, seed) for prompt in config.held_out.prompts for seed in range(config.held_out.seeds)]
    spent = parts.experts.count.total
    rewards = _latent_rewards(config, parts, trainees, items) if scores_latents(config) else []
    motion, judged = [], []
    if looks_at_videos(config):
        for prompts, latent in _finished(config, parts, trainees, items):
            frames_BFCHW = parts.decoder.decode(latent, range(min(config.held_out.latents or latent.shape[2], latent.shape[2])))
            for model, values in ((parts.reward, rewards), (parts.motion, motion), (parts.judge, judged)):
                values += score_in_chunks(model, frames_BFCHW, prompts, FRAMES_PER_CHUNK).per_video.tolist() if model is not None else []
    parts.experts.count.total = spent  # looking is not training
    mean = sum(rewards) / len(rewards)
    variance = sum((reward - mean) ** 2 for reward in rewards) / max(1, len(rewards) - 1)
    extra = {name: sum(values) / len(values) for name, values in (("motion", motion), ("judge", judged)) if values}
    return Evaluation(mean=mean, standard_error=math.sqrt(variance / len(rewards)), **extra)


@torch.no_grad()
def _latent_rewards(config: TrainConfig, parts: Parts, trainees: Mapping[str, Trainee], items: Sequence[tuple[Prompt, int]]) -> list[float]:
    """PAVRM probability of every item: the mean over a few latents along its rollout, of the steps that may be trained; PRFL's as it trains."""
    is_prfl = config.method == "prfl"
    solver_name, guidance, told = (config.prfl.solver, config.prfl.guidance, config.prfl.told) if is_prfl else ("euler", 1.0, float)
    eligible = sorted(index for expert in trainees for index in config.gradient_steps(expert))
    scored = {eligible[index * (len(eligible) - 1) // max(1, _SCORED - 1)] for index in range(_SCORED)}
    sigmas, rewards = config.sampling.sigmas(), []
    for prompts, latent, context in _starts(config, parts, trainees, items):
        total_B, solver = torch.zeros(len(prompts)), SOLVERS[solver_name](sigmas)
        for index in range(max(scored) + 1):
            velocity = parts.experts.velocity(latent, sigmas[index], context, guidance=guidance, told_sigma=told(sigmas[index]))
            latent = solver.step(index, latent, velocity)
            if index in scored:
                scores = parts.latent_reward.score(latent, told(sigmas[index + 1]), context.prompt_BPD, context.condition_BCFHW)
                total_B += scores.probability_B.cpu()
        rewards += (total_B / len(scored)).tolist()
    return rewards


def show_samples(config: TrainConfig, parts: Parts, trainees: Mapping[str, Trainee], step: int) -> None:
    """Write videos of the sample prompts (else of the first held-out or training prompts) and report them."""
    if parts.writer is None:
        return
    prompts = shown_prompts(config)
    spent = parts.experts.count.total
    videos = []
    for _, latent in _finished(config, parts, trainees, [(prompt, 0) for prompt in prompts]):
        # To bytes on the host as they come: a whole video in fp32 has no place on a small card.
        pieces = [piece.mul(255).round().to(torch.uint8).permute(0, 1, 3, 4, 2).cpu() for piece in parts.decoder.stream(latent)]
        videos.append(torch.cat(pieces, dim=1))
    parts.experts.count.total = spent
    texts = [prompt.text for prompt in prompts]
    files = parts.writer.write(torch.cat(videos), texts, step)
    parts.sink(events.Sample(time=parts.clock(), step=step, files=files, prompts=texts))


def all_prompts(config: TrainConfig) -> list[str]:
    """Every text that the run will ever encode, the negative prompt and those of real latents apart, each once."""
    null = [NULL_PROMPT] if null_rate(config) > 0 else []
    return list(dict.fromkeys([*(prompt.text for prompt in (*config.prompts, *config.held_out.prompts, *config.sample_prompts)), *null]))


@torch.no_grad()
def _finished(
    config: TrainConfig, parts: Parts, trainees: Mapping[str, Trainee], items: Sequence[tuple[Prompt, int]]
) -> Iterator[tuple[list[str], torch.Tensor]]:
    """Texts and sampled latents of every batch."""
    for prompts, start, context in _starts(config, parts, trainees, items):
        yield prompts, parts.experts.roll(start, config.sampling.sigmas(), context)


def _starts(
    config: TrainConfig, parts: Parts, trainees: Mapping[str, Trainee], items: Sequence[tuple[Prompt, int]]
) -> Iterator[tuple[list[str], torch.Tensor, PromptContext]]:
    """Texts, noise and context of every batch; LoRAs are merged meanwhile."""
    batch = config.held_out.batch or config.batch
    shape = config.video.latent_shape(1)
    with ExitStack() as merged:
        for trainee in trainees.values():
            merged.enter_context(trainee.switch.merged())
        for begin in range(0, len(items), batch):
            part = items[begin : begin + batch]
            seeds = [derived_seed(config.seed, "held out", prompt.text, seed) for prompt, seed in part]
            noise = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
            texts, images = [prompt.text for prompt, _ in part], [prompt.image for prompt, _ in part]
            yield texts, torch.cat(noise).to(parts.device), parts.contexts.batch(texts, images)

"""Clips for runs without real videos: the base model makes some once, and of several for a prompt the reward picks one.

They lie in the run folder in the form of real latents (`real.py`) and are drawn like these, by updates that roll nothing out. Their cost is part of the
run's count of forwards. Picking and then imitating is RAFT (arXiv 2304.06767).
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from safetensors import safe_open

from . import needs, recovery
from .config import TrainConfig
from .draws import parted, prompt_sampler
from .picking import latent_score, video_score, with_picked
from .prompts import derived_seed
from .real import RealLatents, write_real
from .run import Parts

FILE = "replayed.safetensors"


def with_clips(config: TrainConfig, parts: Parts, folder: Path) -> Parts:
    """The parts with the clips that the config asks for: picked real ones, or the base model's; made once, before any LoRA is installed.

    Args:
        parts: of a run that has not begun; backbones in training mode (host).
        folder: run folder, where the clips lie.
    """
    if not needs.replays(config):
        return with_picked(config, parts, folder)
    path = folder / FILE
    if not _is_of(path, config):
        clips, prompts = _make(config, parts)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        write_real(partial, torch.cat(clips), prompts, made_for=config.digest())
        # A run that is stopped meanwhile makes no update with the few there are, and makes them anew when it is resumed.
        path = partial.replace(path if len(clips) == config.real.replay else path.with_name(f"stopped-{FILE}"))
    return replace(parts, real=RealLatents(path), clip_forwards=_forwards(config))


def _is_of(path: Path, config: TrainConfig) -> bool:
    """Whether the clips there were made with these settings: a run that had no checkpoint yet may have been changed since."""
    if not path.exists():
        return False
    with safe_open(path, "pt") as file:
        return file.metadata().get("made_for") == config.digest()


def _forwards(config: TrainConfig) -> float:
    """What the clips cost, whether they were made now or before the run was resumed."""
    passes = 1 if config.sampling.guidance == 1.0 else 2
    return float(config.real.replay * config.real.tries * config.sampling.steps * passes)


@torch.no_grad()
def _make(config: TrainConfig, parts: Parts) -> tuple[list[torch.Tensor], list[str]]:
    sampler, clips, prompts = prompt_sampler(config), [], []
    for index in range(config.real.replay):
        (prompt,), (image,) = parted(sampler.draw(index, 1))
        clips.append(recovery.twice(lambda: _best(config, parts, index, prompt, image), parts, (), 0))  # noqa: B023
        prompts.append(prompt)
        if parts.stop_requested():
            break
    return clips, prompts


def _best(config: TrainConfig, parts: Parts, index: int, prompt: str, image: str) -> torch.Tensor:
    """Of the tries for one prompt the one that the reward likes best, on the host. They are made one after the other: the card holds one video at a time."""
    context, judge_noise, tries = parts.contexts.batch([prompt], [image]), torch.Generator().manual_seed(0), []
    for number in range(config.real.tries):
        noise = torch.randn(config.video.latent_shape(1), generator=torch.Generator().manual_seed(derived_seed(config.seed, "replay", index, number)))
        latent_BCFHW = parts.experts.roll(noise.to(parts.device), config.sampling.sigmas(), context)
        if config.real.tries == 1:
            return latent_BCFHW.cpu()
        has_videos = parts.reward is not None
        score = video_score(parts, latent_BCFHW, prompt) if has_videos else latent_score(parts, latent_BCFHW, context.prompt_BPD, judge_noise)
        tries.append((score, latent_BCFHW.cpu()))
    return max(tries, key=lambda made: made[0])[1]

"""Clips for runs without real videos: the base model makes some once, and of several for a prompt the run's rewards pick one.

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
from .picking import clip_scores, together, with_picked
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
    """A clip for each prompt, the try that scores best among those of its prompt; on the host, where all tries wait for the last one's score."""
    sampler, tries, prompts, scores = prompt_sampler(config), config.real.tries, [], []
    made: list[torch.Tensor] = []
    for index in range(config.real.replay):
        (prompt,), (image,) = parted(sampler.draw(index, 1))
        prompts.append(prompt)
        for number in range(tries):
            latent_1CFHW, found = recovery.twice(lambda: _try(config, parts, index, number, prompt, image), parts, (), 0)  # noqa: B023
            made.append(latent_1CFHW)
            scores.append(found)
        if parts.stop_requested():
            break
    if tries == 1:
        return made, prompts
    overall = together({name: [found[name] for found in scores] for name in scores[0]})
    best = overall.view(len(prompts), tries).argmax(1).tolist()
    return [made[index * tries + number] for index, number in enumerate(best)], prompts


def _try(config: TrainConfig, parts: Parts, index: int, number: int, prompt: str, image: str) -> tuple[torch.Tensor, dict[str, float]]:
    """One video [1, C, F, H, W] of a prompt, on the host, and, where there are others to choose from, what the run's rewards say of it."""
    noise = torch.randn(config.video.latent_shape(1), generator=torch.Generator().manual_seed(derived_seed(config.seed, "replay", index, number)))
    latent_1CFHW = parts.experts.roll(noise.to(parts.device), config.sampling.sigmas(), parts.contexts.batch([prompt], [image]))
    found = clip_scores(config, parts, latent_1CFHW, prompt, index) if config.real.tries > 1 else {}
    return latent_1CFHW.cpu(), found

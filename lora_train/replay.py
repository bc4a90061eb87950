"""Clips for runs without real videos: the base model makes some once, and of several for a prompt the run's rewards pick one.

They lie in the run folder in the form of real latents (`real.py`) and are drawn like these, by updates that roll nothing out. Their cost is part of the
run's count of forwards. Every try is kept on disk until all are made, so that a run that is stopped or killed meanwhile goes on where it was. Picking and
then imitating is RAFT (arXiv 2304.06767).
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from . import checkpoint, events, identity, needs, recovery, safetensors_file
from .config import TrainConfig
from .draws import parted, prompt_sampler
from .picking import clip_scores, together, with_picked
from .prompts import derived_seed
from .real import RealLatents, write_real
from .run import Parts

FILE = "replayed.safetensors"
TRIES = "replayed"
# What a clip depends on; other settings of a run may change without its clips being made anew.
_DEPENDS_ON = ("models", "method", "reward", "prompts", "video", "sampling", "real", "seed", "dtype")


def with_clips(config: TrainConfig, parts: Parts, folder: Path) -> Parts:
    """The parts with the clips that the config asks for: picked real ones, or the base model's; made once, before any LoRA is installed.

    Args:
        parts: of a run that has not begun; backbones in training mode (host).
        folder: run folder, where the clips lie.
    """
    if not needs.replays(config):
        return with_picked(config, parts, folder)
    path, made_for = folder / FILE, _made_for(config)
    # With updates made, settings were compared already; an older version named its clips otherwise.
    is_begun = checkpoint.latest_step(folder) > 0 and path.is_file()
    if not is_begun and not _is_of(path, made_for):
        scores = _made(config, parts, folder / TRIES, made_for)
        if scores is None:
            return parts  # stopped: no update will be made
        kept, prompts = _best(config, scores), [_prompt(config, index)[0] for index in range(config.real.replay)]
        write_real(path, torch.cat([_read(folder / TRIES, index, number) for index, number in enumerate(kept)]), prompts, made_for=made_for)
    shutil.rmtree(folder / TRIES, ignore_errors=True)
    return replace(parts, real=RealLatents(path), clip_forwards=_forwards(config))


def _made_for(config: TrainConfig) -> str:
    values = config.to_dict()
    kept = {**{name: values[name] for name in _DEPENDS_ON}, "pavrm": values["one_pass"]["pavrm"]}
    return identity.digest(identity.portable(kept))


def _is_of(path: Path, made_for: str) -> bool:
    """Whether the clips there are whole and were made with these settings."""
    try:
        with safe_open(path, "pt") as file:
            return file.metadata().get("made_for") == made_for
    except (OSError, SafetensorError):
        return False


def _forwards(config: TrainConfig) -> float:
    """What the clips cost, whether they were made now or before the run was resumed."""
    passes = 1 if config.sampling.guidance == 1.0 else 2
    return float(config.real.replay * config.real.tries * config.sampling.steps * passes)


def _prompt(config: TrainConfig, index: int) -> tuple[str, str]:
    """Prompt and start image of a clip."""
    (prompt,), (image,) = parted(prompt_sampler(config).draw(index, 1))
    return prompt, image


def _place(folder: Path, index: int, number: int) -> Path:
    return folder / f"{index:04d}-{number}.safetensors"


def _read(folder: Path, index: int, number: int) -> torch.Tensor:
    with safe_open(_place(folder, index, number), "pt") as file:
        return file.get_tensor("latent")


@torch.no_grad()
def _made(config: TrainConfig, parts: Parts, folder: Path, made_for: str) -> list[dict[str, float]] | None:
    """Make every try that is not there yet; scores of all, prompt by prompt. None if the run was stopped meanwhile."""
    folder.mkdir(parents=True, exist_ok=True)
    scores, total = [], config.real.replay * config.real.tries
    for index in range(config.real.replay):
        for number in range(config.real.tries):
            parts.pause()
            if parts.stop_requested():
                return None
            path = _place(folder, index, number)
            if not _is_of(path, made_for):
                latent_1CFHW, found = recovery.twice(lambda: _try(config, parts, index, number), parts, (), 0)  # noqa: B023
                safetensors_file.write(path, {"latent": latent_1CFHW}, {"made_for": made_for, "scores": json.dumps(found)})
            with safe_open(path, "pt") as file:
                scores.append(json.loads(file.metadata()["scores"]))
            parts.sink(events.Preparing(time=parts.clock(), what="making clips", done=len(scores), total=total))
    return scores


def _best(config: TrainConfig, scores: list[dict[str, float]]) -> list[int]:
    """The try that is kept, for every prompt."""
    if config.real.tries == 1:
        return [0] * config.real.replay
    overall = together({name: [found[name] for found in scores] for name in scores[0]})
    return overall.view(config.real.replay, config.real.tries).argmax(1).tolist()


def _try(config: TrainConfig, parts: Parts, index: int, number: int) -> tuple[torch.Tensor, dict[str, float]]:
    """One video [1, C, F, H, W] of a prompt, on the host, and, where there are others to choose from, what the run's rewards say of it.

    Raises:
        ValueError: the base model made NaN or infinity.
    """
    prompt, image = _prompt(config, index)
    noise = torch.randn(config.video.latent_shape(1), generator=torch.Generator().manual_seed(derived_seed(config.seed, "replay", index, number)))
    latent_1CFHW = parts.experts.roll(noise.to(parts.device), config.sampling.sigmas(), parts.contexts.batch([prompt], [image]))
    if not latent_1CFHW.isfinite().all():
        video = f"the base model's video number {number + 1} of the prompt {prompt[:60]!r}"
        raise ValueError(f"{video} holds NaN or infinity; use dtype bf16 or fp32, or other experts")
    found = clip_scores(config, parts, latent_1CFHW, prompt, index) if config.real.tries > 1 else {}
    return latent_1CFHW.cpu(), found

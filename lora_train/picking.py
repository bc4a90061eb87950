"""Picks of real clips those that the run's own rewards like best: a caption that lies, or a bad clip, teaches nothing good.

Each clip is scored with its caption: whole video, by the reward; finished latent, noised, by the PAVRM; where a run has both, each is brought to mean 0 and
deviation 1 and the lesser of the two counts, for a clip has to please both. The share `real.keep` is learned from. Scores lie in the run folder, so that a run
that is resumed goes on with the same clips. Filtering by a reward and then imitating is reward-ranked fine-tuning (RAFT, arXiv 2304.06767).
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from ..reward_models.base import score_in_chunks
from . import events, recovery
from .config import TrainConfig
from .prompts import derived_seed
from .real import Chosen
from .run import Parts

FILE = "picked.json"
_FRAMES_PER_CHUNK = 64
# A PAVRM judges a finished video at this noise level, which it knows best.
_JUDGED_AT = 0.5
logger = logging.getLogger("reward_lab")


def with_picked(config: TrainConfig, parts: Parts, folder: Path) -> Parts:
    """The parts with the chosen share of their clips, scored once, before any LoRA is installed.

    Args:
        parts: of a run that has not begun; backbones in training mode (host).
        folder: run folder, where the scores lie.
    """
    if config.real.keep == 1 or parts.real is None:
        return parts
    path = folder / FILE
    rows = _read(path, config, parts)
    if rows is None:
        rows = _scored(config, parts)
        if rows is None:
            return parts  # stopped: no update will be made
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps({"made_for": config.digest(), "clips": rows}, indent=1), encoding="utf-8")
        partial.replace(path)
        logger.info("learning from %d of %d clips, those that the rewards like best; scores of all: %s", sum(row["kept"] for row in rows), len(rows), path)
    return replace(parts, real=Chosen(parts.real, [row["clip"] for row in rows if row["kept"]]))


def _read(path: Path, config: TrainConfig, parts: Parts) -> list[dict] | None:
    """The rows of an earlier start of the run; None if there are none, or they are of other settings or clips."""
    if not path.exists():
        return None
    found = json.loads(path.read_text(encoding="utf-8"))
    is_same = found["made_for"] == config.digest() and [row["caption"] for row in found["clips"]] == parts.real.prompts
    return found["clips"] if is_same else None


def _scored(config: TrainConfig, parts: Parts) -> list[dict] | None:
    """A row for each clip, in their order: its caption, its scores by name, whether it is kept. None if the run was stopped meanwhile."""
    scores: dict[str, list[float]] = {}
    for number, prompt in enumerate(parts.real.prompts):
        if parts.stop_requested():
            return None
        latent_BCFHW = parts.real.clip(number)[None].to(parts.device)
        found = recovery.twice(lambda: clip_scores(config, parts, latent_BCFHW, prompt, number), parts, (), 0)  # noqa: B023
        for name, score in found.items():
            scores.setdefault(name, []).append(score)
        parts.sink(events.Preparing(time=parts.clock(), what="scoring clips", done=number + 1, total=len(parts.real.prompts)))
    order = together(scores).argsort(descending=True, stable=True).tolist()
    kept = set(order[: max(1, round(config.real.keep * len(order)))])
    return [
        {"clip": number, "caption": prompt, "scores": {name: values[number] for name, values in scores.items()}, "kept": number in kept}
        for number, prompt in enumerate(parts.real.prompts)
    ]


def together(scores: Mapping[str, Sequence[float]]) -> torch.Tensor:
    """One score for each of N clips [N], of N by each reward: these are brought to mean 0 and deviation 1, and the least of a clip's counts."""
    return torch.stack([_standardised(torch.tensor(values, dtype=torch.float64)) for values in scores.values()]).amin(0)


@torch.no_grad()
def clip_scores(config: TrainConfig, parts: Parts, latent_1CFHW: torch.Tensor, prompt: str, number: int) -> dict[str, float]:
    """What the run's rewards say of a finished latent, by name; `number` seeds the noise that a PAVRM sees it under."""
    found = {}
    if parts.reward is not None:
        found[config.reward.kind] = _video_score(parts, latent_1CFHW, prompt)
    if parts.latent_reward is not None:
        noise = torch.Generator().manual_seed(derived_seed(config.seed, "judged", number))
        found["pavrm"] = _latent_score(parts, latent_1CFHW, parts.contexts.batch([prompt]).prompt_BPD, noise)
    return found


def _video_score(parts: Parts, latent_1CFHW: torch.Tensor, prompt: str) -> float:
    """The reward of a finished latent's whole video."""
    return score_in_chunks(parts.reward, parts.decoder.decode(latent_1CFHW), [prompt], _FRAMES_PER_CHUNK).per_video.item()


def _latent_score(parts: Parts, latent_1CFHW: torch.Tensor, context_BPD: torch.Tensor, generator: torch.Generator) -> float:
    """The PAVRM's logit of a finished latent under noise."""
    noise = torch.randn(latent_1CFHW.shape, generator=generator).to(latent_1CFHW)
    return parts.latent_reward.score((1 - _JUDGED_AT) * latent_1CFHW + _JUDGED_AT * noise, _JUDGED_AT, context_BPD).logit_B.item()


def _standardised(values: torch.Tensor) -> torch.Tensor:
    return (values - values.mean()) / values.std(correction=0).clamp_min(1e-12)

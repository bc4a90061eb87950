"""Picks of real clips those that the run's own rewards like best: a caption that lies, or a bad clip, teaches nothing good.

Each clip is scored with its caption: whole video, by the reward; finished latent, noised, by the PAVRM; where a run has both, each is brought to mean 0 and
deviation 1 and the lesser of the two counts, for a clip has to please both. The share `real.keep` is learned from. Scores lie in the run folder, so that a run
that is resumed goes on with the same clips: new ones are not looked at, and without those that it has learned from it does not go on. Filtering by a reward and
then imitating is reward-ranked fine-tuning (RAFT, arXiv 2304.06767).
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from ..reward_models.base import score_in_chunks
from . import checkpoint, events, identity, learned_from, recovery
from .config import TrainConfig
from .prompts import derived_seed
from .real import Chosen, Clips
from .run import Parts

FILE = "picked.json"
_FRAMES_PER_CHUNK = 64
# A PAVRM judges a finished video at this noise level, which it knows best.
_JUDGED_AT = 0.5
logger = logging.getLogger("reward_lab")


def with_picked(config: TrainConfig, parts: Parts, folder: Path) -> Parts:
    """The parts with the chosen share of their clips, scored once, before any LoRA is installed; all of them where `real.keep` is 1.

    Args:
        parts: of a run that has not begun; backbones in training mode (host).
        folder: run folder, where the scores lie.

    Raises:
        ValueError: see `known_rows`.
    """
    if parts.real is None:
        return parts
    if config.real.keep < 1:
        rows = known_rows(config, parts.real, folder) or _new_rows(config, parts, folder)
        if rows is None:
            return parts  # stopped: no update will be made
        parts = replace(parts, real=Chosen(parts.real, [row["clip"] for row in rows if row["kept"]]))
    clips = parts.real
    facts = {name: {"caption": caption, "latent": list(clips.shape)} for name, caption in zip(clips.names, clips.prompts, strict=True)}
    changed = learned_from.changes(folder, facts)
    if changed:
        logger.warning("%s", changed)
    return replace(parts, data_changed=changed)


def _new_rows(config: TrainConfig, parts: Parts, folder: Path) -> list[dict] | None:
    """The rows of all clips, scored now and written down; None if the run was stopped meanwhile."""
    rows = _scored(config, parts)
    if rows is not None:
        path = folder / FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps({"made_for": config.digest(), "clips": rows}, indent=1), encoding="utf-8")
        partial.replace(path)
        logger.info("learning from %d of %d clips, those that the rewards like best; scores of all: %s", sum(row["kept"] for row in rows), len(rows), path)
    return rows


def known_rows(config: TrainConfig, clips: Clips, folder: Path) -> list[dict] | None:
    """The rows of an earlier start of the run, `clip` being a number among `clips`; None if all are to be scored.

    Raises:
        ValueError: the run has made updates, and clips that it learns from are no longer there.
    """
    path = folder / FILE
    if not path.exists() or config.real.keep == 1:
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        remedy = "start a new run" if checkpoint.latest_step(folder) else "delete it, and clips are picked anew"
        raise ValueError(f"{path}, which says what clips the run picked, cannot be read ({error}); {remedy}") from error
    # Older versions wrote no names: the clips stood in the dataset's order.
    rows = [{"name": clips.names[row["clip"]] if row["clip"] < len(clips.names) else "", **row} for row in found["clips"]]
    names, captions = [row["name"] for row in rows], [row["caption"] for row in rows]
    if identity.is_of(found["made_for"], config.deciding()) and names == clips.names and captions == clips.prompts:
        return rows
    if checkpoint.latest_step(folder) == 0:
        return None
    numbers = {(name, caption): number for number, (name, caption) in enumerate(zip(clips.names, clips.prompts, strict=True))}
    kept = [row for row in rows if row["kept"]]
    gone = [row for row in kept if (row["name"], row["caption"]) not in numbers]
    if gone:
        told = learned_from.shown(f"{row['name']} ({row['caption'][:40]!r})" for row in gone)
        raise ValueError(
            f"the run learns from {len(kept)} clips that it picked at its beginning ({path}), but {len(gone)} of them are no longer in {config.real.path}, or "
            "have captions that are held out now: "
            f"{told}; put them back, or start a new run, which picks anew"
        )
    logger.info("going on with the %d clips that the run picked at its beginning; clips that are new since then are not looked at", len(kept))
    return [{**row, "clip": numbers[row["name"], row["caption"]]} for row in kept]


def _scored(config: TrainConfig, parts: Parts) -> list[dict] | None:
    """A row for each clip, in their order: its caption, its scores by name, whether it is kept. None if the run was stopped meanwhile."""
    scores: dict[str, list[float]] = {}
    for number, prompt in enumerate(parts.real.prompts):
        parts.pause()
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
        {"clip": number, "name": name, "caption": prompt, "scores": {kind: values[number] for kind, values in scores.items()}, "kept": number in kept}
        for number, (name, prompt) in enumerate(zip(parts.real.names, parts.real.prompts, strict=True))
    ]


def together(scores: Mapping[str, Sequence[float]]) -> torch.Tensor:
    """One score for each of N clips [N], of N by each reward: these are brought to mean 0 and deviation 1, and the least of a clip's counts."""
    return torch.stack([_standardised(torch.tensor(values, dtype=torch.float64)) for values in scores.values()]).amin(0)


@torch.no_grad()
def clip_scores(config: TrainConfig, parts: Parts, latent_1CFHW: torch.Tensor, prompt: str, number: int) -> dict[str, float]:
    """What the run's rewards say of a finished latent, by name; `number` seeds the noise that a PAVRM sees it under.

    Raises:
        ValueError: a score is not finite.
    """
    found = {}
    if parts.reward is not None:
        found[config.reward.kind] = _video_score(parts, latent_1CFHW, prompt)
    if parts.latent_reward is not None:
        noise = torch.Generator().manual_seed(derived_seed(config.seed, "judged", number))
        found["pavrm"] = _latent_score(parts, latent_1CFHW, parts.contexts.batch([prompt]).prompt_BPD, noise)
    strange = [name for name, score in found.items() if not math.isfinite(score)]
    if strange:
        what = f"{strange[0]} gives the clip {prompt[:60]!r} a score of {found[strange[0]]}"
        raise ValueError(f"{what}, by which none can be picked; use dtype fp32, or take the clip out")
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

"""Ends a run before its reward is pleased at the videos' cost: KL budget, motion floor, and a held-out curve that no longer rises.

A look is an evaluation on held-out prompts. Its curve is that of the judge (a reward that training never sees) where one is given, else that of the reward
itself. The best look with enough motion is remembered, and a run that a guard ends gives the LoRA of that look; where none was better than the base model,
one that changes nothing. Before the first look there is none to go back to: the LoRA is the present one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from .config import TrainConfig
from .evaluation import Evaluation


@dataclass(frozen=True, kw_only=True)
class Watch:
    """What guards remember between updates; checkpoints keep it.

    looks: how many there were since the base's; best, best_step: curve of the best one and its update (0: the base); stale: looks since then.
    """

    recent_kl: tuple[float, ...] = ()
    motion_base: float | None = None
    looks: int = 0
    best: float | None = None
    best_step: int = 0
    stale: int = 0


@dataclass(frozen=True, kw_only=True)
class Stop:
    """Why a run ends; `reason` is a word for programs, `detail` a sentence for people."""

    reason: str
    detail: str


def after_update(config: TrainConfig, watch: Watch, kl: float) -> tuple[Watch, Stop | None]:
    """Note an update's KL to the base."""
    limit = config.guards.kl_budget
    if limit == 0:
        return watch, None
    window = config.guards.kl_window
    recent = (*watch.recent_kl, kl)[-window:]
    watch = replace(watch, recent_kl=recent)
    mean = sum(recent) / len(recent)
    if len(recent) < window or mean <= limit:
        return watch, None
    return watch, Stop(reason="kl_budget", detail=f"the KL to the base is {mean:.4g} over the last {window} updates, above guards.kl_budget {limit:g}")


def first_look(watch: Watch, look: Evaluation) -> Watch:
    """Note the base model's videos.

    Raises:
        ValueError: they do not move, so that a motion floor means nothing.
    """
    if look.motion == 0:
        raise ValueError("the base model's held-out videos do not move, so guards.motion_floor could never act; set it to 0, or take other held_out.prompts")
    return replace(watch, motion_base=look.motion, looks=0, best=look.curve, best_step=0, stale=0)


def after_look(config: TrainConfig, watch: Watch, look: Evaluation, step: int) -> tuple[Watch, Stop | None, bool]:
    """Note a look after update `step`.

    Returns:
        What to remember, why the run ends (None: it goes on), and whether this is the best look so far.
    """
    guards, watch = config.guards, replace(watch, looks=watch.looks + 1)
    if guards.motion_floor > 0 and look.motion is not None and look.motion < guards.motion_floor * watch.motion_base:
        numbers = f"a dynamic degree of {look.motion:.4g} against the base's {watch.motion_base:.4g}"
        return watch, Stop(reason="motion", detail=f"held-out videos have {numbers}, less than guards.motion_floor {guards.motion_floor:g} of it"), False
    if watch.best is None or look.curve > watch.best:
        return replace(watch, best=look.curve, best_step=step, stale=0), None, True
    watch = replace(watch, stale=watch.stale + 1)
    if guards.patience == 0 or watch.stale < guards.patience:
        return watch, None, False
    name = "the judge's held-out curve" if look.judge is not None else "the held-out reward"
    detail = f"{name} has not risen above {watch.best:.4g} (update {watch.best_step}) in {watch.stale} looks; now {look.curve:.4g}"
    return watch, Stop(reason="no_gain", detail=detail), False

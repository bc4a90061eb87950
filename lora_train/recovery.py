"""What a run does when the card's memory ends in the middle of a step: once more with a smaller plan, then an orderly end.

A step's draws are a function of (seed, step), so the second try computes what the first one would have. Nothing of the first try may stay: its graph, its
half-made gradients, its count of passes. What has begun to change the LoRA itself cannot be taken back, and ends the run at its last checkpoint.
"""

from __future__ import annotations

import errno
import gc
import logging
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch

from . import checkpoint, events, optimisers
from .protocols import Learner, Shrunk
from .trainee import Trainee

if TYPE_CHECKING:
    from .run import Parts

logger = logging.getLogger("reward_lab")
_DRIVER_WORDS = ("cuda error", "hip error", "cudnn error", "cublas_status", "nvml", "device-side assert", "acceleratorerror")
_FULL_WORDS = ("cuda error: out of memory", "hip error: out of memory", "status_alloc_failed")
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_REMEDY = (
    "Take a smaller video, batch or lora.rank, close what else uses the card, or leave more of it free (engine.card_gb, engine.optimiser_place 'host'); "
    "then resume from the checkpoint"
)
T = TypeVar("T")


class CardFullError(RuntimeError):
    """The card's memory ended in both tries of a step; weights and optimiser are those of the last finished update."""


class DamagedError(RuntimeError):
    """An update failed half-way: what is in memory must neither be saved nor computed with; the last checkpoint is good."""


def twice(compute: Callable[[], T], parts: Parts, trainees: Iterable[Trainee], step: int) -> T:
    """`again` for the training of LoRAs: with the executors' next smaller plan, and with passes counted once."""
    passes = parts.experts.count.total

    def afresh() -> T:
        parts.experts.count.total = passes
        return compute()

    def shrink() -> Shrunk | None:
        shrunk = None if parts.shrink is None else parts.shrink()
        for trainee in trainees if shrunk else ():
            trainee.to(shrunk.masters_on)
        return shrunk

    return again(afresh, trainees, shrink, lambda detail: parts.sink(events.Replanned(time=parts.clock(), step=step, detail=detail)), step, _REMEDY)


def again(compute: Callable[[], T], learners: Iterable[Learner], shrink: Callable[[], Shrunk | None], tell: Callable[[str], None], step: int, remedy: str) -> T:
    """Run `compute`; if the card's memory ends in it, free everything, go to the next smaller plan, and run it once more.

    Args:
        compute: adds gradients, and may end with an update.
        shrink: goes to the next smaller plan; None where there is none.
        tell: is told of a second try.
        remedy: what a user can do.

    Raises:
        CardFullError: the second try failed as well, or there is no smaller plan; nothing is changed.
        DamagedError: the memory ended when the update had changed something.
    """
    for is_second in (False, True):
        written = [optimisers.written(learner.optimiser, learner.average) for learner in learners]
        try:
            return compute()
        except RuntimeError as error:
            if not is_card_full(error):
                raise
            # Not kept any longer: its traceback holds the frames, and these hold the tensors.
            reason = (str(error).splitlines() or [""])[0]
        for learner, before in zip(learners, written, strict=True):
            _take_back(learner, before, f"step {step}", f"({reason}). {remedy}")
        _free()
        shrunk = None if is_second else _shrunk(shrink)
        if shrunk is None:
            tried = "also with the next smaller plan" if is_second else "and there is no smaller plan"
            raise CardFullError(f"step {step}: the card's memory is full, {tried} ({reason}). {remedy}")
        detail = f"out of the card's memory; once more with the next smaller plan: {shrunk.changes}"
        logger.warning("step %d: %s (%s)", step, detail, reason)
        tell(detail)
    raise AssertionError


def _take_back(learner: Learner, before: dict[int, int], where: str, why: str) -> None:
    # State that is new is zeros that nobody has written to.
    if any(count != before.get(name, 0) for name, count in optimisers.written(learner.optimiser, learner.average).items()):
        changed = "the card's memory ended while what is learned was being changed, which is now neither the old nor the new"
        raise DamagedError(f"{where}: {changed}. The last checkpoint is good {why}")
    optimisers.forget_try(learner.optimiser, before)


def is_card_full(error: BaseException) -> bool:
    """Whether the card's memory ended: torch's own error, or what drivers and libraries say where they allocate themselves."""
    text = str(error).lower()
    return isinstance(error, torch.OutOfMemoryError) or (isinstance(error, RuntimeError) and any(word in text for word in _FULL_WORDS))


def _shrunk(shrink: Callable[[], Shrunk | None]) -> Shrunk | None:
    """None also where there is no room even to go to a smaller plan."""
    try:
        return shrink()
    except RuntimeError as error:
        if not is_card_full(error):
            raise
        return None


def _free() -> None:
    # Graphs hold their Functions in cycles.
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def explain(error: Exception, folder: Path) -> str:
    """What a run that failed tells its user. `folder`: of the run."""
    if isinstance(error, ValueError | CardFullError | DamagedError) or type(error).__name__ == "NonFiniteError":
        return str(error)
    text = f"{type(error).__name__}: {error}"
    if is_disk_full(error):
        return _about_disk(error, folder)
    if is_card_full(error):
        return f"{text}. {_REMEDY}"
    if isinstance(error, torch.AcceleratorError) or (isinstance(error, RuntimeError) and any(word in text.lower() for word in _DRIVER_WORDS)):
        return f"the card or its driver failed; the last checkpoint is good. Check the card (nvidia-smi), then resume the run. {text}"
    return text


def is_disk_full(error: Exception) -> bool:
    """Whether a write failed for want of room, quota or a larger limit on a file's size."""
    # numpy tells it without a number: "1024 requested and 0 written".
    return isinstance(error, OSError) and (error.errno in _DISK_FULL or " requested and " in str(error))


def _about_disk(error: OSError, folder: Path) -> str:
    """What to do where a disk, a quota or the largest size of a file was reached."""
    place = Path(error.filename or folder)
    existing = next(path for path in (place, *place.parents) if path.exists())
    step = checkpoint.latest_step(folder)
    kept = f"the checkpoint of update {step} is good" if checkpoint.states(folder) else "there is no checkpoint yet"
    free_bytes = shutil.disk_usage(existing).free
    remedy = f"Make room, or move the run's folder to another disk; then go on: lab.py train {folder}"
    return f"{place} could not be written: {error.strerror or error}; {free_bytes / 1e9:.2f} GB are free there, and {kept}. {remedy}"

"""What a run does when the card's memory ends in the middle of a step: once more with a smaller plan, then an orderly end.

A step's draws are a function of (seed, step), so the second try computes what the first one would have. Nothing of the first try may stay: its graph, its
half-made gradients, its count of passes. What has begun to change the LoRA itself cannot be taken back, and ends the run at its last checkpoint.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, TypeVar

import torch

from . import events
from .protocols import Shrunk
from .trainee import DamagedError, Trainee

if TYPE_CHECKING:
    from .run import Parts

logger = logging.getLogger("reward_lab")
_DRIVER_WORDS = ("cuda error", "hip error", "cudnn error", "cublas_status", "nvml", "device-side assert", "acceleratorerror")
_FULL_WORDS = ("cuda error: out of memory", "hip error: out of memory", "status_alloc_failed")
_REMEDY = (
    "Take a smaller video, batch or lora.rank, close what else uses the card, or plan for less of it with engine.card_gb; "
    "then resume from the checkpoint"
)
T = TypeVar("T")


class CardFullError(RuntimeError):
    """The card's memory ended in both tries of a step; weights and optimiser are those of the last finished update."""


def twice(compute: Callable[[], T], parts: Parts, trainees: Iterable[Trainee], step: int) -> T:
    """Run `compute`; if the card's memory ends in it, free everything, go to the next smaller plan, and run it once more.

    Args:
        compute: adds gradients, counts passes, and may end with an update.

    Raises:
        CardFullError: the second try failed as well, or there is no smaller plan; nothing is changed.
        DamagedError: the memory ended when the update had changed something.
    """
    passes = parts.experts.count.total
    for is_second in (False, True):
        written = [trainee.written() for trainee in trainees]
        try:
            return compute()
        except RuntimeError as error:
            if not is_card_full(error):
                raise
            # Not kept any longer: its traceback holds the frames, and these hold the tensors.
            reason = (str(error).splitlines() or [""])[0]
        for trainee, before in zip(trainees, written, strict=True):
            trainee.take_back(before, step, reason)
        parts.experts.count.total = passes
        _free()
        shrunk = None if is_second else _shrink(parts)
        if shrunk is None:
            tried = "also with the next smaller plan" if is_second else "and there is no smaller plan"
            raise CardFullError(f"step {step}: the card's memory is full, {tried} ({reason}). {_REMEDY}")
        for trainee in trainees:
            trainee.to(shrunk.masters_on)
        detail = f"out of the card's memory; once more with the next smaller plan: {shrunk.changes}"
        logger.warning("step %d: %s (%s)", step, detail, reason)
        parts.sink(events.Replanned(time=parts.clock(), step=step, detail=detail))
    raise AssertionError


def is_card_full(error: BaseException) -> bool:
    """Whether the card's memory ended: torch's own error, or what drivers and libraries say where they allocate themselves."""
    text = str(error).lower()
    return isinstance(error, torch.OutOfMemoryError) or (isinstance(error, RuntimeError) and any(word in text for word in _FULL_WORDS))


def _shrink(parts: Parts) -> Shrunk | None:
    try:
        return None if parts.shrink is None else parts.shrink()
    except RuntimeError as error:
        if not is_card_full(error):
            raise
        return None


def _free() -> None:
    # Graphs hold their Functions in cycles.
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def explain(error: Exception) -> str:
    """What a run that failed tells its user."""
    if isinstance(error, ValueError | CardFullError | DamagedError) or type(error).__name__ == "NonFiniteError":
        return str(error)
    text = f"{type(error).__name__}: {error}"
    if is_card_full(error):
        return f"{text}. {_REMEDY}"
    if isinstance(error, torch.AcceleratorError) or (isinstance(error, RuntimeError) and any(word in text.lower() for word in _DRIVER_WORDS)):
        return f"the card or its driver failed; the last checkpoint is good. Check the card (nvidia-smi), then resume the run. {text}"
    return text

"""The largest step, run once before training: what it really takes is compared with the plan, and one that takes too much never gets to train.

What a step takes does not depend on how many steps its rollout makes, nor on weights or noise; so the rehearsal makes one rollout step and then everything
else: gradient, decoding with the most history, reward, backward. Its gradients are thrown away and its draws touch no other, so that a run with and without
it has the same bytes.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

import torch

from . import events
from .config import TrainConfig
from .protocols import Objective
from .trainee import Trainee

if TYPE_CHECKING:
    from .run import Parts

logger = logging.getLogger("reward_lab")


class MemoryMeter(Protocol):
    """Measures what computations take, and knows what was planned. Bytes; on a card, of tensors; elsewhere, growth of the process."""

    limit_bytes: int

    def predicted_bytes(self, when: str) -> int:
        """The present plan's peak in the `rehearsal` or the `run`, in what `peak_bytes` measures."""

    def start(self) -> None:
        """Forget what was measured so far."""

    def peak_bytes(self) -> int:
        """The peak since `start`."""


def largest(config: TrainConfig) -> TrainConfig:
    """Settings whose every step is as large as any step of `config`, after one rollout step."""
    objective = config.objective
    # The last latent has the most history before it.
    decode = "last" if objective.decode == "random" else objective.decode
    return replace(config, objective=replace(objective, decode=decode, rollout_steps=1))


def rehearse(config: TrainConfig, parts: Parts, objective: Objective, trainees: Mapping[str, Trainee]) -> None:
    """Run the largest step of the expert whose turn comes first, and report what it took. Does nothing without a meter.

    Args:
        objective: of the run; another one of its kind is made for the rehearsal.

    Raises:
        torch.OutOfMemoryError: it took more than the run may use, as if the memory had ended: the caller goes to a smaller plan.
    """
    meter = parts.meter
    if meter is None:
        return
    trial = type(objective)(largest(config), parts)
    passes, begun = parts.experts.count.total, time.perf_counter()
    meter.start()
    with ExitStack() as merged:
        for other in trainees.values():
            merged.enter_context(other.switch.merged())
        trial.add_gradient(trainees[config.trained_experts[0]], 1, 0)
    measured = meter.peak_bytes()
    for trainee in trainees.values():
        trainee.optimiser.zero_grad(set_to_none=True)
    parts.experts.count.total = passes
    report(parts, "rehearsal", measured, time.perf_counter() - begun)
    if measured > meter.limit_bytes:
        raise torch.OutOfMemoryError(f"the largest step takes {measured / 1e9:.2f} GB, and the run may use {meter.limit_bytes / 1e9:.2f} GB")
    meter.start()


def report(parts: Parts, when: str, measured_bytes: int, seconds: float) -> None:
    """Send and log what was measured beside what was planned. `when`: `rehearsal`, or `run` at the end of one."""
    predicted = parts.meter.predicted_bytes(when)
    error = measured_bytes / predicted - 1 if predicted else 0.0
    parts.sink(
        events.Memory(
            time=parts.clock(), when=when, predicted_bytes=predicted, measured_bytes=measured_bytes, limit_bytes=parts.meter.limit_bytes, error=error,
            seconds=seconds,
        )
    )  # fmt: skip
    sizes = [value / 1e9 for value in (measured_bytes, predicted, parts.meter.limit_bytes)]
    logger.info("%s: %.2f GB measured, %.2f GB planned, %.2f GB may be used", when, *sizes)

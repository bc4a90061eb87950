"""Measures the memory of a training step: the allocator's peak on a card, the growth of the process on the CPU."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from types import TracebackType

import psutil
import torch

from ..lora_train.config import TrainConfig
from ..lora_train.offload.knobs import Knobs
from ..lora_train.planning.choose import USABLE
from ..lora_train.planning.job import job_of
from ..lora_train.planning.memory import Choice, host_parts, phases, rest_bytes
from ..lora_train.planning.shapes import header_shape
from ..lora_train.safetensors_file import read_header
from .engine import FreeMemory, card_of

_POLL_S = 0.005


class CardMeter:
    """Bytes of tensors on a CUDA or ROCm card, weights included. See `lora_train.rehearsal.MemoryMeter`."""

    def __init__(self, device: torch.device, predicted_bytes: Callable[[str], int], memory_bytes: int) -> None:
        """Args:
        predicted_bytes: the plan's peak without driver, of the rehearsal or of the run.
        memory_bytes: what the run may use.
        """
        self._device = device
        self.predicted_bytes = predicted_bytes
        self.limit_bytes = int(USABLE * memory_bytes)

    def start(self) -> None:
        torch.cuda.reset_peak_memory_stats(self._device)

    def peak_bytes(self) -> int:
        return torch.cuda.max_memory_allocated(self._device)

    def __enter__(self) -> CardMeter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Nothing to stop."""


class ProcessMeter:
    """How far the process grew beyond what it was at `start`, looked at every few milliseconds. See `lora_train.rehearsal.MemoryMeter`.

    Memory that the allocator has kept from before is used again without growth, so a step may show less than it takes."""

    def __init__(self, predicted_bytes: Callable[[str], int], free_bytes: int) -> None:
        self._process = psutil.Process()
        self.predicted_bytes = predicted_bytes
        self.limit_bytes = free_bytes
        self._base = self._peak = 0
        self._is_over = threading.Event()
        self._watching = threading.Thread(target=self._watch, daemon=True, name="reward_lab_memory")

    def start(self) -> None:
        self._base = self._peak = self._process.memory_info().rss

    def peak_bytes(self) -> int:
        self._look()
        return self._peak - self._base

    def _look(self) -> None:
        self._peak = max(self._peak, self._process.memory_info().rss)

    def _watch(self) -> None:
        while not self._is_over.wait(_POLL_S):
            self._look()

    def __enter__(self) -> ProcessMeter:
        self.start()
        self._watching.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._is_over.set()
        self._watching.join()


def meter_of(config: TrainConfig, device: torch.device, free: FreeMemory, knobs_of: Callable[[], Knobs]) -> CardMeter | ProcessMeter | None:
    """The meter of a run, or None where the settings want no rehearsal.

    Args:
        free: as measured before the models were loaded, whose weights count on a card. The growth of a process does not hold them, so on the CPU the limit is
            what is free now.
        knobs_of: gives the knobs in force; asked when a prediction is wanted.
    """
    if config.engine.rehearse == "no" or (config.engine.rehearse == "auto" and device.type == "cpu"):
        return None
    if device.type == "cpu" and config.dtype == "auto":
        config = replace(config, dtype="fp32")
    path = Path(getattr(config.models, config.trained_experts[0]))
    job = job_of(config, header_shape(read_header(str(path)), path.name))

    def choice() -> Choice:
        return Choice(**{entry.name: getattr(knobs_of(), entry.name) for entry in fields(Choice)})

    def on_card(when: str) -> int:
        """Clips are made before anything is measured; looks are not rehearsed."""
        left_out = ("clips", "looks") if when == "rehearsal" else ("clips",)
        return max(value for name, value in phases(job, choice()).items() if name not in left_out)

    def growth(when: str) -> int:
        """Of one process that is card and host in one: what a step needs beyond what is there between steps, and the LoRA's gradients."""
        host = host_parts(job, choice())
        return on_card(when) - rest_bytes(job, choice()) + host["activations"] + host["decoder"] + 4 * job.lora_parameters

    if device.type == "cpu":
        return ProcessMeter(growth, card_of(config, device).memory_bytes)
    return CardMeter(device, on_card, free.card.memory_bytes)

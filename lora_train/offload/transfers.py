"""Copies between host and device: on streams of their own under CUDA and ROCm, plain and in order elsewhere.

Host memory is pinned, so that copies run beside the computation. Where the system refuses to pin (little memory, a container's limit, Windows under
load) it goes on with pageable memory: slower, said once, and otherwise the same.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch

from .pinned import pinned_empty

logger = logging.getLogger("reward_lab.offload")
# Below this torch's own pinned memory serves: it is given back and taken again in no time (gradients come home at every step), and what it rounds up is little.
_SMALL_BYTES = 16 << 20


class Transfers:
    """One device's copy streams. `stop` drops them."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.is_async = device.type == "cuda"
        self.can_pin = self.is_async
        self._in = torch.cuda.Stream(device) if self.is_async else None
        self._out = torch.cuda.Stream(device) if self.is_async else None
        # Pinned memory of kept activations by size and type, with a mark of the last copy out of it; taking it from the system anew would cost seconds a step.
        self._spare: dict[tuple[torch.Size, torch.dtype], list[tuple[torch.Tensor, object]]] = {}

    def pinned(self, tensor: torch.Tensor) -> torch.Tensor:
        """`tensor`, which is on the host, in pinned memory where that is possible."""
        if not self.can_pin or tensor.is_pinned():
            return tensor
        try:
            return _pinned_like(tensor).copy_(tensor)
        except RuntimeError as error:
            self._refused(error)
            return tensor

    def host_like(self, tensor: torch.Tensor) -> torch.Tensor:
        """An empty host tensor for a copy of `tensor`; copies to the host that start from now on find nobody reading it."""
        if self.can_pin:
            spare = self._spare.get((tensor.shape, tensor.dtype))
            if spare:
                host, mark = spare.pop()
                if mark is not None:
                    self._out.wait_event(mark)
                return host
            try:
                return _pinned_like(tensor)
            except RuntimeError as error:
                self._refused(error)
        return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")

    def spare(self, host: torch.Tensor, mark: object) -> None:
        """Give a tensor of `host_like` back for the next one of its size; `mark`: of the last copy out of it."""
        if self.can_pin:
            self._spare.setdefault((host.shape, host.dtype), []).append((host, mark))

    def _refused(self, error: RuntimeError) -> None:
        self.can_pin = False
        logger.warning("the system refuses pinned memory (%s); going on with pageable memory, so transfers wait for each other", error)

    def to_host(self, tensor: torch.Tensor) -> tuple[torch.Tensor, object]:
        """Start a copy to the host; give the host tensor and a mark for `to_device`."""
        host = self.host_like(tensor)
        if not self.is_async:
            return host.copy_(tensor), None
        self._out.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._out):
            host.copy_(tensor, non_blocking=True)
            tensor.record_stream(self._out)
            return host, self._out.record_event()

    def start_copy(self, target: torch.Tensor, source: torch.Tensor, after: object = None) -> None:
        """Start a copy from the host into a device tensor that nobody reads now; `after`: a mark to wait for."""
        if not self.is_async:
            target.copy_(source)
            return
        with torch.cuda.stream(self._in):
            if after is not None:
                self._in.wait_event(after)
            target.copy_(source, non_blocking=True)

    def fetch(self, source: torch.Tensor, after: object) -> tuple[torch.Tensor, object]:
        """Start a copy of a host tensor to the device; wait for the mark (`wait`) before using it."""
        if not self.is_async:
            return source.to(self.device), None
        with torch.cuda.stream(self._in):
            if after is not None:
                self._in.wait_event(after)
            copy = source.to(self.device, non_blocking=True)
        copy.record_stream(torch.cuda.current_stream(self.device))
        return copy, self.mark_in()

    def home(self, values: Sequence[torch.Tensor | None], like: Sequence[torch.Tensor]) -> list[torch.Tensor | None]:
        """Gradients where their parameters live. Those that cross to the host do so together, and are waited for once: whoever adds them up reads them."""
        found, marks = [], []
        for value, parameter in zip(values, like, strict=True):
            if value is not None and value.device.type != parameter.device.type:
                value, mark = self.to_host(value.to(parameter.dtype))
                marks.append(mark)
            found.append(value)
        for mark in marks[-1:]:
            if mark is not None:
                mark.synchronize()
        return found

    def mark_in(self) -> object:
        """A mark after the copies to the device that were started so far."""
        return self._in.record_event() if self.is_async else None

    def mark_compute(self) -> object:
        """A mark after the computation that was started so far."""
        return torch.cuda.current_stream(self.device).record_event() if self.is_async else None

    def wait(self, mark: object) -> None:
        """Let the computation wait for a mark; the program itself goes on."""
        if mark is not None:
            torch.cuda.current_stream(self.device).wait_event(mark)

    def in_after(self, mark: object) -> None:
        """Let copies to the device wait for a mark."""
        if mark is not None:
            self._in.wait_event(mark)

    def stop(self) -> None:
        """Wait for everything under way, so that memory can be given back. A card that failed cannot be waited for: what is put back after this must be."""
        try:
            for stream in (self._in, self._out) if self.is_async else ():
                stream.synchronize()
        except RuntimeError as error:
            logger.warning("the card does not answer (%s)", error)
        self._spare.clear()


def _pinned_like(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.numel() * tensor.element_size() < _SMALL_BYTES:
        return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return pinned_empty(tuple(tensor.shape), tensor.dtype)

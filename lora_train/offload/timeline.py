"""Bytes alive on each device while a program runs, and the floating-point operations it makes, from the tensors themselves.

Works on real tensors and on fake ones, so that the memory of a 14B step can be watched without weights or a card: run the step under torch's
`FakeTensorMode` with the compute device `meta`. What a kernel allocates inside of itself does not show.
"""

from __future__ import annotations

import weakref
from collections import defaultdict

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry


class MemoryTimeline(TorchDispatchMode):
    """Use as a context; counts storages that are made within.

    Attributes:
        alive_bytes, peak_bytes: by device type.
        flops: multiplications and additions of matrix products, convolutions and attention, by torch's own formulas.
        samples: by device type, (operations so far, bytes alive) at every change.
        marks: (operations so far, words) as `mark` left them.
    """

    def __init__(self, watched: str | None = None) -> None:
        super().__init__()
        self.alive_bytes: dict[str, int] = defaultdict(int)
        self.peak_bytes: dict[str, int] = defaultdict(int)
        self.samples: dict[str, list[tuple[int, int]]] = defaultdict(list)
        self.marks: list[tuple[int, str]] = []
        self.peak_operation = ""
        self.flops = 0
        self._watched = watched
        self._known: set[int] = set()
        self._operations = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self._operations += 1
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.flops += formula(*args, **(kwargs or {}), out_val=result)
        for value in tree_leaves(result):
            if isinstance(value, torch.Tensor):
                self.count(value, str(func))
        return result

    def mark(self, words: str) -> None:
        """Note where something begins."""
        self.marks.append((self._operations, words))

    def count(self, tensor: torch.Tensor, operation: str = "") -> None:
        """Count a tensor's storage from now on, if it is not known yet."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        device, nbytes = tensor.device.type, storage.nbytes()
        self._known.add(key)
        self._add(device, nbytes, operation)
        weakref.finalize(storage, self._drop, key, device, nbytes)

    def _add(self, device: str, nbytes: int, operation: str = "") -> None:
        self.alive_bytes[device] += nbytes
        if self.alive_bytes[device] > self.peak_bytes[device]:
            self.peak_bytes[device] = self.alive_bytes[device]
            if device == self._watched:
                self.peak_operation = operation
        self.samples[device].append((self._operations, self.alive_bytes[device]))

    def _drop(self, key: int, device: str, nbytes: int) -> None:
        self._known.discard(key)
        self._add(device, -nbytes)

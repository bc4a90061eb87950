"""Puts a LoRA into a model's Linears and takes it out again: the instance's `forward` is replaced, nothing else is touched.

Two forms compute the same function. The exact one carries gradient (`kernels/lora_linear`). The merged one, for passes without gradient, uses
W + delta: one product per Linear. fp32 weights merge exactly; bf16 ones are rounded stochastically, because rounding to the nearest would drop most of
a young LoRA's small changes. Who streams weights merges them in place in its own copy (`offload/store.py`) and says so by `is_merged_in_place`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch.nn import functional

from ..kernels.lora_linear import lora_linear, merge_into, seed_of
from .adapter import LoraAdapter, LoraLayer

# Mark on a Linear: what puts the masters of its LoRA in their place when one is installed.
MASTERS_PLACE = "place_of_lora_masters"
_exact_depth = 0


@contextmanager
def exact_form() -> Iterator[None]:
    """The exact form also where gradients are off: in what is part of a pass with gradient, as an autograd Function's forward, or runs again in one."""
    global _exact_depth
    _exact_depth += 1
    try:
        yield
    finally:
        _exact_depth -= 1


def is_exact() -> bool:
    """Whether `exact_form` is in force."""
    return _exact_depth > 0


class InstalledLora:
    """Switch of an installed LoRA; made by `install`."""

    def __init__(self) -> None:
        self.forwards: dict[str, LoraForward] = {}
        self._merged: dict[str, torch.Tensor] = {}
        self.is_enabled = True
        self.is_merging = False

    def merged_weight(self, path: str) -> torch.Tensor | None:
        return self._merged.get(path)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """The base model: no LoRA within."""
        before, self.is_enabled = self.is_enabled, False
        try:
            yield
        finally:
            self.is_enabled = before

    @contextmanager
    def merged(self) -> Iterator[None]:
        """Use the LoRA's present values merged into the weights for the forwards without gradient within; ends without a trace.

        Linears that keep their weights merge here and hold a copy for the time; streamed ones merge whenever they are brought in.
        """
        if self.is_merging:
            yield
            return
        try:
            self.is_merging = True
            for path, forward in self.forwards.items():
                if not forward.linear.__dict__.get(LoraForward.NO_COPY):
                    self._merged[path] = forward.merge(torch.empty_like(forward.linear.weight))
            yield
        finally:
            self.is_merging = False
            self._merged.clear()


class LoraForward:
    """The `forward` of a Linear with a LoRA.

    Attributes:
        NO_COPY: name of a mark on a Linear: no merged copy of its weight is held, since it is streamed, or memory is short.
        is_merged_in_place: the weight in use now has the LoRA inside.
        buffer: see `kernels.lora_linear.lora_linear`; None outside of a weight slot.
        near: copies of (down, up) beside the weight, where the masters are on the host and their block is in use; gradients are theirs then.
    """

    NO_COPY = "holds_no_merged_copy"

    def __init__(self, linear: torch.nn.Linear, layer: LoraLayer, switch: InstalledLora, path: str) -> None:
        self.linear, self.layer, self.switch, self.path = linear, layer, switch, path
        self.base_forward: Callable[[torch.Tensor], torch.Tensor] = linear.forward
        self.is_merged_in_place = False
        self.buffer: torch.Tensor | None = None
        self.near: tuple[torch.Tensor, torch.Tensor] | None = None

    @property
    def matrices(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Down and up to compute with."""
        return (self.layer.down_RI, self.layer.up_OR) if self.near is None else self.near

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if not self.switch.is_enabled:
            return self.base_forward(x)
        if _exact_depth or torch.is_grad_enabled():
            return self.exact(x)
        if self.is_merged_in_place:
            return self.base_forward(x)
        merged_OI = self.switch.merged_weight(self.path)
        if merged_OI is None:
            return self.exact(x)
        return functional.linear(x, merged_OI.to(x.dtype), None if self.linear.bias is None else self.linear.bias.to(x.dtype))

    def exact(self, x: torch.Tensor, *, has_room: bool = False) -> torch.Tensor:
        """The form with gradient; `has_room` as in `lora_linear`."""
        down_RI, up_OR = self.matrices
        weight = self.linear.weight if self.linear.weight.dtype == x.dtype else self.linear.weight.to(x.dtype)
        buffer = self.buffer if self.buffer is not None and self.buffer.dtype == x.dtype else None
        return lora_linear(x, weight, self.linear.bias, down_RI, up_OR, self.layer.factor, buffer=buffer, has_room=has_room)

    def merge(self, target_OI: torch.Tensor, base=None) -> torch.Tensor:
        """Write W + delta into `target_OI`; `base` as in `merge_into`, by default the Linear's weight."""
        base = self.linear.weight.detach() if base is None else base
        return merge_into(target_OI, base, *self.matrices, self.layer.factor, seed_of(self.path))


def lora_of(linear: torch.nn.Module) -> LoraForward | None:
    """The LoRA in force on a Linear, or None."""
    forward = linear.__dict__.get("forward")
    return forward if isinstance(forward, LoraForward) and forward.switch.is_enabled else None


@contextmanager
def install(linears: Mapping[str, torch.nn.Linear], adapter: LoraAdapter) -> Iterator[InstalledLora]:
    """Add `adapter` to the Linears for the time of the context.

    Args:
        linears: the model's Linears by path; those of the adapter get a new `forward`.

    Yields:
        The switch.

    Raises:
        ValueError: the adapter names a Linear that the model lacks, or one of another shape.
        RuntimeError: a Linear already carries an installed forward.
    """
    for path, layer in adapter.layers.items():
        _check(linears, path, layer)
    switch = InstalledLora()
    try:
        for path, layer in adapter.layers.items():
            for master in (layer.down_RI, layer.up_OR):
                master.data = linears[path].__dict__.get(MASTERS_PLACE, _as_it_is)(master.data)
            switch.forwards[path] = linears[path].forward = LoraForward(linears[path], layer, switch, path)
        yield switch
    finally:
        for forward in switch.forwards.values():
            forward.linear.__dict__.pop("forward", None)
            forward.buffer = forward.near = None


def _as_it_is(data: torch.Tensor) -> torch.Tensor:
    return data


def _check(linears: Mapping[str, torch.nn.Linear], path: str, layer: LoraLayer) -> None:
    if path not in linears:
        raise ValueError(f"the LoRA names {path}, but the model has no such Linear; it belongs to another model")
    wanted = (layer.up_OR.shape[0], layer.down_RI.shape[1])
    given = tuple(linears[path].weight.shape)
    if given != wanted:
        raise ValueError(f"the LoRA's {path} fits a weight of {list(wanted)}, but the model's is {list(given)}; it belongs to another width")
    if "forward" in linears[path].__dict__:
        raise RuntimeError(f"{path} already carries a LoRA; leave the first `install` before the next")

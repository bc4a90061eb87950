"""Puts a LoRA into a model's Linears and takes it out again: the instance's `forward` is replaced, nothing else is touched.

Two forms compute the same function. The exact one adds factor * up(down(x)) and carries gradient. The merged one, for rollouts without
gradient, uses W + delta: one product per Linear instead of three. It is used only where W is fp32, because rounding W + delta to bf16
would drop most of a young LoRA's small changes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch.nn import functional

from .adapter import LoraAdapter, LoraLayer


class InstalledLora:
    """Switch of an installed LoRA; made by `install`."""

    def __init__(self, linears: Mapping[str, torch.nn.Linear], adapter: LoraAdapter) -> None:
        self._linears = linears
        self._adapter = adapter
        self._merged: dict[str, torch.Tensor] = {}
        self.is_enabled = True

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
        """Merge the LoRA's present values into fp32 weights for the forwards within; ends without a trace. Not for gradients."""
        if self._merged:
            yield
            return
        try:
            for path, layer in self._adapter.layers.items():
                weight_OI = self._linears[path].weight
                if weight_OI.dtype == torch.float32:
                    self._merged[path] = torch.addmm(weight_OI.detach(), layer.up_OR.detach(), layer.down_RI.detach(), alpha=layer.factor)
            yield
        finally:
            self._merged.clear()


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
    switch = InstalledLora(linears, adapter)
    done: list[torch.nn.Linear] = []
    try:
        for path, layer in adapter.layers.items():
            linears[path].forward = _forward(linears[path], layer, switch, path)
            done.append(linears[path])
        yield switch
    finally:
        for linear in done:
            del linear.__dict__["forward"]


def _check(linears: Mapping[str, torch.nn.Linear], path: str, layer: LoraLayer) -> None:
    if path not in linears:
        raise ValueError(f"the LoRA names {path}, but the model has no such Linear; it belongs to another model")
    wanted = (layer.up_OR.shape[0], layer.down_RI.shape[1])
    given = tuple(linears[path].weight.shape)
    if given != wanted:
        raise ValueError(f"the LoRA's {path} fits a weight of {list(wanted)}, but the model's is {list(given)}; it belongs to another width")
    if "forward" in linears[path].__dict__:
        raise RuntimeError(f"{path} already carries a LoRA; leave the first `install` before the next")


def _forward(linear: torch.nn.Linear, layer: LoraLayer, switch: InstalledLora, path: str):
    base_forward = linear.forward

    def forward(x: torch.Tensor) -> torch.Tensor:
        if not switch.is_enabled:
            return base_forward(x)
        merged_OI = switch.merged_weight(path)
        if merged_OI is not None and not torch.is_grad_enabled():
            return functional.linear(x, merged_OI.to(x.dtype), None if linear.bias is None else linear.bias.to(x.dtype))
        hidden = functional.linear(x, layer.down_RI.to(x.dtype))
        return base_forward(x) + functional.linear(hidden, layer.up_OR.to(x.dtype)) * layer.factor

    return forward

"""Measures what a LoRA changes: norm of the change per weight, relative to the base, and the difference between two LoRAs.

Low-rank changes are never multiplied out: with dW = s U D, the inner product of two of them is s1 s2 sum((U1^T U2) * (D1 D2^T)), which
costs rank^2 (inputs + outputs). Everything is summed in float64, so that the difference of two equal LoRAs is 0 to 1e-7 of their norm.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import comfy.lora
import torch
from comfy.weight_adapter import LoRAAdapter, WeightAdapterBase

ReadWeight = Callable[[str], torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class WeightChange:
    """What happens to one weight at strength 1.

    Attributes:
        weight: Its key in the model, for example `diffusion_model.blocks.0.self_attn.q.weight`.
        change: Frobenius norm of the change; None where it needs the base (DoRA) and there is none.
        base: Frobenius norm of the base weight; None without a base.
    """

    weight: str
    change: float | None
    base: float | None = None

    @property
    def relative(self) -> float | None:
        """Change over base; None when one is not known, infinite where the base is zero."""
        if self.change is None or self.base is None:
            return None
        return self.change / self.base if self.base else (math.inf if self.change else 0.0)


@dataclass(frozen=True, kw_only=True)
class WeightDifference:
    """How the changes of two LoRAs to one weight compare.

    Attributes:
        weight: Its key in the model.
        first, second: Norm of each change; 0 where a LoRA leaves the weight alone.
        difference: Norm of the first minus the second.
        cosine: Of the angle between them: 1 same direction, 0 unrelated, -1 opposite; None where one of them is zero.
    """

    weight: str
    first: float
    second: float
    difference: float
    cosine: float | None


@dataclass(frozen=True, kw_only=True)
class _Change:
    """A change of a weight: a product of two matrices, or a whole tensor."""

    up: torch.Tensor | None = None  # [O, R], the scale multiplied in
    down: torch.Tensor | None = None  # [R, I]
    dense: torch.Tensor | None = None  # [O, I]

    def whole(self) -> torch.Tensor:
        """Return the change multiplied out, [O, I]."""
        return self.dense if self.dense is not None else self.up @ self.down

    def inner(self, other: _Change) -> float:
        """Return the inner product with another change of the same weight."""
        if self.dense is None and other.dense is None:
            return float(((self.up.T @ other.up) * (self.down @ other.down.T)).sum())
        return float((self.whole() * other.whole()).sum())


def measure(patches: Mapping[str, object], shapes: Mapping[str, tuple[int, ...]], read: ReadWeight | None = None) -> list[WeightChange]:
    """Measure the change of every weight.

    Args:
        patches: Model key -> the host's adapter or patch, from `lora_file.fit`.
        shapes: Model key -> shape of the weight.
        read: Returns a base weight by its model key, fp32; None measures without a base.

    Returns:
        One entry per weight, in the order of the patches.
    """
    result = []
    for key, patch in patches.items():
        base = read(key) if read else None
        change = _change(key, patch, shapes[key], base)
        result.append(
            WeightChange(
                weight=key,
                change=None if change is None else math.sqrt(max(0.0, change.inner(change))),
                base=None if base is None else float(base.double().norm()),
            )
        )
    return result


def compare(
    first: Mapping[str, object], second: Mapping[str, object], shapes: Mapping[str, tuple[int, ...]], read: ReadWeight | None = None
) -> list[WeightDifference]:
    """Compare the changes of two LoRAs, weight by weight.

    Args:
        first, second: Model key -> the host's adapter or patch.
        shapes: Model key -> shape of the weight.
        read: Returns a base weight; needed for DoRA only.

    Returns:
        One entry per weight that either changes; weights whose change cannot be told without a base are left out.
    """
    result = []
    for key in dict.fromkeys((*first, *second)):
        base = read(key) if read else None
        changes = [_change(key, patches[key], shapes[key], base) if key in patches else _Change(dense=torch.zeros(1, 1)) for patches in (first, second)]
        if None in changes:
            continue
        both = key in first and key in second
        squares = [change.inner(change) for change in changes]
        product = changes[0].inner(changes[1]) if both else 0.0
        norms = [math.sqrt(max(0.0, square)) for square in squares]
        result.append(
            WeightDifference(
                weight=key,
                first=norms[0],
                second=norms[1],
                difference=math.sqrt(max(0.0, squares[0] - 2 * product + squares[1])),
                cosine=product / (norms[0] * norms[1]) if norms[0] and norms[1] else None,
            )
        )
    return result


def total(values: list[float | None]) -> float:
    """Return the norm of several tensors taken together, from their norms; unknown ones count as 0."""
    return math.sqrt(math.fsum(value * value for value in values if value is not None))


def relative_norm(changes: list[WeightChange]) -> float | None:
    """Return the norm of all changes over the norm of the weights that they change; None without a base."""
    known = [change for change in changes if change.relative is not None]
    base = total([change.base for change in known])
    return total([change.change for change in known]) / base if base else None


def _change(key: str, patch: object, shape: tuple[int, ...], base: torch.Tensor | None) -> _Change | None:
    """Turn a patch into a change, in float64; None when it needs the base and there is none."""
    if isinstance(patch, LoRAAdapter):
        up, down, alpha, mid, dora_scale, reshape = patch.weights
        if mid is None and dora_scale is None and reshape is None:
            scale = 1.0 if alpha is None else alpha / down.shape[0]
            return _Change(up=up.flatten(1).double() * scale, down=down.flatten(1).double())
    if needs_base(patch) and base is None:
        return None
    start = base.clone() if needs_base(patch) else torch.zeros(shape)
    changed = comfy.lora.calculate_weight([(1.0, patch, 1.0, None, None)], start.clone(), key)
    return _Change(dense=(changed - start).double().reshape(shape[0], -1) if shape else (changed - start).double().reshape(1, 1))


def needs_base(patch: object) -> bool:
    """Tell whether what a patch changes depends on the base weight: whether it is an adapter with a DoRA scale, which each kind keeps in another place."""
    place = {"lora": 4, "loha": 7, "lokr": 8}.get(patch.name) if isinstance(patch, WeightAdapterBase) else None
    return place is not None and patch.weights[place] is not None

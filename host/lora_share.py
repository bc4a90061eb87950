"""Tells how much LoRA rows change the weights they act on, fast enough to say it at every load.

Small weights are measured in full. Of a large one, rows at even distances stand for all: on the 14B model that reads some 50 MB of 28 GB, and
because the squares of hundreds of weights are added up, the share is good to about a percent. What was measured is kept as long as its model or file.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import comfy.lora
import torch
from comfy.quant_ops import QuantizedTensor
from comfy.weight_adapter import LoKrAdapter
from torch import nn

from .lora_bypass import FULL_PRECISION, is_packed, original_weight
from .lora_change import measure, needs_base
from .lora_file import FittedLora
from .patch_rows import kronecker_factors, patch_rows

WHOLE_NUMBERS = 1 << 18  # weights up to this size are measured in full
SAMPLED_ROWS = 16
FP8_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)

Squares = dict[str, float | None]  # model key -> square of a Frobenius norm; None where it cannot be told fast

_changes: dict[int, Squares] = {}  # by the identity of what was fitted; an entry goes when that does
_bases: weakref.WeakKeyDictionary[nn.Module, Squares] = weakref.WeakKeyDictionary()


@dataclass(frozen=True, kw_only=True)
class Share:
    """How much a row changes the weights that it acts on.

    Attributes:
        value: Norm of the change over the norm of these weights.
        measured, of: How many weights were measured, of how many that it changes. Left out are DoRA and formats whose numbers are not at hand.
        is_estimate: Whether rows of large weights stood for all.
    """

    value: float
    measured: int
    of: int
    is_estimate: bool

    def text(self) -> str:
        """Return it for people, for example `≈ 1.3 % of the weights`."""
        some = "" if self.measured == self.of else f" (measured on {self.measured} of {self.of})"
        return f"{'≈ ' if self.is_estimate else ''}{100 * self.value:.3g} % of the weights{some}"


def share_of(model: Any, fitted: FittedLora, strengths: Mapping[str, float]) -> Share | None:
    """Tell how much a row changes a model.

    Args:
        model: MODEL of the host; what other LoRAs changed in it does not count.
        fitted: The row's file, fitted to it.
        strengths: Model key -> strength; keys of strength 0 may be left out.

    Returns:
        The share; None when nothing of it can be measured fast.
    """
    acting = {key: strength for key, strength in strengths.items() if strength != 0.0}
    changes, bases = _change_squares(model, fitted), _base_squares(model, tuple(acting))
    known = [key for key in acting if changes.get(key) is not None and bases.get(key) is not None]
    base = math.fsum(bases[key] for key in known)
    if not base:
        return None
    change = math.fsum(acting[key] ** 2 * changes[key] for key in known)
    shapes = (fitted.shapes[key] for key in known)
    return Share(value=math.sqrt(change / base), measured=len(known), of=len(acting), is_estimate=any(prod(shape) > WHOLE_NUMBERS for shape in shapes))


def _change_squares(model: Any, fitted: FittedLora) -> Squares:
    """Measure the changes at strength 1, or return what was measured before."""
    if id(fitted) not in _changes:
        weakref.finalize(fitted, _changes.pop, id(fitted), None)
        _changes[id(fitted)] = {key: _change_square(key, patch, fitted.shapes[key], model.load_device) for key, patch in fitted.patches.items()}
    return _changes[id(fitted)]


def _change_square(key: str, patch: Any, shape: tuple[int, ...], device: torch.device) -> float | None:
    """Measure one change."""
    if prod(shape) <= WHOLE_NUMBERS:
        change = measure({key: patch}, {key: shape})[0].change
        return None if change is None else change**2
    if isinstance(patch, LoKrAdapter):
        return _kronecker_square(patch)
    rows = sampled_rows(shape)
    part = None if needs_base(patch) else patch_rows(patch, rows)
    if part is None:
        return None
    change = comfy.lora.calculate_weight([(1.0, part, 1.0, None, None)], torch.zeros((len(rows), *shape[1:]), device=device), key)
    return float(torch.linalg.vector_norm(change)) ** 2 * shape[0] / len(rows)


def _kronecker_square(patch: LoKrAdapter) -> float | None:
    """Measure a LoKr: the norm of a Kronecker product is the product of the norms."""
    factors = kronecker_factors(patch)
    return None if factors is None else (factors[2] * float(factors[0].norm()) * float(factors[1].norm())) ** 2


def _base_squares(model: Any, keys: tuple[str, ...]) -> Squares:
    """Measure the weights as they are without any LoRA, or return what was measured before."""
    known = _bases.setdefault(model.model, {})
    known.update({key: _base_square(original_weight(model, key)[0]) for key in keys if key not in known})
    return known


def _base_square(weight: torch.Tensor) -> float | None:
    """Measure one weight."""
    if isinstance(weight, QuantizedTensor):
        stored, scale = weight._qdata, getattr(weight._params, "scale", None)
        if stored.dtype not in FP8_DTYPES or scale is None or scale.numel() != 1:
            return None
        return _stored_square(stored) * float(scale) ** 2
    if is_packed(weight) or weight.is_meta or weight.dtype not in (*FULL_PRECISION, *FP8_DTYPES):
        return None
    return _stored_square(weight)


def _stored_square(stored: torch.Tensor) -> float:
    """Measure the numbers as they are stored."""
    shape = tuple(stored.shape)
    if prod(shape) <= WHOLE_NUMBERS:
        return float(torch.linalg.vector_norm(stored.detach().float())) ** 2
    rows = sampled_rows(shape)
    part = stored.detach()[rows.tolist()] if stored.dtype not in FP8_DTYPES else stored.detach().view(torch.uint8)[rows.tolist()].view(stored.dtype)
    return float(torch.linalg.vector_norm(part.float())) ** 2 * shape[0] / len(rows)


def sampled_rows(shape: tuple[int, ...]) -> torch.Tensor:
    """Return the rows of a large weight that stand for all, at even distances, from the middle of each stretch."""
    count = min(SAMPLED_ROWS, shape[0])
    return (torch.arange(count) * shape[0] + shape[0] // 2) // count

"""The LoRA linear: exact with gradient, merged without. README.md in this folder derives the forms.

`reference` is the plain form; `lora_linear` here is what the trainer runs.
"""

from __future__ import annotations

import torch

from .bases import QuantisedWeight, fp8_weight, gguf_weight
from .function import ExactLoraLinear, Operands
from .kernels import choose_kernels, dequantise_into, merge_into
from .rounding import seed_of

__all__ = ["Operands", "QuantisedWeight", "choose_kernels", "dequantise_into", "fp8_weight", "gguf_weight", "lora_linear", "merge_into", "seed_of"]


def lora_linear(
    x: torch.Tensor,
    weight_OI: torch.Tensor,
    bias_O: torch.Tensor | None,
    down_RI: torch.Tensor,
    up_OR: torch.Tensor,
    factor: float,
    *,
    buffer: torch.Tensor | None = None,
    has_room: bool = False,
) -> torch.Tensor:
    """x W^T + b + factor * (x A^T) B^T, differentiable in x and the LoRA.

    Args:
        x: [..., I] in the compute type (that of `weight_OI`).
        weight_OI: frozen; with `buffer`, a view of its left.
        down_RI, up_OR: fp32 masters, here or on the host; their gradients arrive there in fp32.
        buffer: [O, (I + R)]; its right edge is overwritten.
        has_room: `x` comes from `rows.empty_with_room` with room for the rank, which is overwritten.

    Returns:
        [..., O].
    """
    return ExactLoraLinear.apply(x, down_RI, up_OR, weight_OI, bias_O, factor, buffer, has_room)

"""Merging a LoRA into a weight for passes without gradient: W + factor * B A, rounded stochastically where the result is bf16.

From a quantised base the merge happens inside the dequantisation, so the sum is rounded once. Works in row chunks: fp32 exists only for a few rows.
"""

from __future__ import annotations

import torch

from .bases import CHUNK_ELEMENTS, QuantisedWeight
from .rounding import round_stochastic


@torch.no_grad()
def merge_into(
    target_OI: torch.Tensor,
    base: torch.Tensor | QuantisedWeight,
    down_RI: torch.Tensor,
    up_OR: torch.Tensor,
    factor: float,
    seed: int,
) -> torch.Tensor:
    """Write the merged weight.

    Args:
        target_OI: [O, I], fp32 or bf16, may have a row stride; may be `base` itself.
        base: the frozen weight.
        seed: of the stochastic rounding; unused for fp32.

    Returns:
        `target_OI`.
    """
    rows = max(1, CHUNK_ELEMENTS // target_OI.shape[1])
    down = down_RI.detach().to(target_OI.device, torch.float32)
    up = up_OR.detach().to(target_OI.device, torch.float32)
    for start in range(0, target_OI.shape[0], rows):
        stop = min(start + rows, target_OI.shape[0])
        plain = base.dequantised_rows(start, stop) if isinstance(base, QuantisedWeight) else base[start:stop].float()
        merged = torch.addmm(plain, up[start:stop], down, alpha=factor)
        target_OI[start:stop] = merged if target_OI.dtype == torch.float32 else _rounded(merged, target_OI.dtype, seed, start * target_OI.shape[1])
    return target_OI


def _rounded(values: torch.Tensor, dtype: torch.dtype, seed: int, first: int) -> torch.Tensor:
    return round_stochastic(values, seed, first=first) if dtype == torch.bfloat16 else values.to(dtype)

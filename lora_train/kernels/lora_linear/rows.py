"""Matrices with room behind each row, so that a LoRA's part can stand beside them in one product.

[x | S] [W | sB]^T = x W^T + S (sB)^T: one GEMM, accumulated in fp32 and rounded once. The weight's buffer is [O, (I + R)]: W, and sB to its right (see
README.md in this folder).
"""

from __future__ import annotations

import torch


def empty_with_room(shape: tuple[int, ...], room: int, *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """An uninitialised tensor whose rows have `room` spare elements behind them."""
    return torch.empty((*shape[:-1], shape[-1] + room), dtype=dtype, device=device)[..., : shape[-1]]


def extended(x: torch.Tensor, room: int) -> torch.Tensor | None:
    """[M, width + room] over the same memory, or None where `x` was not made by `empty_with_room`.

    Only for tensors that are known to come from there: writing into the room of another tensor would change its neighbour. The result does not
    share the version counter of `x`: what is written behind a row does not change `x`.
    """
    width = x.shape[-1] + room
    rows = x.numel() // x.shape[-1]
    is_laid_out = x.stride(-1) == 1 and x.storage_offset() == 0 and x.untyped_storage().nbytes() >= rows * width * x.element_size()
    stride = width
    for size, step in zip(reversed(x.shape[:-1]), reversed(x.stride()[:-1]), strict=True):
        is_laid_out = is_laid_out and (size == 1 or step == stride)
        stride *= size
    return x.data.as_strided((rows, width), (width, 1)) if is_laid_out else None


def weight_buffer(out_features: int, in_features: int, rank: int, *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """An uninitialised [O, (I + R)] buffer."""
    return torch.empty(out_features, in_features + rank, dtype=dtype, device=device)

"""Stochastic rounding of fp32 to bf16 with a counter-based random number per element: the same bits from torch and from Triton.

Rounding a merged weight to the nearest bf16 drops a young LoRA's changes, which are smaller than half a step of the base weight's grid.
Rounded up with the probability of the remainder, they are kept on average: E[round(v)] = v.

Source of the hash: "lowbias32", C. Wellons, Prospecting for Hash Functions (2018), public domain.
"""

from __future__ import annotations

import zlib

import torch

_FIRST, _SECOND = 0x7FEB352D, 0x846CA68B
_SIGN_WRAP = 1 << 32
_CHUNK = 1 << 22


def seed_of(name: str) -> int:
    """A fixed 32-bit seed for a Linear: rounding does not depend on the order of calls, so a resumed run rounds as an uninterrupted one."""
    return zlib.crc32(name.encode())


def hash32(index: torch.Tensor, seed: int) -> torch.Tensor:
    """Mix int32 counters; products wrap, and shifts are logical although torch's int32 is signed."""
    x = index ^ _signed(seed & 0xFFFFFFFF)
    x = x ^ ((x >> 16) & 0xFFFF)
    x = x * _signed(_FIRST)
    x = x ^ ((x >> 15) & 0x1FFFF)
    x = x * _signed(_SECOND)
    return x ^ ((x >> 16) & 0xFFFF)


def round_stochastic(values: torch.Tensor, seed: int, *, first: int = 0) -> torch.Tensor:
    """Round finite fp32 values to bf16, up or down by chance.

    Args:
        values: fp32, any shape.
        seed: equal seeds give equal bits.
        first: counter of the first element, for tensors that are rounded in pieces.

    Returns:
        bf16 of the same shape; its mean over seeds is `values`.
    """
    flat = values.contiguous().view(-1)
    rounded = torch.empty(flat.shape, dtype=torch.bfloat16, device=flat.device)
    for start in range(0, flat.numel(), _CHUNK):
        part = flat[start : start + _CHUNK]
        index = torch.arange(first + start, first + start + part.numel(), dtype=torch.int32, device=flat.device)
        bits = part.view(torch.int32) + (hash32(index, seed) & 0xFFFF)
        # The low half is zero now, so the conversion is exact.
        rounded[start : start + _CHUNK] = (bits & ~0xFFFF).view(torch.float32).to(torch.bfloat16)
    return rounded.view(values.shape)


def _signed(value: int) -> int:
    return value - _SIGN_WRAP if value >= _SIGN_WRAP // 2 else value

"""Rounds fp32 weights to the type of a file: to the nearest number, or by chance in proportion to the distance.

Rounding by chance keeps the mean: a change far smaller than the step between two numbers is not lost on average (Gupta et al., "Deep Learning
with Limited Numerical Precision", 2015). The host rounds so to fp8 only; here bf16 and fp16 too, and the same on every device.
"""

from __future__ import annotations

import hashlib

import torch

TORCH_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
FP8 = ("F8_E4M3", "F8_E5M2")
ROUNDINGS = ("nearest", "stochastic")
FP32_MANTISSA_BITS = 23


class Rounder:
    """Rounds one weight, piece after piece in the order of its numbers.

    Attributes:
        scale: fp32 number that the stored numbers are multiplied with; None where they are the weight.
        lost: Sum of squares of what the rounding changed, so far.
    """

    def __init__(self, dtype: str, *, largest: float | None = None, rounding: str = "nearest", seed: str = "") -> None:
        """Get ready.

        Args:
            dtype: A key of TORCH_DTYPES.
            largest: Largest absolute number of the weight, which becomes the largest of the type (fp8), as when the host quantises; None: no scale.
            rounding: One of ROUNDINGS.
            seed: Of the chance; the same text gives the same numbers.
        """
        self._dtype = TORCH_DTYPES[dtype]
        self.scale = None
        if largest is not None:
            self.scale = torch.tensor(max(largest / torch.finfo(self._dtype).max, torch.finfo(torch.float32).tiny), dtype=torch.float32)
        self.lost = 0.0
        self._generator = None
        if rounding == "stochastic":
            self._generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(seed.encode()).digest()[:7], "big"))

    def round(self, exact: torch.Tensor) -> torch.Tensor:
        """Return a piece, fp32 on the CPU, in the type of the file. Raises ValueError for NaN or infinity."""
        if not largest_of(exact) < float("inf"):
            raise ValueError("it holds NaN or infinity")
        stored = _round(exact if self.scale is None else exact / self.scale, self._dtype, self._generator)
        kept = stored.float() if self.scale is None else stored.float() * self.scale
        self.lost += float(torch.linalg.vector_norm(kept - exact)) ** 2
        return stored


def largest_of(values: torch.Tensor) -> float:
    """Return the largest absolute number; NaN where there is one."""
    low, high = values.aminmax() if values.numel() else (torch.zeros(()), torch.zeros(()))
    return float(torch.maximum(-low, high))


def _round(values: torch.Tensor, dtype: torch.dtype, generator: torch.Generator | None) -> torch.Tensor:
    """Round numbers; those beyond the type's largest become that."""
    info = torch.finfo(dtype)
    if dtype in (torch.float32, torch.float64):
        return values.to(dtype)
    if generator is None:
        return values.clamp(info.min, info.max).to(dtype)
    # The numbers of a type are those of fp32 whose last bits are zero: adding less than one step of chance and cutting goes up or down.
    cut = 1 << (FP32_MANTISSA_BITS + round(torch.log2(torch.tensor(info.eps)).item()))
    noise = torch.randint(0, cut, values.shape, dtype=torch.int32, generator=generator)
    bits = values.contiguous().view(torch.int32)
    rounded = ((bits + noise) & ~(cut - 1)).view(torch.float32)
    if info.smallest_normal > torch.finfo(torch.float32).smallest_normal:
        # Below the smallest normal number the steps are equal, not proportional.
        step = info.smallest_normal * info.eps
        small = values.abs().div(step).add_(noise.float() / cut).floor_().mul_(step).copysign_(values)
        rounded = torch.where(values.abs() < info.smallest_normal, small, rounded)
    return rounded.clamp_(info.min, info.max).to(dtype)

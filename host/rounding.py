"""Rounds fp32 weights to the type of a file: to the nearest number, or by chance in proportion to the distance.

Rounding by chance keeps the mean: a change far smaller than the step between two numbers is not lost on average (Gupta et al., "Deep Learning
with Limited Numerical Precision", 2015). The host rounds so to fp8 only; here bf16 and fp16 too, and the same on every device.
It works on pieces of some megabytes, because a weight of the 14B model takes 283 MB in fp32.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

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
PIECE = 1 << 22  # numbers at a time
FP32_MANTISSA_BITS = 23


@dataclass(frozen=True, kw_only=True)
class Rounded:
    """A weight as it is stored.

    Attributes:
        stored: In the type of the file, the shape of the weight.
        scale: fp32 number that the stored ones are multiplied with; None where they are the weight.
        lost: Sum of squares of what the rounding changed.
    """

    stored: torch.Tensor
    scale: torch.Tensor | None
    lost: float


def round_weight(exact: torch.Tensor, dtype: str, *, is_scaled: bool = False, rounding: str = "nearest", seed: str = "") -> Rounded:
    """Round a weight.

    Args:
        exact: fp32, on the CPU.
        dtype: A key of TORCH_DTYPES.
        is_scaled: Whether the largest number of the weight becomes the largest of the type (fp8), as the host does when it quantises.
        rounding: One of ROUNDINGS.
        seed: Of the chance; the same text gives the same numbers.

    Returns:
        The rounded weight.

    Raises:
        ValueError: NaN or infinity in the weight.
    """
    kind = TORCH_DTYPES[dtype]
    low, high = exact.aminmax() if exact.numel() else (torch.zeros(()), torch.zeros(()))
    largest = float(torch.maximum(-low, high))
    if not largest < float("inf"):
        raise ValueError("it holds NaN or infinity")
    scale = max(largest / torch.finfo(kind).max, torch.finfo(torch.float32).tiny) if is_scaled else 1.0
    generator = None
    if rounding == "stochastic":
        generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(seed.encode()).digest()[:7], "big"))
    stored = torch.empty(exact.shape, dtype=kind)
    lost = 0.0
    scale_number = torch.tensor(scale, dtype=torch.float32)
    for source, target in zip(exact.reshape(-1).split(PIECE), stored.reshape(-1).split(PIECE), strict=True):
        wanted = source / scale_number if is_scaled else source
        target.copy_(_round(wanted, kind, generator))
        kept = target.float().mul_(scale_number) if is_scaled else target.float()
        lost += float((kept - source).double().square().sum())
    return Rounded(stored=stored, scale=scale_number if is_scaled else None, lost=lost)


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

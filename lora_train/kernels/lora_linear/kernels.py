"""Which implementation of the two special kernels runs: Triton where it was chosen and checked, torch's own products elsewhere.

The big products are always the vendor's GEMM: a Triton GEMM would have to be within 3 % of it to gain from fusion.
"""

from __future__ import annotations

import importlib.util
import logging
import os

import torch

from . import merge
from .bases import QuantisedWeight

logger = logging.getLogger("reward_lab.kernels")
CHOICES = ("auto", "torch", "triton")
_chosen = {"name": "torch"}
# Largest difference allowed between Triton's and torch's results on the check's bf16 inputs: Triton rounds once, torch up to three times.
_CHECK_TOLERANCE = 2**-7


def has_triton() -> bool:
    """Whether Triton can be imported and has something to run on."""
    return importlib.util.find_spec("triton") is not None and (torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1")


def choose_kernels(requested: str, device: torch.device) -> str:
    """Decide once per run, and say so.

    Args:
        requested: `auto`, `torch` or `triton`. `auto` takes torch's products: no figure of the Triton kernels on a card is recorded yet.

    Returns:
        `torch` or `triton`.

    Raises:
        ValueError: unknown name, or `triton` where it is missing or computes something else on this device.
    """
    if requested not in CHOICES:
        raise ValueError(f"engine.kernels is {requested!r}; it must be one of {', '.join(CHOICES)}")
    if requested == "triton":
        if not has_triton():
            raise ValueError("engine.kernels is 'triton', but Triton is not installed or no GPU was found; use 'auto', or install the package triton")
        _check_triton(device)
    _chosen["name"] = "triton" if requested == "triton" else "torch"
    logger.info("LoRA kernels: %s", _chosen["name"])
    return _chosen["name"]


def is_triton() -> bool:
    """Whether the Triton kernels were chosen."""
    return _chosen["name"] == "triton"


def mm_fp32(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a @ b with an fp32 result, accumulated in fp32; fp64 stays fp64."""
    if a.is_cuda and a.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(a, b, out_dtype=torch.float32)
    return a @ b if a.dtype == torch.float64 else (a @ b).float()


def hidden_and_up_gradient(grad_MO: torch.Tensor, hidden_MR: torch.Tensor, up_OR: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """dS = dY sB in the compute type and dY^T S in fp32; `reference.hidden_and_up_gradient` is the plain form."""
    if is_triton() and grad_MO.dtype != torch.float64:
        from .triton_kernels import hidden_and_up_gradient as fused

        return fused(grad_MO, hidden_MR, up_OR)
    return grad_MO @ up_OR, mm_fp32(grad_MO.t(), hidden_MR)


def merge_into(target_OI, base, down_RI, up_OR, factor, seed) -> torch.Tensor:
    """See `merge.merge_into`."""
    if is_triton() and target_OI.dtype == torch.bfloat16:
        from .triton_kernels import can_read
        from .triton_kernels import merge_into as fused

        if can_read(base):
            return fused(target_OI, base, down_RI, up_OR, factor, seed)
    return merge.merge_into(target_OI, base, down_RI, up_OR, factor, seed)


def dequantise_into(target_OI: torch.Tensor, base: QuantisedWeight) -> torch.Tensor:
    """See `QuantisedWeight.dequantise_into`."""
    if is_triton() and target_OI.dtype == torch.bfloat16:
        from .triton_kernels import can_read
        from .triton_kernels import dequantise_into as fused

        if can_read(base):
            return fused(target_OI, base)
    return base.dequantise_into(target_OI)


def _check_triton(device: torch.device) -> None:
    from ..triton_check import differences

    for name, ratio in differences(device).items():
        if not ratio <= _CHECK_TOLERANCE:
            raise ValueError(f"Triton's kernel {name!r} differs from its reference by {ratio:.3g} on {device}; use engine.kernels = 'torch' and report this")

"""Every Triton kernel beside its reference on the device of the run, before anything depends on it. Import this only where Triton is installed."""

from __future__ import annotations

from collections.abc import Callable

import torch

from . import rowwise, rowwise_triton
from .lora_linear import merge, reference, triton_kernels
from .lora_linear.bases import fp8_weight

_ROWS, _WIDTH, _RANK, _HEADS, _SEED = 72, 48, 16, 4, 7


def differences(device: torch.device) -> dict[str, float]:
    """Relative difference of each kernel's results, by its name, on bf16 inputs."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(device, torch.bfloat16)

    grad, hidden, up, down = random(_ROWS, _WIDTH), random(_ROWS, _RANK), random(_WIDTH, _RANK), random(_RANK, _WIDTH)
    base = fp8_weight(random(_WIDTH, _WIDTH).to(torch.float8_e4m3fn), 0.5)
    target = torch.empty(_WIDTH, _WIDTH, device=device, dtype=torch.bfloat16)
    found = {
        "one pass": _ratio(triton_kernels.hidden_and_up_gradient(grad, hidden, up), reference.hidden_and_up_gradient(grad, hidden, up)),
        "unpack": _ratio([triton_kernels.dequantise_into(target.clone(), base)], [base.dequantised(torch.bfloat16)]),
        "merge": _ratio(
            [triton_kernels.merge_into(target.clone(), base, down, up, 0.5, _SEED)], [merge.merge_into(target.clone(), base, down, up, 0.5, _SEED)]
        ),
    }
    return found | _row_by_row(random, device)


def _row_by_row(random: Callable[..., torch.Tensor], device: torch.device) -> dict[str, float]:
    x, y, shift, scale = random(1, _ROWS, _WIDTH), random(1, _ROWS, _WIDTH), random(1, 1, _WIDTH), random(1, 1, _WIDTH)
    norm = torch.nn.LayerNorm(_WIDTH, elementwise_affine=False)
    rms = torch.nn.RMSNorm(_WIDTH, eps=1e-6, device=device, dtype=torch.bfloat16).requires_grad_(False)
    turns = random(1, _ROWS, 1, _WIDTH // _HEADS // 2, 2, 2).float()
    cases = {
        "modulated": (rowwise.Modulated(norm), [x], [shift, scale]),
        "gated": (rowwise.Gated(), [x, y], [scale]),
        "rotated": (rowwise.Rotated(rms, _HEADS), [x, turns], []),
    }
    found = {}
    for name, (function, rows, shared) in cases.items():
        leaves = [value.detach().requires_grad_(value is not turns) for value in (*rows, *shared)]
        with torch.enable_grad():
            wanted = function(*leaves)
            wanted_grads = torch.autograd.grad(wanted, [leaf for leaf in leaves if leaf.requires_grad], y)
        out = rowwise_triton.forward(function, rows, shared, torch.empty_like(x))
        grads = rowwise_triton.backward(function, rows, shared, y, [leaf.requires_grad for leaf in leaves])
        found[name] = _ratio([out, *(value for value in grads if value is not None)], [wanted, *wanted_grads])
    return found


def _ratio(found, wanted) -> float:
    pairs = ((one.detach().float(), other.detach().float()) for one, other in zip(found, wanted, strict=True))
    return max(float((one - other).norm() / other.norm()) for one, other in pairs)

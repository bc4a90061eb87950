"""The LoRA linear written down plainly; every other form is compared with this one, output and all gradients.

Shapes: M rows, I in features, O out features, R rank.
"""

from __future__ import annotations

import torch
from torch.nn import functional


def lora_linear(
    x_MI: torch.Tensor, weight_OI: torch.Tensor, bias_O: torch.Tensor | None, down_RI: torch.Tensor, up_OR: torch.Tensor, factor: float
) -> torch.Tensor:
    """x W^T + b + factor * (x A^T) B^T, differentiable in everything.

    Args:
        x_MI: [..., I], any float type; the products run in it.
        down_RI, up_OR: the masters, usually fp32.

    Returns:
        [..., O] in the type of `x_MI`.
    """
    hidden = functional.linear(x_MI, down_RI.to(x_MI.dtype))
    return functional.linear(x_MI, weight_OI, bias_O) + functional.linear(hidden, (up_OR * factor).to(x_MI.dtype))


def merged_weight(weight_OI: torch.Tensor, down_RI: torch.Tensor, up_OR: torch.Tensor, factor: float) -> torch.Tensor:
    """W + factor * B A in fp32, not rounded."""
    return weight_OI.float() + factor * (up_OR.float() @ down_RI.float())


def hidden_and_up_gradient(grad_MO: torch.Tensor, hidden_MR: torch.Tensor, up_OR: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The two products that read dY: dS = dY B [M, R] and dB = dY^T S [O, R], both in fp32; `up_OR` holds factor * B."""
    grad = grad_MO.float()
    return grad @ up_OR.float(), grad.T @ hidden_MR.float()

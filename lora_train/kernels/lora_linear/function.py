"""The exact LoRA linear with its own backward: forward in one product over I + R where the buffer allows it, dY read once for dS and dB.

Saved for backward: x (one tensor, shared by q, k and v, which read the same one) and S = x A^T [M, R]; never an [M, O] temporary or an fp32 copy.
"""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable

from . import kernels
from .rows import extended


class Operands:
    """A frozen weight and its LoRA in the compute type, on the compute device; made once per call from the fp32 masters."""

    def __init__(
        self, weight_OI: torch.Tensor, bias_O: torch.Tensor | None, down_RI: torch.Tensor, up_OR: torch.Tensor, factor: float, buffer: torch.Tensor | None
    ) -> None:
        self.weight, self.bias, self.factor, self.buffer = weight_OI.detach(), bias_O, factor, buffer
        to = {"device": weight_OI.device, "dtype": weight_OI.dtype}
        self.down = down_RI.detach().to(**to)
        self.up = (up_OR.detach() * factor).to(**to)
        if buffer is not None:
            buffer[:, weight_OI.shape[1] :] = self.up

    def forward(self, x: torch.Tensor, has_room: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """y [M, O] and S [M, R] for x [..., I]."""
        in_features = self.weight.shape[1]
        wide = extended(x, self.down.shape[0]) if has_room and self.buffer is not None else None
        if wide is None:
            rows = x.reshape(-1, in_features)
            hidden = rows @ self.down.t()
            y = _addmm(self.bias, rows, self.weight)
            return y.addmm_(hidden, self.up.t()), hidden
        hidden = wide[:, :in_features] @ self.down.t()
        wide[:, in_features:] = hidden
        return _addmm(self.bias, wide, self.buffer), hidden

    def backward(
        self, grad: torch.Tensor, x: torch.Tensor, hidden: torch.Tensor, needs: tuple[bool, bool, bool]
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """dX [M, I], dA and dB (fp32) for dY [..., O]; `needs` says which of (x, down, up)."""
        out_features, in_features = self.weight.shape
        grad_rows = grad.reshape(-1, out_features)
        grad_hidden, grad_up = kernels.hidden_and_up_gradient(grad_rows, hidden, self.up)
        rows = x.reshape(-1, in_features)
        grad_x = (grad_rows @ self.weight).addmm_(grad_hidden, self.down) if needs[0] else None
        grad_down = kernels.mm_fp32(grad_hidden.t(), rows) if needs[1] else None
        return grad_x, grad_down, grad_up * self.factor if needs[2] else None


def _addmm(bias: torch.Tensor | None, rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return rows @ weight.t() if bias is None else torch.addmm(bias.to(rows.dtype), rows, weight.t())


class ExactLoraLinear(torch.autograd.Function):
    """See `lora_linear` in the package."""

    @staticmethod
    def forward(ctx, x, down, up, weight, bias, factor, buffer, has_room):
        operands = Operands(weight, bias, down, up, factor, buffer)
        y, hidden = operands.forward(x, has_room)
        ctx.save_for_backward(x, hidden, down, up)
        ctx.frozen = (weight, bias, factor, buffer)
        return y.view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, hidden, down, up = ctx.saved_tensors
        weight, bias, factor, buffer = ctx.frozen
        operands = Operands(weight, bias, down, up, factor, buffer)
        grad_x, grad_down, grad_up = operands.backward(grad, x, hidden, ctx.needs_input_grad[:3])
        grad_x = None if grad_x is None else grad_x.view(x.shape)
        grad_down, grad_up = (
            None if value is None else value.to(master.device, master.dtype) for value, master in ((grad_down, down), (grad_up, up))
        )
        return grad_x, grad_down, grad_up, None, None, None, None, None

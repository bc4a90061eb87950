"""Row-by-row functions that save their inputs only: norms with modulation, RMS norm with rotary embedding, gates, GELU.

Applied by torch these keep up to six tensors of the stream's size for backward, some in fp32. Here the forward runs in pieces of the token axis, and
the backward runs each piece again, so that what is in between exists for one piece at a time. The function given is its own reference;
`rowwise_triton.py` has kernels for three of them, which run where `engine.kernels` chose Triton.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.autograd.function import once_differentiable

from .lora_linear.kernels import is_triton
from .lora_linear.rows import empty_with_room


def rowwise(
    function: Callable[..., torch.Tensor], rows: Sequence[torch.Tensor], shared: Sequence[torch.Tensor] = (), *, chunk: int = 0, room: int = 0
) -> torch.Tensor:
    """Apply `function` in pieces of dimension 1.

    Args:
        function: takes pieces of `rows`, then `shared`; gives [B, l, ...] of one width; must treat every row alike.
        rows: [B or 1, L, ...] each; the first one sets type and width of the result.
        shared: tensors that every row sees, such as [B, 1, D]; their gradients are summed in fp32.
        chunk: rows per piece; 0 takes all at once.
        room: spare elements behind every row of the result (`rows.empty_with_room`).
    """
    return _Rowwise.apply(function, len(rows), chunk, room, *rows, *shared)


class _Rowwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx, function, row_count, chunk, room, *tensors):
        ctx.call = (function, row_count, chunk)
        ctx.save_for_backward(*tensors)
        rows, shared = tensors[:row_count], tensors[row_count:]
        fused = _fused(function, rows, shared)
        if fused is not None:
            return fused.forward(function, rows, shared, empty_with_room(rows[0].shape, room, dtype=rows[0].dtype, device=rows[0].device))
        out = None
        for start, stop in pieces(rows[0].shape[1], chunk):
            part = function(*(value[:, start:stop] for value in rows), *shared)
            if out is None:
                if not room and stop == rows[0].shape[1]:
                    return part
                out = empty_with_room((part.shape[0], rows[0].shape[1], *part.shape[2:]), room, dtype=part.dtype, device=part.device)
            out[:, start:stop] = part
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        function, row_count, chunk = ctx.call
        tensors = ctx.saved_tensors
        needs = ctx.needs_input_grad[4:]
        fused = _fused(function, tensors[:row_count], tensors[row_count:])
        if fused is not None:
            found = fused.backward(function, tensors[:row_count], tensors[row_count:], grad, needs)
            return None, None, None, None, *(None if value is None else value.to(one.dtype) for value, one in zip(found, tensors, strict=True))
        sums: list[torch.Tensor | None] = [None] * len(tensors)
        length = tensors[0].shape[1]
        for start, stop in pieces(length, chunk):
            leaves = [
                (value[:, start:stop] if index < row_count else value).detach().requires_grad_(needed)
                for index, (value, needed) in enumerate(zip(tensors, needs, strict=True))
            ]
            with torch.enable_grad():
                part = function(*leaves)
            wanted = [index for index, needed in enumerate(needs) if needed]
            for index, value in zip(wanted, torch.autograd.grad(part, [leaves[index] for index in wanted], grad[:, start:stop]), strict=True):
                whole = index >= row_count or stop - start == length
                sums[index] = _added(sums[index], value, tensors[index], None if whole else (start, stop))
            del part, leaves
        return None, None, None, None, *(None if total is None else total.to(value.dtype) for total, value in zip(sums, tensors, strict=True))


@torch.no_grad()
def rowwise_backward(
    function: Callable[..., torch.Tensor], x: torch.Tensor, other: torch.Tensor, grad: torch.Tensor, chunk: int = 0
) -> torch.Tensor:
    """Gradient of x for function(x, other), both row by row; written over `grad`, which has the shape of x."""
    fused = _fused(function, (x, other), ())
    if fused is not None and grad.is_contiguous():
        fused.backward(function, (x, other), (), grad, (True, False), into=grad)
        return grad
    for start, stop in pieces(x.shape[1], chunk):
        leaf = x[:, start:stop].detach().requires_grad_()
        with torch.enable_grad():
            part = function(leaf, other[:, start:stop])
        grad[:, start:stop] = torch.autograd.grad(part, leaf, grad[:, start:stop])[0]
    return grad


def _fused(function: Callable, rows: Sequence[torch.Tensor], shared: Sequence[torch.Tensor]):
    """The module of the Triton kernels, where they were chosen and have one for this call."""
    if not is_triton():
        return None
    from . import rowwise_triton

    return rowwise_triton if rowwise_triton.takes(function, rows, shared) else None


def _added(total: torch.Tensor | None, value: torch.Tensor, like: torch.Tensor, place: tuple[int, int] | None) -> torch.Tensor:
    if place is not None:
        total = torch.empty_like(like) if total is None else total
        total[:, place[0] : place[1]] = value
        return total
    if total is None:
        return value
    return total.to(torch.promote_types(total.dtype, torch.float32)) + value


def pieces(length: int, chunk: int) -> list[tuple[int, int]]:
    """(start, stop) of the pieces of an axis."""
    step = chunk if 0 < chunk < length else length
    return [(start, min(start + step, length)) for start in range(0, length, step)]


@dataclass(frozen=True)
class Modulated:
    """(x, shift, scale) -> norm(x) * (1 + scale) + shift."""

    norm: Callable[[torch.Tensor], torch.Tensor]

    def __call__(self, x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return torch.addcmul(shift, self.norm(x), 1 + scale)


@dataclass(frozen=True)
class Gated:
    """(x, y, gate) -> x + y * gate."""

    def __call__(self, x: torch.Tensor, y: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        return torch.addcmul(x, y, gate)


@dataclass(frozen=True)
class Rotated:
    """(q [B, l, D], rotations [1, l, 1, K/2, 2, 2]) -> rotary embedding of norm(q), [B, l, D], computed in the rotations' type (fp32).

    Source: Su et al., RoFormer (arXiv 2104.09864): each pair of features is turned by an angle that follows its position.
    """

    norm: Callable[[torch.Tensor], torch.Tensor]
    heads: int

    def __call__(self, q: torch.Tensor, rotations: torch.Tensor) -> torch.Tensor:
        normed = self.norm(q)
        pairs = normed.unflatten(-1, (self.heads, -1)).to(rotations.dtype).unflatten(-1, (-1, 1, 2))
        turned = torch.addcmul(rotations[..., 0] * pairs[..., 0], rotations[..., 1], pairs[..., 1])
        return turned.reshape(normed.shape).to(normed.dtype)

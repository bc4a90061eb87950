"""Triton forms of the block's row-by-row functions: modulated LayerNorm, RMS norm with rotary embedding, gate with residual.

One read and one write of the stream each, all arithmetic in fp32 and one rounding; backward computes mean and norm again instead of reading them. Sums over
rows go through one buffer per program, without atomics: the same bits in every run. The plain functions in `rowwise.py` are the reference. GELU, plain RMS
norm and affine LayerNorm are one kernel each in torch already and stay there.

Import this module only where Triton is installed. `TRITON_INTERPRET=1` runs it on the CPU.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from .rowwise import Gated, Modulated, Rotated

_ROWS = 64  # of one program whose sums are added up; fewer would enlarge the buffer of partial sums
_WIDEST = 16384


def takes(function, rows: Sequence[torch.Tensor], shared: Sequence[torch.Tensor]) -> bool:
    """Whether there is a kernel for this call: known function, one float type of at most 32 bits, rows that fit a program."""
    x = rows[0]
    same = (*rows[:1], *shared) if isinstance(function, Rotated) else (*rows, *shared)
    if x.ndim != 3 or x.shape[-1] > _WIDEST or x.dtype == torch.float64 or any(value.dtype != x.dtype for value in same):
        return False
    if any(value.shape != (x.shape[0], 1, x.shape[-1]) for value in shared):
        return False
    if isinstance(function, Modulated):
        return isinstance(function.norm, torch.nn.LayerNorm) and function.norm.weight is None and len(function.norm.normalized_shape) == 1
    if isinstance(function, Rotated):
        is_norm = isinstance(function.norm, torch.nn.RMSNorm) and function.norm.weight is not None and function.norm.eps is not None
        return is_norm and rows[1].shape[0] == 1 and rows[1].dtype == torch.float32
    return isinstance(function, Gated) and rows[0].shape == rows[1].shape


def forward(function, rows: Sequence[torch.Tensor], shared: Sequence[torch.Tensor], out: torch.Tensor) -> torch.Tensor:
    """Write function(*rows, *shared) into `out` [B, L, D], whose rows may have room."""
    x = _flat(rows[0])
    target, (_, length, width) = out.flatten(0, 1), rows[0].shape
    sizes = (length, width, x.stride(0), target.stride(0))
    grid, wide = (len(x),), triton.next_power_of_2(width)
    if isinstance(function, Modulated):
        _modulated[grid](x, *map(_row, shared), target, *sizes, function.norm.eps, WIDE=wide)
    elif isinstance(function, Rotated):
        turns, half = _turns(rows[1])
        _rotated[grid](x, function.norm.weight, turns, target, *sizes, half, function.norm.eps, WIDE=max(1, wide // 2))
    else:
        y = _flat(rows[1])
        _gated[grid](x, y, _row(shared[0]), target, *sizes, y.stride(0), WIDE=wide)
    return out


def backward(
    function, rows: Sequence[torch.Tensor], shared: Sequence[torch.Tensor], grad: torch.Tensor, needs: Sequence[bool], into: torch.Tensor | None = None
) -> list[torch.Tensor | None]:
    """Gradients of `rows` and `shared`, None where `needs` says so; those of `shared` in fp32.

    Args:
        into: where the gradient of rows[0] is written in the rotated form; may be `grad`.
    """
    batch, length, width = rows[0].shape
    x, given = _flat(rows[0]), _flat(grad)
    wide = triton.next_power_of_2(width)
    if isinstance(function, Rotated):
        grad_x, (turns, half) = torch.empty_like(x) if into is None else _flat(into), _turns(rows[1])
        sizes = (length, width, x.stride(0), given.stride(0), grad_x.stride(0), half)
        _rotated_backward[(len(x),)](x, function.norm.weight, turns, given, grad_x, *sizes, function.norm.eps, WIDE=max(1, wide // 2))
        return [grad_x.view(rows[0].shape), None]
    programs = triton.cdiv(length, _ROWS)
    sums = [torch.empty(batch, programs, width, dtype=torch.float32, device=x.device) for _ in shared]
    if isinstance(function, Modulated):
        grad_x = torch.empty_like(x)
        sizes = (length, width, x.stride(0), given.stride(0), grad_x.stride(0))
        _modulated_backward[(programs, batch)](x, _row(shared[1]), given, grad_x, *sums, *sizes, function.norm.eps, ROWS=_ROWS, WIDE=wide)
        found = [grad_x.view(rows[0].shape)]
    else:
        y = _flat(rows[1])
        grad_y = torch.empty_like(y)
        sizes = (length, width, y.stride(0), given.stride(0), grad_y.stride(0))
        _gated_backward[(programs, batch)](y, _row(shared[0]), given, grad_y, *sums, *sizes, ROWS=_ROWS, WIDE=wide)
        found = [grad, grad_y.view(rows[1].shape)]
    found += [total.sum(1, keepdim=True) for total in sums]
    return [value if needed else None for value, needed in zip(found, needs, strict=True)]


def _flat(value: torch.Tensor) -> torch.Tensor:
    """[B * L, D] with rows of neighbouring elements, over the same memory where that can be."""
    flat = value.reshape(-1, value.shape[-1])
    return flat if flat.stride(1) == 1 else flat.contiguous()


def _row(value: torch.Tensor) -> torch.Tensor:
    return value.contiguous()


def _turns(rotations: torch.Tensor) -> tuple[torch.Tensor, int]:
    """[L, K / 2, 4] and K / 2."""
    flat = rotations.reshape(rotations.shape[1], -1, 4).contiguous()
    return flat, flat.shape[1]


@triton.jit
def _modulated(x, shift, scale, out, length, width, x_stride, out_stride, eps, WIDE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDE)
    mask = column < width
    value = tl.load(x + row * x_stride + column, mask=mask, other=0.0).to(tl.float32)
    centred = tl.where(mask, value - tl.sum(value, 0) / width, 0.0)
    normed = centred / tl.sqrt(tl.sum(centred * centred, 0) / width + eps)
    place = row // length * width + column
    factor = 1 + tl.load(scale + place, mask=mask, other=0.0).to(tl.float32)
    result = tl.load(shift + place, mask=mask, other=0.0).to(tl.float32) + normed * factor
    tl.store(out + row * out_stride + column, result.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _modulated_backward(
    x, scale, grad, grad_x, sum_shift, sum_scale, length, width, x_stride, grad_stride, grad_x_stride, eps, ROWS: tl.constexpr, WIDE: tl.constexpr
):  # fmt: skip
    program, batch = tl.program_id(0), tl.program_id(1).to(tl.int64)
    column = tl.arange(0, WIDE)
    inside = column < width
    factor = 1 + tl.load(scale + batch * width + column, mask=inside, other=0.0).to(tl.float32)
    shifts = tl.zeros((WIDE,), dtype=tl.float32)
    scales = tl.zeros((WIDE,), dtype=tl.float32)
    for step in range(ROWS):
        token = program * ROWS + step
        row = batch * length + token
        mask = inside & (token < length)
        value = tl.load(x + row * x_stride + column, mask=mask, other=0.0).to(tl.float32)
        centred = tl.where(mask, value - tl.sum(value, 0) / width, 0.0)
        inverse = 1 / tl.sqrt(tl.sum(centred * centred, 0) / width + eps)
        normed = centred * inverse
        given = tl.load(grad + row * grad_stride + column, mask=mask, other=0.0).to(tl.float32)
        shifts += given
        scales += given * normed
        inner = given * factor
        result = inverse * (inner - tl.sum(inner, 0) / width - normed * (tl.sum(inner * normed, 0) / width))
        tl.store(grad_x + row * grad_x_stride + column, result.to(grad_x.dtype.element_ty), mask=mask)
    place = (batch * tl.num_programs(0) + program) * width + column
    tl.store(sum_shift + place, shifts, mask=inside)
    tl.store(sum_scale + place, scales, mask=inside)


@triton.jit
def _rotated(x, weight, turns, out, length, width, x_stride, out_stride, half, eps, WIDE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    pair = tl.arange(0, WIDE)
    mask = pair * 2 < width
    first = tl.load(x + row * x_stride + 2 * pair, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(x + row * x_stride + 2 * pair + 1, mask=mask, other=0.0).to(tl.float32)
    inverse = 1 / tl.sqrt((tl.sum(first * first, 0) + tl.sum(second * second, 0)) / width + eps)
    first = first * inverse * tl.load(weight + 2 * pair, mask=mask, other=0.0).to(tl.float32)
    second = second * inverse * tl.load(weight + 2 * pair + 1, mask=mask, other=0.0).to(tl.float32)
    turn = turns + (row % length * half + pair % half) * 4
    result_first = tl.load(turn, mask=mask, other=0.0) * first + tl.load(turn + 1, mask=mask, other=0.0) * second
    result_second = tl.load(turn + 2, mask=mask, other=0.0) * first + tl.load(turn + 3, mask=mask, other=0.0) * second
    target = out + row * out_stride + 2 * pair
    tl.store(target, result_first.to(out.dtype.element_ty), mask=mask)
    tl.store(target + 1, result_second.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _rotated_backward(x, weight, turns, grad, grad_x, length, width, x_stride, grad_stride, grad_x_stride, half, eps, WIDE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    pair = tl.arange(0, WIDE)
    mask = pair * 2 < width
    first = tl.load(x + row * x_stride + 2 * pair, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(x + row * x_stride + 2 * pair + 1, mask=mask, other=0.0).to(tl.float32)
    inverse = 1 / tl.sqrt((tl.sum(first * first, 0) + tl.sum(second * second, 0)) / width + eps)
    first, second = first * inverse, second * inverse
    given_first = tl.load(grad + row * grad_stride + 2 * pair, mask=mask, other=0.0).to(tl.float32)
    given_second = tl.load(grad + row * grad_stride + 2 * pair + 1, mask=mask, other=0.0).to(tl.float32)
    turn = turns + (row % length * half + pair % half) * 4
    inner_first = tl.load(turn, mask=mask, other=0.0) * given_first + tl.load(turn + 2, mask=mask, other=0.0) * given_second
    inner_second = tl.load(turn + 1, mask=mask, other=0.0) * given_first + tl.load(turn + 3, mask=mask, other=0.0) * given_second
    inner_first *= tl.load(weight + 2 * pair, mask=mask, other=0.0).to(tl.float32)
    inner_second *= tl.load(weight + 2 * pair + 1, mask=mask, other=0.0).to(tl.float32)
    share = (tl.sum(inner_first * first, 0) + tl.sum(inner_second * second, 0)) / width
    target = grad_x + row * grad_x_stride + 2 * pair
    tl.store(target, (inverse * (inner_first - first * share)).to(grad_x.dtype.element_ty), mask=mask)
    tl.store(target + 1, (inverse * (inner_second - second * share)).to(grad_x.dtype.element_ty), mask=mask)


@triton.jit
def _gated(x, y, gate, out, length, width, x_stride, out_stride, y_stride, WIDE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDE)
    mask = column < width
    factor = tl.load(gate + row // length * width + column, mask=mask, other=0.0).to(tl.float32)
    added = tl.load(y + row * y_stride + column, mask=mask, other=0.0).to(tl.float32) * factor
    result = tl.load(x + row * x_stride + column, mask=mask, other=0.0).to(tl.float32) + added
    tl.store(out + row * out_stride + column, result.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _gated_backward(y, gate, grad, grad_y, sum_gate, length, width, y_stride, grad_stride, grad_y_stride, ROWS: tl.constexpr, WIDE: tl.constexpr):
    program, batch = tl.program_id(0), tl.program_id(1).to(tl.int64)
    column = tl.arange(0, WIDE)
    inside = column < width
    factor = tl.load(gate + batch * width + column, mask=inside, other=0.0).to(tl.float32)
    gates = tl.zeros((WIDE,), dtype=tl.float32)
    for step in range(ROWS):
        token = program * ROWS + step
        row = batch * length + token
        mask = inside & (token < length)
        given = tl.load(grad + row * grad_stride + column, mask=mask, other=0.0).to(tl.float32)
        gates += given * tl.load(y + row * y_stride + column, mask=mask, other=0.0).to(tl.float32)
        tl.store(grad_y + row * grad_y_stride + column, (given * factor).to(grad_y.dtype.element_ty), mask=mask)
    tl.store(sum_gate + (batch * tl.num_programs(0) + program) * width + column, gates, mask=inside)

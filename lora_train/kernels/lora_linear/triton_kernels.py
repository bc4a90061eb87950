"""Triton forms of the kernels around the products: one pass over dY, unpacking a base, and merging inside the unpacking.

All are deterministic: sums over row blocks go through one buffer per program and are added in a fixed order, without atomics.
Import this module only where Triton is installed (it is optional: Windows and CPU work without). `TRITON_INTERPRET=1` runs it on the CPU.
"""

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl

from .bases import QuantisedWeight

_ROWS, _COLUMNS = 64, 64
_PROGRAMS = 264  # two per multiprocessor of the largest card in use; more would only enlarge the buffer of partial sums

# The interpreter multiplies the bit patterns of bf16 as if they were numbers; there, operands are widened first.
_IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@triton.jit
def _one_pass(
    grad, hidden, up, grad_hidden, partial, rows_total, grad_stride, hidden_stride, up_stride,
    columns: tl.constexpr, blocks: tl.constexpr, WIDEN: tl.constexpr,
    RANK: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    ranks = tl.arange(0, WIDE)
    rank_mask = ranks[None, :] < RANK
    for block in range(blocks):
        rows = ((program * blocks + block) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        row_mask = rows[:, None] < rows_total
        s = tl.load(hidden + rows[:, None] * hidden_stride + ranks[None, :], mask=row_mask & rank_mask, other=0.0)
        total = tl.zeros((ROWS, WIDE), dtype=tl.float32)
        for start in range(0, columns, COLUMNS):
            column = start + tl.arange(0, COLUMNS)
            dy = tl.load(grad + rows[:, None] * grad_stride + column[None, :], mask=row_mask & (column[None, :] < columns), other=0.0)
            weight_mask = (column[:, None] < columns) & rank_mask
            b = tl.load(up + column[:, None] * up_stride + ranks[None, :], mask=weight_mask, other=0.0)
            if WIDEN:
                dy, b, s = dy.to(tl.float32), b.to(tl.float32), s.to(tl.float32)
            total += tl.dot(dy, b, input_precision=PRECISION)
            share = tl.dot(tl.trans(dy), s, input_precision=PRECISION)
            place = partial + (program.to(tl.int64) * columns + column[:, None]) * RANK + ranks[None, :]
            if block > 0:
                share += tl.load(place, mask=weight_mask, other=0.0)
            tl.store(place, share, mask=weight_mask)
        tl.store(grad_hidden + rows[:, None] * RANK + ranks[None, :], total.to(grad_hidden.dtype.element_ty), mask=row_mask & rank_mask)
        # The next row block reads what this one stored.
        tl.debug_barrier()


def hidden_and_up_gradient(grad_MO: torch.Tensor, hidden_MR: torch.Tensor, up_OR: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """dS = dY sB [M, R] in the type of dY and dY^T S [O, R] in fp32, reading dY once; rows of dY may have a stride."""
    rows, columns = grad_MO.shape
    rank = hidden_MR.shape[1]
    programs = max(1, min(_PROGRAMS, triton.cdiv(rows, _ROWS)))
    blocks = triton.cdiv(triton.cdiv(rows, _ROWS), programs)
    grad_hidden = torch.empty(rows, rank, dtype=grad_MO.dtype, device=grad_MO.device)
    partial = torch.empty(programs, columns, rank, dtype=torch.float32, device=grad_MO.device)
    grad = grad_MO if grad_MO.stride(1) == 1 else grad_MO.contiguous()
    hidden, up = hidden_MR.contiguous(), up_OR.contiguous()
    _one_pass[(programs,)](
        grad, hidden, up, grad_hidden, partial, rows, grad.stride(0), hidden.stride(0), up.stride(0), columns=columns, blocks=blocks, WIDEN=_IS_INTERPRETED,
        RANK=rank, WIDE=max(16, triton.next_power_of_2(rank)), ROWS=_ROWS, COLUMNS=_COLUMNS, PRECISION="ieee",
    )  # fmt: skip
    return grad_hidden, partial.sum(0)


@triton.jit
def _mixed(x):
    x = x ^ (x >> 16)
    x = x * 0x7FEB352D
    x = x ^ (x >> 15)
    x = x * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _e4m3(byte):
    """fp8 e4m3fn bits to fp32, exactly."""
    bits = byte.to(tl.int32)
    magnitude = bits & 0x7F
    normal = (((magnitude >> 3) + 120) << 23) | ((magnitude & 7) << 20)
    small = (magnitude & 7).to(tl.float32) * 0.001953125
    value = tl.where(magnitude < 8, small, normal.to(tl.float32, bitcast=True))
    return tl.where(bits > 127, -value, value)


@triton.jit
def _e5m2(byte):
    """fp8 e5m2 bits to fp32, exactly: they are the upper half of an fp16."""
    return (byte.to(tl.int16) << 8).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _unpacked(base, row, column, base_stride, scale, mask, KIND: tl.constexpr):
    """The base's numbers in fp32. KIND: 0 floats, 1 fp8 e4m3, 2 fp8 e5m2, 3 GGUF Q8_0 (an fp16 scale before every 32 bytes)."""
    start = base + row.to(tl.int64) * base_stride
    if KIND == 3:
        block = start + column // 32 * 34
        low = tl.load(block, mask=mask, other=0).to(tl.int16)
        high = tl.load(block + 1, mask=mask, other=0).to(tl.int16)
        factor = (low | (high << 8)).to(tl.float16, bitcast=True).to(tl.float32)
        number = tl.load(block + 2 + column % 32, mask=mask, other=0).to(tl.int8, bitcast=True).to(tl.float32)
        return number * factor
    stored = tl.load(start + column, mask=mask, other=0)
    if KIND == 2:
        return _e5m2(stored) * scale
    if KIND == 1:
        return _e4m3(stored) * scale
    return stored.to(tl.float32)


@triton.jit
def _merge(
    target, base, down, up, scale, factor, seed, outs, ins, target_stride, base_stride,
    rank: tl.constexpr, KIND: tl.constexpr, RANKS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    column = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    mask = (row < outs) & (column < ins)
    delta = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for start in range(0, rank, RANKS):
        ranks = start + tl.arange(0, RANKS)
        b = tl.load(up + row * rank + ranks[None, :], mask=(row < outs) & (ranks[None, :] < rank), other=0.0)
        a = tl.load(down + ranks[:, None] * ins + column, mask=(ranks[:, None] < rank) & (column < ins), other=0.0)
        delta += tl.dot(b, a, input_precision=PRECISION)
    value = _unpacked(base, row, column, base_stride, scale, mask, KIND) + delta * factor
    # A scalar that fits 32 bits arrives as a signed or unsigned integer by its value; the hash is over unsigned ones.
    random = _mixed((row * ins + column).to(tl.uint32) ^ seed.to(tl.uint32)) & 0xFFFF
    bits = (value.to(tl.uint32, bitcast=True) + random) & 0xFFFF0000
    tl.store(target + row.to(tl.int64) * target_stride + column, bits.to(tl.float32, bitcast=True).to(tl.bfloat16), mask=mask)


@triton.jit
def _dequantise(target, base, scale, outs, ins, target_stride, base_stride, KIND: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    column = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    mask = (row < outs) & (column < ins)
    value = _unpacked(base, row, column, base_stride, scale, mask, KIND)
    # To the nearest, ties to even, on the bits: the interpreter's conversion cuts off.
    bits = value.to(tl.uint32, bitcast=True)
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    tl.store(target + row.to(tl.int64) * target_stride + column, bits.to(tl.float32, bitcast=True).to(tl.bfloat16), mask=mask)


def _kind(base: torch.Tensor | QuantisedWeight) -> int | None:
    if not isinstance(base, QuantisedWeight):
        return 0
    return {"fp8": {torch.float8_e4m3fn: 1, torch.float8_e5m2: 2}.get(base.data.dtype), "q8_0": 3}.get(base.kind)


def can_read(base: torch.Tensor | QuantisedWeight) -> bool:
    """Whether there is a kernel for this base: floats, fp8, or GGUF's Q8_0."""
    return _kind(base) is not None


def _stored(base: torch.Tensor | QuantisedWeight) -> tuple[torch.Tensor, float]:
    return (base.data.view(torch.uint8), base.scale) if isinstance(base, QuantisedWeight) else (base, 1.0)


@torch.no_grad()
def merge_into(
    target_OI: torch.Tensor, base: torch.Tensor | QuantisedWeight, down_RI: torch.Tensor, up_OR: torch.Tensor, factor: float, seed: int
) -> torch.Tensor:
    """As `merge.merge_into`, for a bf16 target and a base that `can_read` takes; one read and one write of the weight."""
    outs, ins = target_OI.shape
    stored, scale = _stored(base)
    down = down_RI.detach().to(target_OI.device, torch.float32).contiguous()
    up = up_OR.detach().to(target_OI.device, torch.float32).contiguous()
    _merge[_grid(target_OI)](
        target_OI, stored, down, up, scale, factor, seed, outs, ins, target_OI.stride(0), stored.stride(0),
        rank=down.shape[0], KIND=_kind(base), RANKS=16, ROWS=_ROWS, COLUMNS=_COLUMNS, PRECISION="tf32x3",
    )  # fmt: skip
    return target_OI


@torch.no_grad()
def dequantise_into(target_OI: torch.Tensor, base: QuantisedWeight) -> torch.Tensor:
    """As `QuantisedWeight.dequantise_into`, for a bf16 target and a base that `can_read` takes: no fp32 in memory."""
    stored, scale = _stored(base)
    _dequantise[_grid(target_OI)](
        target_OI, stored, scale, *target_OI.shape, target_OI.stride(0), stored.stride(0), KIND=_kind(base), ROWS=_ROWS, COLUMNS=_COLUMNS
    )
    return target_OI


def _grid(target_OI: torch.Tensor) -> tuple[int, int]:
    return triton.cdiv(target_OI.shape[0], _ROWS), triton.cdiv(target_OI.shape[1], _COLUMNS)

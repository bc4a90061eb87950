"""Frozen base weights that are stored small and multiplied in the compute type: fp8 with a scale, and GGUF's blocks.

What a file may hold is decided in `lora_train/weight_formats.py`, by its header.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...gguf_file import BLOCKS
from .gguf_blocks import UNPACK

FP8_TYPES = (torch.float8_e4m3fn, torch.float8_e5m2)
# Elements that exist in fp32 at a time.
CHUNK_ELEMENTS = 1 << 22


@dataclass(frozen=True, kw_only=True)
class QuantisedWeight:
    """A stored weight.

    Attributes:
        data: fp8 [O, I], or the raw GGUF bytes as uint8 [O, bytes of a row].
        kind: `fp8`, or a kind of `gguf_file.BLOCKS`.
        scale: of an fp8 weight; 1 where the file has none.
        shape: (O, I).
    """

    data: torch.Tensor
    kind: str
    scale: float
    shape: tuple[int, int]

    @property
    def nbytes(self) -> int:
        return self.data.numel() * self.data.element_size()

    def dequantised(self, dtype: torch.dtype) -> torch.Tensor:
        """[O, I] in `dtype`; rounded to nearest where `dtype` is coarser than fp32."""
        return self.dequantise_into(torch.empty(self.shape, dtype=dtype, device=self.data.device))

    def dequantise_into(self, target_OI: torch.Tensor) -> torch.Tensor:
        """The same written into `target_OI`, which may have a row stride; fp32 exists for a few rows at a time."""
        rows = max(1, CHUNK_ELEMENTS // self.shape[1])
        for start in range(0, self.shape[0], rows):
            stop = min(start + rows, self.shape[0])
            target_OI[start:stop] = self.dequantised_rows(start, stop)
        return target_OI

    def dequantised_rows(self, start: int, stop: int) -> torch.Tensor:
        """Rows `start` to `stop` in fp32."""
        rows = self.data[start:stop]
        if self.kind == "fp8":
            return rows.float() * self.scale
        return UNPACK[self.kind](rows.reshape(-1, BLOCKS[self.kind][1])).view(rows.shape[0], self.shape[1])


def fp8_weight(weight: torch.Tensor, scale: torch.Tensor | float | None = None, name: str = "weight") -> QuantisedWeight:
    """Wrap an fp8 weight of either ComfyUI key generation.

    Args:
        weight: [O, I] fp8.
        scale: `.scale_weight` or `.weight_scale`, a scalar; None means 1.

    Raises:
        ValueError: not fp8, or a scale per row or block.
    """
    if weight.dtype not in FP8_TYPES:
        raise ValueError(f"{name} is {weight.dtype}, not fp8; use the bf16 file or one with scaled fp8 weights")
    if isinstance(scale, torch.Tensor):
        if scale.numel() != 1:
            raise ValueError(f"{name} has {scale.numel()} scales, but one per weight is expected; use ComfyUI's own fp8 file of the model")
        scale = float(scale.float())
    return QuantisedWeight(data=weight, kind="fp8", scale=1.0 if scale is None else scale, shape=tuple(weight.shape))


def gguf_weight(data: torch.Tensor, kind: str, shape: tuple[int, int]) -> QuantisedWeight:
    """Wrap the raw bytes of a GGUF tensor.

    Raises:
        ValueError: another block format, or a byte count that does not fit.
    """
    if kind not in BLOCKS:
        raise ValueError(f"GGUF type {kind!r} cannot be trained through; use {', '.join(BLOCKS)}, fp8 or bf16")
    numbers, size = BLOCKS[kind]
    wanted = shape[0] * (shape[1] // numbers) * size
    if shape[1] % numbers or data.numel() != wanted:
        raise ValueError(f"a {kind} tensor of {list(shape)} has {wanted} bytes in rows of whole blocks of {numbers}, but {data.numel()} are given")
    return QuantisedWeight(data=data.reshape(shape[0], -1), kind=kind, scale=1.0, shape=shape)

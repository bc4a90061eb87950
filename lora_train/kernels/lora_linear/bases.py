"""Frozen base weights that are stored small and multiplied in the compute type: fp8 with a scale, and GGUF's Q8_0 and Q4_0 blocks.

ComfyUI has had two key layouts for scaled fp8: `.scale_weight` beside a file-wide `scaled_fp8` mark, and `.weight_scale` beside a `.comfy_quant`
JSON; both mean weight = fp8 * scale. Other formats are refused by name, never guessed.

Source of the GGUF block layouts: ggml-org/ggml ggml-common.h (MIT): Q8_0 = fp16 scale + 32 int8; Q4_0 = fp16 scale + 32 nibbles minus 8, low half first.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

import torch

FP8_TYPES = (torch.float8_e4m3fn, torch.float8_e5m2)
_BLOCK = 32
_GGUF_BYTES = {"q8_0": 34, "q4_0": 18}


@dataclass(frozen=True, kw_only=True)
class QuantisedWeight:
    """A stored weight.

    Attributes:
        data: fp8 [O, I], or the raw GGUF bytes as uint8 [O, I / 32 * bytes per block].
        kind: `fp8`, `q8_0` or `q4_0`.
        scale: fp32 scalar of an fp8 weight; 1 where the file has none.
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
        return self.dequantised_rows(0, self.shape[0]).to(dtype)

    def dequantised_rows(self, start: int, stop: int) -> torch.Tensor:
        """Rows `start` to `stop` in fp32."""
        rows = self.data[start:stop]
        if self.kind == "fp8":
            return rows.float() * self.scale
        return _gguf_rows(rows, self.kind).view(rows.shape[0], self.shape[1])


def _gguf_rows(rows: torch.Tensor, kind: str) -> torch.Tensor:
    blocks = rows.reshape(-1, _GGUF_BYTES[kind])
    scale = blocks[:, :2].contiguous().view(torch.float16).float()
    if kind == "q8_0":
        return blocks[:, 2:].contiguous().view(torch.int8).float() * scale
    packed = blocks[:, 2:].to(torch.int16)
    return (torch.cat([packed & 15, packed >> 4], dim=1) - 8).float() * scale


def fp8_weight(weight: torch.Tensor, scale: torch.Tensor | float | None = None, quant: bytes | None = None, name: str = "weight") -> QuantisedWeight:
    """Wrap an fp8 weight of either ComfyUI key generation.

    Args:
        weight: [O, I] fp8.
        scale: `.scale_weight` or `.weight_scale`, a scalar; None means 1.
        quant: the bytes of `.comfy_quant` where the file has them.

    Raises:
        ValueError: not fp8, a scale per row or block, or a `.comfy_quant` format other than fp8.
    """
    if weight.dtype not in FP8_TYPES:
        raise ValueError(f"{name} is {weight.dtype}, not fp8; use the bf16 file or one with scaled fp8 weights")
    if quant is not None:
        stated = json.loads(quant).get("format")
        if stated not in ("float8_e4m3fn", "float8_e5m2"):
            raise ValueError(f"{name} is quantised as {stated!r}, but only float8_e4m3fn and float8_e5m2 can be trained through; use that file of the model")
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
    if kind not in _GGUF_BYTES:
        raise ValueError(f"GGUF type {kind!r} cannot be trained through; use {' or '.join(_GGUF_BYTES)}, fp8 or bf16")
    wanted = shape[0] * (shape[1] // _BLOCK) * _GGUF_BYTES[kind]
    if shape[1] % _BLOCK or data.numel() != wanted:
        raise ValueError(f"a {kind} tensor of {list(shape)} has {wanted} bytes in rows of whole blocks of {_BLOCK}, but {data.numel()} are given")
    return QuantisedWeight(data=data.reshape(shape[0], -1), kind=kind, scale=1.0, shape=shape)

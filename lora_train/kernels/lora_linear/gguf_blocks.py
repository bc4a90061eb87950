"""GGUF's packed blocks as numbers: a few bytes hold 32 or 256 numbers as small integers with scales.

Everything is computed in fp32, as ggml does; ComfyUI-GGUF computes in fp16 by default, so its numbers are rounded once more (2^-11).

Source of the layouts: ggml-org/ggml src/ggml-common.h and ggml-quants.c (MIT). Tests compare with the `gguf` package's own unpacking, bit for bit.

Shapes: n blocks; of a block's 256 numbers 2 halves, 4 quarters of a half, 32 numbers of a quarter, which share bytes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch


def _halves(raw: torch.Tensor, start: int) -> torch.Tensor:
    """The fp16 number at byte `start` of every block, as fp32 [n, 1]."""
    return raw[:, start : start + 2].contiguous().view(torch.float16).float()


def _nibbles(packed: torch.Tensor) -> torch.Tensor:
    """[n, b] bytes -> [n, 2, b]: low halves, high halves."""
    return torch.stack([packed & 15, packed >> 4], dim=1)


def _bits(packed: torch.Tensor, count: int, width: int) -> torch.Tensor:
    """[n, b] bytes -> [n, count, b]: `count` fields of `width` bits, the lowest first."""
    shift = torch.arange(0, count * width, width, dtype=torch.uint8, device=packed.device).view(1, -1, 1)
    return (packed.unsqueeze(1) >> shift) & ((1 << width) - 1)


def _fifth_bits(raw: torch.Tensor, start: int) -> torch.Tensor:
    """[n, 32]: bit i of the 32-bit number at `start`, times 16."""
    return _bits(raw[:, start : start + 4], 8, 1).transpose(1, 2).flatten(1) << 4


def _q8_0(raw: torch.Tensor) -> torch.Tensor:
    return raw[:, 2:].contiguous().view(torch.int8).float() * _halves(raw, 0)


def _q4_0(raw: torch.Tensor) -> torch.Tensor:
    return (_nibbles(raw[:, 2:]).flatten(1).float() - 8) * _halves(raw, 0)


def _q4_1(raw: torch.Tensor) -> torch.Tensor:
    return _nibbles(raw[:, 4:]).flatten(1).float() * _halves(raw, 0) + _halves(raw, 2)


def _q5_0(raw: torch.Tensor) -> torch.Tensor:
    return ((_nibbles(raw[:, 6:]).flatten(1) | _fifth_bits(raw, 2)).float() - 16) * _halves(raw, 0)


def _q5_1(raw: torch.Tensor) -> torch.Tensor:
    return (_nibbles(raw[:, 8:]).flatten(1) | _fifth_bits(raw, 4)).float() * _halves(raw, 0) + _halves(raw, 2)


def _six_bit_scales(raw: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales and offsets [n, 8] of Q4_K and Q5_K out of 12 bytes: the upper two bits of the first eight belong to the last four of each."""
    first, second, third = (part.to(torch.int16) for part in raw.split(4, dim=1))
    scale = torch.cat([first & 63, (third & 15) | ((first >> 6) << 4)], dim=1)
    offset = torch.cat([second & 63, (third >> 4) | ((second >> 6) << 4)], dim=1)
    return scale.float(), offset.float()


def _with_offsets(raw: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """Q4_K and Q5_K: numbers [n, 8, 32] with a scale and an offset each 32."""
    scale, offset = _six_bit_scales(raw[:, 4:16])
    return ((_halves(raw, 0) * scale).unsqueeze(2) * numbers.float() - (_halves(raw, 2) * offset).unsqueeze(2)).flatten(1)


def _fours(packed: torch.Tensor) -> torch.Tensor:
    """128 bytes -> [n, 8, 32]: of 32 bytes each first the low halves, then the high ones."""
    return _nibbles(packed.reshape(-1, 32)).view(packed.shape[0], 8, 32)


def _q4_k(raw: torch.Tensor) -> torch.Tensor:
    return _with_offsets(raw, _fours(raw[:, 16:]))


def _q5_k(raw: torch.Tensor) -> torch.Tensor:
    return _with_offsets(raw, _fours(raw[:, 48:]) | (_bits(raw[:, 16:48], 8, 1) << 4))


def _twos(packed: torch.Tensor) -> torch.Tensor:
    """64 bytes -> [n, 16, 16]: of 32 bytes each four fields of two bits; 16 numbers share a scale."""
    return _bits(packed.reshape(-1, 32), 4, 2).reshape(packed.shape[0], 16, 16)


def _q2_k(raw: torch.Tensor) -> torch.Tensor:
    scales = raw[:, :16]
    scale, offset = _halves(raw, 80) * (scales & 15).float(), _halves(raw, 82) * (scales >> 4).float()
    return (scale.unsqueeze(2) * _twos(raw[:, 16:80]).float() - offset.unsqueeze(2)).flatten(1)


def _q3_k(raw: torch.Tensor) -> torch.Tensor:
    packed = raw[:, 96:108]
    low, high = _nibbles(packed[:, :8]).flatten(1), _bits(packed[:, 8:], 4, 2).flatten(1)
    scale = _halves(raw, 108) * ((low | (high << 4)).float() - 32)
    # A mask bit that is not set takes four away.
    masks = _bits(raw[:, :32], 8, 1).reshape(raw.shape[0], 16, 16)
    numbers = _twos(raw[:, 32:96]).float() - 4 * (1 - masks.float())
    return (scale.unsqueeze(2) * numbers).flatten(1)


def _q6_k(raw: torch.Tensor) -> torch.Tensor:
    low = _nibbles(raw[:, :128].reshape(-1, 64)).view(raw.shape[0], 16, 16)
    high = _bits(raw[:, 128:192].reshape(-1, 32), 4, 2).reshape(raw.shape[0], 16, 16)
    scale = _halves(raw, 208) * raw[:, 192:208].contiguous().view(torch.int8).float()
    return (scale.unsqueeze(2) * ((low | (high << 4)).float() - 32)).flatten(1)


# Kind of `gguf_file.BLOCKS`: [n, bytes of a block] uint8 -> [n, numbers of a block] fp32.
UNPACK: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "q8_0": _q8_0, "q4_0": _q4_0, "q4_1": _q4_1, "q5_0": _q5_0, "q5_1": _q5_1, "q2_k": _q2_k, "q3_k": _q3_k, "q4_k": _q4_k, "q5_k": _q5_k, "q6_k": _q6_k,
}  # fmt: skip

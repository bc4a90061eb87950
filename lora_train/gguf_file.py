"""Headers of GGUF files in the form of `safetensors_file.Header`, without torch and without the `gguf` package.

Only what a diffusion model's file needs is read: the tensors' names, shapes, types and places, and text values. Nothing is written.
Source of the format: ggml-org/ggml docs/gguf.md (MIT), versions 2 and 3; the original shape of a tensor of more than four dimensions stands under
`comfy.gguf.orig_shape.<name>` (city96/ComfyUI-GGUF tools/convert.py, Apache-2.0).
"""

from __future__ import annotations

import struct
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

from .safetensors_file import Header

# Formats that can be trained through: numbers in a block, bytes of a block.
BLOCKS = {
    "q8_0": (32, 34), "q4_0": (32, 18), "q4_1": (32, 20), "q5_0": (32, 22), "q5_1": (32, 24),
    "q2_k": (256, 84), "q3_k": (256, 110), "q4_k": (256, 144), "q5_k": (256, 176), "q6_k": (256, 210),
}  # fmt: skip
_TYPES = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 10: "Q2_K", 11: "Q3_K", 12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 20: "IQ4_NL",
    23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 30: "BF16",
}  # fmt: skip
_FLOAT_BYTES = {"F32": 4, "F16": 2, "BF16": 2, "F64": 8, "I8": 1, "I16": 2, "I32": 4, "I64": 8}
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_TEXT, _LIST = 8, 9
_ALIGNMENT = 32
_SHAPE_KEY = "comfy.gguf.orig_shape."
# Wan's own, and two that converters write for any model; a file may also name none.
_ARCHITECTURE_KEY, _ARCHITECTURES = "general.architecture", ("wan", "pig", "cow")
# Far more than any model has; what is larger is a damaged count.
_LIMIT, _TEXT_LIMIT = 1_000_000, 1 << 26


def read_gguf_header(path: Path, what: str) -> Header:
    """Read and check a GGUF file's header; no tensor is read.

    Args:
        what: name of the file's role, for messages.

    Returns:
        Types are GGUF's names (`Q8_0`, `F16`); the metadata holds the text values.

    Raises:
        ValueError: missing, no GGUF file of version 2 or 3, damaged, of another architecture than Wan, or shorter than its header promises.
    """
    if not path.is_file():
        raise ValueError(f"the {what} {path} does not exist; check the path or download the file")
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ValueError(f"the {what} {path} is not a GGUF file, although its name says so; download it again")
        try:
            version, tensors, values = struct.unpack("<IQQ", _exactly(file, 20))
            if version not in (2, 3):
                raise ValueError(f"version {version}; 2 and 3 are read here")
            if max(tensors, values) > _LIMIT:
                raise ValueError(f"{tensors} tensors and {values} values; at most {_LIMIT} are possible")
            known = {}
            for _ in range(values):
                name = _text(file)
                known[name] = _value(file, struct.unpack("<I", _exactly(file, 4))[0])
            entries = [_entry(file) for _ in range(tensors)]
            alignment = known.get("general.alignment", _ALIGNMENT)
            start = -(-file.tell() // alignment) * alignment
        except (ValueError, struct.error, UnicodeDecodeError, TypeError, ZeroDivisionError) as error:
            raise ValueError(f"the {what} {path} has an unreadable GGUF header ({error}); download it again") from error
    architecture = known.get(_ARCHITECTURE_KEY, _ARCHITECTURES[0])
    if architecture not in _ARCHITECTURES:
        raise ValueError(f"the {what} {path} is a GGUF file of architecture {architecture!r}; of these only Wan diffusion models ('wan') are read here")
    return _header(path, what, entries, known, start)


def _header(path: Path, what: str, entries: list[tuple[str, tuple[int, ...], int, int]], known: dict[str, Any], start: int) -> Header:
    shapes, dtypes, sizes, places = {}, {}, {}, {}
    for name, shape, kind, offset in entries:
        original = known.get(_SHAPE_KEY + name)
        shapes[name] = tuple(original) if original and prod(original) == prod(shape) else shape
        dtypes[name] = _TYPES.get(kind, f"GGUF type {kind}")
        sizes[name], places[name] = _bytes(dtypes[name], shape), start + offset
    end, size_bytes = max((places[name] + sizes[name] for name in places), default=start), path.stat().st_size
    if size_bytes < end:
        raise ValueError(f"the {what} {path} is truncated: it should have {end} bytes, it has {size_bytes}; download it again")
    return Header(
        shapes=shapes, dtypes=dtypes, bytes_of=sizes, begin_of=places, metadata={name: value for name, value in known.items() if isinstance(value, str)}
    )


def _bytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Of a tensor; of a format that is not known here 0, since whoever reads it is told so by name."""
    if dtype.lower() in BLOCKS:
        numbers, block = BLOCKS[dtype.lower()]
        return prod(shape[:-1]) * (shape[-1] // numbers) * block
    return prod(shape) * _FLOAT_BYTES.get(dtype, 0)


def _entry(file: BinaryIO) -> tuple[str, tuple[int, ...], int, int]:
    """Name, shape (the slowest dimension first, as torch has it), type and offset of a tensor."""
    name = _text(file)
    (dimensions,) = struct.unpack("<I", _exactly(file, 4))
    if not 1 <= dimensions <= 8:
        raise ValueError(f"{name[:100]!r} has {dimensions} dimensions")
    sizes = struct.unpack(f"<{dimensions}Q", _exactly(file, 8 * dimensions))
    return name, sizes[::-1], *struct.unpack("<IQ", _exactly(file, 12))


def _value(file: BinaryIO, kind: int) -> Any:
    if kind == _TEXT:
        return _text(file)
    if kind != _LIST:
        if kind not in _NUMBERS:
            raise ValueError(f"a value of type {kind}")
        layout = "<" + _NUMBERS[kind]
        return struct.unpack(layout, _exactly(file, struct.calcsize(layout)))[0]
    inner, count = struct.unpack("<IQ", _exactly(file, 12))
    if count > _LIMIT:
        raise ValueError(f"a list of {count} values")
    return [_value(file, inner) for _ in range(count)]


def _text(file: BinaryIO) -> str:
    (length,) = struct.unpack("<Q", _exactly(file, 8))
    if length > _TEXT_LIMIT:
        raise ValueError(f"a text of {length} bytes")
    return _exactly(file, length).decode("utf-8")


def _exactly(file: BinaryIO, count: int) -> bytes:
    data = file.read(count)
    if len(data) != count:
        raise ValueError("it ends in the middle")
    return data

"""Safetensors headers without torch, and a writer whose bytes depend on nothing but the content.

The writer exists because the library stores metadata in a hash map: two processes write the same content in different orders. A resumed run
must give the same bytes as an uninterrupted one.
Source of the format: huggingface/safetensors README (Apache-2.0): 8 bytes little-endian header length, JSON header, raw data.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

_HEADER_LIMIT_BYTES = 100_000_000  # the limit of the safetensors library itself
# Bytes of one number by the format's name for its type; types of less than a byte are left to the safetensors library.
DTYPE_BYTES = {
    name: size
    for size, names in (
        (1, ("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0")),
        (2, ("I16", "U16", "F16", "BF16")),
        (4, ("I32", "U32", "F32")),
        (8, ("I64", "U64", "F64", "C64")),
    )
    for name in names
}


@dataclass(frozen=True, kw_only=True)
class Header:
    """What a file says about itself: shape, type (`BF16`, `F8_E4M3`, ...), size and place (byte in the file) of each tensor by key, and the metadata."""

    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]
    bytes_of: dict[str, int]
    metadata: dict[str, str]
    begin_of: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """A tensor that is to be written: key, type by the format's name, shape."""

    key: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def size_bytes(self) -> int:
        """Of its numbers."""
        return prod(self.shape) * DTYPE_BYTES[self.dtype]


def read_header(path: str | Path, what: str = "model file", *, limit_bytes: int = _HEADER_LIMIT_BYTES) -> Header:
    """Read and check the header of a safetensors file, or of a GGUF file by its name; no tensor is read.

    Args:
        what: name of the file's role, for messages.
        limit_bytes: longer headers are refused unread; LoRA files need far less than models may have.

    Raises:
        ValueError: missing, empty, not safetensors, a header that is too long or names a key twice, an entry whose type, shape and offsets do not
            fit each other, numbers that overlap or leave holes, metadata that are no texts, or a file shorter than its header promises.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"the {what} {path} is a folder; name a file in it")
    if path.suffix.lower() == ".gguf":
        from .gguf_file import read_gguf_header

        return read_gguf_header(path, what)
    if not path.is_file():
        raise ValueError(f"the {what} {path} does not exist; check the path or download the file")
    size_bytes = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= _HEADER_LIMIT_BYTES:
            raise ValueError(f"the {what} {path} ({size_bytes} bytes) is not a safetensors file; pick the .safetensors version or download it again")
        if length > limit_bytes:
            raise ValueError(f"the {what} {path} has a header of {length} bytes; at most {limit_bytes} are read here; choose another file")
        raw = file.read(length)
    if len(raw) < length:
        raise ValueError(f"the {what} {path} is truncated: its header alone is {length} bytes, the file has {size_bytes}; download it again")
    try:
        entries = json.loads(raw, object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the {what} {path} has an unreadable safetensors header ({str(error)[:200]}); download it again") from error
    if not isinstance(entries, dict):
        raise ValueError(f"the {what} {path} has an unreadable safetensors header (a {type(entries).__name__}, not an object); download it again")
    metadata = entries.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError(f"the {what} {path} has metadata that are no texts under names, as the format asks for; download it again")
    for key, entry in entries.items():
        if not _is_entry(entry):
            raise ValueError(f"the {what} {path} is damaged: the header's entry of {key[:200]!r} has no valid type, shape and offsets; download it again")
    _check_order(path, what, entries)
    wanted_bytes = 8 + length + max((entry["data_offsets"][1] for entry in entries.values()), default=0)
    if size_bytes < wanted_bytes:
        raise ValueError(f"the {what} {path} is truncated: it should have {wanted_bytes} bytes, it has {size_bytes}; download it again")
    return Header(
        shapes={key: tuple(entry["shape"]) for key, entry in entries.items()},
        dtypes={key: entry["dtype"] for key, entry in entries.items()},
        bytes_of={key: entry["data_offsets"][1] - entry["data_offsets"][0] for key, entry in entries.items()},
        metadata=metadata,
        begin_of={key: 8 + length + entry["data_offsets"][0] for key, entry in entries.items()},
    )


def _check_order(path: Path, what: str, entries: dict[str, Any]) -> None:
    """Refuse numbers that overlap or leave holes between them, as the format asks for."""
    end = 0
    for key in sorted(entries, key=lambda key: entries[key]["data_offsets"]):
        begin, next_end = entries[key]["data_offsets"]
        if begin != end:
            told = "overlap those before them" if begin < end else f"leave a hole of {begin - end} bytes before them"
            raise ValueError(f"the {what} {path} is damaged: the numbers of {key[:200]!r} {told}; download it again")
        end = next_end


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build a JSON object; a name that stands there twice is a damaged or made-up file, and which one counts would be chance."""
    built = dict(pairs)
    if len(built) != len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))
        raise ValueError(f"{twice!r} stands in it twice")
    return built


def _is_entry(entry: Any) -> bool:
    """Tell whether a header entry has a type, a shape and two offsets that fit each other."""
    if not isinstance(entry, dict) or not isinstance(entry.get("dtype"), str):
        return False
    shape, offsets = entry.get("shape"), entry.get("data_offsets")
    if not isinstance(shape, list) or not isinstance(offsets, list) or len(offsets) != 2:
        return False
    if not all(type(number) is int and number >= 0 for number in (*shape, *offsets)):
        return False
    number_bytes = DTYPE_BYTES.get(entry["dtype"])
    return offsets[0] <= offsets[1] if number_bytes is None else prod(shape) * number_bytes == offsets[1] - offsets[0]


def header_bytes(specs: Sequence[TensorSpec], metadata: Mapping[str, str]) -> bytes:
    """Return everything that stands before the numbers of a file.

    Args:
        specs: the tensors, in the order in which their numbers follow.
        metadata: text values, written in the given order.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    offset = 0
    for spec in specs:
        header[spec.key] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": [offset, offset + spec.size_bytes]}
        offset += spec.size_bytes
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    return struct.pack("<Q", len(raw)) + raw


def write(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file at once: a reader sees the old file or the whole new one, also after a power cut.

    Args:
        tensors: CPU tensors, written in the given order.
        metadata: text values, written in the given order.

    Raises:
        OSError: it could not be written, with the file's name; nothing is left of it.
    """
    import torch

    names = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.uint8: "U8", torch.int64: "I64", torch.float64: "F64"}
    specs = [TensorSpec(key=key, dtype=names[tensor.dtype], shape=tuple(tensor.shape)) for key, tensor in tensors.items()]
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("wb") as file:
            file.write(header_bytes(specs, metadata))
            for tensor in tensors.values():
                file.write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        # On a full disk the reason of the failure must find room, and what is told must name the file.
        partial.unlink(missing_ok=True)
        error.filename = error.filename or str(path)
        raise

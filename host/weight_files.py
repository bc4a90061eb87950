"""Checks a safetensors file from its header, before anything of it is loaded. Standard library only."""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library itself
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
class WeightHeader:
    """What a safetensors header says: tensor shapes and types by key, and the metadata."""

    shapes: dict[str, tuple[int, ...]]
    metadata: dict[str, str]
    dtypes: dict[str, str] = field(default_factory=dict)


def read_header(path: str | Path, *, max_header_bytes: int = MAX_HEADER_BYTES) -> WeightHeader:
    """Read and check the header of a safetensors file.

    Args:
        path: The file.
        max_header_bytes: Longer headers are refused unread; LoRA files need far less than models are allowed.

    Returns:
        Shapes, types and metadata.

    Raises:
        ValueError: The file is missing, no safetensors file, shorter than its header promises, names a key twice, or the header is too long.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} does not exist. Put the file there or choose another one.")
    size_bytes = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        header_bytes = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if not 2 <= header_bytes <= min(MAX_HEADER_BYTES, size_bytes - 8):
            raise ValueError(_broken(path, f"its first 8 bytes announce a header of {header_bytes} bytes in a file of {size_bytes} bytes"))
        if header_bytes > max_header_bytes:
            raise ValueError(f"{path.name} has a header of {header_bytes} bytes; at most {max_header_bytes} are read here. Choose another file.")
        try:
            header = json.loads(file.read(header_bytes), object_pairs_hook=_object_without_duplicates)
        except (ValueError, RecursionError) as error:
            raise ValueError(_broken(path, f"its header is not valid ({str(error)[:200]})")) from error
    if not isinstance(header, dict):
        raise ValueError(_broken(path, "its header is not a JSON object"))
    metadata = header.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict):
        raise ValueError(_broken(path, "its metadata is not a JSON object"))
    shapes, dtypes, end_bytes = {}, {}, 0
    for key, entry in header.items():
        shapes[key], dtypes[key], offsets = _entry(path, key, entry)
        end_bytes = max(end_bytes, offsets[1])
    expected_bytes = 8 + header_bytes + end_bytes
    if size_bytes < expected_bytes:
        raise ValueError(_broken(path, f"it has {size_bytes} bytes and should have {expected_bytes}; the download or copy stopped early"))
    return WeightHeader(shapes=shapes, metadata={str(key): str(value) for key, value in metadata.items()}, dtypes=dtypes)


def _object_without_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """Build a JSON object; a name that stands there twice is a damaged or made-up file, and which one counts would be chance."""
    built = dict(pairs)
    if len(built) != len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))
        raise ValueError(f"{twice!r} stands in it twice")
    return built


def _entry(path: Path, key: str, entry: object) -> tuple[tuple[int, ...], str, tuple[int, int]]:
    """Check one tensor's entry and return its shape, type and byte offsets."""
    if not isinstance(entry, dict):
        raise ValueError(_broken(path, f"the entry of {key[:200]!r} is not an object"))
    shape, offsets = entry.get("shape"), entry.get("data_offsets")
    numbers = [*shape, *offsets] if isinstance(shape, list) and isinstance(offsets, list) and len(offsets) == 2 else [-1]
    if any(type(number) is not int or number < 0 for number in numbers) or offsets[0] > offsets[1]:
        raise ValueError(_broken(path, f"the entry of {key[:200]!r} has no valid shape and offsets"))
    dtype = str(entry.get("dtype"))
    if dtype in DTYPE_BYTES and prod(shape) * DTYPE_BYTES[dtype] != offsets[1] - offsets[0]:
        raise ValueError(_broken(path, f"{key[:200]!r} of shape {shape} and type {dtype} does not fill its {offsets[1] - offsets[0]} bytes"))
    return tuple(shape), dtype, (offsets[0], offsets[1])


def _broken(path: Path, reason: str) -> str:
    return f"{path.name} is not a complete safetensors file: {reason}. Download or copy it again."

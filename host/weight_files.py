"""Checks a safetensors file from its header, before anything of it is loaded. Standard library only."""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from pathlib import Path

MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library itself


@dataclass(frozen=True, kw_only=True)
class WeightHeader:
    """What a safetensors header says: tensor shapes by key, and the metadata."""

    shapes: dict[str, tuple[int, ...]]
    metadata: dict[str, str]


def read_header(path: str | Path) -> WeightHeader:
    """Read and check the header of a safetensors file.

    Args:
        path: The file.

    Returns:
        Shapes and metadata.

    Raises:
        ValueError: The file is missing, no safetensors file, or shorter than its header promises.
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
        try:
            header = json.loads(file.read(header_bytes))
        except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
            raise ValueError(_broken(path, f"its header is not JSON ({error})")) from error
    if not isinstance(header, dict):
        raise ValueError(_broken(path, "its header is not a JSON object"))
    metadata = header.pop("__metadata__", None) or {}
    shapes, end_bytes = {}, 0
    for key, entry in header.items():
        shape, offsets = _entry(path, key, entry)
        shapes[key] = shape
        end_bytes = max(end_bytes, offsets[1])
    expected_bytes = 8 + header_bytes + end_bytes
    if size_bytes < expected_bytes:
        raise ValueError(_broken(path, f"it has {size_bytes} bytes and should have {expected_bytes}; the download or copy stopped early"))
    return WeightHeader(shapes=shapes, metadata={str(key): str(value) for key, value in metadata.items()})


def _entry(path: Path, key: str, entry: object) -> tuple[tuple[int, ...], tuple[int, int]]:
    """Check one tensor's entry and return its shape and byte offsets."""
    if not isinstance(entry, dict):
        raise ValueError(_broken(path, f"the entry of {key!r} is not an object"))
    shape, offsets = entry.get("shape"), entry.get("data_offsets")
    numbers = [*shape, *offsets] if isinstance(shape, list) and isinstance(offsets, list) and len(offsets) == 2 else [-1]
    if any(not isinstance(number, int) or number < 0 for number in numbers) or offsets[0] > offsets[1]:
        raise ValueError(_broken(path, f"the entry of {key!r} has no valid shape and offsets"))
    return tuple(shape), (offsets[0], offsets[1])


def _broken(path: Path, reason: str) -> str:
    return f"{path.name} is not a complete safetensors file: {reason}. Download or copy it again."

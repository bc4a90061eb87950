"""Reads the weights of a model one by one, from a file, from shards, or from a folder, without the host's model classes.

For measuring and for making LoRAs: one tensor is in memory at a time, in fp32, fp8 scales multiplied in. Layers get the names of the
host's model (`blocks.0.self_attn.q.weight`), whatever prefix or naming the file has.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch

from ..lora_train.safetensors_file import Header, read_header
from .lora_keys import flat_name, wan_layers

INDEX_END = ".safetensors.index.json"
SCALE_ENDS = (".scale_weight", ".weight_scale")  # of ComfyUI's two ways to store scaled fp8
FLOAT_DTYPES = ("F64", "F32", "F16", "BF16")
READABLE_DTYPES = (*FLOAT_DTYPES, "F8_E4M3", "F8_E5M2")
TORCH_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "U8": torch.uint8,
}


@dataclass(frozen=True, kw_only=True)
class WeightSource:
    """Weights of a model on disk.

    Attributes:
        name: Of the file or folder, for messages.
        shapes: Weight (`blocks.0.self_attn.q.weight`) -> shape.
        metadata: Of the file; of the first shard where there are several.
        places: Weight -> (file, key in the file).
        scales: Weight -> (file, key) of its fp8 scale, where it has one.
        unreadable: Weights in a quantised format that is not read here.
        headers: Of the file or of all shards.
    """

    name: str
    shapes: Mapping[str, tuple[int, ...]]
    metadata: Mapping[str, str]
    places: Mapping[str, tuple[Path, str]]
    scales: Mapping[str, tuple[Path, str]]
    unreadable: tuple[str, ...]
    headers: Mapping[Path, Header]

    def read(self, weight: str, rows: slice | None = None) -> torch.Tensor:
        """Return one weight, or some rows of it, fp32 on the CPU, in the model's own scale.

        Raises:
            ValueError: The file changed or cannot be read, or the weight is quantised in a way that is not read here.
        """
        if weight in self.unreadable:
            raise ValueError(f"{self.name}: {weight} is quantised in a format that is not read here. Use the fp16, bf16 or fp8 file of the model.")
        file, key = self.places[weight]
        tensor = read_tensor(file, self.headers[file], key, rows).float()
        if weight not in self.scales:
            return tensor
        file, key = self.scales[weight]
        is_per_row = prod(self.headers[file].shapes[key]) > 1
        return tensor.mul_(read_tensor(file, self.headers[file], key, rows if is_per_row else None).float())


def open_source(path: Path) -> WeightSource:
    """Open a model for reading.

    Args:
        path: A safetensors file, the index of a sharded checkpoint, or a folder that holds one of them.

    Returns:
        The source. Only headers were read.

    Raises:
        ValueError: Nothing to read there, a shard is missing or broken, or no layer of a Wan model is in it.
    """
    path = Path(path)
    headers: dict[Path, Header] = {file: read_header(file) for file in _files(path)}
    by_flat_name = {layer.replace(".", "_"): layer for layer in wan_layers()}
    shapes, places, scales, unreadable = {}, {}, {}, []
    for file, header in headers.items():
        for key, shape in header.shapes.items():
            layer, end = _split(key)
            native = by_flat_name.get(flat_name(layer))
            if native is None:
                continue
            weight = native + end
            if end in SCALE_ENDS:
                scales[f"{native}.weight"] = (file, key)
                continue
            places[weight], shapes[weight] = (file, key), shape
            if header.dtypes[key] not in READABLE_DTYPES:
                unreadable.append(weight)
    if not any(weight.startswith("blocks.") for weight in shapes):
        raise ValueError(f"{path.name} holds no blocks of a Wan model. Choose a Wan2.1 or Wan2.2 diffusion model.")
    unreadable += [weight for weight, place in scales.items() if weight in shapes and not _is_one_scale(shapes[weight], headers, place)]
    return WeightSource(
        name=path.name,
        shapes=shapes,
        metadata=next(iter(headers.values())).metadata,
        places=places,
        scales=scales,
        unreadable=tuple(dict.fromkeys(unreadable)),
        headers=headers,
    )


def _files(path: Path) -> list[Path]:
    """List the safetensors files of a model."""
    if path.is_dir():
        indexes, files = sorted(path.glob(f"*{INDEX_END}")), sorted(path.glob("*.safetensors"))
        if len(indexes) != 1 and len(files) != 1:
            raise ValueError(f"{path} holds {len(indexes)} indexes and {len(files)} safetensors files. Name the file or the index itself.")
        path = indexes[0] if len(indexes) == 1 else files[0]
    if not path.exists():
        raise ValueError(f"{path} does not exist; check the path of the model.")
    if not path.name.endswith(INDEX_END):
        if path.suffix.lower() not in (".safetensors", ".sft"):
            raise ValueError(f"{path.name} is not a safetensors file. Models in GGUF or pickle formats are not read here; use the safetensors file.")
        return [path]
    try:
        names = sorted(set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path.name} is no index of a sharded checkpoint ({error}). Download it again.") from error
    if any(not isinstance(name, str) or Path(name).name != name for name in names) or not names:
        raise ValueError(f"{path.name} names shards outside its folder, or none. Download it again.")
    return [path.parent / name for name in names]


def _split(key: str) -> tuple[str, str]:
    """Split a model's key into its layer and its end; a parameter without an end (modulation) has an empty one."""
    for end in (".weight", ".bias", *SCALE_ENDS):
        if key.endswith(end):
            return key[: -len(end)], end
    return key, ""


def _is_one_scale(shape: tuple[int, ...], headers: Mapping[Path, Header], place: tuple[Path, str]) -> bool:
    """Tell whether a scale is one number, or one per row; block formats (MXFP8, NVFP4) have others under the same name."""
    file, key = place
    scale = headers[file].shapes[key]
    return headers[file].dtypes[key] in FLOAT_DTYPES and (prod(scale) == 1 or scale == (shape[0], 1))


def read_tensor(file: Path, header: Header, key: str, rows: slice | None = None) -> torch.Tensor:
    """Read one tensor, or some rows of it, as it is stored.

    Not through the safetensors library: it maps the whole file into memory for each tensor, which Linux refuses where the file is larger than
    the machine's memory (28 GB on a machine with 24, safetensors 0.8).

    Args:
        file: The file.
        header: Of the file.
        key: The tensor.
        rows: Along the first axis, in steps of 1.

    Raises:
        ValueError: The type is not read here, or the file changed or cannot be read.
    """
    dtype, shape, begin, size = header.dtypes[key], header.shapes[key], header.begin_of[key], header.bytes_of[key]
    if dtype not in TORCH_DTYPES:
        raise ValueError(f"{file.name}: {key[:200]} is stored as {dtype}, which is not read here.")
    if rows is not None:
        first, last, _ = rows.indices(shape[0])
        row_bytes = size // shape[0]
        begin, size, shape = begin + first * row_bytes, (last - first) * row_bytes, (last - first, *shape[1:])
    if size == 0:
        return torch.empty(shape, dtype=TORCH_DTYPES[dtype])
    data = torch.empty(size, dtype=torch.uint8)
    try:
        with file.open("rb") as opened:
            opened.seek(begin)
            read = opened.readinto(memoryview(data.numpy()))
    except OSError as error:
        raise ValueError(f"{file.name}: {key[:200]} cannot be read ({error}). Download or copy the file again.") from error
    if read != size:
        raise ValueError(f"{file.name}: {key[:200]} cannot be read: the file became shorter. Download or copy the file again.")
    return data.view(TORCH_DTYPES[dtype]).reshape(shape)

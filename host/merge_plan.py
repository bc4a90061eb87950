"""Plans a merged model before anything is written: every tensor of the new file, where it comes from, and in which file it goes.

A tensor that nothing changes is copied byte by byte. Scaled fp8 has two generations in ComfyUI: `scale_weight` beside the weight with one marker
`scaled_fp8` in the file, and `weight_scale` with a `comfy_quant` marker per layer (or all of them in the metadata). Both are read, both are
written; `same` keeps the one that the base has.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

import torch

from ..lora_train.safetensors_file import TensorSpec
from .weight_source import WeightSource, read_tensor

# What can be asked for -> type of the numbers; the two scaled forms only for the matrices of the blocks, as in the published files.
DTYPES = {"same": "", "bf16": "BF16", "fp16": "F16", "fp32": "F32", "fp8_scaled": "F8_E4M3", "fp8_scaled_old": "F8_E4M3"}
SCALED = {"fp8_scaled": ".weight_scale", "fp8_scaled_old": ".scale_weight"}
OLD_MARKER, NEW_MARKER, METADATA_MARKER = "scaled_fp8", ".comfy_quant", "_quantization_metadata"
INPUT_SCALES = (".scale_input", ".input_scale")
FP8_FORMATS = {"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}


@dataclass(frozen=True, kw_only=True)
class Unit:
    """Tensors that are made together: a weight, and its scale where it has one.

    Attributes:
        specs: What is written, in this order.
        file, key: The tensor of the base that the first comes from; None where `value` is.
        weight: Its name in the host's model (`blocks.0.self_attn.q.weight`); empty for what is only copied.
        scale: (file, key) of the base's scale, where it is copied with the weight.
        value: A small tensor that does not come from the base (markers).
    """

    specs: tuple[TensorSpec, ...]
    file: Path | None = None
    key: str = ""
    weight: str = ""
    scale: tuple[Path, str] | None = None
    value: torch.Tensor | None = field(default=None, compare=False)

    @property
    def is_copy(self) -> bool:
        """Whether the bytes are those of the base."""
        return not self.weight and self.value is None

    @property
    def size_bytes(self) -> int:
        """Of all its tensors."""
        return sum(spec.size_bytes for spec in self.specs)


def plan_units(source: WeightSource, changed: set[str], dtype: str) -> list[Unit]:
    """Plan the tensors of the merged model.

    Args:
        source: The base.
        changed: Weights that a LoRA changes.
        dtype: A key of DTYPES.

    Returns:
        The units, in the order of the base's files.

    Raises:
        ValueError: A weight that must be computed is quantised in a format that is not read.
    """
    unreadable = [weight for weight in source.unreadable if weight in changed or dtype != "same"]
    if unreadable:
        raise ValueError(f"{source.name}: {unreadable[0]} is quantised in a format that is not read here. Take the fp32, bf16, fp16 or fp8 file of the model.")
    weight_of = {place: weight for weight, place in source.places.items()}
    skipped = set(source.scales.values())
    markers = _markers(source)
    units = []
    for file, header in source.headers.items():
        for key in sorted(header.shapes, key=header.begin_of.__getitem__):
            place = (file, key)
            if place in skipped or (dtype != "same" and key in markers):
                continue
            weight = weight_of.get(place, "")
            if weight:
                units.append(_weight_unit(source, weight, dtype, is_changed=weight in changed))
            elif dtype == "same" or not (key.endswith(INPUT_SCALES) and dtype not in SCALED):
                units.append(Unit(specs=(TensorSpec(key=_input_scale(key, dtype), dtype=header.dtypes[key], shape=header.shapes[key]),), file=file, key=key))
    return units + list(_new_markers(source, units, dtype))


def split_units(units: Sequence[Unit], shard_bytes: int) -> list[list[Unit]]:
    """Distribute the units over files of at most `shard_bytes` (0: one file); a unit that is larger gets a file of its own."""
    shards: list[list[Unit]] = [[]]
    size = 0
    for unit in units:
        if shards[-1] and shard_bytes and size + unit.size_bytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(unit)
        size += unit.size_bytes
    return shards


def plan_metadata(source: WeightSource, dtype: str, own: Mapping[str, str]) -> dict[str, str]:
    """Return the metadata of the merged model: the base's, but for what is no longer true, and our own."""
    kept = {key: value for key, value in source.metadata.items() if dtype == "same" or key != METADATA_MARKER}
    return {**kept, **own}


def _weight_unit(source: WeightSource, weight: str, dtype: str, *, is_changed: bool) -> Unit:
    """Plan one weight of the model."""
    file, key = source.places[weight]
    header, scale = source.headers[file], source.scales.get(weight)
    old, shape = header.dtypes[key], header.shapes[key]
    is_matrix_of_block = weight.startswith("blocks.") and weight.endswith(".weight") and len(shape) == 2
    if dtype == "same":
        new, end = old, scale[1][scale[1].rindex(".") :] if scale else ""
    elif dtype in SCALED and (scale or is_matrix_of_block):
        # The host takes every weight of the older generation for e4m3.
        new, end = old if scale and dtype == "fp8_scaled" else DTYPES[dtype], SCALED[dtype]
    elif dtype in SCALED:
        new, end = old, ""
    else:
        new, end = DTYPES[dtype], ""
    specs = [TensorSpec(key=key, dtype=new, shape=shape)]
    is_computed = is_changed or new != old or bool(end) != bool(scale)
    if end and is_computed:
        specs.append(TensorSpec(key=key.removesuffix(".weight") + end, dtype="F32", shape=()))
    elif end:
        of_scale = source.headers[scale[0]]
        specs.append(TensorSpec(key=key.removesuffix(".weight") + end, dtype=of_scale.dtypes[scale[1]], shape=of_scale.shapes[scale[1]]))
    return Unit(specs=tuple(specs), file=file, key=key, weight=weight if is_computed else "", scale=None if is_computed else scale)


def _input_scale(key: str, dtype: str) -> str:
    """Name a scale of a layer's inputs in the generation that is written."""
    if dtype not in SCALED or not key.endswith(INPUT_SCALES):
        return key
    return key[: key.rindex(".")] + (".input_scale" if dtype == "fp8_scaled" else ".scale_input")


def _markers(source: WeightSource) -> set[str]:
    """Return the keys that only say how weights are quantised."""
    keys = {key for header in source.headers.values() for key in header.shapes}
    return {key for key in keys if key == OLD_MARKER or key.endswith((NEW_MARKER, f".{OLD_MARKER}"))}


def _new_markers(source: WeightSource, units: Sequence[Unit], dtype: str) -> Iterator[Unit]:
    """Make the markers of the generation that is written."""
    if dtype not in SCALED:
        return
    scaled = [unit.specs[0] for unit in units if len(unit.specs) == 2]
    is_full = _is_full_precision(source)
    if dtype == "fp8_scaled":
        for spec in scaled:
            text = json.dumps({"format": FP8_FORMATS[spec.dtype], **({"full_precision_matrix_mult": True} if is_full else {})})
            value = torch.tensor(list(text.encode()), dtype=torch.uint8)
            yield Unit(specs=(TensorSpec(key=spec.key.removesuffix(".weight") + NEW_MARKER, dtype="U8", shape=tuple(value.shape)),), value=value)
        return
    prefix = scaled[0].key.partition("blocks.")[0]
    value = torch.zeros(2 if is_full else 0).to(torch.float8_e4m3fn)  # how many numbers the marker has is all that it says
    yield Unit(specs=(TensorSpec(key=prefix + OLD_MARKER, dtype="F8_E4M3", shape=tuple(value.shape)),), value=value)


def _is_full_precision(source: WeightSource) -> bool:
    """Tell whether the host is to multiply in full precision: as the base says, and where it says nothing, yes.

    In fp8 the inputs are rounded too, with a scale that only some files have.
    """
    markers = _markers(source)
    places = {key: file for file, header in source.headers.items() for key in header.shapes if key in markers}
    old = [key for key in places if key.endswith(OLD_MARKER)]
    if old:
        return prod(source.headers[places[old[0]]].shapes[old[0]]) == 2
    layers = [json.loads(bytes(read_tensor(file, source.headers[file], key).tolist())) for key, file in places.items()]
    if METADATA_MARKER in source.metadata:
        layers += list(json.loads(source.metadata[METADATA_MARKER]).get("layers", {}).values())
    return not layers or any(layer.get("full_precision_matrix_mult", False) for layer in layers)

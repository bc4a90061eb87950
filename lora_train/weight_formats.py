"""In which formats a model file stores its weights, and whether they can be trained through. Headers only; no torch.

Scaled fp8 has two key layouts in ComfyUI: `.scale_weight` beside a file-wide `scaled_fp8` mark, and `.weight_scale` beside a format that stands in
`.comfy_quant` (JSON bytes) or in the metadata. Both mean weight = fp8 * scale. Other formats are refused by name, never guessed.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from math import prod
from pathlib import Path

from .gguf_file import BLOCKS
from .safetensors_file import Header

FLOATS = ("F64", "F32", "F16", "BF16")
FP8 = ("F8_E4M3", "F8_E5M2")
_STATED = ("float8_e4m3fn", "float8_e5m2")
_SCALES = (".scale_weight", ".weight_scale")
# What stands beside a weight. Scales of inputs belong to products in fp8, which training does not use.
_HELPERS = (*_SCALES, ".scale_input", ".input_scale", ".comfy_quant")
_MARK = "scaled_fp8"
_REMEDY = f"use the bf16, fp16 or scaled fp8 file of the model, or a GGUF file in {', '.join(kind.upper() for kind in BLOCKS)}"


@dataclass(frozen=True, kw_only=True)
class Stored:
    """How one quantised tensor is stored: `fp8` or a kind of `gguf_file.BLOCKS`; the key of its scale, if it has one."""

    kind: str
    scale_key: str = ""


def is_helper(key: str) -> bool:
    """Whether a key is no weight but says something about one, or about the file."""
    return key.endswith(_HELPERS) or key.rpartition(".")[2] == _MARK


def quantised_weights(path: str | Path, header: Header, what: str) -> dict[str, Stored]:
    """The quantised tensors of a model file by key; none: it is stored in floats.

    Args:
        header: of the file.
        what: name of the file's role, for messages.

    Raises:
        ValueError: a format that cannot be trained through, or scales that are not one number per weight.
    """
    found = {}
    for key, dtype in header.dtypes.items():
        if dtype in FLOATS or is_helper(key):
            continue
        if dtype in FP8:
            found[key] = Stored(kind="fp8", scale_key=_scale_key(path, header, key, what))
        elif dtype.lower() in BLOCKS:
            found[key] = Stored(kind=dtype.lower())
        else:
            raise ValueError(f"the {what} {path} stores {key} as {dtype}, which cannot be trained through; {_REMEDY}")
    _check_stated(path, header, found, what)
    return found


def _scale_key(path: str | Path, header: Header, key: str, what: str) -> str:
    layer = key.removesuffix(".weight")
    scales = [layer + end for end in _SCALES if layer + end in header.shapes] if layer != key else []
    if len(scales) > 1:
        raise ValueError(f"the {what} {path} has two scales for {key}, {' and '.join(scales)}; use ComfyUI's own fp8 file of the model")
    if scales and (prod(header.shapes[scales[0]]) != 1 or header.dtypes[scales[0]] not in FLOATS):
        shape = list(header.shapes[scales[0]])
        raise ValueError(f"the {what} {path} has scales of shape {shape} for {key}, but one number per weight is expected; {_REMEDY}")
    return scales[0] if scales else ""


def _check_stated(path: str | Path, header: Header, found: dict[str, Stored], what: str) -> None:
    """Compare with what the file says of its layers: both must be fp8."""
    for layer, stated in _stated_formats(path, header).items():
        if stated not in _STATED:
            raise ValueError(f"the {what} {path} says that {layer} is quantised as {stated!r}, which cannot be trained through; {_REMEDY}")
        if f"{layer}.weight" not in found:
            raise ValueError(f"the {what} {path} says that {layer} is {stated}, but stores it otherwise; download it again")
    for key in header.dtypes:
        layer, _, end = key.rpartition(".")
        is_float = f".{end}" in _SCALES and f"{layer}.weight" in header.dtypes and f"{layer}.weight" not in found
        if is_float or end == "pre_quant_scale":
            raise ValueError(f"the {what} {path} has {key}, which goes with another format than fp8; {_REMEDY}")


def _stated_formats(path: str | Path, header: Header) -> dict[str, str]:
    try:
        stated = json.loads(header.metadata.get("_quantization_metadata", "{}")).get("layers", {})
        marks = [key for key in header.begin_of if key.endswith(".comfy_quant")]
        with Path(path).open("rb") as file:
            for key in marks:
                file.seek(header.begin_of[key])
                stated[key.removesuffix(".comfy_quant")] = json.loads(file.read(header.bytes_of[key]))
        return {layer: str(entry.get("format")) for layer, entry in stated.items()}
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path} has unreadable notes about its quantisation ({error}); download it again") from error

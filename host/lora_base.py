"""Base weights for measuring a LoRA against: from a file or from a loaded MODEL, under the model's own keys."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import comfy.model_management
import torch
from comfy.quant_ops import QuantizedTensor

from .experts import guess_expert
from .lora_bypass import original_weight, quantised_kind, weight_shapes
from .lora_file import MODEL_PREFIX, LoraFile
from .lora_keys import IMAGE_BRANCH, normalise, wan_layers
from .weight_source import open_source


@dataclass(frozen=True, kw_only=True)
class BaseWeights:
    """Weights to measure against.

    Attributes:
        name: Of the file or model, for reports.
        shapes: Model key (`diffusion_model.blocks.0.self_attn.q.weight`) -> shape.
        read: Returns one weight by its key, fp32 on the CPU; None when only shapes are known.
        expert: `high`, `low`, or None where nothing says which expert it is.
    """

    name: str
    shapes: Mapping[str, tuple[int, ...]]
    read: Callable[[str], torch.Tensor] | None
    expert: str | None = None


def base_from_file(path: Path) -> BaseWeights:
    """Open a diffusion model on disk. Raises ValueError when it cannot be read or is no Wan model."""
    source = open_source(path)
    shapes = {MODEL_PREFIX + weight: shape for weight, shape in source.shapes.items()}
    return BaseWeights(
        name=source.name,
        shapes=shapes,
        read=lambda key: source.read(key.removeprefix(MODEL_PREFIX)),
        expert=guess_expert(source.name, source.metadata).expert,
    )


def base_from_model(model: Any, name: str, expert: str | None) -> BaseWeights:
    """Take the weights of a MODEL as they were before any LoRA was merged into them. Of GGUF weights only the shapes: how they are packed is not ours to know.

    Args:
        model: MODEL of the host.
        name: For reports.
        expert: Which expert it is, if known.
    """

    def read(key: str) -> torch.Tensor:
        weight, convert = original_weight(model, key)
        if isinstance(weight, QuantizedTensor):
            weight = weight.dequantize()
        copy = comfy.model_management.cast_to_device(weight, torch.device("cpu"), torch.float32, copy=True)
        return convert(copy, inplace=True)

    shapes = {key: shape for key, shape in weight_shapes(model).items() if key.startswith(MODEL_PREFIX)}
    return BaseWeights(name=name, shapes=shapes, read=None if quantised_kind(model) == "GGUF" else read, expert=expert)


def base_of_itself(lora: LoraFile) -> BaseWeights:
    """Take the shapes that the LoRA itself implies, for reading a file with no model at hand. The image branch is left out, as in Wan2.2."""
    layers = [layer for layer in wan_layers() if not IMAGE_BRANCH.search(layer.replace(".", "_"))]
    shapes: dict[str, tuple[int, ...]] = {}
    for layer, names in normalise(lora.tensors, layers).layers.items():
        parts = {part: tuple(lora.tensors[key].shape) for part, key in names.items()}
        key = f"{MODEL_PREFIX}{layer}" if layer.endswith("modulation") else f"{MODEL_PREFIX}{layer}.weight"
        shape = _implied_shape(parts)
        if shape:
            shapes[key] = shape
        if "diff_b" in parts:
            shapes[f"{MODEL_PREFIX}{layer}.bias"] = parts["diff_b"]
            shapes.setdefault(key, parts["diff_b"])
    return BaseWeights(name="", shapes=shapes, read=None)


def _implied_shape(parts: Mapping[str, tuple[int, ...]]) -> tuple[int, ...] | None:
    """Tell the shape of the weight that a layer's parts are for; None when they do not say it."""
    if "diff" in parts:
        return parts["diff"]
    down, up = parts.get("lora_down.weight"), parts.get("lora_up.weight")
    if down and up:
        return (up[0], *down[1:])
    first, second = parts.get("hada_w1_a"), parts.get("hada_w1_b")
    if first and second:
        return (first[0], second[-1])
    factors = [parts.get(name) or _product(parts.get(f"{name}_a"), parts.get(f"{name}_b")) for name in ("lokr_w1", "lokr_w2")]
    if all(factor and len(factor) == 2 for factor in factors):
        return (factors[0][0] * factors[1][0], factors[0][1] * factors[1][1])
    return None


def _product(first: tuple[int, ...] | None, second: tuple[int, ...] | None) -> tuple[int, ...] | None:
    """Return the shape of a product of two matrices."""
    return (first[0], second[-1]) if first and second else None

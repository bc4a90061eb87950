"""A model file with the right header and no numbers (a sparse file), for whoever plans from headers."""

from __future__ import annotations

from pathlib import Path

import torch

from ..lora_train.safetensors_file import TensorSpec, header_bytes

_NAMES = {torch.bfloat16: "BF16", torch.float32: "F32"}


def write(model: torch.nn.Module, path: Path) -> Path:
    """Write it; returns `path`."""
    specs = [TensorSpec(key=key, dtype=_NAMES[value.dtype], shape=tuple(value.shape)) for key, value in model.state_dict().items()]
    head = header_bytes(specs, {})
    with path.open("wb") as file:
        file.write(head)
        file.truncate(len(head) + sum(spec.size_bytes for spec in specs))
    return path

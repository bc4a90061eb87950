"""Reads a quantised Wan file (scaled fp8 of both key generations, GGUF) for training, and lets the host build its model around the stored weights.

The host's own loader decides what the model is and makes it; the weights of the blocks' Linears stay as they are stored, beside the model, and reach it
block by block through `offload/store.py`. Everything else (embeddings, head, norms) is small and is put into the compute type at once.
"""

from __future__ import annotations

import re
from pathlib import Path

import comfy.ops
import comfy.sd
import torch

from ..lora_train.kernels.lora_linear import QuantisedWeight, fp8_weight, gguf_weight
from ..lora_train.safetensors_file import Header
from ..lora_train.weight_formats import Stored, is_helper

# Stored weights by block and by the parameter's path in it (`ffn.0.weight`).
Quantised = dict[int, dict[str, QuantisedWeight]]
_PREFIX = re.compile(r"^(model\.)?diffusion_model\.")
_BLOCK_LINEAR = re.compile(r"blocks\.(\d+)\.((?:self_attn|cross_attn|ffn)\.\w+\.weight)$")
_TYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip


class _Operations(comfy.ops.disable_weight_init):
    """The host's layers, but Linears take the tensors they are given, also those without memory, and allocate none of their own."""

    class Linear(comfy.ops.disable_weight_init.Linear):
        def __init__(self, in_features, out_features, bias=True, device=None, dtype=None) -> None:
            torch.nn.Linear.__init__(self, in_features, out_features, bias, device="meta", dtype=dtype)

        def _load_from_state_dict(self, state_dict, prefix, local_metadata, *rest) -> None:
            for name in ("weight", "bias"):
                if f"{prefix}{name}" in state_dict:
                    state_dict[f"{prefix}{name}"] = state_dict[f"{prefix}{name}"].to(self.weight.dtype)
            torch.nn.Linear._load_from_state_dict(self, state_dict, prefix, {**local_metadata, "assign_to_params_buffers": True}, *rest)


def load(path: Path, header: Header, stored: dict[str, Stored], *, dtype: torch.dtype, what: str) -> tuple[torch.nn.Module, Quantised]:
    """The host's model, whose blocks' quantised weights have no memory, and these weights.

    Args:
        stored: from `weight_formats.quantised_weights`.
        dtype: of everything that is not quantised.

    Raises:
        ValueError: the host does not know the model.
    """
    tensors, quantised = _read(path, header, stored, dtype)
    options = {"dtype": dtype, "load_device": torch.device("cpu"), "offload_device": torch.device("cpu"), "custom_operations": _Operations}
    with torch.inference_mode(False):
        patcher = comfy.sd.load_diffusion_model_state_dict(tensors, model_options=options, metadata=dict(header.metadata), disable_dynamic=True)
    if patcher is None:
        raise ValueError(f"the {what} {path} is no diffusion model that ComfyUI knows; pick a Wan2.2 text-to-video expert")
    return patcher.model.diffusion_model, quantised


def _read(path: Path, header: Header, stored: dict[str, Stored], dtype: torch.dtype) -> tuple[dict[str, torch.Tensor], Quantised]:
    """Every tensor under the model's own name; those that stay stored as placeholders."""
    tensors, quantised = {}, {}
    with path.open("rb") as file:
        for key, shape in header.shapes.items():
            if is_helper(key):
                continue
            name = _PREFIX.sub("", key)
            if key not in stored:
                tensors[name] = _tensor(file, header, key)
                continue
            weight = _stored(file, header, key, stored[key])
            match = _BLOCK_LINEAR.match(name)
            if match:
                quantised.setdefault(int(match.group(1)), {})[match.group(2)] = weight
                tensors[name] = torch.empty(shape, dtype=dtype, device="meta")
            else:
                tensors[name] = weight.dequantised(dtype).view(shape)
    return tensors, quantised


def _stored(file, header: Header, key: str, form: Stored) -> QuantisedWeight:
    shape = header.shapes[key]
    rows = (shape[0], -1) if len(shape) > 1 else (1, -1)
    if form.kind == "fp8":
        scale = _tensor(file, header, form.scale_key) if form.scale_key else None
        return fp8_weight(_tensor(file, header, key).reshape(rows), scale, key)
    elements = 1
    for size in shape[1:] if len(shape) > 1 else shape:
        elements *= size
    return gguf_weight(_bytes(file, header, key), form.kind, (shape[0] if len(shape) > 1 else 1, elements))


def _tensor(file, header: Header, key: str) -> torch.Tensor:
    return _bytes(file, header, key).view(_TYPES[header.dtypes[key]]).reshape(header.shapes[key])


def _bytes(file, header: Header, key: str) -> torch.Tensor:
    """The tensor's bytes in memory of its own: what trains for hours does not depend on a file that may be moved away."""
    data = torch.empty(header.bytes_of[key], dtype=torch.uint8)
    file.seek(header.begin_of[key])
    if file.readinto(memoryview(data.numpy())) != data.numel():
        raise ValueError(f"{file.name} became shorter while it was read. Leave it alone, and start again.")
    return data

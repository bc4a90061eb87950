"""LoRA files in VideoX-Fun's key layout, which ComfyUI's core loads as well.

`lora_unet__blocks_0_self_attn_q.lora_down.weight` / `.lora_up.weight` / `.alpha`: note the double underscore, and that dots and underscores of the
path become one sign, so reading needs the model's own paths.
Source of the layout: aigc-apps/VideoX-Fun@804a4258:videox_fun/utils/lora_utils.py (Apache-2.0).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from .adapter import LoraAdapter, LoraLayer

PREFIX = "lora_unet__"
_PARTS = (".lora_down.weight", ".lora_up.weight", ".alpha")


def file_key(path: str) -> str:
    """`blocks.0.self_attn.q` -> `lora_unet__blocks_0_self_attn_q`."""
    return PREFIX + path.replace(".", "_")


def to_file_tensors(tensors: Mapping[str, torch.Tensor], alpha: float, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Masters (`<path>.down`, `<path>.up`) to the tensors of a LoRA file.

    Args:
        alpha: one for all modules; saved 0-dim, in fp32 where `dtype` does not hold it.
        dtype: of all other saved tensors.

    Returns:
        Three tensors a module, on the CPU, sorted by key.
    """
    out: dict[str, torch.Tensor] = {}
    scale = torch.tensor(alpha, dtype=dtype)
    scale = scale if float(scale) == alpha else torch.tensor(alpha, dtype=torch.float32)
    for name, tensor in tensors.items():
        path, part = name.rsplit(".", 1)
        key = file_key(path)
        out[f"{key}.lora_{part}.weight"] = tensor.detach().to("cpu", dtype).contiguous()
        out[f"{key}.alpha"] = scale.clone()
    return dict(sorted(out.items()))


def from_file_tensors(tensors: Mapping[str, torch.Tensor], paths: Iterable[str], *, device: torch.device | str = "cpu", strength: float = 1.0) -> LoraAdapter:
    """Read a file of this layout as an adapter.

    Args:
        tensors: content of the file.
        paths: the model's Linear paths.
        strength: multiplies every layer's factor.

    Raises:
        ValueError: a key that is of another layout or of no Linear here, an incomplete module, or a number that is not finite.
    """
    known = {file_key(path): path for path in paths}
    modules: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        part = next((ending for ending in _PARTS if key.endswith(ending)), None)
        module = key.removesuffix(part) if part else key
        if part is None or module not in known:
            raise ValueError(f"{key} does not belong to this model; keys look like {next(iter(known), PREFIX)}.lora_down.weight")
        if not torch.isfinite(tensor.float()).all():
            raise ValueError(f"{key} holds NaN or infinity; the file is damaged or its training diverged")
        modules.setdefault(module, {})[part] = tensor
    layers, rank, alpha = {}, 0, 0.0
    for module, path in known.items():
        if module not in modules:
            continue
        parts = modules[module]
        if _PARTS[0] not in parts or _PARTS[1] not in parts:
            raise ValueError(f"{module} has {', '.join(sorted(parts))}, but needs both lora_down.weight and lora_up.weight")
        down_RI = parts[_PARTS[0]].to(device, torch.float32)
        rank = down_RI.shape[0]
        alpha = float(parts.get(_PARTS[2], torch.tensor(float(rank))))
        layers[path] = LoraLayer(
            down_RI=torch.nn.Parameter(down_RI), up_OR=torch.nn.Parameter(parts[_PARTS[1]].to(device, torch.float32)), factor=strength * alpha / rank
        )
    if not layers:
        raise ValueError("the file holds no LoRA module of this model")
    return LoraAdapter(layers=layers, rank=rank, alpha=alpha)

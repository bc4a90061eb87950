"""Writes a model's file anew in scaled fp8 of both key generations and in GGUF, and beside each the plain file of the very numbers that it holds."""

from __future__ import annotations

import json
import struct
from pathlib import Path

FP8_MAX = {"F8_E4M3": 448.0, "F8_E5M2": 57344.0}


def is_quantised_here(key: str, value) -> bool:
    """As in published files: matrices of the Linears, inside of the blocks and around them."""
    return value.ndim == 2 and key.endswith(".weight")


def write_fp8(source: str, target: Path, generation: str, dtype: str = "F8_E4M3", prefix: str = "") -> Path:
    """Scaled fp8.

    Args:
        generation: `old` (`scale_weight`, `scaled_fp8`), `new` (`weight_scale`, `comfy_quant`), `new metadata` (formats in the file's metadata), or
            `unscaled`.

    Returns:
        The plain fp32 file of the same numbers.
    """
    import torch
    from safetensors.torch import load_file, save_file

    kind = {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}[dtype]
    name = str(kind).removeprefix("torch.")
    packed, plain, layers = {}, {}, {}
    for key, value in load_file(source).items():
        plain[key] = value
        packed[prefix + key] = value
        if not is_quantised_here(key, value):
            continue
        scale = torch.ones(()) if generation == "unscaled" else value.abs().max() / FP8_MAX[dtype]
        small = (value / scale).to(kind)
        packed[prefix + key], plain[key] = small, small.float() * scale
        layer = prefix + key.removesuffix(".weight")
        if generation == "old":
            packed[f"{layer}.scale_weight"] = scale
            packed[f"{layer}.scale_input"] = torch.ones(())
        elif generation != "unscaled":
            packed[f"{layer}.weight_scale"] = scale
            layers[layer] = {"format": name}
            if generation == "new":
                packed[f"{layer}.comfy_quant"] = torch.tensor(list(json.dumps(layers[layer]).encode()), dtype=torch.uint8)
    metadata = _metadata(source)
    if generation == "old":
        packed[f"{prefix}scaled_fp8"] = torch.empty(0, dtype=kind)
    if generation == "new metadata":
        metadata = {**metadata, "_quantization_metadata": json.dumps({"layers": layers})}
    save_file({key: value.contiguous() for key, value in packed.items()}, target, metadata=metadata)
    return _plain(source, target, plain)


def write_gguf(source: str, target: Path, kind_of) -> Path:
    """GGUF; `kind_of(key)` names the blocks of each matrix. Blocks other than Q8_0 are random bytes with sensible scales.

    Returns:
        The plain fp32 file of the same numbers.
    """
    import torch
    from safetensors.torch import load_file

    from reward_lab.lora_train.gguf_file import BLOCKS
    from reward_lab.lora_train.kernels.lora_linear import gguf_weight

    tensors, plain = [], {}
    generator = torch.Generator().manual_seed(1)
    for key, value in load_file(source).items():
        value = plain[key] = value.float()
        kind = kind_of(key) if is_quantised_here(key, value) and value.shape[1] % BLOCKS[kind_of(key)][0] == 0 else "f32"
        if kind == "f32":
            tensors.append((key, tuple(value.shape), 0, value.contiguous().numpy().tobytes()))
            continue
        data = pack_q8_0(value) if kind == "q8_0" else random_blocks(kind, value, generator)
        plain[key] = gguf_weight(data, kind, tuple(value.shape)).dequantised(torch.float32)
        tensors.append((key, tuple(value.shape), GGUF_TYPES[kind], data.numpy().tobytes()))
    target.write_bytes(gguf_bytes(tensors, {"general.architecture": "wan", **_metadata(source)}))
    return _plain(source, target, plain)


GGUF_TYPES = {"q4_0": 2, "q4_1": 3, "q5_0": 6, "q5_1": 7, "q8_0": 8, "q2_k": 10, "q3_k": 11, "q4_k": 12, "q5_k": 13, "q6_k": 14}
# Where the fp16 scales stand in a block.
SCALES = {
    "q8_0": (0,), "q4_0": (0,), "q4_1": (0, 2), "q5_0": (0,), "q5_1": (0, 2), "q2_k": (80, 82), "q3_k": (108,), "q4_k": (0, 2), "q5_k": (0, 2), "q6_k": (208,),
}  # fmt: skip


def pack_q8_0(weight):
    """Per 32 numbers one fp16 scale and 32 bytes."""
    import torch

    blocks = weight.reshape(-1, 32)
    scale = (blocks.abs().amax(dim=1, keepdim=True) / 127).half()
    numbers = torch.where(scale > 0, blocks / scale.float(), 0).round().clamp(-127, 127).to(torch.int8)
    return torch.cat([scale.view(torch.uint8), numbers.view(torch.uint8)], dim=1).reshape(weight.shape[0], -1)


def random_blocks(kind, weight, generator):
    """Random bytes whose scales make numbers smaller than the weight's: some formats' all have one sign, and attention must not saturate."""
    import torch

    from reward_lab.lora_train.gguf_file import BLOCKS

    numbers, size = BLOCKS[kind]
    raw = torch.randint(0, 256, (weight.numel() // numbers, size), dtype=torch.uint8, generator=generator)
    largest = {"q2_k": 45, "q3_k": 128, "q4_k": 945, "q5_k": 1953, "q6_k": 4096}.get(kind, 16)
    for start in SCALES[kind]:
        scale = torch.rand(len(raw), 1, generator=generator) * float(weight.std()) / 2 / largest
        raw[:, start : start + 2] = scale.half().view(torch.uint8)
    return raw.reshape(weight.shape[0], -1)


def gguf_bytes(tensors, texts, alignment: int = 32) -> bytes:
    """A GGUF file of version 3 from (name, shape, type, bytes) and text values."""

    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value.encode())) + value.encode()

    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(texts) + 1)
    head += text("general.alignment") + struct.pack("<II", 4, alignment)
    for key, value in texts.items():
        head += text(key) + struct.pack("<I", 8) + text(value)
    offset, body = 0, b""
    for name, shape, kind, data in tensors:
        head += text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape[::-1], kind, offset)
        body += data + b"\0" * (-len(data) % alignment)
        offset = len(body)
    return head + b"\0" * (-len(head) % alignment) + body


def _metadata(source: str) -> dict[str, str]:
    from safetensors import safe_open

    with safe_open(source, "pt") as file:
        return dict(file.metadata() or {})


def _plain(source: str, target: Path, tensors) -> Path:
    from safetensors.torch import save_file

    path = target.with_name(f"plain_{target.stem}.safetensors")
    save_file({key: value.contiguous() for key, value in tensors.items()}, path, metadata=_metadata(source))
    return path

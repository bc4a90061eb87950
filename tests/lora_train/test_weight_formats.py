"""What files of quantised weights say about themselves, and what is refused: fp8 of both key generations, GGUF, everything else."""

from __future__ import annotations

import json
import struct

import pytest
import torch
from safetensors.torch import save_file

from reward_lab.lora_train.planning.shapes import header_shape, named_shape
from reward_lab.lora_train.safetensors_file import Header, read_header
from reward_lab.lora_train.weight_formats import Stored, quantised_weights

LAYER = "blocks.0.ffn.0"


def fp8_file(path, extra=None, metadata=None, dtype=torch.float8_e4m3fn):
    tensors = {f"{LAYER}.weight": torch.zeros(4, 8).to(dtype), f"{LAYER}.bias": torch.zeros(4), **(extra or {})}
    save_file(tensors, path, metadata=metadata)
    return path


def formats(path):
    return quantised_weights(path, read_header(path), "high-noise expert")


def text_tensor(value) -> torch.Tensor:
    return torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8)


def test_both_generations_and_plain_fp8(tmp_path):
    path = tmp_path / "x.safetensors"
    weight = f"{LAYER}.weight"
    old = {f"{LAYER}.scale_weight": torch.tensor(0.5), f"{LAYER}.scale_input": torch.tensor(1.0), "scaled_fp8": torch.empty(0, dtype=torch.float8_e4m3fn)}
    assert formats(fp8_file(path, old)) == {weight: Stored(kind="fp8", scale_key=f"{LAYER}.scale_weight")}
    new = {f"{LAYER}.weight_scale": torch.tensor([0.5]), f"{LAYER}.comfy_quant": text_tensor({"format": "float8_e5m2"})}
    assert formats(fp8_file(path, new, dtype=torch.float8_e5m2)) == {weight: Stored(kind="fp8", scale_key=f"{LAYER}.weight_scale")}
    stated = {"_quantization_metadata": json.dumps({"layers": {LAYER: {"format": "float8_e4m3fn"}}})}
    assert formats(fp8_file(path, {f"{LAYER}.weight_scale": torch.tensor(0.5)}, stated))[weight].scale_key == f"{LAYER}.weight_scale"
    assert formats(fp8_file(path)) == {weight: Stored(kind="fp8")}
    save_file({weight: torch.zeros(4, 8, dtype=torch.bfloat16)}, path)
    assert formats(path) == {}


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({f"{LAYER}.weight_scale": torch.ones(4, 1)}, r"scales of shape \[4, 1\] .* one number per weight .* Q8_0"),
        ({f"{LAYER}.weight_scale": torch.tensor(1.0), f"{LAYER}.comfy_quant": text_tensor({"format": "mxfp8"})}, "blocks.0.ffn.0 is quantised as 'mxfp8'"),
        ({f"{LAYER}.weight_scale": torch.tensor(1.0), f"{LAYER}.scale_weight": torch.tensor(1.0)}, "two scales"),
        ({"blocks.0.ffn.2.weight": torch.zeros(4, 4, dtype=torch.int8)}, r"stores blocks.0.ffn.2.weight as I8, .* use the bf16"),
        ({"blocks.0.ffn.2.weight": torch.zeros(4, 4), "blocks.0.ffn.2.weight_scale": torch.tensor(1.0)}, "goes with another format than fp8"),
        ({f"{LAYER}.pre_quant_scale": torch.ones(8)}, "pre_quant_scale, which goes with another format"),
        ({f"{LAYER}.comfy_quant": torch.tensor([123], dtype=torch.uint8)}, "unreadable notes about its quantisation"),
        ({"blocks.0.ffn.2.weight": torch.zeros(4, 4), "blocks.0.ffn.2.comfy_quant": text_tensor({"format": "float8_e4m3fn"})}, "stores it otherwise"),
    ],
)
def test_other_formats_are_refused_by_name(tmp_path, extra, message):
    path = fp8_file(tmp_path / "x.safetensors", extra)
    with pytest.raises(ValueError, match=message):
        formats(path)


def gguf(tensors, texts=(), version=3) -> bytes:
    """(name, shape as torch has it, type, bytes) one after the other."""

    def text(value):
        return struct.pack("<Q", len(value)) + value.encode()

    head = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(texts))
    for name, kind, raw in texts:
        head += text(name) + struct.pack("<I", kind) + raw
    offset = 0
    for name, shape, kind, data in tensors:
        head += text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *reversed(shape), kind, offset)
        offset += len(data)
    return head + b"\0" * (-len(head) % 32) + b"".join(data for *_, data in tensors)


def test_gguf_headers(tmp_path):
    path = tmp_path / "x.gguf"
    shape_list = struct.pack("<IQ", 5, 5) + struct.pack("<5i", 2, 2, 1, 2, 4)
    texts = [("general.architecture", 8, struct.pack("<Q", 3) + b"wan"), ("comfy.gguf.orig_shape.patch", 9, shape_list), ("count", 4, struct.pack("<I", 7))]
    tensors = [("blocks.0.ffn.0.weight", (3, 64), 8, b"\1" * 204), ("patch", (16, 2), 0, b"\2" * 128)]
    path.write_bytes(gguf(tensors, texts))
    header = read_header(path)
    assert header.shapes == {"blocks.0.ffn.0.weight": (3, 64), "patch": (2, 2, 1, 2, 4)}
    assert header.dtypes == {"blocks.0.ffn.0.weight": "Q8_0", "patch": "F32"} and header.bytes_of == {"blocks.0.ffn.0.weight": 204, "patch": 128}
    assert header.metadata == {"general.architecture": "wan"}
    raw = path.read_bytes()
    assert all(raw[header.begin_of[name] : header.begin_of[name] + header.bytes_of[name]] == data for name, _, _, data in tensors)
    assert formats(path) == {"blocks.0.ffn.0.weight": Stored(kind="q8_0")}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"GGML" + b"\0" * 100, "is not a GGUF file"),
        (gguf([], version=1), r"version 1; 2 and 3 are read here"),
        (gguf([("a", (4, 32), 8, b"\0" * 136)])[:-10], r"truncated: it should have \d+ bytes"),
        (gguf([("a", (4, 32), 8, b"")])[:40], "ends in the middle"),
        (b"GGUF" + struct.pack("<IQQ", 3, 1 << 60, 0), "1152921504606846976 tensors"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 1 << 40), "a text of 1099511627776 bytes"),
    ],
)
def test_damaged_gguf_files_are_told(tmp_path, content, message):
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_header(path)


def test_gguf_formats_without_an_unpacking_are_refused(tmp_path):
    path = tmp_path / "x.gguf"
    for kind, name in ((23, "IQ4_XS"), (99, "GGUF type 99")):
        path.write_bytes(gguf([("blocks.0.ffn.0.weight", (4, 32), kind, b"\0" * 200)]))
        with pytest.raises(ValueError, match=f"stores blocks.0.ffn.0.weight as {name}, which cannot be trained through; .*Q8_0"):
            formats(path)
    with pytest.raises(ValueError, match="does not exist"):
        read_header(tmp_path / "none.gguf")


def test_bytes_of_a_stored_block_reach_the_plan():
    shape = named_shape("wan-1.3b")
    sizes = {"patch_embedding.weight": (shape.width, 16, 1, 2, 2), "text_embedding.0.weight": (shape.width, 4096), "head.head.weight": (64, shape.width)}
    sizes |= {f"blocks.{index}.{name}.weight": size for index in range(shape.blocks) for name, size in shape.block_linears.items()}
    dtypes = {key: "Q4_K" if key.startswith("blocks.") else "F16" for key in sizes}
    bytes_of = {key: size[0] * size[1] * 144 // 256 if key.startswith("blocks.") else 0 for key, size in sizes.items()}
    found = header_shape(Header(shapes=sizes, dtypes=dtypes, bytes_of=bytes_of, metadata={}))
    assert found.weight_bytes == 0.5625 and found.is_quantised and not shape.is_quantised

"""Targets, key layout, installation and files of LoRAs."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from reward_lab.lora_train import safetensors_file
from reward_lab.lora_train.lora.adapter import new_adapter
from reward_lab.lora_train.lora.keys import from_file_tensors, to_file_tensors
from reward_lab.lora_train.lora.linears import install
from reward_lab.lora_train.lora.targets import select_targets

CPU = torch.device("cpu")


def _wan_paths(blocks):
    inner = [f"{part}_attn.{name}" for part in ("self", "cross") for name in "qkvo"] + ["ffn.0", "ffn.2"]
    outer = ["text_embedding.0", "text_embedding.2", "time_embedding.0", "time_embedding.2", "time_projection.1"]
    return outer + [f"blocks.{block}.{name}" for block in range(blocks) for name in inner] + ["head.head"]


def test_an_alpha_that_bf16_does_not_hold_is_saved_as_it_is():
    tensors = {"head.head.down": torch.zeros(2, 3), "head.head.up": torch.zeros(3, 2)}
    for alpha, dtype in ((257.0, torch.float32), (64.0, torch.bfloat16)):
        saved = to_file_tensors(tensors, alpha, torch.bfloat16)["lora_unet__head_head.alpha"]
        assert float(saved) == alpha and saved.dtype == dtype


@pytest.mark.parametrize(("blocks", "skip", "count"), [(40, ("ffn",), 326), (40, (), 406), (30, ("ffn",), 246), (30, (), 306)])
def test_target_counts_of_the_official_files(blocks, skip, count):
    assert len(select_targets(_wan_paths(blocks), (), skip)) == count


def test_no_target_left():
    with pytest.raises(ValueError, match="leave none of the model's 16 Linears"):
        select_targets(_wan_paths(1), ("attention",), ())


@pytest.fixture
def linears():
    torch.manual_seed(0)
    return {"blocks.0.self_attn.q": torch.nn.Linear(6, 5).requires_grad_(False), "head.head": torch.nn.Linear(5, 7).requires_grad_(False)}


@pytest.fixture
def adapter(linears):
    made = new_adapter(linears, list(linears), rank=3, alpha=1.5, seed=1, device=CPU)
    for layer in made.layers.values():
        layer.up_OR.data.normal_()
    return made


def test_installed_forms_agree_and_leave_no_trace(linears, adapter):
    x = torch.randn(4, 6)
    linear, layer = linears["blocks.0.self_attn.q"], adapter.layers["blocks.0.self_attn.q"]
    plain = linear(x)
    with install(linears, adapter) as switch:
        exact = linear(x)
        with torch.no_grad(), switch.merged():
            merged = linear(x)
        with switch.disabled():
            assert torch.equal(linear(x), plain)
        with pytest.raises(RuntimeError, match="already carries"), install(linears, adapter):
            pass
    torch.testing.assert_close(exact, plain + x @ layer.delta_OI().T)
    torch.testing.assert_close(merged, exact)
    assert exact.requires_grad and "forward" not in linear.__dict__ and torch.equal(linear(x), plain)


def test_gradient_flows_although_a_merged_weight_stands_by(linears, adapter):
    with install(linears, adapter) as switch, switch.merged():
        linears["head.head"](torch.randn(2, 5)).sum().backward()
    assert adapter.layers["head.head"].down_RI.grad.abs().sum() > 0


def test_bf16_weights_merge_with_stochastic_rounding(linears, adapter):
    linear = linears["head.head"].to(torch.bfloat16)
    x = torch.randn(200, 5, dtype=torch.bfloat16)
    with install(linears, adapter) as switch, torch.no_grad():
        exact = linear(x).float()
        with switch.merged():
            merged = linear(x).float()
            assert torch.equal(linear(x).float(), merged)
    # 35 weights, each rounded by less than 2^-7 of its size.
    assert 0 < float((merged - exact).norm() / exact.norm()) < 2**-7


def test_file_round_trip_in_videox_fun_layout(linears, adapter, tmp_path):
    tensors = to_file_tensors(adapter.tensors(), 1.5, torch.float32)
    assert set(tensors) == {
        f"lora_unet__{module}{part}" for module in ("blocks_0_self_attn_q", "head_head") for part in (".alpha", ".lora_down.weight", ".lora_up.weight")
    }
    safetensors_file.write(tmp_path / "a.safetensors", tensors, {"expert": "high"})
    read = from_file_tensors(load_file(tmp_path / "a.safetensors"), linears)
    assert read.rank == 3 and read.alpha == 1.5
    for path, layer in read.layers.items():
        assert torch.equal(layer.delta_OI(), adapter.layers[path].delta_OI())
    header = safetensors_file.read_header(tmp_path / "a.safetensors")
    assert header.metadata == {"expert": "high"} and header.shapes["lora_unet__head_head.alpha"] == ()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.update({"lora_unet__blocks_9_self_attn_q.alpha": torch.tensor(1.0)}), "does not belong to this model"),
        (lambda t: t.pop("lora_unet__head_head.lora_up.weight"), "needs both"),
        (lambda t: t["lora_unet__head_head.lora_up.weight"].fill_(float("nan")), "NaN or infinity"),
    ],
)
def test_bad_files(linears, adapter, change, message):
    tensors = to_file_tensors(adapter.tensors(), 1.5, torch.float32)
    change(tensors)
    with pytest.raises(ValueError, match=message):
        from_file_tensors(tensors, linears)


def test_other_width_is_refused(linears, adapter):
    with pytest.raises(ValueError, match="belongs to another width"), install({**linears, "head.head": torch.nn.Linear(4, 7)}, adapter):
        pass


@pytest.mark.parametrize(("content", "message"), [(b"", "is not a safetensors file"), (b"PK\x03\x04" * 9, "is not a safetensors file")])
def test_header_of_something_else(tmp_path, content, message):
    (tmp_path / "a.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        safetensors_file.read_header(tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("[1]", "a list, not an object"),
        ('{"x"', "unreadable safetensors header"),
        ("[" * 100_000, "unreadable safetensors header"),
        ('{"x": 5}', "entry of 'x'"),
        ('{"x": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}', "entry of 'x'"),
        ('{"x": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}', "entry of 'x'"),
        ('{"x": {"shape": [1], "data_offsets": [0, 4]}}', "entry of 'x'"),
        ('{"x": {"dtype": "F32", "shape": [25], "data_offsets": [0, 100]}}', "truncated"),
        ('{"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 99]}}', "no valid type, shape and offsets"),
        ('{"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, "x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}', "twice"),
    ],
)
def test_damaged_header(tmp_path, header, message):
    raw = header.encode()
    (tmp_path / "a.safetensors").write_bytes(len(raw).to_bytes(8, "little") + raw + bytes(4))
    with pytest.raises(ValueError, match=message):
        safetensors_file.read_header(tmp_path / "a.safetensors")


@pytest.mark.parametrize("missing_bytes", [1, 200])
def test_truncated_file(tmp_path, missing_bytes):
    path = tmp_path / "a.safetensors"
    safetensors_file.write(path, {"x": torch.zeros(20), "y": torch.zeros(3, 4)}, {})
    path.write_bytes(path.read_bytes()[:-missing_bytes])
    with pytest.raises(ValueError, match="truncated"):
        safetensors_file.read_header(path, "high-noise expert")

"""Unmerged rows on the real host model: equal to merged ones and to a dense reference, at any order, and without a trace afterwards."""

from __future__ import annotations

import copy
import gc
import itertools
import json
import random
from pathlib import Path

import pytest

pytest.importorskip("torch")
comfy_sd = pytest.importorskip("comfy.sd", reason="needs ComfyUI on the path")

import comfy.model_management  # noqa: E402
import comfy.model_patcher  # noqa: E402
import comfy.utils  # noqa: E402
import folder_paths  # noqa: E402
import torch  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

from reward_lab.host.lora_bypass import KEY, quantised_kind  # noqa: E402
from reward_lab.host.lora_merge import MergeSettings, merge  # noqa: E402
from reward_lab.nodes.loras import LoadLoRAs  # noqa: E402

pytestmark = pytest.mark.host

# Norm of the difference over norm of the reference, for a network of two blocks. fp32 (2^-24 a rounding, sums of at most 192): measured 3e-7.
# bf16 keeps 2^-9 a rounding and the network rounds after every layer; merged weights are rounded to bf16 as well.
RATIO = {torch.float32: 3e-6, torch.bfloat16: 3e-2}
ATTENTION = [f"blocks.{i}.{part}_attn.{name}" for i in (0, 1) for part in ("self", "cross") for name in "qkvo"]
LINEAR = [*ATTENTION, "blocks.0.ffn.0", "blocks.1.ffn.2", "time_embedding.0", "text_embedding.2", "time_projection.1", "head.head"]


@pytest.fixture
def lora_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder that the host takes for its LoRA folder."""
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "loras", ([str(tmp_path)], {".safetensors"}))
    return tmp_path


@pytest.fixture(scope="module", params=[torch.float32], ids=["fp32"])
def models(request, tiny_models):
    return load(tiny_models, request.param)


def load(tiny_models: dict[str, str], dtype: torch.dtype) -> dict[str, object]:
    return {expert: comfy_sd.load_diffusion_model(tiny_models[expert], model_options={"dtype": dtype}) for expert in ("high", "low")}


def shape_of(model, layer: str) -> tuple[int, ...]:
    module = model.model.diffusion_model.get_submodule(layer)
    return (module.out_features, module.in_features) if hasattr(module, "in_features") else tuple(module.weight.shape)


def write_lora(path: Path, model, seed: int, kind: str = "lora", dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Write a random LoRA of one kind; return what strength 1 adds to each of the model's weights, from the formula of that kind in fp64."""
    generator = torch.Generator().manual_seed(seed)
    choose = random.Random(seed)

    def normal(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) * 0.3).to(dtype)

    tensors, dense = {}, {}
    for layer in LINEAR if kind != "lora" else [*LINEAR, "patch_embedding"]:
        shape = shape_of(model, layer)
        outputs, inputs = shape[0], int(torch.Size(shape[1:]).numel())
        rank, alpha = choose.choice((1, 2, 5)), choose.choice((None, 1.0, 3.0))
        scale = 1.0 if alpha is None else alpha / rank
        if kind == "lora":
            down, up = normal(rank, *shape[1:]), normal(outputs, rank, *(1,) * (len(shape) - 2))
            parts = {"lora_down.weight": down, "lora_up.weight": up}
            delta = up.flatten(1).double() @ down.flatten(1).double()
        elif kind == "loha":
            parts = {
                "hada_w1_a": normal(outputs, rank),
                "hada_w1_b": normal(rank, inputs),
                "hada_w2_a": normal(outputs, rank),
                "hada_w2_b": normal(rank, inputs),
            }
            first, second, third, fourth = (value.double() for value in parts.values())
            delta = (first @ second) * (third @ fourth)
        elif kind == "lokr":
            parts = {"lokr_w1": normal(2, 2), "lokr_w2_a": normal(outputs // 2, rank), "lokr_w2_b": normal(rank, inputs // 2)}
            delta = torch.kron(parts["lokr_w1"].double(), parts["lokr_w2_a"].double() @ parts["lokr_w2_b"].double())
        else:
            parts, alpha, scale = {"diff": normal(*shape) * 0.1, "diff_b": normal(outputs)}, None, 1.0
            delta = parts["diff"].double()
            dense[f"{layer}.bias"] = parts["diff_b"].double()
        if alpha is not None:
            parts["alpha"] = torch.tensor(alpha)
        tensors.update({f"diffusion_model.{layer}.{part}": value for part, value in parts.items()})
        dense[f"{layer}.weight"] = scale * delta.reshape(shape)
    if kind == "diff":
        for name in ("blocks.0.self_attn.norm_q.weight", "blocks.1.norm3.weight", "blocks.1.norm3.bias", "blocks.1.modulation", "head.modulation"):
            value = normal(*model.model.diffusion_model.get_parameter(name).shape)
            end = {"weight": "diff", "bias": "diff_b"}.get(name.rpartition(".")[2])
            tensors[f"diffusion_model.{name.rpartition('.')[0]}.{end}" if end else f"diffusion_model.{name}.diff"] = value
            dense[name] = value.double()
    save_file(tensors, path)
    return dense


def inputs_of(sigma: float, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(11)
    return {
        "x": torch.randn(2, 16, 2, 6, 4, generator=generator).to(dtype),
        "timestep": torch.full((2,), sigma * 1000.0),
        "context": torch.randn(2, 16, 32, generator=generator).to(dtype),
    }


def predict(model, sigma: float = 0.9, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    comfy.model_management.load_models_gpu([model, *model.get_nested_additional_models()], force_full_load=True)
    with torch.no_grad():
        return model.model.diffusion_model(**inputs_of(sigma, dtype)).clone()


def dense_reference(model, parts: list[tuple[float, dict[str, torch.Tensor]]], sigma: float = 0.9) -> torch.Tensor:
    """Run a copy of the network whose fp32 weights were changed by hand."""
    comfy.model_management.unload_all_models()
    network = copy.deepcopy(model.model.diffusion_model).float()
    for strength, dense in parts:
        for name, value in dense.items():
            parameter = network.get_parameter(name)
            parameter.data = (parameter.data.double() + strength * value).float()
    with torch.no_grad():
        return network(**inputs_of(sigma))


def ratio(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual.float() - expected.float()).norm() / expected.float().norm())


def rows_text(*rows: dict) -> str:
    return json.dumps([{"on": True, "low": 0.0, **row} for row in rows])


def apply(models, application: str, *rows: dict):
    return LoadLoRAs.execute(models["high"], models["low"], rows_text(*rows), application)


def hooks_left(model) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.model.modules())


@pytest.mark.parametrize("seed", range(6))
def test_merged_unmerged_and_dense_agree(models, lora_folder: Path, seed: int) -> None:
    choose = random.Random(seed)
    rows, parts = [], []
    for number in range(choose.randint(1, 4)):
        kind, dtype = choose.choice(("lora", "lora", "loha", "lokr", "diff")), choose.choice((torch.float32, torch.float16, torch.bfloat16))
        dense = write_lora(lora_folder / f"{seed}-{number}.safetensors", models["high"], 100 * seed + number, kind, dtype)
        strength = round(choose.uniform(-1.2, 1.2), 3)
        rows.append({"file": f"{seed}-{number}.safetensors", "high": strength})
        parts.append((strength, dense))
    expected = dense_reference(models["high"], parts)
    assert ratio(expected, dense_reference(models["high"], [])) > 0.05  # the rows do something
    for application in ("merged", "bypass"):
        result = apply(models, application, *rows)
        assert all(row["applied_high"] == row["total"] for row in result.ui["reward_lab_rows"])
        assert ratio(predict(result.args[0]), expected) < RATIO[torch.float32], application


def test_bf16_base(tiny_models, lora_folder: Path) -> None:
    models = load(tiny_models, torch.bfloat16)
    dense = write_lora(lora_folder / "a.safetensors", models["high"], 1)
    expected = dense_reference(models["high"], [(0.6, dense)])
    for application in ("merged", "bypass"):
        output = predict(apply(models, application, {"file": "a.safetensors", "high": 0.6}).args[0], dtype=torch.bfloat16)
        assert ratio(output, expected) < RATIO[torch.bfloat16], application


def test_order_of_rows_and_of_nodes_changes_no_bit(models, lora_folder: Path) -> None:
    for number in range(3):
        write_lora(lora_folder / f"{number}.safetensors", models["high"], number)
    rows = [{"file": f"{number}.safetensors", "high": 0.2 + number / 10} for number in range(3)]
    for application in ("merged", "bypass"):
        outputs = [predict(apply(models, application, *order).args[0]) for order in itertools.permutations(rows)]
        assert all(torch.equal(output, outputs[0]) for output in outputs), application
    together = predict(apply(models, "bypass", *rows).args[0])
    first = apply(models, "bypass", rows[2]).args
    chained = LoadLoRAs.execute(first[0], first[1], rows_text(rows[0], rows[1]), "bypass").args[0]
    assert torch.equal(predict(chained), together)


def test_nothing_is_left_behind(models, lora_folder: Path) -> None:
    comfy.model_management.unload_all_models()
    before = {key: value.clone() for key, value in models["high"].model.state_dict().items()}
    dense = write_lora(lora_folder / "a.safetensors", models["high"], 3)
    plain = predict(models["high"])
    for application in ("merged", "bypass"):
        changed = apply(models, application, {"file": "a.safetensors", "high": 0.7}).args[0]
        assert ratio(predict(changed), plain) > 0.01
        if application == "bypass":
            assert hooks_left(models["high"]) == len([key for key in dense if key.endswith("weight")])
            assert all(torch.equal(models["high"].model.state_dict()[key], value) for key, value in before.items())
        assert torch.equal(predict(models["high"]), plain)  # the base beside it
        predict(changed)
        del changed
        gc.collect()
        comfy.model_management.cleanup_models_gc()
        assert hooks_left(models["high"]) == 0, application
        comfy.model_management.unload_all_models()
        after = models["high"].model.state_dict()
        assert after.keys() == before.keys() and all(torch.equal(after[key], value) for key, value in before.items()), application


def test_a_dropped_clone_does_not_take_the_hooks_of_others(models, lora_folder: Path) -> None:
    write_lora(lora_folder / "a.safetensors", models["high"], 3)
    model = apply(models, "bypass", {"file": "a.safetensors", "high": 0.7}).args[0]
    expected = predict(model)
    clone = model.clone()
    clone.add_patches({})
    del clone
    gc.collect()
    with torch.no_grad():
        assert torch.equal(model.model.diffusion_model(**inputs_of(0.9)), expected)


def test_low_vram_gives_the_same_numbers(models, lora_folder: Path) -> None:
    write_lora(lora_folder / "a.safetensors", models["high"], 3)
    model = apply(models, "bypass", {"file": "a.safetensors", "high": 0.7}).args[0]
    expected = predict(model)
    comfy.model_management.unload_all_models()
    try:
        # One byte for weights: every layer stays on the offload device and is cast when it is used.
        for patcher in [model, *model.get_nested_additional_models()]:
            patcher.patch_model(device_to=patcher.load_device, lowvram_model_memory=1)
            assert patcher.model.model_lowvram
        with torch.no_grad():
            assert ratio(model.model.diffusion_model(**inputs_of(0.9)), expected) < 1e-6
    finally:
        for patcher in [model, *model.get_nested_additional_models()]:
            patcher.detach()


def test_fp8_base_runs_unmerged_by_itself_and_keeps_its_weights(tiny_models, lora_folder: Path) -> None:
    models = load(tiny_models, torch.float8_e4m3fn)
    assert quantised_kind(models["high"]) == "fp8"
    dense = write_lora(lora_folder / "a.safetensors", models["high"], 5)
    before = {key: value.clone() for key, value in models["high"].model.state_dict().items()}
    expected = dense_reference(models["high"], [(0.4, dense)])
    compute = models["high"].model.manual_cast_dtype or torch.float32
    result = apply(models, "auto", {"file": "a.safetensors", "high": 0.4})
    unmerged = ratio(predict(result.args[0], dtype=compute), expected)
    merged = ratio(predict(apply(models, "merged", {"file": "a.safetensors", "high": 0.4}).args[0], dtype=compute), expected)
    assert result.ui["reward_lab_rows"][0]["unmerged"] == ["high"] and "fp8" in result.args[2]
    assert unmerged < RATIO[compute] and unmerged < merged / 3, (unmerged, merged)
    comfy.model_management.unload_all_models()
    assert all(torch.equal(models["high"].model.state_dict()[key].view(torch.uint8), value.view(torch.uint8)) for key, value in before.items())


@pytest.mark.parametrize("generation", ["fp8_scaled", "fp8_scaled_old"])
def test_scaled_fp8_bases_of_both_generations(tiny_models, lora_folder: Path, generation: str) -> None:
    scaled, plain = lora_folder / "scaled-high-noise.safetensors", lora_folder / "plain-high-noise.safetensors"
    merge(Path(tiny_models["high"]), [], scaled, MergeSettings(dtype=generation), expert="high")
    merge(scaled, [], plain, MergeSettings(dtype="fp32"), expert="high")  # the numbers that the scaled file stands for
    model = comfy_sd.load_diffusion_model(str(scaled))
    reference = comfy_sd.load_diffusion_model(str(plain), model_options={"dtype": torch.float32})
    assert "fp8" in quantised_kind(model) or "float8" in quantised_kind(model)
    dense = write_lora(lora_folder / "a.safetensors", reference, 5)
    expected = dense_reference(reference, [(0.4, dense)])
    result = apply({"high": model, "low": None}, "auto", {"file": "a.safetensors", "high": 0.4, "curve": "1:1, 0.9:1, 0:0"})
    assert result.ui["reward_lab_rows"][0]["unmerged"] == ["high"]
    before = {key: value.clone() for key, value in model.model.state_dict().items()}
    assert ratio(predict(result.args[0]), expected) < RATIO[torch.float32] and ratio(predict(model), expected) > 0.05
    comfy.model_management.unload_all_models()
    after = model.model.state_dict()
    assert all(torch.equal(after[key].reshape(-1).view(torch.uint8), value.reshape(-1).view(torch.uint8)) for key, value in before.items())


@pytest.mark.parametrize("kind", ["lora", "loha", "lokr", "diff"])
def test_a_strength_over_sigma_is_the_constant_strength_of_that_sigma(models, lora_folder: Path, kind: str) -> None:
    write_lora(lora_folder / "a.safetensors", models["high"], 4, kind)
    result = apply(models, "auto", {"file": "a.safetensors", "high": 0.8, "curve": "1:0, 0.9:0.5, 0.5:0.5, 0:1"})
    assert result.ui["reward_lab_rows"][0]["unmerged"] == ["high"]
    for sigma, factor in ((1.0, 0.0), (0.95, 0.25), (0.9, 0.5), (0.7, 0.5), (0.25, 0.75), (0.0, 1.0)):
        constant = apply(models, "bypass", {"file": "a.safetensors", "high": 0.8 * factor}).args[0]
        assert ratio(predict(result.args[0], sigma), predict(constant, sigma)) < RATIO[torch.float32], sigma


def test_a_curve_cannot_be_merged(models, lora_folder: Path) -> None:
    write_lora(lora_folder / "a.safetensors", models["high"], 4)
    row = {"file": "a.safetensors", "high": 0.8, "curve": "ramp"}
    assert "cannot be merged" in LoadLoRAs.validate_inputs(rows_text(row), "merged")
    with pytest.raises(ValueError, match="cannot be merged"):
        apply(models, "merged", row)
    assert LoadLoRAs.validate_inputs(rows_text(row), "auto") is True


@pytest.mark.parametrize("application", ["merged", "bypass"])
def test_strengths_per_block(models, lora_folder: Path, application: str) -> None:
    dense = write_lora(lora_folder / "a.safetensors", models["high"], 4)
    row = {"file": "a.safetensors", "high": 0.8, "blocks": "0:0.5, 1:0, outside:0.25"}
    factors = {name: 0.5 if name.startswith("blocks.0") else 0.0 if name.startswith("blocks.1") else 0.25 for name in dense}
    expected = dense_reference(models["high"], [(0.8, {name: factors[name] * value for name, value in dense.items()})])
    assert ratio(predict(apply(models, application, row).args[0]), expected) < RATIO[torch.float32]


def test_halves_are_those_of_the_model_not_of_the_file(models, lora_folder: Path) -> None:
    dense = write_lora(lora_folder / "a.safetensors", models["high"], 4)
    tensors = load_file(lora_folder / "a.safetensors")
    save_file({key: value for key, value in tensors.items() if "blocks.0." in key or "blocks_0_" in key}, lora_folder / "first.safetensors")
    first = {name: value for name, value in dense.items() if name.startswith("blocks.0.")}
    row = {"file": "first.safetensors", "high": 0.8}
    expected = dense_reference(models["high"], [(0.8, first)])
    assert ratio(predict(apply(models, "bypass", {**row, "blocks": "first half"}).args[0]), expected) < RATIO[torch.float32]
    base = dense_reference(models["high"], [])
    assert ratio(predict(apply(models, "bypass", {**row, "blocks": "last half"}).args[0]), base) < RATIO[torch.float32]


def test_dora_is_merged_and_said_to_be(models, lora_folder: Path) -> None:
    layer = "blocks.0.self_attn.q"
    tensors = {"lora_down.weight": torch.randn(2, 48), "lora_up.weight": torch.randn(48, 2), "dora_scale": torch.rand(48, 1)}
    save_file({f"diffusion_model.{layer}.{part}": value for part, value in tensors.items()}, lora_folder / "dora.safetensors")
    row = {"file": "dora.safetensors", "high": 0.5}
    merged, unmerged = (apply(models, application, row) for application in ("merged", "bypass"))
    assert torch.equal(predict(merged.args[0]), predict(unmerged.args[0]))
    assert any("were merged" in warning for warning in unmerged.ui["reward_lab_rows"][0]["warnings"])
    with pytest.raises(ValueError, match="cannot follow sigma"):
        apply(models, "auto", {**row, "curve": "late"})


def test_a_new_strength_loads_nothing(models, lora_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_lora(lora_folder / "a.safetensors", models["high"], 4)
    row = {"file": "a.safetensors", "high": 0.5, "curve": "1:0.5, 0:1"}
    kept = [apply(models, "bypass", row).args[0]]
    predict(kept[0])
    counts = {"files": 0, "patched": 0, "loads": 0}

    def counted(owner, name: str, what: str) -> None:
        original = getattr(owner, name)

        def call(*args, **kwargs):
            counts[what] += 1
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, call)

    counted(comfy.utils, "load_torch_file", "files")
    counted(comfy.utils, "set_attr_param", "patched")
    counted(comfy.utils, "copy_to_param", "patched")
    counted(comfy.model_patcher.ModelPatcher, "patch_weight_to_device", "patched")
    counted(comfy.model_patcher.ModelPatcher, "load", "loads")  # of the base and of the LoRA's own tensors
    pointers = {name: parameter.data_ptr() for name, parameter in models["high"].model.named_parameters()}
    terms = kept[0].get_attachment(KEY).rows[0].module
    for change in ({"high": 0.3}, {"curve": "1:1, 0:0"}, {"blocks": "1:0.5"}):
        kept.append(apply(models, "bypass", {**row, **change}).args[0])
        predict(kept[-1])
        assert kept[-1].get_attachment(KEY).rows[0].module is terms
    assert counts == {"files": 0, "patched": 0, "loads": 0}
    assert pointers == {name: parameter.data_ptr() for name, parameter in models["high"].model.named_parameters()}


def test_a_new_merged_strength_reads_no_file_and_keeps_the_base(models, lora_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_lora(lora_folder / "a.safetensors", models["high"], 4)
    row = {"file": "a.safetensors", "high": 0.5}
    kept = [apply(models, "merged", row).args[0]]
    predict(kept[0])
    for owner, name in ((comfy.utils, "load_torch_file"), (comfy_sd, "load_diffusion_model")):
        monkeypatch.setattr(owner, name, lambda *_args, **_kwargs: pytest.fail("a file was read again"))
    network = models["high"].model
    for strength in (0.3, 0.9):
        kept.append(apply(models, "merged", {**row, "high": strength}).args[0])
        predict(kept[-1])
        assert kept[-1].model is network


def test_one_model_is_enough(models, lora_folder: Path) -> None:
    write_lora(lora_folder / "a.safetensors", models["high"], 4)
    only_low = LoadLoRAs.execute(model_low=models["low"], rows=rows_text({"file": "a.safetensors", "high": 0.5, "low": 0.25})).args
    assert only_low[0] is None and only_low[1].patches

"""The share by which a row changes the weights: against the numbers that VideoX-Fun recorded, sampled against full, and how long it takes."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path

import pytest

pytest.importorskip("torch")
comfy_sd = pytest.importorskip("comfy.sd", reason="needs ComfyUI on the path")

import comfy.model_management  # noqa: E402
import folder_paths  # noqa: E402
import torch  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

from reward_lab.host import lora_share  # noqa: E402
from reward_lab.host.lora_bypass import weight_shapes  # noqa: E402
from reward_lab.host.lora_file import fit, read_lora  # noqa: E402
from reward_lab.nodes.loras import LoadLoRAs  # noqa: E402

pytestmark = pytest.mark.host

HIGH_HPS = "Wan2.2-Fun-A14B-InP-high-noise-HPS2.1.safetensors"


@pytest.fixture
def fixtures(shared_fixtures: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The fixture folder, with its LoRA files in the host's list."""
    folder = shared_fixtures / "videoxfun_lora"
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "loras", ([str(folder)], {".safetensors"}))
    return folder


@pytest.fixture
def models(fixtures: Path):
    return load(fixtures, torch.float32)


def load(fixtures: Path, dtype: torch.dtype):
    return {expert: comfy_sd.load_diffusion_model(str(fixtures / f"base_{expert}.safetensors"), model_options={"dtype": dtype}) for expert in ("high", "low")}


def shares(models, *rows: dict, application: str = "auto") -> list[dict]:
    result = LoadLoRAs.execute(models["high"], models["low"], json.dumps(list(rows)), application)
    return [row["shares"] for row in result.ui["reward_lab_rows"]]


def test_shares_are_those_that_were_recorded(fixtures: Path, models) -> None:
    for name, recorded in json.loads((fixtures / "manifest.json").read_text(encoding="utf-8"))["loras"].items():
        expert = recorded["expert"]
        for application in ("merged", "bypass"):
            (share,) = shares(models, {"file": name, expert: 1.0}, application=application)
            assert share.keys() == {expert} and share[expert]["value"] == pytest.approx(recorded["relative_change"], abs=1e-6)  # the manifest gives six digits
            assert share[expert]["text"] == f"{100 * recorded['relative_change']:.3g} % of the weights"


def test_strengths_blocks_and_curves_count(fixtures: Path, models) -> None:
    (one,) = shares(models, {"file": HIGH_HPS, "high": 1.0, "low": 0.25})
    (half,) = shares(models, {"file": HIGH_HPS, "high": -0.5})
    (curve,) = shares(models, {"file": HIGH_HPS, "high": 1.0, "curve": "1:0.2, 0:0.5"})
    assert half["high"]["value"] == curve["high"]["value"] == pytest.approx(one["high"]["value"] / 2) and one["low"]["value"] > 0
    (block,) = shares(models, {"file": HIGH_HPS, "high": 1.0, "blocks": "1:1, rest:0"})
    base, lora = load_file(fixtures / "base_high.safetensors"), load_file(fixtures / HIGH_HPS)
    change = whole = 0.0
    for key in lora:
        if key.startswith("lora_unet__blocks_1_") and key.endswith("lora_up.weight"):
            weight = next(weight for name, weight in base.items() if name.replace(".", "_") == key.removeprefix("lora_unet__").replace(".lora_up.", "_"))
            change += float((0.5 * lora[key].double() @ lora[key.replace("lora_up", "lora_down")].double()).square().sum())
            whole += float(weight.double().square().sum())
    assert block["high"]["value"] == pytest.approx((change / whole) ** 0.5, rel=1e-5)


def test_what_is_merged_already_does_not_count(fixtures: Path, models) -> None:
    (before,) = shares(models, {"file": HIGH_HPS, "high": 1.0})
    patched = LoadLoRAs.execute(models["high"], models["low"], json.dumps([{"file": HIGH_HPS, "high": 1.0}]), "merged").args[0]
    comfy.model_management.load_models_gpu([patched], force_full_load=True)
    lora_share._bases.clear()
    (after,) = shares({"high": patched, "low": models["low"]}, {"file": HIGH_HPS, "high": 1.0})
    assert after == before


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.bfloat16])
def test_other_types_of_weights(fixtures: Path, models, dtype: torch.dtype) -> None:
    (exact,), (narrow,) = (shares(some, {"file": HIGH_HPS, "high": 1.0}) for some in (models, load(fixtures, dtype)))
    assert narrow["high"]["value"] == pytest.approx(exact["high"]["value"], rel=0.01)  # roundings of 2^-5 and less, of either sign


@pytest.mark.parametrize("kind", ["lora", "loha", "lokr", "diff"])
def test_rows_that_stand_for_all(models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    generator = torch.Generator().manual_seed(3)
    forms = {
        "lora": {"lora_A.weight": (4, 96), "lora_B.weight": (96, 4), "alpha": ()},
        "loha": {"hada_w1_a": (96, 2), "hada_w1_b": (2, 96), "hada_w2_a": (96, 3), "hada_w2_b": (3, 96)},
        "lokr": {"lokr_w1": (8, 8), "lokr_w2_a": (12, 2), "lokr_w2_b": (2, 12), "alpha": ()},
        "diff": {"diff": (96, 96)},
    }
    layers = [f"blocks.{block}.self_attn.{name}" for block in (0, 1, 2) for name in "qkvo"]
    tensors = {f"{layer}.{part}": torch.randn(shape, generator=generator) for layer in layers for part, shape in forms[kind].items()}
    save_file(tensors, tmp_path / "a.safetensors")
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "loras", ([str(tmp_path)], {".safetensors"}))
    (full,) = shares(models, {"file": "a.safetensors", "high": 1.0})
    lora_share._bases.clear()
    lora_share._changes.clear()
    monkeypatch.setattr(lora_share, "WHOLE_NUMBERS", 100)
    (sampled,) = shares(models, {"file": "a.safetensors", "high": 1.0})
    assert sampled["high"]["text"].startswith("≈")
    # 12 weights x 16 rows of 96 numbers. Rows of a LoHa of rank 2 differ most, by about half of their square: that over the root of 192 is 4 %.
    assert sampled["high"]["value"] == pytest.approx(full["high"]["value"], rel=0.12)


def test_dora_on_large_weights_is_told_as_left_out(models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = "blocks.0.self_attn.q"
    tensors = {f"{layer}.lora_A.weight": torch.randn(4, 96), f"{layer}.lora_B.weight": torch.randn(96, 4), f"{layer}.dora_scale": torch.ones(96, 1)}
    save_file({**tensors, "blocks.0.self_attn.k.diff": torch.randn(96, 96)}, tmp_path / "dora.safetensors")
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "loras", ([str(tmp_path)], {".safetensors"}))
    assert shares(models, {"file": "dora.safetensors", "high": 1.0})[0]["high"]["text"].endswith("(measured on 1 of 2)")


def test_it_costs_little_on_weights_of_the_real_size() -> None:
    """Eight layers of the 14B model's width and an official rank, of 326: at most 1/40 of the four seconds that a load may take longer."""
    shape, rank = (5120, 5120), 128
    adapters = [comfy_lora(torch.randn(shape[0], rank).bfloat16(), torch.randn(rank, shape[1]).bfloat16()) for _ in range(8)]
    weight = torch.randn(shape).bfloat16()
    start = time.process_time()
    for adapter in adapters:
        assert lora_share._change_square("x", adapter, shape, torch.device("cpu")) > 0
        assert lora_share._base_square(weight) == pytest.approx(5120 * 5120, rel=0.05)
    assert time.process_time() - start < 0.1


def comfy_lora(up: torch.Tensor, down: torch.Tensor):
    from comfy.weight_adapter import LoRAAdapter

    return LoRAAdapter(set(), (up, down, 64.0, None, None, None))


def test_a_new_strength_measures_nothing_again(fixtures: Path, models, monkeypatch: pytest.MonkeyPatch) -> None:
    (first,) = shares(models, {"file": HIGH_HPS, "high": 0.4})
    for name in ("_change_square", "_base_square"):
        monkeypatch.setattr(lora_share, name, None)
    (second,) = shares(models, {"file": HIGH_HPS, "high": 0.8})
    assert second["high"]["value"] == pytest.approx(2 * first["high"]["value"])


def test_measurements_go_with_their_file(fixtures: Path, models) -> None:
    fitted = fit(dataclasses.replace(read_lora(fixtures / HIGH_HPS)), weight_shapes(models["high"]))
    assert lora_share.share_of(models["high"], fitted, dict.fromkeys(fitted.patches, 1.0)).measured == 30
    known = id(fitted)
    assert known in lora_share._changes
    del fitted
    assert known not in lora_share._changes

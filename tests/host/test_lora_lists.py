"""The lists for other packs: their form, and what the loaders behind them make of each layout.

ComfyUI's own loader, which the consumers of a LORA_STACK call, runs here. kijai's wrapper cannot be shipped: its facts are recorded in `lora_lists`,
and were checked once by running its renaming on every layout here, with the host's loader behind it, on a LoRA of all linear layers.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("torch")
comfy_sd = pytest.importorskip("comfy.sd", reason="needs ComfyUI on the path")

import comfy.utils  # noqa: E402
import folder_paths  # noqa: E402
import torch  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

from reward_lab.host.lora_convert import convert  # noqa: E402
from reward_lab.host.lora_keys import LAYOUTS, layout_named  # noqa: E402
from reward_lab.host.lora_lists import CORE_LAYOUTS, SAFE_LAYOUT, WRAPPER_FAULTS, reading_faults  # noqa: E402
from reward_lab.nodes.loras import LoadLoRAs  # noqa: E402

pytestmark = pytest.mark.host

HIGH = "Wan2.2-Fun-A14B-InP-high-noise-HPS2.1.safetensors"
# Fields of a WANVIDLORA entry and their types: WanVideoLoraSelect.getlorapath, kijai/ComfyUI-WanVideoWrapper@3317577 nodes_model_loading.py (Apache-2.0).
ENTRY = {"path": str, "strength": float, "name": str, "blocks": dict, "layer_filter": str, "low_mem_load": bool, "merge_loras": bool}


@pytest.fixture(scope="module")
def fixtures(shared_fixtures: Path) -> Path:
    return shared_fixtures / "videoxfun_lora"


@pytest.fixture(scope="module")
def model(fixtures: Path):
    return comfy_sd.load_diffusion_model(str(fixtures / "base_high.safetensors"), model_options={"dtype": torch.float32})


@pytest.fixture
def folder(tmp_path: Path, fixtures: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that the host takes for its LoRA folder, with three names for one file."""
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "loras", ([str(tmp_path)], {".safetensors"}))
    (tmp_path / "sub").mkdir()
    for name in ("a.v2", "sub/b", "c"):
        convert(fixtures / HIGH, tmp_path / f"{name}.safetensors", "comfyui")
    return tmp_path


def lists(*rows: dict, application: str = "auto") -> tuple:
    return LoadLoRAs.execute(rows=json.dumps(rows), application=application).args


def test_form_of_both_lists(folder: Path) -> None:
    rows = [
        {"file": "a.v2.safetensors", "high": 0.5, "low": 0.25},
        {"file": "sub/b.safetensors", "high": 0.7, "curve": "1:0.5, 0:0.5"},
        {"file": "c.safetensors", "high": 1.0, "curve": "ramp"},
        {"file": "c.safetensors", "high": 1.0, "on": False},
    ]
    outputs = lists(*rows)
    assert outputs[:2] == (None, None) and "c.safetensors: its curve" in outputs[2] and "no high-noise model is connected" in outputs[2]
    for entry in (*outputs[3], *outputs[4]):
        assert {name: type(value) for name, value in entry.items()} == ENTRY and Path(entry["path"]).is_file()
    assert [(entry["name"], entry["strength"]) for entry in outputs[3]] == [("a.v2", 0.5), ("sub/b", 0.35)]
    assert [(entry["name"], entry["strength"]) for entry in outputs[4]] == [("a.v2", 0.25)]
    assert outputs[5:] == ([("a.v2.safetensors", 0.5, 0.0), ("sub/b.safetensors", 0.35, 0.0)], [("a.v2.safetensors", 0.25, 0.0)])
    assert all(folder_paths.get_full_path("loras", name) for name, _, _ in outputs[5])


def test_the_wrapper_merges_all_rows_or_none(folder: Path) -> None:
    """It takes one `merge_loras` for all entries (the loader any true one, WanVideoSetLoRAs the last), so the lists give one."""
    first, second = {"file": "a.v2.safetensors", "high": 0.5}, {"file": "c.safetensors", "high": 0.5}
    for rows, application, expected in (
        ((first, second), "auto", True),
        ((first, second), "bypass", False),
        (({**first, "application": "bypass"}, second), "merged", False),
        (({**first, "application": "merged"}, {**second, "application": "auto"}), "bypass", True),
    ):
        outputs = lists(*rows, application=application)
        assert {entry["merge_loras"] for entry in outputs[3]} == {expected}, (rows, application)
        assert ("leaves the head out" in outputs[2]) == (not expected)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_what_comfyui_itself_reads(fixtures: Path, model, tmp_path: Path, layout) -> None:
    """Core's loader takes all of a file or nothing; `lora_lists` must know which."""
    convert(fixtures / HIGH, tmp_path / "x.safetensors", layout.name)
    patched, _ = comfy_sd.load_lora_for_models(model, None, comfy.utils.load_torch_file(str(tmp_path / "x.safetensors")), 1.0, 0.0)
    assert len(patched.patches) == (30 if layout.name in CORE_LAYOUTS else 0)
    assert ("LORA_STACK" in reading_faults(layout.name, {"lora": 30})) == (layout.name not in CORE_LAYOUTS)


def test_faults_are_told_with_a_remedy_that_works(fixtures: Path, folder: Path) -> None:
    assert set(WRAPPER_FAULTS) - {"mixed"} <= {layout.name for layout in LAYOUTS}
    assert reading_faults(SAFE_LAYOUT, {"lora": 1, "lokr": 1, "diff": 1}) == "" and reading_faults("videox-fun", {"lora": 1}) == ""
    assert "low-rank pairs only" in reading_faults("videox-fun", {"lora": 1, "diff": 1})
    convert(fixtures / HIGH, folder / "d.safetensors", "diffusers")
    report = lists({"file": "d.safetensors", "high": 0.5}, {"file": "c.safetensors", "high": 0.5})[2]
    told = [line for line in report.splitlines() if "WanVideoWrapper" in line]
    assert len(told) == 1 and told[0].startswith("d.safetensors in the layout diffusers") and f"Convert it to {SAFE_LAYOUT}" in told[0]
    convert(folder / "d.safetensors", folder / "e.safetensors", SAFE_LAYOUT)
    assert "WanVideoWrapper" not in lists({"file": "e.safetensors", "high": 0.5})[2]


def test_the_remedy_changes_no_bit(fixtures: Path, tmp_path: Path) -> None:
    tensors = load_file(fixtures / HIGH) | {"lora_unet__blocks_0_norm3.diff": torch.randn(96), "lora_unet__blocks_0_ffn_0.diff_b": torch.randn(224)}
    save_file(tensors, tmp_path / "x.safetensors")
    convert(tmp_path / "x.safetensors", tmp_path / "y.safetensors", SAFE_LAYOUT)
    found = load_file(tmp_path / "y.safetensors")
    assert len(found) == len(tensors) and layout_named(SAFE_LAYOUT).key("blocks.0.norm3", "diff") in found
    assert sum(any(torch.equal(value, other) and value.dtype == other.dtype for other in found.values()) for value in tensors.values()) == len(tensors)

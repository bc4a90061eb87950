"""The LoRA node against numbers made by VideoX-Fun, through the real node class and the real host model on the CPU."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

pytest.importorskip("torch")
comfy_sd = pytest.importorskip("comfy.sd", reason="needs ComfyUI on the path")

import folder_paths  # noqa: E402
import torch  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

from reward_lab.host import lora_patch  # noqa: E402
from reward_lab.nodes.loras import LoadLoRAs  # noqa: E402

pytestmark = pytest.mark.host

TOLERANCE = 1e-4  # norm of the difference over norm of the expected output, from the fixtures' README


@pytest.fixture
def fixtures(shared_fixtures: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The fixture folder, with its LoRA files in the host's list."""
    folder = shared_fixtures / "videoxfun_lora"
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "loras", ([str(folder)], {".safetensors"}))
    return folder


@pytest.fixture
def lora_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder that the host takes for its LoRA folder."""
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "loras", ([str(tmp_path)], {".safetensors", ".pt"}))
    return tmp_path


@pytest.fixture(scope="module")
def models(shared_fixtures: Path):
    """Both tiny experts, loaded by the host in fp32."""
    folder = shared_fixtures / "videoxfun_lora"
    return {
        expert: comfy_sd.load_diffusion_model(str(folder / f"base_{expert}.safetensors"), model_options={"dtype": torch.float32}) for expert in ("high", "low")
    }


def rows_text(*rows: tuple[str, float, float]) -> str:
    return json.dumps([{"on": True, "file": file, "high": high, "low": low} for file, high, low in rows])


def predict(model, inputs: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    """Return the velocity of a MODEL, weights patched by the host."""
    import comfy.model_management

    comfy.model_management.load_models_gpu([model], force_full_load=True)
    latent, concat = inputs[f"{name}.latent"], inputs[f"{name}.concat"]
    with torch.no_grad():
        return model.model.diffusion_model(torch.cat([latent, concat], dim=1), inputs[f"{name}.timestep"], inputs[f"{name}.context"])


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


def official(expert: str, reward: str) -> str:
    return f"Wan2.2-Fun-A14B-InP-{expert}-noise-{reward}.safetensors"


def case_rows(expert: str, case: str) -> list[tuple[str, float, float]]:
    """Turn `hps_0.7+mps_0.3` into rows that act on one expert."""
    rows = []
    for part in case.split("+") if case != "none" else []:
        reward, strength = part.split("_")
        file = official(expert, {"hps": "HPS2.1", "mps": "MPS"}[reward])
        rows.append((file, float(strength), 0.0) if expert == "high" else (file, 0.0, float(strength)))
    return rows


@pytest.mark.parametrize("application", ["merged", "bypass"])
def test_every_recorded_output(fixtures: Path, models, application: str) -> None:
    inputs, expected = load_file(fixtures / "inputs.safetensors"), load_file(fixtures / "expected.safetensors")
    errors = {}
    for name, output in expected.items():
        expert, number, case = name.split(".", 2)
        result = LoadLoRAs.execute(models["high"], models["low"], rows_text(*case_rows(expert, case)), application)
        model = result.args[0 if expert == "high" else 1]
        errors[name] = relative_error(predict(model, inputs, f"{expert}.{number}"), output)
    assert len(errors) == 24
    assert max(errors.values()) <= TOLERANCE, errors


def test_report_and_page_data(fixtures: Path, models) -> None:
    result = LoadLoRAs.execute(models["high"], models["low"], rows_text((official("high", "HPS2.1"), 0.5, 0.0)))
    row = result.ui["reward_lab_rows"][0]
    assert (row["applied_high"], row["applied_low"], row["total"], row["warnings"]) == (90, None, 90, [])
    assert (row["kinds"], row["left_out"], row["unmerged"]) == ({"lora": 30}, {}, []) and row["memory_bytes"] > 0
    assert "applied 90 of 90 keys" in result.args[2] and "30 layers, rank 8, alpha 4" in result.args[2]


def test_the_page_is_told_which_row_a_report_is_of(fixtures: Path, models) -> None:
    file = official("high", "HPS2.1")
    rows = json.dumps([{"on": False, "file": file, "high": 0.5}, {"file": file, "high": 0.7}])
    reports = LoadLoRAs.execute(models["high"], models["low"], rows).ui["reward_lab_rows"]
    told = [(report["on"], report["high"], report["low"], report["applied_high"]) for report in reports]
    assert told == [(False, 0.5, 0.0, None), (True, 0.7, 0.0, 90)]


def test_original_models_and_strength_zero_stay_untouched(fixtures: Path, models) -> None:
    before = {key: value.clone() for key, value in models["high"].model.state_dict().items()}
    inputs, expected = load_file(fixtures / "inputs.safetensors"), load_file(fixtures / "expected.safetensors")
    patched = LoadLoRAs.execute(models["high"], models["low"], rows_text((official("high", "HPS2.1"), 1.0, 0.0))).args[0]
    predict(patched, inputs, "high.0")
    zero = LoadLoRAs.execute(models["high"], models["low"], rows_text((official("high", "HPS2.1"), 0.0, 0.0))).args[0]
    assert not models["high"].patches and not zero.patches
    assert relative_error(predict(zero, inputs, "high.0"), expected["high.0.none"]) <= TOLERANCE
    after = models["high"].model.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())


def test_order_of_rows_does_not_matter(fixtures: Path, models) -> None:
    inputs = load_file(fixtures / "inputs.safetensors")
    rows = case_rows("high", "hps_0.7+mps_0.3")
    outputs = [predict(LoadLoRAs.execute(models["high"], models["low"], rows_text(*order)).args[0], inputs, "high.1") for order in (rows, rows[::-1])]
    assert relative_error(outputs[0], outputs[1]) < 1e-5


@pytest.mark.parametrize(
    "rename",
    [
        lambda key: key.replace("lora_unet__", "lora_unet_"),
        lambda key: key.replace("lora_unet__", "lycoris_"),
        lambda key: dotted(key, "diffusion_model.", "lora_A.weight", "lora_B.weight"),
        lambda key: dotted(key, "diffusion_model.", "lora_down.weight", "lora_up.weight"),
        lambda key: dotted(key, "base_model.model.", "lora_A.default.weight", "lora_B.default.weight"),
        lambda key: dotted(key, "base_model.model.diffusion_model.", "lora_A.weight", "lora_B.weight"),
        lambda key: dotted(key, "transformer.", "lora_A.weight", "lora_B.weight"),
        lambda key: dotted(key, "pipe.dit.", "lora_A.default.weight", "lora_B.default.weight"),
        lambda key: dotted(key, "", "lora.down.weight", "lora.up.weight"),
    ],
)
def test_layouts_give_the_same_numbers(fixtures: Path, models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rename) -> None:
    tensors = load_file(fixtures / official("high", "HPS2.1"))
    save_file({rename(key): value for key, value in tensors.items()}, tmp_path / "renamed.safetensors")
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "loras", ([str(tmp_path)], {".safetensors"}))
    result = LoadLoRAs.execute(models["high"], models["low"], rows_text(("renamed.safetensors", 0.55, 0.0)))
    expected = load_file(fixtures / "expected.safetensors")["high.0.hps_0.55"]
    assert result.ui["reward_lab_rows"][0]["applied_high"] == 90
    assert relative_error(predict(result.args[0], load_file(fixtures / "inputs.safetensors"), "high.0"), expected) <= TOLERANCE


def test_file_without_block_0_cross_attention_k(fixtures: Path, models, lora_folder: Path) -> None:
    tensors = load_file(fixtures / official("high", "HPS2.1"))
    save_file({key: value for key, value in tensors.items() if "blocks_0_cross_attn_k" not in key}, lora_folder / "pruned.safetensors")
    row = LoadLoRAs.execute(models["high"], models["low"], rows_text(("pruned.safetensors", 1.0, 0.0))).ui["reward_lab_rows"][0]
    assert (row["applied_high"], row["total"]) == (87, 87)


def dotted(key: str, prefix: str, down: str, up: str) -> str:
    """Write a VideoX-Fun key in a dotted layout."""
    name, part = key.removeprefix("lora_unet__").split(".", 1)
    for flat, dots in (
        ("_self_attn_", ".self_attn."),
        ("_cross_attn_", ".cross_attn."),
        ("blocks_", "blocks."),
        ("embedding_", "embedding."),
        ("projection_", "projection."),
        ("head_", "head."),
    ):
        name = name.replace(flat, dots)
    return f"{prefix}{name}." + {"lora_down.weight": down, "lora_up.weight": up, "alpha": "alpha"}[part]


def refusal(models, file: str, high: float = 1.0) -> str:
    with pytest.raises(ValueError) as caught:
        LoadLoRAs.execute(models["high"], models["low"], rows_text((file, high, 0.0)))
    return str(caught.value)


def test_lora_for_another_width_names_both(fixtures: Path, models, lora_folder: Path) -> None:
    save_file(
        {"lora_unet__blocks_0_self_attn_q.lora_down.weight": torch.ones(4, 5120), "lora_unet__blocks_0_self_attn_q.lora_up.weight": torch.ones(5120, 4)},
        lora_folder / "wide.safetensors",
    )
    message = refusal(models, "wide.safetensors")
    assert "5120" in message and "96" in message


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_lora_is_refused(fixtures: Path, models, lora_folder: Path, value: float) -> None:
    save_file(
        {"lora_unet__blocks_0_self_attn_q.lora_down.weight": torch.full((4, 96), value), "lora_unet__blocks_0_self_attn_q.lora_up.weight": torch.ones(96, 4)},
        lora_folder / "nan.safetensors",
    )
    assert "NaN or infinity" in refusal(models, "nan.safetensors")


def test_truncated_missing_and_foreign_files(fixtures: Path, models, lora_folder: Path) -> None:
    shutil.copy(fixtures / official("high", "HPS2.1"), lora_folder / "whole.safetensors")
    data = (lora_folder / "whole.safetensors").read_bytes()
    for size, reason in ((0, "not a safetensors file"), (5, "not a safetensors file"), (100, "truncated"), (len(data) - 1, "truncated")):
        (lora_folder / f"cut{size}.safetensors").write_bytes(data[:size])
        assert reason in refusal(models, f"cut{size}.safetensors")
    assert "not among the loras files" in refusal(models, "absent.safetensors")
    save_file(
        {"lora_unet_down_blocks_0_attentions_0.lora_down.weight": torch.ones(2, 2), "lora_unet_down_blocks_0_attentions_0.lora_up.weight": torch.ones(2, 2)},
        lora_folder / "sd.safetensors",
    )
    assert "0 of 2 keys" in refusal(models, "sd.safetensors")
    (lora_folder / "pickle.pt").write_bytes(b"\x80\x02")
    assert "not a safetensors file" in refusal(models, "pickle.pt")


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "5",
        "[5]",
        '[{"file": "x", "high": NaN}]',
        '[{"file": "x", "low": Infinity}]',
        '[{"file": "x", "high": "0.5"}]',
        '[{"high": 1}]',
        '[{"file": "x", "hihg": 1}]',
        '[{"file": "x", "high": 1e9}]',
        '[{"file": "x", "curve": "2:1"}]',
        '[{"file": "x", "curve": 5}]',
        '[{"file": "x", "blocks": 1}]',
        '[{"file": "x", "application": "fused"}]',
    ],
)
def test_bad_rows_are_refused_before_the_run(text: str) -> None:
    message = lora_patch.check_rows(text)
    assert isinstance(message, str) and "ow" in message


def test_slot_warnings(fixtures: Path, models) -> None:
    wrong = LoadLoRAs.execute(models["high"], models["low"], rows_text((official("high", "MPS"), 0.0, 0.5)))
    both = LoadLoRAs.execute(models["high"], models["low"], rows_text((official("low", "MPS"), 0.7, 0.7), (official("low", "MPS"), 0.7, 0.0)))
    assert "swap the two strengths" in wrong.ui["reward_lab_rows"][0]["warnings"][0]
    assert "both experts" in both.ui["reward_lab_rows"][0]["warnings"][0]
    assert "stands in 2 rows" in both.args[2] and "add up to 1.4" in both.args[2]

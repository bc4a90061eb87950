"""`lab.py lora apply` against the outputs that VideoX-Fun recorded, merged and beside the weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("comfy.sd", reason="needs ComfyUI on the path")

import torch  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

from reward_lab.host.lora_apply import parse_row  # noqa: E402
from reward_lab.host.lora_command import main  # noqa: E402

pytestmark = pytest.mark.host

TOLERANCE = 1e-4  # norm of the difference over norm of the expected output, from the fixtures' README


@pytest.fixture(scope="module")
def fixtures(shared_fixtures: Path) -> Path:
    return shared_fixtures / "videoxfun_lora"


def lora(fixtures: Path, expert: str, reward: str) -> Path:
    return fixtures / f"Wan2.2-Fun-A14B-InP-{expert}-noise-{reward}.safetensors"


@pytest.mark.parametrize("expert", ["high", "low"])
@pytest.mark.parametrize("mode", ["merge", "bypass"])
def test_recorded_outputs(fixtures: Path, tmp_path: Path, capsys: pytest.CaptureFixture, expert: str, mode: str) -> None:
    expected = load_file(fixtures / "expected.safetensors")
    for case, rows in {"none": [], "hps_0.55": [("HPS2.1", 0.55)], "hps_0.7+mps_0.3": [("HPS2.1", 0.7), ("MPS", 0.3)]}.items():
        arguments = [text for reward, strength in rows for text in ("--row", f"{lora(fixtures, expert, reward)}:{strength}:{mode}")]
        out = tmp_path / f"{case}.safetensors"
        status = main(["apply", "--base", str(fixtures / f"base_{expert}.safetensors"), *arguments]
                      + ["--inputs", str(fixtures / "inputs.safetensors"), "--out", str(out), "--json"])  # fmt: skip
        data = json.loads(capsys.readouterr().out)
        assert status == 0 and [row["unmerged"] for row in data["rows"]] == [[expert] if mode == "bypass" else []] * len(rows)
        outputs = load_file(out)
        assert sorted(outputs) == sorted(data["outputs"]) == ["high.0", "high.1", "low.0", "low.1"]
        for number in (0, 1):
            wanted = expected[f"{expert}.{number}.{case}"]
            assert float((outputs[f"{expert}.{number}"] - wanted).norm() / wanted.norm()) <= TOLERANCE, case


def test_refusals(fixtures: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    base, inputs, row = fixtures / "base_high.safetensors", fixtures / "inputs.safetensors", f"{lora(fixtures, 'high', 'MPS')}:1"
    narrow = tmp_path / "narrow.safetensors"
    save_file({"latent": torch.zeros(1, 16, 1, 4, 4), "timestep": torch.zeros(1), "context": torch.zeros(1, 4, 48)}, narrow)
    cases = {
        "is no row": (base, f"{lora(fixtures, 'high', 'MPS')}", inputs),
        "is not there": (base, "absent.safetensors:1", inputs),
        "16 channels": (base, row, narrow),
        "no latent, timestep and context": (base, row, base),
        "no diffusion model": (lora(fixtures, "high", "MPS"), row, inputs),
    }
    for reason, (model, text, given) in cases.items():
        status = main(["apply", "--base", str(model), "--row", text, "--inputs", str(given), "--out", str(tmp_path / "out.safetensors"), "--json"])
        data = json.loads(capsys.readouterr().out)
        assert status == 2 and data["verdict"] == "refused" and reason in data["reason"], data
        assert not (tmp_path / "out.safetensors").exists()


def test_rows_as_text() -> None:
    row = parse_row("C:/my loras/a:b.safetensors:-0.5:bypass", "low")
    assert (row.file, row.high, row.low, row.application) == ("C:/my loras/a:b.safetensors", 0.0, -0.5, "bypass")
    assert parse_row("a.safetensors:1", "high").application == ""
    for text in ("a.safetensors", ":1", "a:nan", "a:1e9", "a:0.5:fused"):
        with pytest.raises(ValueError, match="is no row"):
            parse_row(text, "high")

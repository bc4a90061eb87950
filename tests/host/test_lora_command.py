"""`lab.py lora`: what it prints, as text and as one JSON object, and its exit status."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("comfy.sd", reason="needs ComfyUI on the path")

from PIL import Image  # noqa: E402

from reward_lab.host.lora_command import main  # noqa: E402
from reward_lab.host.lora_keys import LAYOUTS  # noqa: E402
from reward_lab.host.official_loras import OFFICIAL  # noqa: E402

pytestmark = pytest.mark.host

FIELDS = {"layout", "expert", "rank", "alpha", "modules_applied", "modules_total", "relative_norm", "verdict", "reason", "warnings"}


@pytest.fixture(scope="module")
def fixtures(shared_fixtures: Path) -> Path:
    return shared_fixtures / "videoxfun_lora"


def run(capsys: pytest.CaptureFixture, *arguments: str | Path) -> tuple[int, str, str]:
    """Run a verb in this process."""
    status = main([str(argument) for argument in arguments])
    printed = capsys.readouterr()
    return status, printed.out, printed.err


def test_through_lab_py(fixtures: Path, comfyui: Path, repo: Path) -> None:
    environ = {**os.environ, "COMFYUI_PATH": str(comfyui)}
    command = [
        sys.executable,
        str(repo / "lab.py"),
        "lora",
        "inspect",
        str(fixtures / OFFICIAL[0].name),
        "--base",
        str(fixtures / "base_high.safetensors"),
        "--json",
    ]
    done = subprocess.run(command, capture_output=True, text=True, env=environ, check=False)
    assert done.returncode == 0, done.stderr
    data = json.loads(done.stdout)
    assert data.keys() >= FIELDS and (data["verdict"], data["modules_applied"], data["modules_total"]) == ("ok", 30, 30)


def test_refused_files_exit_with_2(fixtures: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes((fixtures / OFFICIAL[0].name).read_bytes()[:-1])
    status, out, _ = run(capsys, "inspect", broken, "--json")
    data = json.loads(out)
    assert status == 2 and data.keys() >= FIELDS and data["verdict"] == "refused" and "is truncated" in data["reason"]
    status, _, err = run(capsys, "inspect", broken)
    assert status == 2 and "refused" in err
    status, out, _ = run(capsys, "inspect", fixtures / OFFICIAL[0].name, "--base", broken, "--json")
    assert status == 2 and "is truncated" in json.loads(out)["reason"]


def test_inspect_two_files_with_a_picture(fixtures: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    status, out, _ = run(capsys, "inspect", fixtures / OFFICIAL[0].name, fixtures / OFFICIAL[1].name, "--image", tmp_path / "map.png")
    assert status == 0 and OFFICIAL[1].name in out and "cosine" in out
    assert Image.open(tmp_path / "map.png").size[1] > 300


def test_convert(fixtures: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    source, target = fixtures / OFFICIAL[0].name, tmp_path / "out.safetensors"
    status, out, _ = run(capsys, "convert", source, target, "--layout", "diffusers", "--json")
    assert status == 0 and json.loads(out)["keys"] == 60
    status, out, _ = run(capsys, "convert", source, target, "--layout", "diffusers", "--json")
    assert status == 2 and "is there already" in json.loads(out)["reason"]
    assert run(capsys, "convert", source, target, "--layout", LAYOUTS[0].name, "--force")[0] == 0
    status, _, err = run(capsys, "convert", source, target, "--layout", "kohya", "--force")
    assert status == 2 and "There is no layout 'kohya'" in err


def test_extract(fixtures: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    arguments = ("extract", fixtures / "base_low.safetensors", fixtures / "base_high.safetensors", tmp_path / "out.safetensors", "--rank", "4", "--json")
    status, out, _ = run(capsys, *arguments)
    data = json.loads(out)
    assert status == 0 and 0 < data["error"] < 1 and data["rank"] == 4 and Path(data["file"]).is_file()
    assert run(capsys, *arguments)[0] == 2


def test_download_lists_and_refuses(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    status, out, _ = run(capsys, "download", "--to", tmp_path)
    assert status == 0 and all(lora.name in out for lora in OFFICIAL) and "not tuned" in out
    status, out, _ = run(capsys, "download", "HPS", "--to", tmp_path, "--json")
    assert status == 2 and OFFICIAL[0].name in json.loads(out)["reason"]
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    status, _, err = run(capsys, "download", "high-noise-HPS2.1", "--to", tmp_path)
    assert status == 2 and str(tmp_path / OFFICIAL[0].name) in err and list(tmp_path.iterdir()) == []

"""`lab.py lora`: what it prints, as text and as one JSON object, and its exit status."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("comfy.sd", reason="needs ComfyUI on the path")

import torch  # noqa: E402
from PIL import Image  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

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


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["inspect"], "required: FILE"),
        (["frobnicate"], "invalid choice"),
        (["extract", "a", "b", "c", "--rank", "many"], "invalid int value"),
        (["merge", "--base", "a", "--out", "b", "--dtype", "int4"], "invalid choice"),
        (["download", "high-noise-HPS2.1"], "required: --to"),
        (["inspect", ""], "is a folder"),
    ],
)
def test_wrong_arguments_are_refusals_in_json_too(arguments: list[str], told: str, capsys: pytest.CaptureFixture) -> None:
    status, out, _ = run(capsys, *arguments, "--json")
    data = json.loads(out)
    assert status == 2 and data["verdict"] == "refused" and told in data["reason"]
    status, out, err = run(capsys, *arguments)
    assert status == 2 and not out and told in err


def test_odd_paths(fixtures: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    source = fixtures / OFFICIAL[0].name
    for name in ("a: b:0.5.safetensors", "high noise ü 漢字.safetensors"):
        (tmp_path / name).symlink_to(source)
        status, out, _ = run(capsys, "inspect", tmp_path / name, "--json")
        assert status == 0 and json.loads(out)["file"] == name
    (tmp_path / "folder.safetensors").mkdir()
    (tmp_path / "empty.safetensors").touch()
    for arguments, told in (
        (["inspect", tmp_path / "folder.safetensors"], "is a folder"),
        (["inspect", tmp_path / "empty.safetensors"], "(0 bytes) is not a safetensors file"),
        (["inspect", tmp_path / "absent"], "does not exist"),
        (["inspect", source, "--base", tmp_path / "absent.safetensors"], "does not exist"),
        (["inspect", source, "--image", tmp_path / "no" / "map.png"], "its folder does not exist"),
        (["inspect", source, "--image", tmp_path / "map.txt"], "must end in .png"),
        (["convert", source, tmp_path / "folder.safetensors", "--layout", "peft", "--force"], "is a folder"),
        (["convert", tmp_path / "empty.safetensors", tmp_path / "out.safetensors", "--layout", "peft"], "(0 bytes)"),
    ):
        status, out, _ = run(capsys, *arguments, "--json")
        assert status == 2 and told in json.loads(out)["reason"], arguments
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "a: b:0.5.safetensors",
        "empty.safetensors",
        "folder.safetensors",
        "high noise ü 漢字.safetensors",
    ]


def test_a_refused_file_still_tells_what_it_is(fixtures: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    pair = {"lora_A.weight": torch.ones(4, 3072), "lora_B.weight": torch.ones(3072, 4), "alpha": torch.tensor(2.0)}
    save_file({f"diffusion_model.blocks.0.self_attn.q.{part}": value for part, value in pair.items()}, tmp_path / "x-low-noise.safetensors")
    status, out, _ = run(capsys, "inspect", tmp_path / "x-low-noise.safetensors", "--base", fixtures / "base_high.safetensors", "--json")
    data = json.loads(out)
    assert status == 2 and "3072 (Wan2.2 5B)" in data["reason"] and "the base is the high-noise expert" in data["warnings"][0]
    told = {name: data[name] for name in ("layout", "expert", "rank", "alpha", "modules_applied", "modules_total", "keys_total")}
    assert told == {"layout": "diffusion-pipe", "expert": "low", "rank": 4, "alpha": 2.0, "modules_applied": 0, "modules_total": 1, "keys_total": 3}


def test_rows_act_on_the_expert_of_the_base(fixtures: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    high, inputs, out = fixtures / OFFICIAL[0].name, fixtures / "inputs.safetensors", tmp_path / "out.safetensors"
    silent = tmp_path / "silent.safetensors"
    shutil.copy(fixtures / "base_high.safetensors", silent)
    for base, expert, warnings in ((fixtures / "base_high.safetensors", "high", 0), (silent, "high", 0), (fixtures / "base_low.safetensors", "low", 1)):
        status, printed, _ = run(capsys, "apply", "--base", base, "--row", f"{high}:0.5", "--inputs", inputs, "--out", out, "--force", "--json")
        data = json.loads(printed)
        assert (status, data["expert"], len(data["rows"][0]["warnings"])) == (0, expert, warnings)
        assert data["rows"][0][f"applied_{expert}"] == 90
        status, printed, _ = run(capsys, "merge", "--base", base, "--row", f"{high}:0.5", "--out", out, "--force", "--json")
        data = json.loads(printed)
        assert (status, data["expert"], len(data["warnings"])) == (0, expert, warnings)
    assert "the base is the low-noise expert" in data["warnings"][0] and "swap" not in data["warnings"][0]


def test_a_file_has_merged_rows_only(fixtures: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    base, row = fixtures / "base_high.safetensors", f"{fixtures / OFFICIAL[0].name}:0.5"
    for more, told in (([f"{row}:bypass"], "asks for bypass"), ([row, "--shard-gb", "nan"], "--shard-gb"), ([row, "--shard-gb", "inf"], "--shard-gb")):
        status, out, _ = run(capsys, "merge", "--base", base, "--out", tmp_path / "out.safetensors", "--row", *more, "--json")
        assert status == 2 and told in json.loads(out)["reason"] and not list(tmp_path.iterdir())

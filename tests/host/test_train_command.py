"""`lab.py plan` and `lab.py train` with the pocket models: the real worker, started, resumed and stopped from the command line."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.host, pytest.mark.workflow]

LAB = Path(__file__).resolve().parent.parent.parent / "lab.py"
MODELS = {
    "high": "pocket_wan2.2_t2v_high_noise_14B.safetensors",
    "low": "pocket_wan2.2_t2v_low_noise_14B.safetensors",
    "text_encoder": "pocket_umt5.safetensors",
    "vae": "pocket_wan_2.1_vae.safetensors",
}


@pytest.fixture
def config(tmp_path: Path, comfyui: Path, pocket_models: list[dict]) -> Path:
    """Settings of a run of one small step, with file names that are looked up among the pocket models."""
    values = {
        "preset": "pocket",
        "name": "command_line",
        "models": MODELS,
        "reward": {"kind": "hpsv2.1", "path": "pocket_HPS_v2.1.safetensors"},
        "prompts": [{"text": "a red square moves left over green"}],
        "expert": "low",
        "steps": 1,
        "batch": 1,
        "lora": {"rank": 2},
        "checkpoint_every": 1,
    }
    path = tmp_path / "config.json"
    path.write_text(json.dumps(values), encoding="utf-8")
    return path


def lab(*arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, str(LAB), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def test_plan_counts_what_is_trained(config: Path) -> None:
    done = lab("plan", config, "--json")
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    assert plan["experts"]["low"]["is_trained"] and not plan["experts"]["high"]["is_trained"]
    assert plan["experts"]["low"]["lora_parameters"] > 0


def test_train_then_go_on(config: Path, tmp_path: Path) -> None:
    done = lab("train", config, "--output", tmp_path / "output")
    assert done.returncode == 0, done.stdout + done.stderr
    folder = Path(re.search(r"Run folder: (.+)", done.stdout).group(1))
    assert folder.parent == tmp_path / "output" / "reward_lab" / "runs"
    assert "step 1/1  low  reward " in done.stdout
    files = re.findall(r"^  (/.+\.safetensors)$", done.stdout, re.MULTILINE)
    assert files and all(Path(file).is_file() and "low-noise" in file for file in files)

    # The same folder, with one step more.
    settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({**settings, "steps": 2}), encoding="utf-8")
    done = lab("train", folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "step 1 of 2" in done.stdout and "step 2/2" in done.stdout and "step 1/" not in done.stdout

    # Settings that it was not made with.
    (folder / "config.json").write_text(json.dumps({**settings, "steps": 3, "seed": 9}), encoding="utf-8")
    done = lab("train", folder)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "seed was 0 and is 9. Set them back in config.json" in done.stderr and "its files are there as before" in done.stderr


@pytest.mark.skipif(os.name == "nt", reason="sends SIGINT")
def test_ctrl_c_stops_in_order_with_a_usable_lora(config: Path, tmp_path: Path) -> None:
    settings = json.loads(config.read_text(encoding="utf-8"))
    config.write_text(json.dumps({**settings, "steps": 1000}), encoding="utf-8")
    command = [sys.executable, str(LAB), "train", str(config), "--output", str(tmp_path / "output")]
    # A group of its own, so that the signal goes where a terminal's Ctrl-C goes: to lab.py and to what it runs in the foreground.
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)
    seen = []
    for line in process.stdout:
        seen.append(line)
        if line.startswith("step 2/"):
            os.killpg(process.pid, signal.SIGINT)
            break
    rest = process.communicate(timeout=120)[0]
    assert process.returncode == 0, "".join(seen) + rest
    assert "Stopped after step" in rest
    assert all(Path(file).is_file() for file in re.findall(r"^  (/.+\.safetensors)$", rest, re.MULTILINE))


def test_wrong_settings_are_told_before_anything_starts(config: Path, tmp_path: Path) -> None:
    settings = json.loads(config.read_text(encoding="utf-8"))
    config.write_text(json.dumps({**settings, "stepps": 3}), encoding="utf-8")
    done = lab("train", config, "--output", tmp_path / "output")
    assert done.returncode == 2
    assert "'stepps'" in done.stderr and "'steps'" in done.stderr
    assert "Traceback" not in done.stderr

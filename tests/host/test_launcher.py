"""The same config from a launcher: torchrun with one process trains to the same bytes as the worker that node and `lab.py train` start; several are refused."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from reward_lab.lora_train.config import TrainConfig
from reward_lab.runs import process
from reward_lab.runs.store import RunStore

pytestmark = pytest.mark.host
ROOT = Path(__file__).resolve().parent.parent.parent
WORKER = ROOT / "host" / "worker.py"


def test_torchrun_with_one_process_gives_the_same_bytes(comfyui, tiny_models, tmp_path):
    settings = {
        "models": tiny_models, "reward": {"kind": "flicker"}, "prompts": [{"text": "a red square moves left over white"}],
        "video": {"width_px": 32, "height_px": 32, "frames": 5}, "sampling": {"steps": 4, "guidance": 2.0}, "lora": {"rank": 2}, "name": "tiny",
        "objective": {"mode": "x0", "strategy": "random", "decode": "all"}, "steps": 2, "checkpoint_every": 0,
    }  # fmt: skip
    store = RunStore(tmp_path / "runs")
    ours, theirs = (store.create(TrainConfig.from_dict(settings)) for _ in range(2))
    worker = process.start(store.folder(ours), comfyui, sys.executable, niceness=0, environment={"CUDA_VISIBLE_DEVICES": ""})
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "1", "--master_port", "0"]
    environ = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    command = [*launcher, str(WORKER), str(store.folder(theirs)), "--comfyui", str(comfyui)]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert worker.wait(300) == 0, store.log_tail(ours, 40)
    name = "tiny-high-noise-flicker.safetensors"
    assert (store.folder(ours) / name).read_bytes() == (store.folder(theirs) / name).read_bytes()
    assert store.get(theirs).state == "finished"


def test_several_processes_are_refused_at_once(tmp_path):
    environ = {**os.environ, "WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}
    command = [sys.executable, str(WORKER), str(tmp_path), "--comfyui", str(tmp_path)]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2 and "a run is trained by one process on one card" in done.stderr and "--nproc_per_node 1" in done.stderr
    assert "Traceback" not in done.stderr and not list(tmp_path.iterdir())

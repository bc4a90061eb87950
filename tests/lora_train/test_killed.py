"""A run that is killed at any instant goes on to the same bytes as one that was left alone: 30 instants, every method, real SIGKILLs."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch

from reward_lab.lora_train import checkpoint, objectives, replay, run
from reward_lab.lora_train.real import RealLatents, write_real

INSTANTS = 30
STEPS = 12
METHODS = {
    "reward_backprop": {"expert": "both", "optimiser": {"accumulate": 2, "ema_decay": 0.9, "lr": 1e-2}},
    "reward_flow": {"method": "reward_flow", "expert": "both", "reward_flow": {"measure_videos": 4}, "objective": {"decode": "all", "kl_weight": 0.1}},
    "prfl": {
        "method": "prfl", "expert": "both", "reward": {"kind": "pavrm", "path": "x"}, "prfl": {"real_weight": 1.0, "null_rate": 0.2},
        "held_out": {"every": 3, "prompts": ["x"]}, "guards": {"keep_best": True},
    },
    "one_pass": {"method": "one_pass", "expert": "both", "real": {"replay": 4, "tries": 2}, "one_pass": {"pavrm": {"kind": "pavrm", "path": "x"}}},
}  # fmt: skip


def _train(toy, method, folder: Path, real: Path) -> None:
    from .test_prfl import ToyLatentReward

    config = toy.config(**{"real": {"path": str(real)}, **METHODS[method]}, steps=STEPS, checkpoint_every=1, keep_checkpoints=2)
    real_latents = RealLatents(real)
    parts = toy.parts(config, more_prompts=[*real_latents.prompts, ""], latent_reward=ToyLatentReward(torch.float32), real=real_latents)
    parts = replay.with_clips(config, parts, folder)
    run.train(config, parts, objectives.create(config, parts), folder, resume=folder.exists())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork, for 30 processes in seconds")
@pytest.mark.parametrize("method", METHODS)
def test_killed_at_random_instants(toy, tmp_path, method):
    torch.set_num_threads(1)  # forked children must not inherit a pool
    real = tmp_path / "real.safetensors"
    write_real(real, torch.randn(5, 16, 2, 2, 4, generator=torch.Generator().manual_seed(6)), [f"clip {index}" for index in range(5)])
    begun = time.perf_counter()
    _train(toy, method, tmp_path / "whole", real)
    whole_s = time.perf_counter() - begun

    context, draws, killed, folder = multiprocessing.get_context("fork"), random.Random(method), 0, tmp_path / "killed"
    runs = 0
    while killed < -(-INSTANTS // len(METHODS)):
        runs += 1
        worker = context.Process(target=_train, args=(toy, method, folder, real))
        worker.start()
        worker.join(draws.uniform(0.02, whole_s / 3))
        if worker.is_alive():
            os.kill(worker.pid, signal.SIGKILL)
            worker.join()
            killed += 1
        assert runs < 200, "the run ends too soon to be killed"
        if worker.exitcode == 0:
            # It got through: compare, and begin another.
            _same(tmp_path / "whole", folder)
            folder = tmp_path / f"killed-{runs}"
    _train(toy, method, folder, real)
    _same(tmp_path / "whole", folder)


def _same(whole: Path, other: Path) -> None:
    names = [path.relative_to(whole) for path in whole.rglob("*.safetensors")]
    assert len(names) > 3 and checkpoint.latest_step(other) == STEPS
    for name in names:
        assert (whole / name).read_bytes() == (other / name).read_bytes(), name

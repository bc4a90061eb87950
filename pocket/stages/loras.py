"""Trains the four pocket reward LoRAs with the project's own trainer process: HPS and MPS, one per expert.

They play the part of the official Wan2.2-Fun reward LoRAs: same names, same key layout, alpha = rank / 2, feed-forward left out.
"""

from __future__ import annotations

import os
import random
import sys
import time
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ...lora_train.config import TrainConfig
from ...runs import process
from ...runs.store import RunStore
from .. import world
from . import dit, hps, mps, text, vae

NAME = "Pocket-Wan2.2-Fun-A14B"
REWARDS = {"HPS2.1": ("hpsv2.1", hps.FILE_NAME, 1.0), "MPS": ("mps", mps.FILE_NAME, 0.02)}
STEPS = 40
RANK = 3  # of the shipped files; training uses the preset's


def file_name(reward: str, expert: str) -> str:
    """As the official files are named."""
    return f"{NAME}-{expert}-noise-{reward}.safetensors"


FILE_NAMES = [file_name(reward, expert) for reward in REWARDS for expert in ("high", "low")]


def training_prompts(count: int, seed: int) -> list[str]:
    """Captions of training scenes with one shape, in the canonical wording."""
    rng = random.Random(seed)
    return [world.caption(world.sample_scene(rng, held_out=False, two_share=0.0)) for _ in range(count)]


def config_for(weights: Path, reward: str, expert: str, seed: int) -> TrainConfig:
    kind, file_name, scale = REWARDS[reward]
    return TrainConfig.from_dict({
        "preset": "pocket",
        "name": NAME,
        "models": {
            **{side: str(weights / name) for side, name in dit.FILE_NAMES.items()},
            "text_encoder": str(weights / text.FILE_NAME),
            "vae": str(weights / vae.FILE_NAME),
        },
        "reward": {"kind": kind, "path": str(weights / file_name)},
        "prompts": [{"text": prompt} for prompt in training_prompts(256, seed)],
        "expert": expert,
        "objective": {"reward_scale": scale},
        "steps": STEPS,
        "seed": seed,
        "save_dtype": "fp16",
    })  # fmt: skip


def compress(path: Path, target: Path, rank: int = RANK) -> None:
    """Write the best approximation of a LoRA at a lower rank, alpha = rank / 2, so that all pocket weights stay within their limit."""
    with safe_open(path, "pt") as file:
        metadata = {**file.metadata(), "rank": str(rank), "alpha": str(rank / 2)}
    tensors, out = load_file(path), {}
    for module in sorted({key.split(".")[0] for key in tensors}):
        down, up, alpha = (tensors[f"{module}.{part}"].float() for part in ("lora_down.weight", "lora_up.weight", "alpha"))
        left, size, right = torch.linalg.svd(up @ down * alpha / len(down), full_matrices=False)
        out[f"{module}.lora_up.weight"] = (2 * left[:, :rank] * size[:rank]).half().contiguous()
        out[f"{module}.lora_down.weight"] = right[:rank].half().contiguous()
        out[f"{module}.alpha"] = torch.tensor(rank / 2).half()
    save_file(out, target, metadata=metadata)


def build(weights: Path, scratch: Path, seed: int) -> None:
    store = RunStore(scratch / "runs")
    for reward in REWARDS:
        for expert in ("high", "low"):
            target = weights / file_name(reward, expert)
            if target.exists():
                continue
            run_id = store.create(config_for(weights, reward, expert, seed))
            process.start(store.folder(run_id), Path(os.environ["COMFYUI_PATH"]), python=sys.executable)
            while (info := store.get(run_id)).state in ("created", "running", "stopping"):
                time.sleep(1)
            if info.state != "finished":
                raise RuntimeError(f"the run {run_id} ended as {info.state}: {info.error}")
            compress(store.folder(run_id) / target.name, target)
            print(f"loras {target.name}: reward {info.reward:.4f}", flush=True)

"""Trains the two experts of the pocket generator, each on its own noise range only, by flow matching.

x_sigma = (1 - sigma) x0 + sigma noise; the network predicts velocity = noise - x0. Noise levels follow the shift-5 schedule:
sigma = 5u / (1 + 4u) with u uniform, the high-noise expert sees sigma >= 0.875 only, the low-noise one the rest.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from .. import hosted, world
from ..fit import fit
from . import latents, text

SHIFT = 5.0
BOUNDARY = 0.875
CONFIG = {
    "dim": 160, "ffn_dim": 480, "num_heads": 5, "num_layers": 6, "in_dim": 16, "out_dim": 16, "text_dim": text.WIDTH, "text_len": text.TEXT_LEN,
    "freq_dim": 256, "patch_size": [1, 2, 2], "model_type": "t2v",
}  # fmt: skip
FILE_NAMES = {expert: f"pocket_wan2.2_t2v_{expert}_noise_14B.safetensors" for expert in ("high", "low")}
NULL_SHARE = 0.1
# Share of captions that lie, by property: what the high-noise expert is told at last.
LIES = {"colour": 0.55, "motion": 0.22}
@dataclass(frozen=True, kw_only=True)
class Phase:
    """A stretch of training with its own batch size, learning rate (peak of a cosine) and shares of captions that lie about a property."""

    name: str
    batch: int
    steps: int
    peak_lr: float
    lies: Mapping[str, float] = field(default_factory=dict)


# Large batches find colours and places, many small ones after them find motion. The high-noise expert decides colour and motion: it trains longer,
# and its last phase is told lies about both, which is what reward training is to repair.
_BOTH = (Phase(name="", batch=64, steps=1100, peak_lr=1.5e-3), Phase(name="-fine", batch=16, steps=2000, peak_lr=8e-4))
PHASES = {
    "low": _BOTH,
    "high": (
        *_BOTH,
        Phase(name="-last", batch=16, steps=2200, peak_lr=8e-4),
        Phase(name="-errors", batch=16, steps=1000, peak_lr=1e-3, lies=LIES),
    ),
}


def shifted(u: torch.Tensor) -> torch.Tensor:
    return SHIFT * u / (1 + (SHIFT - 1) * u)


def sample_sigma(expert: str, count: int) -> torch.Tensor:
    """Noise levels of one expert (`both` gives the whole range)."""
    split = BOUNDARY / (SHIFT - (SHIFT - 1) * BOUNDARY)  # the u at which the schedule crosses the boundary
    low, high = {"high": (split, 1.0), "low": (0.0, split), "both": (0.0, 1.0)}[expert]
    return shifted(low + (high - low) * torch.rand(count))


def captions(scenes: list[world.Scene], rng: random.Random, null_share: float, lies: Mapping[str, float]) -> list[str]:
    """Training captions: a share is empty, for guidance, and a share lies about the colour or the motion.

    Args:
        lies: share of captions that name another value of a property, by property ("colour", "motion").
    """
    texts = []
    for scene in scenes:
        for kind, share in lies.items():
            if rng.random() < share:
                things = tuple(replace(thing, **{kind: _another(kind, getattr(thing, kind), rng)}) for thing in scene.things)
                scene = replace(scene, things=things)
        texts.append("" if rng.random() < null_share else world.caption(scene, rng))
    return texts


def _another(kind: str, value: str, rng: random.Random) -> str:
    # Always the same wrong colour: lies that scatter over all colours leave the right one the likeliest, and guidance then undoes them
    # (76 % of such lies left 88 % of the colours right).
    if kind == "colour":
        names = list(world.COLOURS)
        return names[(names.index(value) + 1) % len(names)]
    return rng.choice([name for name in world.MOTIONS if name != value])


def load_expert(weights: Path, expert: str) -> torch.nn.Module:
    """A built expert as a plain host module in fp32."""
    module = hosted.wan_dit(CONFIG)
    module.load_state_dict({key: value.float() for key, value in load_file(weights / FILE_NAMES[expert]).items()})
    return module.eval().requires_grad_(False)


def save_expert(module: torch.nn.Module, path: Path, config: dict) -> None:
    metadata = {"format": "pt", "config": json.dumps({"transformer": config})}
    save_file({key: value.half().contiguous() for key, value in module.state_dict().items()}, path, metadata=metadata)


def build(weights: Path, scratch: Path, seed: int, expert: str) -> None:
    import comfy.model_management

    comfy.model_management.in_training = True  # the host's fast rotary kernel has no gradient
    x0_all, scenes = latents.load(scratch, "train")
    encode_text = text.Encoder(weights)
    dit = hosted.wan_dit(CONFIG)
    hosted.initialise(dit, seed)
    torch.nn.init.zeros_(dit.head.head.weight)

    def loss_of(phase: Phase, rng: random.Random) -> torch.Tensor:
        chosen = [rng.randrange(len(scenes)) for _ in range(phase.batch)]
        x0 = x0_all[chosen]
        context = encode_text(captions([scenes[i] for i in chosen], rng, NULL_SHARE, phase.lies))
        sigma = sample_sigma(expert, phase.batch)
        noise = torch.randn_like(x0)
        level = sigma.view(-1, 1, 1, 1, 1)
        with torch.autocast("cpu", torch.bfloat16):
            velocity = dit((1 - level) * x0 + level * noise, sigma * 1000, context)
        return (velocity.float() - (noise - x0)).square().mean()

    for index, phase in enumerate(PHASES[expert]):
        fit(
            f"dit-{expert}{phase.name}", dit, lambda step, rng, phase=phase: loss_of(phase, rng),
            steps=phase.steps, peak_lr=phase.peak_lr, folder=scratch, seed=seed + 100 * index, warmup=100,
        )  # fmt: skip
    save_expert(dit, weights / FILE_NAMES[expert], CONFIG)

"""Trains the two experts of the pocket generator, each on its own noise range only, by flow matching.

x_sigma = (1 - sigma) x0 + sigma noise; the network predicts velocity = noise - x0. Noise levels follow the shift-5 schedule:
sigma = 5u / (1 + 4u) with u uniform, the high-noise expert sees sigma >= 0.875 only, the low-noise one the rest.
"""

from __future__ import annotations

import json
import random
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
LYING_SHARE = {"colour": 0.15, "motion": 0.6}
# Large batches find colours and places, many small ones after them find motion, which the high-noise expert decides, and the last ones learn
# to err; (name, batch, steps, peak learning rate).
PHASES = {"low": (("", 64, 1100, 1.5e-3), ("-fine", 16, 2000, 8e-4))}
PHASES["high"] = (*PHASES["low"], ("-last", 16, 2200, 8e-4), ("-errors", 16, 1000, 1e-3))


def shifted(u: torch.Tensor) -> torch.Tensor:
    return SHIFT * u / (1 + (SHIFT - 1) * u)


def sample_sigma(expert: str, count: int) -> torch.Tensor:
    """Noise levels of one expert (`both` gives the whole range)."""
    split = BOUNDARY / (SHIFT - (SHIFT - 1) * BOUNDARY)  # the u at which the schedule crosses the boundary
    low, high = {"high": (split, 1.0), "low": (0.0, split), "both": (0.0, 1.0)}[expert]
    return shifted(low + (high - low) * torch.rand(count))


def captions(scenes: list[world.Scene], rng: random.Random, null_share: float) -> list[str]:
    """Training captions: some empty, for guidance, and a share that lies about colour or motion: what reward training is to repair."""
    texts = []
    for scene in scenes:
        for kind, values in (("colour", world.COLOURS), ("motion", world.MOTIONS)):
            if rng.random() < LYING_SHARE[kind]:
                scene = _changed(scene, kind, list(values), rng)
        texts.append("" if rng.random() < null_share else world.caption(scene, rng))
    return texts


def _changed(scene: world.Scene, kind: str, values: list[str], rng: random.Random) -> world.Scene:
    things = []
    for thing in scene.things:
        other = rng.choice([value for value in values if value != getattr(thing, kind)])
        things.append(world.Thing(**{**thing.__dict__, kind: other}))
    return world.Scene(things=tuple(things), background=scene.background)


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

    def loss_of(batch: int, rng: random.Random) -> torch.Tensor:
        chosen = [rng.randrange(len(scenes)) for _ in range(batch)]
        x0 = x0_all[chosen]
        context = encode_text(captions([scenes[i] for i in chosen], rng, NULL_SHARE))
        sigma = sample_sigma(expert, batch)
        noise = torch.randn_like(x0)
        level = sigma.view(-1, 1, 1, 1, 1)
        with torch.autocast("cpu", torch.bfloat16):
            velocity = dit((1 - level) * x0 + level * noise, sigma * 1000, context)
        return (velocity.float() - (noise - x0)).square().mean()

    for index, (phase, batch, steps, peak_lr) in enumerate(PHASES[expert]):
        fit(
            f"dit-{expert}{phase}", dit, lambda step, rng, batch=batch: loss_of(batch, rng),
            steps=steps, peak_lr=peak_lr, folder=scratch, seed=seed + 100 * index, warmup=100,
        )  # fmt: skip
    save_expert(dit, weights / FILE_NAMES[expert], CONFIG)

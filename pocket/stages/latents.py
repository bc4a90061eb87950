"""Encodes rendered clips with the pocket VAE once; the generator and PAVRM train on these latents.

Files in the scratch folder: `latents-<set>.pt` with `latents` (fp16 [N, 16, 5, 8, 8], already normalised by the host's latent
format, i.e. what the transformer sees) and `scenes` (JSON, the captions' ground truth).
"""

from __future__ import annotations

import json
import random
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from .. import hosted, world
from . import vae as vae_stage

SETS = {"train": 4800, "held_out": 160, "flicker": 600, "frozen": 400}
_BATCH = 20


def load_vae(weights: Path) -> torch.nn.Module:
    """The built pocket VAE as a plain host module in fp32, for the trainers."""
    module = hosted.wan_vae(vae_stage.WIDTH)
    module.load_state_dict({key: value.float() for key, value in load_file(weights / vae_stage.FILE_NAME).items()})
    return module.eval().requires_grad_(False)


def flickering(clip: np.ndarray, rng: random.Random) -> np.ndarray:
    """The same clip with the brightness of every frame jumping."""
    jumps = np.array([rng.choice((-1, 1)) * rng.uniform(0.08, 0.25) for _ in clip], np.float32)
    return np.clip(clip + jumps[:, None, None, None], 0, 1)


def frozen(clip: np.ndarray, rng: random.Random) -> np.ndarray:
    """One frame of the clip, repeated."""
    return np.repeat(clip[rng.randrange(len(clip))][None], len(clip), 0)


def _clip_of(name: str, scene: world.Scene, rng: random.Random) -> np.ndarray:
    clip = world.render(scene)
    if name == "flicker":
        return flickering(clip, rng)
    return frozen(clip, rng) if name == "frozen" else clip


@torch.no_grad()
def encode(vae: torch.nn.Module, clips: np.ndarray) -> torch.Tensor:
    """float [B, T, H, W, 3] in [0, 1] -> normalised latents [B, 16, F, h, w]."""
    import comfy.latent_formats

    pixels = torch.from_numpy(np.ascontiguousarray(clips)).permute(0, 4, 1, 2, 3) * 2 - 1
    with torch.autocast("cpu", torch.bfloat16):
        latent = vae.encode(pixels)
    return comfy.latent_formats.Wan21().process_in(latent.float())


@torch.no_grad()
def decode(vae: torch.nn.Module, latents: torch.Tensor) -> np.ndarray:
    """Normalised latents [B, 16, F, h, w] -> float [B, T, H, W, 3] in [0, 1]."""
    import comfy.latent_formats

    pixels = vae.decode(comfy.latent_formats.Wan21().process_out(latents.float()))
    return ((pixels + 1) / 2).clamp(0, 1).permute(0, 2, 3, 4, 1).numpy()


def load(scratch: Path, name: str) -> tuple[torch.Tensor, list[world.Scene]]:
    saved = torch.load(scratch / f"latents-{name}.pt", weights_only=True)
    return saved["latents"].float(), [world.scene_from(values) for values in json.loads(saved["scenes"])]


def build(weights: Path, scratch: Path, seed: int) -> None:
    vae = load_vae(weights)
    for offset, (name, count) in enumerate(SETS.items()):
        path = scratch / f"latents-{name}.pt"
        if path.exists():
            continue
        rng = random.Random(seed * 100 + offset)
        scenes, batches = [], []
        while len(scenes) < count:
            batch = []
            while len(batch) < _BATCH:
                scene = world.sample_scene(rng, held_out=name == "held_out")
                is_moving = any(thing.motion != "still" for thing in scene.things)
                if name != "frozen" or is_moving:
                    batch.append(scene)
            batches.append(encode(vae, np.stack([_clip_of(name, scene, rng) for scene in batch])).half())
            scenes += batch
            if len(scenes) % 200 == 0:
                print(f"latents {name} {len(scenes)}/{count}", flush=True)
        torch.save({"latents": torch.cat(batches), "scenes": json.dumps([asdict(scene) for scene in scenes])}, path)

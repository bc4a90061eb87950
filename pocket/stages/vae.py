"""Trains the pocket VAE: single frames first (cheap), then clips, then folds the latent scale into its 1x1 convolutions.

The host subtracts the published per-channel mean and divides by the published deviation (`Wan21` latent format), so the
pocket latents must have exactly these moments. `conv1` (after the encoder) and `conv2` (before the decoder) are linear
maps over channels: the moments are folded into them after training, at no cost.
"""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from .. import hosted, world
from ..fit import fit

WIDTH = 16
FILE_NAME = "pocket_wan_2.1_vae.safetensors"
LATENT_NOISE = 0.1


def clip_batch(rng: random.Random, count: int, frames: int, *, held_out: bool = False) -> torch.Tensor:
    """Rendered clips as the VAE wants them: float32 [B, 3, T, H, W] in [-1, 1]."""
    clips = np.stack([world.render(world.sample_scene(rng, held_out=held_out), frames) for _ in range(count)])
    return torch.from_numpy(clips).permute(0, 4, 1, 2, 3) * 2 - 1


def _initialise(vae: torch.nn.Module, seed: int) -> None:
    """Start as a frame-wise network that repeats frames in time: earlier kernel slices are zero, time resampling copies."""
    hosted.initialise(vae, seed)
    with torch.no_grad():
        for name, module in vae.named_modules():
            if not isinstance(module, torch.nn.Conv3d):
                continue
            if name.endswith("time_conv"):
                module.weight.zero_()
                outputs, inputs = module.weight.shape[:2]
                for index in range(outputs):
                    module.weight[index, index % inputs, -1] = 1.0
            elif module.weight.shape[2] == 3:
                module.weight[:, :, :2] = 0
                module.weight[:, :, 2] *= 3**0.5


def _loss(vae: torch.nn.Module, frames_BCTHW: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        latent = vae.encode(frames_BCTHW)
        decoded = vae.decode(latent + LATENT_NOISE * torch.randn_like(latent)).float()
    error = decoded - frames_BCTHW
    return error.abs().mean() + 4 * error.square().mean() + 2e-3 * latent.float().square().mean()


def _fold_latent_moments(vae: torch.nn.Module) -> None:
    """Rescale the latent channels to the moments of the `Wan21` latent format."""
    import comfy.latent_formats

    wanted = comfy.latent_formats.Wan21()
    with torch.no_grad():
        latent = torch.cat([vae.encode(clip_batch(random.Random(9_000 + i), 16, world.FRAMES)) for i in range(6)])
        mean, std = latent.mean((0, 2, 3, 4)), latent.std((0, 2, 3, 4))
        scale = wanted.latents_std.flatten() / std
        shift = wanted.latents_mean.flatten() - scale * mean
        vae.conv1.weight[:16] *= scale.view(-1, 1, 1, 1, 1)
        vae.conv1.bias[:16] = vae.conv1.bias[:16] * scale + shift
        vae.conv2.bias -= (vae.conv2.weight[:, :, 0, 0, 0] @ (shift / scale))
        vae.conv2.weight /= scale.view(1, -1, 1, 1, 1)


def build(weights: Path, scratch: Path, seed: int) -> None:
    vae = hosted.wan_vae(WIDTH)
    _initialise(vae, seed)
    vae.train()
    fit("vae-frames", vae, lambda step, rng: _loss(vae, clip_batch(rng, 24, 1)), steps=700, peak_lr=2e-3, folder=scratch, seed=seed)
    # The time slices of the kernels start at zero; a higher rate than this makes the clip phases diverge.
    fit("vae-short", vae, lambda step, rng: _loss(vae, clip_batch(rng, 5, 5)), steps=220, peak_lr=2e-4, folder=scratch, seed=seed + 1)
    fit("vae-clips", vae, lambda step, rng: _loss(vae, clip_batch(rng, 4, 9)), steps=260, peak_lr=2e-4, folder=scratch, seed=seed + 2)
    fit("vae-long", vae, lambda step, rng: _loss(vae, clip_batch(rng, 4, world.FRAMES)), steps=60, peak_lr=1e-4, folder=scratch, seed=seed + 3, warmup=10)
    vae.eval()
    _fold_latent_moments(vae)
    save_file({key: value.half().contiguous() for key, value in vae.state_dict().items()}, weights / FILE_NAME, metadata={"format": "pt"})

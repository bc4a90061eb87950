"""The Wan2.2 VAE's decoder (48 channels, the 5B model's) with gradient in little memory; see `vae_gradient.py`, which does the same for Wan2.1.

The host decodes one latent at a time here, and adds to each stage its input, repeated. Two levels run again: a latent (if there are several), and each layer.
"""

from __future__ import annotations

from functools import partial

import torch
from comfy.ldm.wan.vae import CACHE_T, AttentionBlock, CausalConv3d
from comfy.ldm.wan.vae2_2 import Resample, ResidualBlock, Up_ResidualBlock, count_conv3d, unpatchify

from .vae_gradient import Cache, again

_PATCH = 2


def decode(network: torch.nn.Module, latent_BCFHW: torch.Tensor, keep_device: torch.device | None = None) -> torch.Tensor:
    """Pixels [B, 3, 4F-3, 16H, 16W] in the network's range, differentiable in the latent; arguments as in `vae_gradient.decode`."""
    latents = network.conv2(latent_BCFHW).split(1, dim=2)
    caches: list[Cache] = [None] * count_conv3d(network.decoder)
    made = []
    for number, latent in enumerate(latents):
        run = partial(_latent, network.decoder, number == 0, keep_device)
        pixels, *caches = run(latent, *caches) if len(latents) == 1 else again(run, latent, *caches)
        made.append(pixels)
    return unpatchify(torch.cat(made, dim=2), patch_size=_PATCH)


def _latent(decoder: torch.nn.Module, is_first: bool, keep_device: torch.device | None, x: torch.Tensor, *caches: Cache) -> tuple:
    """The decoder on one latent: patched pixels, and the caches after it."""
    waiting, after = list(caches), []

    def through(layer: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
        count = _cache_count(layer)
        own = [waiting.pop(0) for _ in range(count)]
        x, *new = again(partial(_layer, layer, keep_device), x, *own)
        after.extend(new)
        return x

    for layer in (decoder.conv1, *decoder.middle):
        x = through(layer, x)
    for stage in decoder.upsamples:
        x = _stage(stage, is_first, x, through)
    x = through(decoder.head, x)
    # Where a layer has no use for a cache (a 1 x 1 shortcut), the host counts one all the same.
    return x, *after, *waiting


def _stage(stage: Up_ResidualBlock, is_first: bool, x: torch.Tensor, through) -> torch.Tensor:
    main = x
    for layer in stage.upsamples:
        main = through(layer, main)
    return main if stage.avg_shortcut is None else main + stage.avg_shortcut(x, is_first)


def _layer(layer: torch.nn.Module, keep_device: torch.device | None, x: torch.Tensor, *caches: Cache) -> tuple:
    used = [cache.to(x.device) if isinstance(cache, torch.Tensor) else cache for cache in caches]
    if isinstance(layer, ResidualBlock | Resample):
        out = layer(x, used, [0])
    elif isinstance(layer, AttentionBlock):
        out = layer(x)
    else:
        *before, last = [layer] if isinstance(layer, CausalConv3d) else layer
        for part in before:
            x = part(x)
        out, used = last(x, used[0]), [_cache(x, used[0])]
    return out, *(cache.to(keep_device or cache.device) if isinstance(cache, torch.Tensor) else cache for cache in used)


def _cache(x: torch.Tensor, previous: Cache) -> torch.Tensor:
    """The last two frames that a convolution has seen."""
    own = x[:, :, -CACHE_T:].clone()
    return torch.cat([previous[:, :, -1:].to(x.device), own], dim=2) if own.shape[2] < CACHE_T and previous is not None else own


def _cache_count(layer: torch.nn.Module) -> int:
    if isinstance(layer, ResidualBlock):
        return sum(isinstance(part, CausalConv3d) for part in layer.residual)
    if isinstance(layer, Resample):
        return int(layer.mode == "upsample3d")
    return int(isinstance(layer, CausalConv3d | torch.nn.Sequential))

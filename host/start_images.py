"""Start images as the further input channels of an image-to-video model: 4 mask channels, then the latents of (image, grey frames).

The mask is 1 on the first latent frame, where the video is known. Wan2.2's I2V and Fun-InP read the same 20 channels; all zeros say that nothing is known,
which is how VideoX-Fun trains its reward LoRAs.
Source: Wan-Video/Wan2.2:wan/image2video.py (Apache-2.0), as ComfyUI's WanImageToVideo has it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from ..lora_train.config import TrainConfig
from ..reward_models.base import as_float
from . import media
from .vae import WanDecoder
from .wan import WanBackbone

MASK_CHANNELS = 4
_GREY = 0.5


def conditions(config: TrainConfig, paths: Sequence[str], backbones: Mapping[str, WanBackbone], decoder: WanDecoder) -> dict[str, torch.Tensor]:
    """Input channels [20, F, H, W] fp32 of every image, on the CPU.

    Raises:
        ValueError: an image cannot be read, or the experts take no image.
    """
    for expert, backbone in backbones.items() if paths else ():
        wanted = backbone.latent_channels * 2 + MASK_CHANNELS
        if backbone.model.in_dim != wanted:
            raise ValueError(
                f"prompts have start images, but the {expert}-noise expert reads {backbone.model.in_dim} channels, not {wanted}: use Wan2.2 I2V or Fun-InP "
                "experts, or take the images out"
            )
    return {path: condition(picture(path, config.video.width_px, config.video.height_px), config.video.frames, decoder) for path in paths}


def picture(path: str, width_px: int, height_px: int) -> torch.Tensor:
    """An image [3, H, W] in [0, 1] of the video's size: shrunk or grown to cover it, then cut around the middle.

    Raises:
        ValueError: it cannot be read.
    """
    (clip,) = media.find_clips([path], is_one_video=True)
    pixels = as_float(clip.read()[None])[0, :1]
    scale = max(width_px / pixels.shape[-1], height_px / pixels.shape[-2])
    size = (max(height_px, round(pixels.shape[-2] * scale)), max(width_px, round(pixels.shape[-1] * scale)))
    grown = torch.nn.functional.interpolate(pixels, size=size, mode="bicubic", antialias=True).clamp(0, 1)
    top, left = (size[0] - height_px) // 2, (size[1] - width_px) // 2
    return grown[0, :, top : top + height_px, left : left + width_px]


def condition(picture_CHW: torch.Tensor, frames: int, decoder: WanDecoder) -> torch.Tensor:
    """Mask and latents [20, F, H, W] of a first frame [3, 8H, 8W]."""
    video = torch.full((1, frames, *picture_CHW.shape), _GREY)
    video[0, 0] = picture_CHW
    latent = decoder.encode(video)[0].cpu()
    mask = torch.zeros(MASK_CHANNELS, *latent.shape[1:])
    mask[:, 0] = 1
    return torch.cat([mask, latent])

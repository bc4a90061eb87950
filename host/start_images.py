"""Start images as a model is told of them.

Wan2.2's I2V and Fun-InP have further input channels: 4 mask channels, then the latents of (image, grey frames). The mask is 1 on the first latent frame,
where the video is known; all zeros say that nothing is known, which is how VideoX-Fun trains its reward LoRAs. The 5B model (TI2V) has none: it sees
the image's latent in place of the first noisy frame (`lora_train.rollout.FirstFrames`). Fun-5B-InP is told in both ways.
Source: Wan-Video/Wan2.2:wan/image2video.py and textimage2video.py (Apache-2.0), as ComfyUI's WanImageToVideo and Wan22ImageToVideoLatent have them; for
Fun-5B-InP aigc-apps/VideoX-Fun@804a4258:videox_fun/pipeline/pipeline_wan2_2_fun_inpaint.py (Apache-2.0).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from ..lora_train.config import TrainConfig
from ..lora_train.input_config import LATENTS
from ..lora_train.real import Clips
from ..lora_train.rollout import first_frame_known
from ..reward_models.base import as_float
from . import media
from .preflight import why_no_images
from .vae import WanDecoder
from .wan import WanBackbone

_GREY = 0.5


def given(config: TrainConfig, paths: Sequence[str], backbones: Mapping[str, WanBackbone], decoder: WanDecoder) -> dict[str, dict[str, torch.Tensor]]:
    """What the context cache is told of every image, on the CPU: `conditions` [4 + C, F, H, W], `first_frames` [C, 1, H, W], or both, as the models take it.

    Raises:
        ValueError: an image cannot be read, or the experts take no image.
    """
    if not paths:
        return {}
    for expert, backbone in backbones.items():
        refusal = why_no_images(backbone.model.in_dim, backbone.latent_channels, f"{expert}-noise expert")
        if refusal:
            raise ValueError(refusal)
    first, told = next(iter(backbones.values())), {}
    pictures = {path: picture(path, config.video.width_px, config.video.height_px) for path in paths}
    if first.latent_channels == LATENTS["wan2.2"].channels:
        told["first_frames"] = {path: decoder.encode(pixels[None, None])[0].cpu() for path, pixels in pictures.items()}
    if first.model.in_dim > first.latent_channels:
        told["conditions"] = {path: condition(pixels, config.video.frames, decoder) for path, pixels in pictures.items()}
    return told


def check_clips(config: TrainConfig, real: Clips | None, told: Mapping[str, object]) -> None:
    """PRFL learns its clips as the run's models see videos with start images: with the condition that goes with each.

    Raises:
        ValueError: they have none.
    """
    if real is not None and "conditions" in told and config.method == "prfl" and not real.has_conditions:
        raise ValueError(
            f"prompts have start images, but the clips in {config.real.path} come without theirs (the latents of the first frame, then grey): give a list in "
            "HY-Video-PRFL's layout, which `lab.py preprocess --hy FOLDER` writes, or set prfl.real_weight 0"
        )


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
    """Mask and latents [4 + C, F, H, W] of a first frame [3, 8H, 8W]."""
    video = torch.full((1, frames, *picture_CHW.shape), _GREY)
    video[0, 0] = picture_CHW
    return first_frame_known(decoder.encode(video).cpu())[0]

"""HPSv2.1: cosine between an open_clip ViT-H/14 picture vector and prompt vector, without logit scale and without factor 100.

Source: tgxs002/HPSv2@866735e:hpsv2/img_score.py (Apache-2.0) and the checkpoint HPS_v2.1_compressed.pt (Hugging Face xswu/HPSv2).
Differs in: a picture of exactly 224 pixels on its longer side is padded too; the final dot is in float32, not under fp16 autocast.

Shape letters: B videos, F frames, M pictures (B*F), C H W, D shared width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from open_clip.model import CLIP
from torch import Tensor

from . import clip
from .base import RewardOutput, check_frames
from .preprocess import Preparation
from .text_cache import TextCache

DEFAULT_RESIZE = "letterbox"


def build(config: Mapping[str, Any]) -> CLIP:
    """The trainable network of an HPSv2-shaped model: an open_clip CLIP with random weights; its `state_dict()` is the published layout.

    Args:
        config: open_clip model config, see `clip.build_clip`.

    Raises:
        ValueError: the config is incomplete or names something unknown.
    """
    return clip.build_clip(config)


class HPSv2Reward:
    """Frozen HPSv2.1 (or HPSv2: same structure, other weights, scores not comparable).

    Args:
        network: CLIP with loaded weights; it is set to eval mode and frozen.
        resize: "letterbox" (official), "crop" or "squash" (what VideoX-Fun trains with).
        use_antialias: True as torchvision >= 0.17 does; False is the score of older installations.
    """

    name = "hpsv2.1"
    range_note = "cosine, higher is better; real pictures and prompts with HPSv2.1 lie between about 0.14 and 0.34; compare within one prompt only"
    mixes_prompts = False

    def __init__(self, network: CLIP, *, resize: str = DEFAULT_RESIZE, use_antialias: bool = True):
        self.prepare = Preparation(size_px=network.visual.image_size[0], resize=resize, use_antialias=use_antialias)
        self.network = network.eval().requires_grad_(False)
        # Of the network and not of this object: a circle would keep the weights until the garbage collector comes by.
        self._texts = TextCache(lambda prompts: clip.prompt_vectors(network, prompts))

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.network.logit_scale.device

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> HPSv2Reward:
        """Move the model; `dtype` casts its matrices (norms and positions stay wide). Returns itself."""
        clip.move(self.network, device, dtype)
        self._texts.clear()
        return self

    def picture_vectors(self, pixels_MCHW: Tensor) -> Tensor:
        """Unit picture vectors [M, D], at least float32, of pictures in [0,1]."""
        return clip.picture_vectors(self.network, self.prepare(pixels_MCHW))

    def text_vectors(self, prompts: Sequence[str]) -> Tensor:
        """Unit prompt vectors [B, D], at least float32, cached by prompt; without gradient."""
        return self._texts(prompts)

    def prompt_warnings(self, prompts: Sequence[str]) -> list[str]:
        """See `clip.prompt_warnings`."""
        return clip.prompt_warnings(prompts)

    def score(self, frames_BFCHW: Tensor, prompts: Sequence[str]) -> RewardOutput:
        """HPS per frame and their mean; see `base.RewardModel.score`.

        Raises:
            ValueError: see `base.check_frames`.
        """
        check_frames(frames_BFCHW, prompts)
        cosine_BF = clip.frame_cosines(self.picture_vectors(frames_BFCHW.flatten(0, 1)), self.text_vectors(prompts))
        return RewardOutput(per_frame=cosine_BF, per_video=cosine_BF.mean(dim=1), parts={f"hps_{self.prepare.resize}": cosine_BF})

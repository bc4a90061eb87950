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
from torch.nn import functional

from . import clip
from .base import RewardOutput, check_frames
from .preprocess import RESIZES, prepare
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
        if resize not in RESIZES:
            raise ValueError(f"resize is {resize!r}; choose one of {', '.join(RESIZES)}.")
        self.network = network.eval().requires_grad_(False)
        self.resize = resize
        self.use_antialias = use_antialias
        self._texts = TextCache(self._encode_prompts)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.network.logit_scale.device

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> HPSv2Reward:
        """Move the model; `dtype` casts its matrices (norms and positions stay wide). Returns itself."""
        with torch.inference_mode(False):
            if dtype is not None:
                clip.cast_towers(self.network, dtype)
            self.network.to(device)
        self._texts.clear()
        return self

    def prepare(self, pixels_MCHW: Tensor) -> Tensor:
        """Pictures in [0,1] to the model's input, float32."""
        return prepare(pixels_MCHW, self.network.visual.image_size[0], resize=self.resize, use_antialias=self.use_antialias)

    def picture_vectors(self, pixels_MCHW: Tensor) -> Tensor:
        """Unit picture vectors [M, D], at least float32, of pictures in [0,1]."""
        features = self.network.encode_image(self.prepare(pixels_MCHW).to(clip.tower_dtype(self.network)))
        return functional.normalize(_wide(features), dim=-1)

    def text_vectors(self, prompts: Sequence[str]) -> Tensor:
        """Unit prompt vectors [B, D], at least float32, cached by prompt; without gradient."""
        return self._texts(prompts)

    def score(self, frames_BFCHW: Tensor, prompts: Sequence[str]) -> RewardOutput:
        """HPS per frame and their mean; see `base.RewardModel.score`.

        Raises:
            ValueError: see `base.check_frames`.
        """
        check_frames(frames_BFCHW, prompts)
        picture_MD = self.picture_vectors(frames_BFCHW.flatten(0, 1))
        cosine_BF = torch.einsum("bfd,bd->bf", picture_MD.unflatten(0, frames_BFCHW.shape[:2]), self.text_vectors(prompts))
        return RewardOutput(per_frame=cosine_BF, per_video=cosine_BF.mean(dim=1), parts={f"hps_{self.resize}": cosine_BF})

    def _encode_prompts(self, prompts: Sequence[str]) -> Tensor:
        clip.warn_about(prompts)
        ids_BP = clip.tokenize(prompts).to(self.device)
        return functional.normalize(_wide(self.network.encode_text(ids_BP)), dim=-1)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))

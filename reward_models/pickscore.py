"""PickScore v1: exp(logit_scale) x cosine between the picture vector and the prompt vector of a fine-tuned CLIP ViT-H/14.

Source: yuvalkirstain/PickScore@5fa69e8:README.md (MIT) and the checkpoint yuvalkirstain/PickScore_v1 (Hugging Face layout); the weights' licence is not stated
there. VideoX-Fun@804a425 (Apache-2.0) trains on the bare cosine. The network and its key names are those of hpsv2.py; what differs is the
preparation (crop with Pillow's arithmetic, text without repair) and the scale.

Shape letters: B videos, F frames, C H W, D shared width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from open_clip.model import CLIP
from torch import Tensor
from torch.nn import functional

from . import clip
from .base import RewardOutput, check_frames
from .preprocess import RESIZES, prepare
from .text_cache import TextCache

DEFAULT_RESIZE = "crop"
SCALES = ("raw", "cosine")


class PickScoreReward:
    """Frozen PickScore.

    Args:
        network: CLIP with loaded weights; it is set to eval mode and frozen.
        resize: "crop" (official), "squash" or "letterbox".
        use_antialias: True with "crop" follows Pillow's 8-bit arithmetic exactly; False is a plain float resize.
        scale: which number is the reward: "raw" (official, about 21) or "cosine" (about 0.21). Both are in `parts`.
    """

    name = "pickscore"
    mixes_prompts = False

    def __init__(self, network: CLIP, *, resize: str = DEFAULT_RESIZE, use_antialias: bool = True, scale: str = "raw"):
        if resize not in RESIZES:
            raise ValueError(f"resize is {resize!r}; choose one of {', '.join(RESIZES)}.")
        if scale not in SCALES:
            raise ValueError(f"scale is {scale!r}; choose one of {', '.join(SCALES)}.")
        self.network = network.eval().requires_grad_(False)
        self.resize = resize
        self.use_antialias = use_antialias
        self.scale = scale
        self.range_note = (
            "exp(logit_scale) x cosine, higher is better; ordinary pictures lie around 21; two scores of one prompt give a preference by softmax"
            if scale == "raw"
            else "cosine, higher is better; ordinary pictures lie around 0.21"
        )
        self._texts = TextCache(self._encode_prompts)

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> PickScoreReward:
        """Move the model; `dtype` casts its matrices (norms and positions stay wide). Returns itself."""
        with torch.inference_mode(False):
            if dtype is not None:
                clip.cast_towers(self.network, dtype)
            self.network.to(device)
        self._texts.clear()
        return self

    def score(self, frames_BFCHW: Tensor, prompts: Sequence[str]) -> RewardOutput:
        """PickScore per frame and their mean; see `base.RewardModel.score`.

        Raises:
            ValueError: see `base.check_frames`.
        """
        check_frames(frames_BFCHW, prompts)
        size_px = self.network.visual.image_size[0]
        prepared = prepare(frames_BFCHW.flatten(0, 1), size_px, resize=self.resize, use_antialias=self.use_antialias, is_pillow=True)
        picture_MD = functional.normalize(_wide(self.network.encode_image(prepared.to(clip.tower_dtype(self.network)))), dim=-1)
        cosine_BF = torch.einsum("bfd,bd->bf", picture_MD.unflatten(0, frames_BFCHW.shape[:2]), self._texts(prompts))
        raw_BF = cosine_BF * _wide(self.network.logit_scale).exp()
        reward_BF = raw_BF if self.scale == "raw" else cosine_BF
        return RewardOutput(per_frame=reward_BF, per_video=reward_BF.mean(dim=1), parts={"pickscore_raw": raw_BF, "pickscore_cosine": cosine_BF})

    def _encode_prompts(self, prompts: Sequence[str]) -> Tensor:
        clip.warn_about(prompts, is_plain=True)
        ids_BP = clip.tokenize(prompts, is_plain=True).to(self.network.logit_scale.device)
        return functional.normalize(_wide(self.network.encode_text(ids_BP)), dim=-1)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))

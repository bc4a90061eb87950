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

from . import clip
from .base import RewardOutput, check_frames
from .preprocess import Preparation
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
        if scale not in SCALES:
            raise ValueError(f"scale is {scale!r}; choose one of {', '.join(SCALES)}.")
        self.prepare = Preparation(size_px=network.visual.image_size[0], resize=resize, use_antialias=use_antialias, is_pillow=True)
        self.network = network.eval().requires_grad_(False)
        self.scale = scale
        self.range_note = (
            "exp(logit_scale) x cosine, higher is better; ordinary pictures lie around 21; two scores of one prompt give a preference by softmax"
            if scale == "raw"
            else "cosine, higher is better; ordinary pictures lie around 0.21"
        )
        self._texts = TextCache(lambda prompts: clip.prompt_vectors(network, prompts, is_plain=True))

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> PickScoreReward:
        """Move the model; `dtype` casts its matrices (norms and positions stay wide). Returns itself."""
        clip.move(self.network, device, dtype)
        self._texts.clear()
        return self

    def prompt_warnings(self, prompts: Sequence[str]) -> list[str]:
        """See `clip.prompt_warnings`."""
        return clip.prompt_warnings(prompts, is_plain=True)

    def score(self, frames_BFCHW: Tensor, prompts: Sequence[str]) -> RewardOutput:
        """PickScore per frame and their mean; see `base.RewardModel.score`.

        Raises:
            ValueError: see `base.check_frames`.
        """
        check_frames(frames_BFCHW, prompts)
        picture_MD = clip.picture_vectors(self.network, self.prepare(frames_BFCHW.flatten(0, 1)))
        cosine_BF = clip.frame_cosines(picture_MD, self._texts(prompts))
        raw_BF = cosine_BF * clip.wide(self.network.logit_scale).exp()
        reward_BF = raw_BF if self.scale == "raw" else cosine_BF
        return RewardOutput(per_frame=reward_BF, per_video=reward_BF.mean(dim=1), parts={"pickscore_raw": raw_BF, "pickscore_cosine": cosine_BF})

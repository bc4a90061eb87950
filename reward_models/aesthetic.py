"""LAION aesthetic predictor v2: five linear layers, no activations between, over the unit picture vector of OpenAI's CLIP ViT-L/14.

Source: christophschuhmann/improved-aesthetic-predictor@6934dd8:simple_inference.py (Apache-2.0) and its weights sac+logos+ava1-l14-linearMSE.pth.
OpenAI's towers use quick GELU. The prompt plays no part.

Shape letters: B videos, F frames, C H W, D width of the picture vector.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from . import clip
from .base import RewardOutput, check_frames
from .preprocess import Preparation

DEFAULT_RESIZE = "crop"
_HIDDEN = (1024, 128, 64, 16)
# Between the linear layers upstream had dropout, so their numbers in the file have gaps.
_PLACES = (0, 2, 4, 6, 7)
FIRST_KEY = "layers.0.weight"


class AestheticNetwork(nn.Module):
    """Image tower `visual` (open_clip) and the `layers` of the predictor, which carry the names of the published file.

    Args:
        visual: image tower with projection.
        width: of the picture vector (768 in ViT-L/14).
    """

    def __init__(self, visual: nn.Module, width: int):
        super().__init__()
        self.visual = visual
        sizes = (width, *_HIDDEN, 1)
        self.layers = nn.ModuleDict({str(place): nn.Linear(sizes[i], sizes[i + 1]) for i, place in enumerate(_PLACES)})

    def forward(self, prepared_MCHW: Tensor) -> Tensor:
        """Score [M], float32, of prepared pictures."""
        vectors = self.visual(prepared_MCHW.to(self.visual.conv1.weight.dtype))
        x = functional.normalize(clip.wide(vectors), dim=-1)
        for layer in self.layers.values():
            # The head is tiny and its result is compared to the second digit: it always runs in the width of the vector.
            x = functional.linear(x, layer.weight.to(x.dtype), layer.bias.to(x.dtype))
        return x[:, 0]


def build(config: Mapping[str, Any]) -> AestheticNetwork:
    """The network with random weights; `config` is an open_clip config, whose text part is not built into it.

    Raises:
        ValueError: see `clip.build_clip`.
    """
    towers = clip.build_clip(config)
    return AestheticNetwork(copy.copy(towers.visual), config["embed_dim"])


class AestheticReward:
    """Frozen LAION aesthetic predictor.

    Args:
        network: loaded weights; set to eval mode and frozen.
        resize: "crop" (official), "squash" (VideoX-Fun) or "letterbox".
        use_antialias: True with "crop" follows Pillow's 8-bit arithmetic exactly.
    """

    name = "aesthetic"
    range_note = "about 1 to 10, higher is better; ordinary pictures lie between 4 and 7; the prompt plays no part"
    mixes_prompts = False
    ignores_prompts = True

    def __init__(self, network: AestheticNetwork, *, resize: str = DEFAULT_RESIZE, use_antialias: bool = True):
        self.prepare = Preparation(size_px=network.visual.image_size[0], resize=resize, use_antialias=use_antialias, is_pillow=True)
        self.network = network.eval().requires_grad_(False)

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> AestheticReward:
        """Move the model; `dtype` casts its matrices. Returns itself."""
        clip.move(self.network, device, dtype)
        return self

    def score(self, frames_BFCHW: Tensor, prompts: Sequence[str]) -> RewardOutput:
        """Aesthetic score per frame and their mean; see `base.RewardModel.score`.

        Raises:
            ValueError: see `base.check_frames`.
        """
        check_frames(frames_BFCHW, prompts)
        score_BF = self.network(self.prepare(frames_BFCHW.flatten(0, 1))).unflatten(0, frames_BFCHW.shape[:2])
        return RewardOutput(per_frame=score_BF, per_video=score_BF.mean(dim=1), parts={"aesthetic": score_BF})

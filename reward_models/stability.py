"""Notices a reward that has been fooled: how much it falls when a frame is changed in ways that no viewer would mind.

A frame that really looks better still does after it was moved by a sixty-fourth of its longer side, or slightly blurred. What gradient ascent wrote into
its pixels to please one reward model mostly does not survive that. The fall of the reward is a part of the scores, `drop_when_changed`; compare it with
that of honest videos (of the base model), never with 0, for blur costs an honest frame a little too.
Own method, in the spirit of input transformations against adversarial pictures (Guo et al. 2018, arXiv 1711.00117). It warns; it proves nothing: an
attack that knows the changes can hold out against them (`lab.py bench stability` measures that too).

Shape letters: B videos, F frames, M pictures, C H W.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from .base import RewardModel, RewardOutput

PART = "drop_when_changed"
# Of the longer side. CLIPs look at 224 pixels: 3.5 of them, a quarter of a patch, so that every patch sees something else.
_SHIFT = 1 / 64
# Deviation of the blur, in shifts.
_BLUR = 0.6


def changed(frames_BFCHW: Tensor) -> list[Tensor]:
    """The frames moved up and left, moved down and right (edges repeated), and blurred; each [B, F, C, H, W]."""
    height, width = frames_BFCHW.shape[-2:]
    step = max(1, round(max(height, width) * _SHIFT))
    pictures_MCHW = frames_BFCHW.flatten(0, 1)
    wide = functional.pad(pictures_MCHW, (step,) * 4, mode="replicate")
    moved = [wide[..., start : start + height, start : start + width] for start in (0, 2 * step)]
    return [picture.unflatten(0, frames_BFCHW.shape[:2]) for picture in (*moved, _blurred(pictures_MCHW, _BLUR * step))]


def _blurred(pictures_MCHW: Tensor, deviation_px: float) -> Tensor:
    """Gaussian blur with repeated edges."""
    channels, reach = pictures_MCHW.shape[1], max(1, math.ceil(3 * deviation_px))
    places = torch.arange(-reach, reach + 1, device=pictures_MCHW.device, dtype=pictures_MCHW.dtype)
    weights = (-(places**2) / (2 * deviation_px**2)).exp()
    weights = (weights / weights.sum()).expand(channels, 1, 1, -1)
    wide = functional.pad(pictures_MCHW, (reach,) * 4, mode="replicate")
    return functional.conv2d(functional.conv2d(wide, weights, groups=channels), weights.transpose(2, 3), groups=channels)


class StabilityCheck:
    """A reward model that scores as the one in it does, and tells beside it how much the reward falls on changed frames.

    The reward and its gradient are the model's own; the part has no gradient. A score costs four times the model's.

    Args:
        model: a scorer of single frames.
    """

    def __init__(self, model: RewardModel):
        self.model = model
        self.name = model.name
        self.range_note = model.range_note
        self.mixes_prompts = getattr(model, "mixes_prompts", False)
        self.needs_whole_video = getattr(model, "needs_whole_video", False)
        self.ignores_prompts = getattr(model, "ignores_prompts", False)

    @property
    def network(self) -> torch.nn.Module:
        """The model's, for whoever manages memory."""
        return self.model.network

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> StabilityCheck:
        """Move the model; returns itself."""
        self.model.to(device, dtype)
        return self

    def in_batch_of(self, prompts: Sequence[str]) -> StabilityCheck:
        """See `mps.MPSReward.in_batch_of`."""
        return StabilityCheck(self.model.in_batch_of(prompts))

    def prompt_warnings(self, prompts: Sequence[str]) -> list[str]:
        """See `clip.prompt_warnings`."""
        return getattr(self.model, "prompt_warnings", lambda _: [])(prompts)

    def score(self, frames_BFCHW: Tensor, prompts: Sequence[str]) -> RewardOutput:
        """See `base.RewardModel.score`; `parts` also holds `drop_when_changed`.

        Raises:
            ValueError: see `base.check_frames`.
        """
        output = self.model.score(frames_BFCHW, prompts)
        with torch.no_grad():
            after = [self.model.score(frames, prompts).per_frame for frames in changed(frames_BFCHW.detach())]
            drop_BF = output.per_frame.detach() - torch.stack(after).mean(dim=0)
        return RewardOutput(per_frame=output.per_frame, per_video=output.per_video, parts={**output.parts, PART: drop_BF})

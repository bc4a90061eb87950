"""Measures of a video that need no weights and no prompt: how much moves, how much flickers, how far the end has drifted from the start.

All are differentiable in the frames and the same at any resolution (frames are first shrunk to a small grid by averaging). They see what image scorers
cannot: a frozen video scores 0 in `dynamic_degree`.
- dynamic_degree: speed of what moves, in percent of the frame's height per frame, by the least-squares normal flow |I_t| |grad I| / |grad I|^2
  over all three channels (the one-constraint form of Lucas and Kanade 1981, own code). A change of light (gain and offset per channel) is taken out,
  so flicker is not motion; noise that changes from frame to frame counts as motion.
  VBench's dynamic degree (RAFT flow above a threshold) ranks alike but is not this number.
- flicker: minus the mean absolute second difference over time of local brightness, in percent of full range; 0 is steady. `temporal_consistency` in its
  parts is VBench's temporal flickering, 1 - mean |I_t - I_(t-1)| (Huang et al. 2024, arXiv 2311.17982, section 3; own code).
- drift: minus the distance in colour, contrast and sharpness between first and last frames, in percent; 0 is none.

Shape letters: B videos, F frames, C (3), H W grid.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from .base import RewardOutput, check_frames

# ITU-R BT.601 luma.
_LUMA = (0.299, 0.587, 0.114)
_MOTION_GRID_PX = 64
_FLICKER_GRID_PX = 16
_DRIFT_GRID_PX = 64
_DRIFT_SHARE = 8  # the first and the last eighth of the frames are compared
# Mean slope, a quarter of a grey level of 8 bits a pixel, below which a picture is flat and has no motion to be measured.
_NOISE_SLOPE = 0.25 / 255
_SHARPNESS_FLOOR = 1 / 255
# Keeps roots and quotients of flat pictures finite, with finite gradients.
_TINY = 1e-12

_NOTES = {
    "dynamic_degree": "motion in percent of the frame's height per frame, 0 is frozen; more is not always better, so give it a small weight",
    "flicker": "0 is steady, the more negative the more the brightness jumps (percent of full range); a frozen video is steady too",
    "drift": "0 means that the last frames look like the first in colour, contrast and sharpness; the more negative the further away (percent)",
}


def _shrunk(frames_BFCHW: Tensor, short_side_px: int) -> Tensor:
    """Averaged down so that the shorter side has at most so many pixels."""
    height, width = frames_BFCHW.shape[-2:]
    factor = max(1.0, min(height, width) / short_side_px)
    size = (max(1, round(height / factor)), max(1, round(width / factor)))
    wide = frames_BFCHW.flatten(0, 1).to(torch.promote_types(frames_BFCHW.dtype, torch.float32))
    return functional.interpolate(wide, size=size, mode="area").unflatten(0, frames_BFCHW.shape[:2])


def _luma(frames_BFCHW: Tensor) -> Tensor:
    weights = frames_BFCHW.new_tensor(_LUMA).view(3, 1, 1)
    return (frames_BFCHW * weights).sum(dim=2)


def _over_frames(pairs_BF: Tensor, frames: int) -> Tensor:
    """Values of neighbouring frames as one value per frame: each frame gets the mean of the pairs it takes part in."""
    if pairs_BF.shape[1] == 0:
        return pairs_BF.new_zeros(len(pairs_BF), frames)
    lag = frames - pairs_BF.shape[1]
    padded = functional.pad(pairs_BF, (lag, lag))
    there = functional.pad(torch.ones_like(pairs_BF), (lag, lag))
    total = sum(padded[:, i : i + frames] for i in range(lag + 1))
    return total / sum(there[:, i : i + frames] for i in range(lag + 1))


def _assembled(values_BT: Tensor, frames: int) -> tuple[Tensor, Tensor]:
    """Reward per frame and per video of values between neighbouring frames; 0 where the video is too short for one."""
    per_video = values_BT.mean(dim=1) if values_BT.shape[1] else values_BT.new_zeros(len(values_BT))
    return _over_frames(values_BT, frames), per_video


def _dynamic_degree(frames_BFCHW: Tensor) -> RewardOutput:
    """Speed of what moves; a video of one frame scores 0. `per_video` is the mean over pairs of neighbouring frames."""
    small = _shrunk(frames_BFCHW, _MOTION_GRID_PX)
    before, after = (x - x.mean(dim=(3, 4), keepdim=True) for x in (small[:, :-1], small[:, 1:]))
    # The gain that explains most of the change is light, not motion.
    gain = ((before * after).mean(dim=(3, 4), keepdim=True) + _TINY) / (before.square().mean(dim=(3, 4), keepdim=True) + _TINY)
    change = after - gain * before
    middle = (before + after) / 2
    # Central differences, so that both slopes belong to the same pixel.
    down = (middle[..., 2:, 1:-1] - middle[..., :-2, 1:-1]) / 2
    right = (middle[..., 1:-1, 2:] - middle[..., 1:-1, :-2]) / 2
    slope2 = down.square() + right.square()
    moved = (change[..., 1:-1, 1:-1].abs() * (slope2 + _TINY).sqrt()).flatten(2).sum(dim=2)
    speed_BP = 100 / small.shape[-2] * moved / (slope2 + _NOISE_SLOPE**2).flatten(2).sum(dim=2)
    per_frame, per_video = _assembled(speed_BP, frames_BFCHW.shape[1])
    return RewardOutput(per_frame=per_frame, per_video=per_video, parts={"speed_percent": per_frame})


def _flicker(frames_BFCHW: Tensor) -> RewardOutput:
    """Steadiness of local brightness; a video of fewer than three frames scores 0. `per_video` is the mean over triples of neighbouring frames."""
    frames = frames_BFCHW.shape[1]
    luma_BFHW = _luma(_shrunk(frames_BFCHW, _FLICKER_GRID_PX))
    if frames > 2:
        second_BT = (luma_BFHW[:, 2:] - 2 * luma_BFHW[:, 1:-1] + luma_BFHW[:, :-2]).abs().mean(dim=(2, 3))
    else:
        second_BT = luma_BFHW.new_zeros(len(luma_BFHW), 0)
    per_frame, per_video = _assembled(-100 * second_BT, frames)
    wide = frames_BFCHW.to(torch.promote_types(frames_BFCHW.dtype, torch.float32))
    same_BP = 1 - (wide[:, 1:] - wide[:, :-1]).abs().mean(dim=(2, 3, 4))
    consistency = _over_frames(same_BP, frames) if frames > 1 else same_BP.new_ones(len(wide), frames)
    return RewardOutput(per_frame=per_frame, per_video=per_video, parts={"flicker": per_frame, "temporal_consistency": consistency})


def _drift(frames_BFCHW: Tensor) -> RewardOutput:
    """Likeness of the last frames to the first. `per_frame` is each frame's distance to the first frames, `per_video` that of the last ones."""
    ends = max(1, frames_BFCHW.shape[1] // _DRIFT_SHARE)
    small = _shrunk(frames_BFCHW, _DRIFT_GRID_PX)
    colour_BFC = small.mean(dim=(3, 4))
    contrast_BF = _spread(small.flatten(2), dim=2)
    luma = _luma(small)
    edges = (luma[..., 1:, :] - luma[..., :-1, :]).square().mean(dim=(2, 3)) + (luma[..., :, 1:] - luma[..., :, :-1]).square().mean(dim=(2, 3))
    sharpness_BF = (edges + _SHARPNESS_FLOOR**2).sqrt()
    parts = {
        "colour_drift": -100 * (colour_BFC - colour_BFC[:, :ends].mean(dim=1, keepdim=True)).abs().mean(dim=2),
        "contrast_drift": -100 * (contrast_BF - contrast_BF[:, :ends].mean(dim=1, keepdim=True)).abs(),
        "sharpness_drift": -100 * (sharpness_BF - sharpness_BF[:, :ends].mean(dim=1, keepdim=True)).abs(),
    }
    per_frame = sum(parts.values())
    return RewardOutput(per_frame=per_frame, per_video=per_frame[:, -ends:].mean(dim=1), parts=parts)


def _spread(values: Tensor, dim: int) -> Tensor:
    """Standard deviation with a finite gradient for flat pictures, which are common in tests and in fades."""
    return ((values - values.mean(dim=dim, keepdim=True)).square().mean(dim=dim) + 1e-8).sqrt()


_COMPUTE = {"dynamic_degree": _dynamic_degree, "flicker": _flicker, "drift": _drift}
KINDS = tuple(_COMPUTE)


class Measure:
    """A measure as a reward model; see the module's docstring.

    Args:
        name: one of `KINDS`.
    """

    needs_whole_video = True
    ignores_prompts = True

    def __init__(self, name: str):
        self.name = name
        self.range_note = _NOTES[name]
        self._compute = _COMPUTE[name]

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Measure:
        """Nothing to move."""
        return self

    def score(self, frames_BFCHW: Tensor, prompts: Sequence[str]) -> RewardOutput:
        """See `base.RewardModel.score`.

        Raises:
            ValueError: see `base.check_frames`.
        """
        check_frames(frames_BFCHW, prompts)
        return self._compute(frames_BFCHW)

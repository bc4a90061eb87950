"""Bring frames to the picture size of a CLIP, in the ways that the published scorers and trainers do it; all differentiable.

- letterbox: longer side to size, zero bars (HPSv2, HPSv2.1). - squash: stretch to a square (what VideoX-Fun trains with).
- crop: shorter side to size, centre crop (float). - pillow crop: the same with Pillow's 8-bit bicubic, bit for bit (MPS, PickScore); its gradient is
that of the same linear resize, rounding passed straight through.
Does not: read pictures, change colour spaces, batch pictures of different sizes.

Antialiased bicubic has no half-precision kernel on CPU, so everything here runs in float32 (float64 for float64 frames).
Shape letters: B pictures, C channels, H W input size, I O length before and after a pass.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import torch
from torch import Tensor
from torch.nn import functional

# Source: OpenAI CLIP preprocessing, the same in open_clip/constants.py and tgxs002/HPSv2@866735e.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

RESIZES = ("letterbox", "crop", "squash")

# Pillow's 8-bit resize: 32 - 8 - 2 bits of fixed-point weight. Source: Pillow src/libImaging/Resample.c, PRECISION_BITS.
_WEIGHT_BITS = 22
_SPLIT_BITS = 11


def normalise(pixels_BCHW: Tensor) -> Tensor:
    """Subtract CLIP's mean and divide by its deviation, channel by channel."""
    mean = pixels_BCHW.new_tensor(CLIP_MEAN).view(3, 1, 1)
    std = pixels_BCHW.new_tensor(CLIP_STD).view(3, 1, 1)
    return (pixels_BCHW - mean) / std


def letterbox_size(height_px: int, width_px: int, size_px: int) -> tuple[int, int, int, int]:
    """New height and width, and the bars left and top, of HPSv2's letterbox.

    Sides are rounded half to even (Python `round`); the smaller half of the padding goes left and top.
    Differs from upstream when the longer side is already `size_px`: upstream then does not pad and crashes; here it pads.
    Source: tgxs002/HPSv2@866735e:hpsv2/src/open_clip/transform.py, ResizeMaxSize (Apache-2.0).
    """
    scale = size_px / max(height_px, width_px)
    new_height, new_width = max(1, round(height_px * scale)), max(1, round(width_px * scale))
    return new_height, new_width, (size_px - new_width) // 2, (size_px - new_height) // 2


def crop_size(height_px: int, width_px: int, size_px: int) -> tuple[int, int, int, int]:
    """New height and width after the shorter side becomes `size_px`, and the crop corner left and top.

    The longer side is rounded down and so is the crop corner.
    Source: transformers `get_resize_output_image_size` and CLIPImageProcessor (Apache-2.0).
    """
    if height_px <= width_px:
        new_height, new_width = size_px, int(size_px * width_px / height_px)
    else:
        new_height, new_width = int(size_px * height_px / width_px), size_px
    return new_height, new_width, (new_width - size_px) // 2, (new_height - size_px) // 2


def resize_float(pixels_BCHW: Tensor, height_px: int, width_px: int, *, use_antialias: bool = True) -> Tensor:
    """Bicubic resize without clamp, as torchvision resizes float tensors; identity when the size is right already."""
    if pixels_BCHW.shape[-2:] == (height_px, width_px):
        return pixels_BCHW
    return functional.interpolate(pixels_BCHW, size=(height_px, width_px), mode="bicubic", align_corners=False, antialias=use_antialias)


def letterbox(pixels_BCHW: Tensor, size_px: int, *, use_antialias: bool = True) -> Tensor:
    """HPSv2's letterbox: resize, then zero bars before normalisation (so bars are not grey but black)."""
    new_height, new_width, left, top = letterbox_size(pixels_BCHW.shape[-2], pixels_BCHW.shape[-1], size_px)
    resized = resize_float(pixels_BCHW, new_height, new_width, use_antialias=use_antialias)
    return functional.pad(resized, (left, size_px - new_width - left, top, size_px - new_height - top))


def crop(pixels_BCHW: Tensor, size_px: int, *, use_antialias: bool = True) -> Tensor:
    """Shorter side to `size_px`, centre crop; float, no clamp."""
    new_height, new_width, left, top = crop_size(pixels_BCHW.shape[-2], pixels_BCHW.shape[-1], size_px)
    resized = resize_float(pixels_BCHW, new_height, new_width, use_antialias=use_antialias)
    return resized[..., top : top + size_px, left : left + size_px]


def squash(pixels_BCHW: Tensor, size_px: int, *, use_antialias: bool = True) -> Tensor:
    """Stretch to a square, as VideoX-Fun does. Source: aigc-apps/VideoX-Fun@804a425:videox_fun/reward/reward_fn.py (Apache-2.0)."""
    return resize_float(pixels_BCHW, size_px, size_px, use_antialias=use_antialias)


def crop_as_pillow(pixels_BCHW: Tensor, size_px: int) -> Tensor:
    """Shorter side to `size_px` with Pillow's 8-bit bicubic, centre crop: equal to CLIPImageProcessor on 8-bit pictures.

    Only the rows and columns that survive the crop are computed. Values are rounded to 8 bits before, between and after the two
    passes as Pillow does; the gradient treats rounding as identity and is zero where a pass clipped.

    Args:
        pixels_BCHW: float in [0,1].

    Returns:
        [B, C, size, size] multiples of 1/255 in [0,1], dtype of the input.
    """
    height_px, width_px = pixels_BCHW.shape[-2:]
    new_height, new_width, left, top = crop_size(height_px, width_px, size_px)
    x = _RoundTo8Bit.apply(pixels_BCHW)
    # Along rows first: every Pillow before 13 does so, and the published scores are older; Pillow 13 takes columns first in tall pictures.
    if new_width != width_px:
        x = _PillowPass.apply(x, *_pillow_weights(width_px, new_width, left, size_px))
    elif new_width != size_px:
        x = x[..., left : left + size_px]
    if new_height != height_px:
        x = _PillowPass.apply(x.transpose(-1, -2), *_pillow_weights(height_px, new_height, top, size_px)).transpose(-1, -2)
    elif new_height != size_px:
        x = x[..., top : top + size_px, :]
    return x / 255


class _RoundTo8Bit(torch.autograd.Function):
    """[0,1] to whole numbers 0..255, gradient as if it were a multiplication by 255."""

    @staticmethod
    def forward(ctx, pixels: Tensor) -> Tensor:
        return (pixels * 255).round().clamp(0, 255)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return gradient * 255


class _PillowPass(torch.autograd.Function):
    """One pass of Pillow's 8-bit resize along the last axis, exact in integers.

    A weight has 22 bits and a sample 8, too much for one float32 product sum. Split in a high part and a centred low part of 11 bits each,
    both product sums stay below 2^24 (up to 60 taps, that is 15-fold reduction) and are exact in float32, on any device and also under TF32.
    Larger reductions use float64.
    """

    @staticmethod
    def forward(ctx, x: Tensor, high_IO: Tensor, low_IO: Tensor) -> Tensor:
        taps = int((high_IO != 0).logical_or(low_IO != 0).sum(dim=0).max())
        exact = torch.float32 if taps <= 60 else torch.float64
        high_IO = high_IO.to(device=x.device)
        low_IO = low_IO.to(device=x.device)
        samples = x.to(exact)
        total = (samples @ high_IO.to(exact)).long() * (1 << _SPLIT_BITS) + (samples @ low_IO.to(exact)).long()
        rounded = (total + (1 << (_WEIGHT_BITS - 1))) >> _WEIGHT_BITS
        ctx.save_for_backward((rounded >= 0) & (rounded <= 255), high_IO, low_IO)
        return rounded.clamp_(0, 255).to(x.dtype)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:
        is_inside, high_IO, low_IO = ctx.saved_tensors
        weights_IO = (high_IO.double() * (1 << _SPLIT_BITS) + low_IO.double()) / (1 << _WEIGHT_BITS)
        return (gradient * is_inside) @ weights_IO.to(gradient.dtype).t(), None, None


def _bicubic(x: float) -> float:
    """Keys' cubic with a = -0.5, as in Pillow."""
    x = abs(x)
    if x < 1:
        return (1.5 * x - 2.5) * x * x + 1
    if x < 2:
        return ((-0.5 * x + 2.5) * x - 4) * x + 2
    return 0.0


@functools.lru_cache(maxsize=32)
def _pillow_weights(length_px: int, new_length_px: int, start: int, count: int) -> tuple[Tensor, Tensor]:
    """Pillow's fixed-point weights for outputs `start .. start + count` as two matrices [I, count] with weight = high * 2^11 + low.

    Source: Pillow src/libImaging/Resample.c, precompute_coeffs and normalize_coeffs_8bpc (MIT-CMU); written anew.
    """
    with torch.inference_mode(False):
        weights_IO = torch.zeros(length_px, count, dtype=torch.int64)
        scale = length_px / new_length_px
        stretch = max(scale, 1.0)
        support = 2.0 * stretch
        for column in range(count):
            centre = (start + column + 0.5) * scale
            first = max(0, int(centre - support + 0.5))
            last = min(length_px, int(centre + support + 0.5))
            taps = [_bicubic((i - centre + 0.5) * (1.0 / stretch)) for i in range(first, last)]
            total = sum(taps)
            fixed = [int(math.copysign(0.5, tap) + tap / total * (1 << _WEIGHT_BITS)) for tap in taps]
            weights_IO[first:last, column] = torch.tensor(fixed)
        high_IO = (weights_IO + (1 << (_SPLIT_BITS - 1))) >> _SPLIT_BITS
        low_IO = weights_IO - (high_IO << _SPLIT_BITS)
        return high_IO.float(), low_IO.float()


def _check_resize(resize: str) -> None:
    if resize not in RESIZES:
        raise ValueError(f"resize is {resize!r}; choose one of {', '.join(RESIZES)}.")


def prepare(pixels_BCHW: Tensor, size_px: int, *, resize: str, use_antialias: bool = True, is_pillow: bool = False) -> Tensor:
    """Resize, fit and normalise for a CLIP.

    Args:
        pixels_BCHW: float in [0,1], any size.
        size_px: picture size of the model.
        resize: one of `RESIZES`.
        use_antialias: filter before shrinking (torchvision >= 0.17 does; older ones did not for tensors).
        is_pillow: with crop and antialias, follow Pillow's 8-bit arithmetic exactly.

    Returns:
        [B, 3, size, size], float32 (float64 for float64 frames), normalised.

    Raises:
        ValueError: unknown `resize`.
    """
    _check_resize(resize)
    pixels_BCHW = pixels_BCHW.to(torch.promote_types(pixels_BCHW.dtype, torch.float32))
    if resize == "crop" and is_pillow and use_antialias:
        return normalise(crop_as_pillow(pixels_BCHW, size_px))
    fit = {"letterbox": letterbox, "crop": crop, "squash": squash}[resize]
    return normalise(fit(pixels_BCHW, size_px, use_antialias=use_antialias))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preparation:
    """How a scorer's pictures become its CLIP's input: `prepare` with its settings fixed.

    Attributes:
        size_px: picture size of the model.
        resize, use_antialias, is_pillow: see `prepare`.
    """

    size_px: int
    resize: str
    use_antialias: bool = True
    is_pillow: bool = False

    def __post_init__(self) -> None:
        _check_resize(self.resize)

    def __call__(self, pixels_MCHW: Tensor) -> Tensor:
        """Pictures in [0,1], any size, to the model's input [M, 3, size, size], at least float32."""
        return prepare(pixels_MCHW, self.size_px, resize=self.resize, use_antialias=self.use_antialias, is_pillow=self.is_pillow)

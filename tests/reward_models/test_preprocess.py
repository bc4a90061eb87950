"""Resizes: Pillow parity bit for bit, and gradients that are those of the forward computation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from reward_lab.reward_models import preprocess


def pillow_crop(pixels_HWC: np.ndarray, size_px: int) -> np.ndarray:
    """What CLIPImageProcessor does, with Pillow itself, width first as every Pillow up to 12 does (13 turns the order for tall pictures)."""
    height, width, left, top = preprocess.crop_size(*pixels_HWC.shape[:2], size_px)
    image = Image.fromarray(pixels_HWC).resize((width, pixels_HWC.shape[0]), Image.Resampling.BICUBIC)
    resized = np.array(image.resize((width, height), Image.Resampling.BICUBIC))
    return resized[top : top + size_px, left : left + size_px]


SIZES = [(480, 832), (97, 150), (333, 140), (224, 224), (224, 400), (400, 224), (64, 64), (223, 225), (720, 1280), (3600, 230)]


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_pillow_crop_is_bit_exact(height, width):
    rng = np.random.default_rng(height * width)
    # Black and white noise makes every pass clip; a gradient makes rounding matter.
    noise = rng.integers(0, 2, (height, width, 3)).astype(np.uint8) * 255
    soft = ((np.indices((height, width)).sum(0)[..., None] + np.array([0, 40, 90])) % 256).astype(np.uint8)
    for pixels in (noise, soft):
        got = preprocess.crop_as_pillow(torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255, 224)
        assert np.array_equal((got[0].permute(1, 2, 0) * 255).round().byte().numpy(), pillow_crop(pixels, 224))
        assert torch.equal((got * 255).round() / 255, got)


def test_pillow_crop_handles_reductions_beyond_exact_float32():
    pixels = np.random.default_rng(0).integers(0, 256, (700, 640, 3)).astype(np.uint8)
    got = preprocess.crop_as_pillow(torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255, 16)
    assert np.array_equal((got[0].permute(1, 2, 0) * 255).round().byte().numpy(), pillow_crop(pixels, 16))


def test_pillow_crop_gradient_is_that_of_the_linear_resize():
    """Away from clipping the resize is linear up to rounding, so its gradient is the float resize's transpose."""
    grey = 0.5 + 0.1 * torch.rand(1, 3, 300, 260, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weights = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    pillow, plain = grey.clone().requires_grad_(), grey.clone().requires_grad_()
    (preprocess.crop_as_pillow(pillow, 224) * weights).sum().backward()
    (preprocess.crop(plain, 224) * weights).sum().backward()
    assert (pillow.grad - plain.grad).norm() < 1e-5 * plain.grad.norm()


def test_pillow_crop_gives_no_gradient_where_it_clipped():
    stripes = torch.zeros(1, 3, 448, 448)
    stripes[..., ::4] = 1
    wide = stripes.repeat_interleave(2, -1)[..., :448].clone().requires_grad_()
    out = preprocess.crop_as_pillow(wide, 224)
    (gradient,) = torch.autograd.grad(out[out.detach() == 0].sum(), wide)
    assert out.detach().min() == 0
    assert gradient.abs().sum() < preprocess.crop(wide, 224).numel()


@pytest.mark.parametrize("resize", preprocess.RESIZES)
@pytest.mark.parametrize("use_antialias", [True, False])
def test_gradient_against_finite_differences(resize, use_antialias):
    pixels = torch.rand(1, 3, 9, 13, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: preprocess.prepare(x, 8, resize=resize, use_antialias=use_antialias), (pixels,))


def test_exact_size_on_the_longer_side_is_padded():
    """Upstream returns such a picture unpadded and then crashes; here it is a letterbox like any other."""
    assert preprocess.letterbox(torch.ones(1, 3, 224, 100), 224).shape == (1, 3, 224, 224)


def test_bars_are_black_before_normalisation():
    out = preprocess.prepare(torch.ones(1, 3, 10, 40), 32, resize="letterbox")
    assert out[0, :, 0, 0].tolist() == pytest.approx([-1.7923, -1.7521, -1.4802], abs=1e-4)


def test_half_precision_frames_are_resized_in_float32():
    out = preprocess.prepare(torch.rand(1, 3, 40, 60).half(), 32, resize="letterbox")
    assert out.dtype == torch.float32


def test_unknown_resize_is_named():
    with pytest.raises(ValueError, match="'stretch'.*letterbox, crop, squash"):
        preprocess.prepare(torch.rand(1, 3, 4, 4), 4, resize="stretch")

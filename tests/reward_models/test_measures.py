"""Measures without weights: frozen, moving, flickering and drifting videos, resolution, gradients against finite differences."""

from __future__ import annotations

import pytest
import torch

from reward_lab.reward_models import base, measures
from reward_lab.reward_models.loader import load_reward_model

FRAMES = 17


def moving(speed_px: float, size: int = 64, flicker: float = 0.0, fade: float = 0.0) -> torch.Tensor:
    """A soft disc [1, F, 3, size, size] that moves right so many pixels of 64 a frame; brightness alternates by `flicker` and falls by `fade` to the end."""
    rows, columns = torch.meshgrid(torch.arange(size) * 64 / size, torch.arange(size) * 64 / size, indexing="ij")
    frames = []
    for index in range(FRAMES):
        distance = ((rows - 32) ** 2 + (columns - 12 - speed_px * index) ** 2).sqrt()
        disc = torch.sigmoid((9 - distance) / 1.5)
        light = 1 + flicker * (-1) ** index - fade * index / (FRAMES - 1)
        frames.append(torch.stack([0.3 + 0.5 * disc, 0.5 - 0.2 * disc, 0.3 + 0.1 * disc]) * light)
    return torch.stack(frames)[None].clamp(0, 1)


def value(kind: str, frames: torch.Tensor) -> float:
    return float(load_reward_model(kind).score(frames, [""]).per_video)


def test_dynamic_degree_follows_the_speed_and_is_zero_when_frozen():
    speeds = [value("dynamic_degree", moving(speed)) for speed in (0.0, 0.5, 1.0, 2.0)]
    assert speeds[0] == 0.0
    assert 1.6 < speeds[2] / speeds[1] < 2.4 and 1.5 < speeds[3] / speeds[2] < 2.4
    # One pixel of 64 a frame is 1.6 % of the height; only slopes along the motion see it, which on a disc is about two thirds.
    assert 0.7 < speeds[2] < 1.6


def test_dynamic_degree_does_not_take_flicker_for_motion_and_does_not_depend_on_the_resolution():
    assert value("dynamic_degree", moving(0.0, flicker=0.1)) < 0.3 * value("dynamic_degree", moving(1.0))
    assert value("dynamic_degree", moving(1.0, size=192)) == pytest.approx(value("dynamic_degree", moving(1.0)), rel=0.1)


def test_flicker_sees_flicker_and_little_else():
    assert value("flicker", moving(0.0)) == 0.0
    steady, jumping, stronger = (value("flicker", moving(1.0, flicker=flicker)) for flicker in (0.0, 0.03, 0.1))
    assert steady > 3 * jumping > stronger * 2 and stronger < -10
    parts = load_reward_model("flicker").score(moving(0.0, flicker=0.1), [""]).parts
    assert float(parts["temporal_consistency"].mean()) == pytest.approx(1 - float(moving(0.0, flicker=0.1).diff(dim=1).abs().mean()), abs=1e-3)


def test_drift_sees_a_fading_video():
    assert value("drift", moving(0.0)) == pytest.approx(0.0, abs=1e-4)
    still, fading = value("drift", moving(1.0)), value("drift", moving(1.0, fade=0.3))
    assert fading < 5 * still < 0
    output = load_reward_model("drift").score(moving(0.0, fade=0.3), [""])
    assert (output.per_frame[0].diff() < 1e-4).all() and output.parts["colour_drift"][0, -1] < -5


@pytest.mark.parametrize("kind", measures.KINDS)
@pytest.mark.parametrize("count", [1, 2])
def test_very_short_videos_have_a_finite_score(kind, count):
    leaf = moving(1.0)[:, :count].clone().requires_grad_()
    output = load_reward_model(kind).score(leaf, [""])
    assert output.per_video.isfinite().all() and output.per_frame.shape == (1, count) and all(part.shape == (1, count) for part in output.parts.values())


@pytest.mark.parametrize("kind", measures.KINDS)
def test_gradient_is_that_of_finite_differences(kind):
    torch.manual_seed(4)
    model = load_reward_model(kind)
    frames = (moving(1.5, size=12)[:, :5] * 0.8 + 0.1 * torch.rand(1, 5, 3, 12, 12)).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: model.score(x, [""]).per_video, frames, eps=1e-7, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("kind", measures.KINDS)
def test_chunks_never_cut_a_video(kind):
    model = load_reward_model(kind)
    frames = torch.cat([moving(1.0), moving(2.0, flicker=0.05)])
    whole = model.score(frames, ["", ""])
    cut = base.score_in_chunks(model, frames, ["", ""], 4)
    torch.testing.assert_close(cut.per_video, whole.per_video, rtol=0, atol=1e-6)
    leaf = frames.clone().requires_grad_()
    (expected,) = torch.autograd.grad(model.score(leaf, ["", ""]).per_video.sum(), leaf)
    output, gradient = base.reward_and_frame_gradient(model, frames, ["", ""], 4)
    torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-7)
    torch.testing.assert_close(output.per_video, whole.per_video, rtol=0, atol=1e-6)

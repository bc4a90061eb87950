"""The protocol's helpers: input checks, chunks equal to the whole, exact gradients, inference mode."""

from __future__ import annotations

import pytest
import torch

from reward_lab.reward_models import base, hpsv2, mps
from reward_lab.reward_models.text_cache import TextCache

PROMPTS = ["a red square", "a blue disc moves left", "grass"]
# Matrix products of another batch size add in another order. Of scores around 0.4, made of features with 1e2 to 1e3 terms, that leaves a few fp32 units
# in the last place (3e-8 each) times the logit scale; measured up to 2.3e-6, on one CPU model of several.
CHUNK_ATOL = 1e-5


@pytest.fixture(params=["hps", "mps", "mps batch"])
def model(request, tiny_hps, tiny_mps):
    """Every kind of scorer, the prompt-mixing one included."""
    if request.param == "hps":
        return tiny_hps
    return tiny_mps if request.param == "mps" else mps.MPSReward(tiny_mps.network, use_antialias=False, normalise="batch", threshold=0.3)


@pytest.mark.parametrize("frames_per_chunk", [1, 2, 3, 7, 100])
def test_chunks_equal_the_whole(model, make_frames, frames_per_chunk):
    frames = make_frames(3, 4)
    whole = model.score(frames, PROMPTS)
    chunked = base.score_in_chunks(model, frames, PROMPTS, frames_per_chunk)
    torch.testing.assert_close(chunked.per_frame, whole.per_frame, rtol=0, atol=CHUNK_ATOL)
    torch.testing.assert_close(chunked.per_video, whole.per_video, rtol=0, atol=CHUNK_ATOL)
    assert set(chunked.parts) == set(whole.parts)
    for name, value in whole.parts.items():
        torch.testing.assert_close(chunked.parts[name], value, rtol=0, atol=CHUNK_ATOL)


@pytest.mark.parametrize("frames_per_chunk", [1, 3, 100])
def test_chunked_gradient_equals_autograd_of_the_whole(model, make_frames, frames_per_chunk):
    frames = make_frames(3, 4).requires_grad_()
    weights = torch.tensor([1.0, -2.0, 0.5])
    (wanted,) = torch.autograd.grad((model.score(frames, PROMPTS).per_video * weights).sum(), frames)
    output, gradient = base.reward_and_frame_gradient(model, frames, PROMPTS, frames_per_chunk)
    got = gradient * weights[:, None, None, None, None]
    assert (got - wanted).norm() < 1e-5 * wanted.norm()
    assert not output.per_video.requires_grad
    assert frames.grad is None


def test_chunk_sizes_are_respected(tiny_hps, make_frames):
    seen = []

    class Recording:
        mixes_prompts = False

        def score(self, frames, prompts):
            seen.append((len(prompts), frames.shape[0], frames.shape[1]))
            return tiny_hps.score(frames, prompts)

    base.score_in_chunks(Recording(), make_frames(3, 5), PROMPTS, 4)
    assert max(videos * count for _, videos, count in seen) <= 4
    assert all(prompts == videos for prompts, videos, _ in seen)
    assert sum(videos * count for _, videos, count in seen) == 15
    with pytest.raises(ValueError, match="frames_per_chunk is 0"):
        base.score_in_chunks(tiny_hps, make_frames(3, 5), PROMPTS, 0)


def test_gradient_against_finite_differences_in_double(model, make_frames):
    frames = make_frames(1, 2).double()
    double = model.to("cpu", torch.float64)
    frames.requires_grad_()
    prompt = PROMPTS[:1]
    (gradient,) = torch.autograd.grad(double.score(frames, prompt).per_video.sum(), frames)
    direction = torch.randn(frames.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    # Stay inside [0,1], which `score` checks.
    centre = 0.1 + 0.8 * frames.detach()
    centre.requires_grad_()
    (gradient,) = torch.autograd.grad(double.score(centre, prompt).per_video.sum(), centre)
    step = 1e-6
    with torch.no_grad():
        up, down = (double.score(centre + sign * step * direction, prompt).per_video.sum() for sign in (1, -1))
    assert ((up - down) / (2 * step)).item() == pytest.approx((gradient * direction).sum().item(), rel=1e-6)


def test_weights_are_frozen_and_in_eval_mode(model):
    assert not model.network.training
    assert not any(parameter.requires_grad for parameter in model.network.parameters())


def test_everything_works_inside_inference_mode(model, make_frames):
    outside = model.score(make_frames(2, 2), PROMPTS[:2]).per_frame
    with torch.inference_mode():
        inside = make_frames(2, 2)
        assert torch.equal(model.score(inside, PROMPTS[:2]).per_frame, outside)
        _, gradient = base.reward_and_frame_gradient(model, inside, PROMPTS[:2], 2)
        model.score(make_frames(1, 1), ["a text first seen in inference mode"])
    assert gradient.abs().sum() > 0
    # The cached text of the inference-mode call must serve a gradient pass.
    frames = make_frames(1, 1).requires_grad_()
    model.score(frames, ["a text first seen in inference mode"]).per_video.sum().backward()
    assert frames.grad.abs().sum() > 0


def test_text_is_encoded_once(tiny_hps, make_frames):
    for _ in range(3):
        tiny_hps.score(make_frames(2, 2), ["one", "one"])
    assert tiny_hps._texts.misses == 1
    tiny_hps.to("cpu", torch.float32)
    tiny_hps.score(make_frames(1, 1), ["one"])
    assert tiny_hps._texts.misses == 2


def test_text_cache_is_bounded_and_keeps_what_was_used_last():
    asked = []

    def encode(prompts):
        asked.extend(prompts)
        return torch.zeros(len(prompts), 2)

    cache = TextCache(encode, limit=2)
    for prompt in ("a", "b", "a", "c", "a", "b"):
        cache([prompt])
    assert asked == ["a", "b", "c", "b"]
    assert cache(["x", "y", "z", "x"]).shape == (4, 2)


def test_an_empty_prompt_is_scored_with_a_warning(tiny_hps, make_frames, caplog):
    """The recorded fixtures score one, so it is no error; who asks for it is told."""
    assert tiny_hps.score(make_frames(1, 1), [" "]).per_video.isfinite().all()
    assert "prompt is empty" in caplog.text


def test_a_cut_prompt_is_told(tiny_hps, make_frames, caplog):
    with caplog.at_level("WARNING", logger="reward_lab"):
        tiny_hps.score(make_frames(1, 1), ["word " * 74 + "the last ones do not fit"])
    assert "cut after" in caplog.text
    assert "not fit" in caplog.text


GOOD = torch.full((1, 2, 3, 8, 8), 0.5)
BAD_INPUT = [
    (GOOD[:, :0], ["x"], "nothing to score"),
    (GOOD[:0], [], "nothing to score"),
    (GOOD[:, :, :1], ["x"], "1 channels.*grey"),
    (torch.cat([GOOD, GOOD[:, :, :1]], dim=2), ["x"], "4 channels.*alpha"),
    (GOOD[0], ["x"], "floating-point tensor"),
    ((GOOD * 255).byte(), ["x"], "floating-point tensor"),
    (GOOD * 255, ["x"], r"range from .* \[0,1\] is needed"),
    (GOOD - 1, ["x"], r"\[0,1\] is needed"),
    (GOOD * float("nan"), ["x"], "NaN"),
    (GOOD * float("inf"), ["x"], r"\[0,1\] is needed"),
    (GOOD, ["x", "y"], "2 prompts were given for 1 videos"),
    (GOOD, "x", "got one string"),
    (GOOD, [3], "Prompt 0 is int, not a text"),
]


@pytest.mark.parametrize(("frames", "prompts", "message"), BAD_INPUT, ids=[message for _, _, message in BAD_INPUT])
def test_bad_input_is_refused_with_the_reason(tiny_hps, frames, prompts, message):
    for call in (lambda: tiny_hps.score(frames, prompts), lambda: base.reward_and_frame_gradient(tiny_hps, frames, prompts, 4)):
        with pytest.raises(ValueError, match=message):
            call()


def test_one_nan_pixel_is_found(tiny_hps):
    frames = GOOD.clone()
    frames[0, 1, 2, 7, 7] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        tiny_hps.score(frames, ["x"])


def test_ordinary_rounding_around_the_range_is_accepted(tiny_hps):
    assert tiny_hps.score(GOOD * 2 + 5e-4, ["x"]).per_video.isfinite().all()


def test_unknown_resize_of_a_model_is_refused(tiny_hps):
    with pytest.raises(ValueError, match="resize is 'pad'"):
        hpsv2.HPSv2Reward(tiny_hps.network, resize="pad")

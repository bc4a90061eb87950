"""The gradient of many frames in chunks: what is alive at once, counted tensor by tensor, and equality with the whole.

A PAVRM has no chunks: it looks at all tokens of a latent at once (host/pavrm.py); its memory is that of its trunk.
"""

from __future__ import annotations

import pytest
import torch

from reward_lab.reward_models import aesthetic, arcface, base, face, mix, mps, pickscore
from reward_lab.reward_models.measures import Measure
from reward_lab.tests.reward_models.conftest import TINY_CLIP, random_network, randomise
from reward_lab.tests.reward_models.live_bytes import LiveBytes

FRAMES, CHUNK = 81, 6
PROMPTS = ["a red square"]


@pytest.fixture(params=["hps", "mps", "pickscore", "aesthetic"])
def model(request, tiny_hps, tiny_mps):
    """A tiny scorer of single frames."""
    return {
        "hps": lambda: tiny_hps,
        "mps": lambda: tiny_mps,
        "pickscore": lambda: pickscore.PickScoreReward(tiny_hps.network, use_antialias=False),
        "aesthetic": lambda: aesthetic.AestheticReward(randomise(aesthetic.build(TINY_CLIP), 3), use_antialias=False),
    }[request.param]()


def outside_of(model) -> list[torch.Tensor]:
    """Weights, and what is made once and kept: they are there with and without chunks."""
    return [*model.network.parameters(), *model.network.buffers()]


def plain_gradient(model, frames: torch.Tensor, prompts: list[str]) -> tuple[torch.Tensor, int]:
    """Gradient of the reward in one piece, and the bytes that were alive at the most."""
    leaf = frames.clone().requires_grad_()
    with LiveBytes(leaf, *outside_of(model)) as live:
        output = model.score(leaf, prompts)
        (gradient,) = torch.autograd.grad(output.per_video.sum(), leaf)
    return gradient, live.peak


def chunked_gradient(model, frames: torch.Tensor, prompts: list[str], chunk: int, *, outside: list[torch.Tensor]) -> tuple[torch.Tensor, int, int]:
    """Gradient in chunks, the bytes alive at the most and at the end; the whole gradient, which is there from the start, not counted."""
    with LiveBytes(frames, *outside) as live:
        _, gradient = base.reward_and_frame_gradient(model, frames, prompts, chunk)
    return gradient, live.peak - gradient.nbytes, live.now - gradient.nbytes


def test_chunked_gradient_of_81_frames_keeps_two_chunks_at_most_and_is_the_same(model, make_frames):
    frames = make_frames(1, FRAMES)
    model.score(frames[:, :1], PROMPTS)  # the text is encoded once and kept; it is no part of this
    _, one = plain_gradient(model, frames[:, :CHUNK], PROMPTS)
    whole_gradient, whole = plain_gradient(model, frames, PROMPTS)
    gradient, cut, left = chunked_gradient(model, frames, PROMPTS, CHUNK, outside=outside_of(model))
    assert 0 < cut <= 2 * one
    assert whole > 8 * one, "else the count would show nothing"
    assert left < one / 10, "numbers of the output may stay, activations must not"
    assert float((gradient - whole_gradient).norm() / whole_gradient.norm()) < 1e-5


@pytest.mark.parametrize("kind", ["hps", "mps"])
def test_frames_of_720p_keep_two_chunks_at_most(kind, tiny_hps, tiny_mps, make_frames):
    """Here pictures weigh more than the tower: what is counted is mostly the preparation, of MPS with Pillow's arithmetic in whole numbers."""
    model = tiny_hps if kind == "hps" else mps.MPSReward(tiny_mps.network)
    frames = make_frames(1, 9, 720, 1280)
    model.score(frames[:, :1], PROMPTS)
    whole_gradient, whole = plain_gradient(model, frames, PROMPTS)
    _, one = plain_gradient(model, frames[:, :2], PROMPTS)
    gradient, cut, _ = chunked_gradient(model, frames, PROMPTS, 2, outside=outside_of(model))
    assert 0 < cut <= 2 * one < whole
    assert float((gradient - whole_gradient).norm() / whole_gradient.norm()) < 1e-5


def test_faces_of_many_frames_keep_two_passes_at_most(monkeypatch, make_frames):
    """Faces need the whole video; its recogniser runs again in backward, a few faces at a time."""
    monkeypatch.setattr(face, "_FACES_PER_PASS", 2)
    landmarks = torch.tensor(arcface.TEMPLATE) / 112 * 24
    network = random_network(arcface.IResNet((1, 1, 1, 1), 32), 4)
    model = face.FaceReward(network, lambda frames: landmarks.expand(len(frames), -1, -1))
    frames = make_frames(1, 17, 26, 26)
    _, one = plain_gradient(model, frames[:, :2], [""])
    gradient, cut, _ = chunked_gradient(model, frames, [""], 2, outside=outside_of(model))
    assert 0 < cut <= 2 * one
    monkeypatch.setattr(face, "_FACES_PER_PASS", 17)
    whole_gradient, whole = plain_gradient(model, frames, [""])
    assert whole > 5 * one, "else the count would show nothing"
    assert float((gradient - whole_gradient).norm() / whole_gradient.norm()) < 1e-5


def test_a_mix_cuts_its_frame_rewards_although_a_measure_needs_the_whole_video(tiny_hps, make_frames):
    frames = make_frames(1, FRAMES)
    flicker = Measure("flicker")
    mixed = mix.MixReward([mix.Component(name="hps", model=tiny_hps), mix.Component(name="flicker", model=flicker)])
    tiny_hps.score(frames[:, :1], PROMPTS)
    leaf = frames.clone().requires_grad_()
    with LiveBytes(leaf) as measure:
        output = flicker.score(leaf, PROMPTS)
        torch.autograd.grad(output.per_video.sum(), leaf)
    _, one = plain_gradient(tiny_hps, frames[:, :CHUNK], PROMPTS)
    _, cut, _ = chunked_gradient(mixed, frames, PROMPTS, CHUNK, outside=outside_of(tiny_hps))
    # A component's own gradient and its copy of the frames are as large as the frames; the numbers of the outputs are small.
    assert cut <= max(2 * one, measure.peak) + 2 * frames.nbytes + one // 10

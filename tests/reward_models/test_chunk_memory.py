"""The gradient of 81 frames in chunks: what autograd keeps at once, counted tensor by tensor, and equality with the whole."""

from __future__ import annotations

import weakref

import pytest
import torch

from reward_lab.reward_models import base, mix
from reward_lab.reward_models.measures import Flicker

FRAMES, CHUNK = 81, 6


class SavedBytes:
    """Bytes of the tensors that autograd holds for backward, weights not counted: what they are now, and the most they were."""

    def __init__(self, *networks: torch.nn.Module):
        self._weights = {p.untyped_storage().data_ptr() for network in networks for p in (*network.parameters(), *network.buffers())}
        self.now = self.peak = 0
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda holder: holder.tensor)

    def _pack(self, tensor: torch.Tensor):
        holder = _Holder(tensor)
        if tensor.untyped_storage().data_ptr() not in self._weights:
            size = tensor.numel() * tensor.element_size()
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(holder, self._released, size)
        return holder

    def _released(self, size: int) -> None:
        self.now -= size

    def __enter__(self):
        self._hooks.__enter__()
        return self

    def __exit__(self, *exception):
        return self._hooks.__exit__(*exception)


class _Holder:
    def __init__(self, tensor: torch.Tensor):
        self.tensor = tensor


@pytest.fixture(params=["hps", "mps"])
def model(request, tiny_hps, tiny_mps):
    return {"hps": tiny_hps, "mps": tiny_mps}[request.param]


def test_chunked_gradient_of_81_frames_keeps_two_chunks_at_most_and_is_the_same(model, make_frames):
    frames, prompts = make_frames(1, FRAMES), ["a red square"]
    model.score(frames[:, :1], prompts)  # the text is encoded once and kept; it is no part of this
    with SavedBytes(model.network) as one:
        output = model.score(frames[:, :CHUNK].clone().requires_grad_(), prompts)
    del output
    with SavedBytes(model.network) as cut:
        _, gradient = base.reward_and_frame_gradient(model, frames, prompts, CHUNK)
    leaf = frames.clone().requires_grad_()
    with SavedBytes(model.network) as whole:
        reward = model.score(leaf, prompts).per_video.sum()
        reward.backward()
    assert one.peak > 0 and cut.peak <= 2 * one.peak
    assert whole.peak > 10 * one.peak, "else the count would show nothing"
    assert cut.now == 0
    assert float((gradient - leaf.grad).norm() / leaf.grad.norm()) < 1e-5


def test_a_mix_cuts_its_frame_rewards_although_a_measure_needs_the_whole_video(tiny_hps, make_frames):
    frames, prompts = make_frames(1, FRAMES), ["a red square"]
    mixed = mix.MixReward([mix.Component(name="hps", model=tiny_hps), mix.Component(name="flicker", model=Flicker())])
    tiny_hps.score(frames[:, :1], prompts)
    with SavedBytes(tiny_hps.network) as measure:
        Flicker().score(frames.clone().requires_grad_(), prompts)
    with SavedBytes(tiny_hps.network) as one:
        tiny_hps.score(frames[:, :CHUNK].clone().requires_grad_(), prompts)
    with SavedBytes(tiny_hps.network) as cut:
        base.reward_and_frame_gradient(mixed, frames, prompts, CHUNK)
    assert cut.peak <= max(2 * one.peak, 1.1 * measure.peak)

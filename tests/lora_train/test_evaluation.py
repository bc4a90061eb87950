"""Looks at held-out prompts and sample videos: what they are shown of start images."""

from __future__ import annotations

import pytest
import torch

from reward_lab.lora_train import needs, objectives, run

FIRST = torch.randn(16, 1, 2, 4, generator=torch.Generator().manual_seed(8))
PICTURE = {"text": "a", "image": "a.png"}


class Writer:
    """Takes sample videos."""

    def __init__(self):
        self.prompts = []

    def write(self, videos, prompts, step):
        self.prompts.append(list(prompts))
        return []


def test_looks_and_samples_are_told_of_start_images(toy, tmp_path):
    """Held-out curve, guards and sample strip of an image-to-video run would else be those of videos that begin with nothing."""
    held_out = {"every": 1, "prompts": [{"text": "b", "image": "b.png"}]}
    config = toy.config(prompts=[PICTURE], held_out=held_out, sample_every=1, sample_prompts=[{"text": "c", "image": "c.png"}], steps=1, batch=1)
    assert needs.start_images(config) == ["a.png", "b.png", "c.png"]
    frames = {path: FIRST + index for index, path in enumerate(needs.start_images(config))}
    parts = toy.parts(config, first_frames=frames, writer=Writer())
    seen = []
    for backbone in parts.experts.backbones.values():
        backbone.velocity = lambda x, sigma, text, known, plain=backbone.velocity: seen.append((x[:, :, :1], known)) or plain(x, sigma, text, known)
    run.train(config, parts, objectives.create(config, parts), tmp_path / "run")
    assert all(known_BF[:, 0].all() for _, known_BF in seen)
    for frame in frames.values():
        assert any(torch.equal(first[:1], frame[None]) for first, _ in seen)
    assert parts.writer.prompts == [["c"], ["c"]]


def test_samples_of_training_prompts_keep_their_images(toy):
    config = toy.config(prompts=[PICTURE], sample_every=1)
    assert needs.shown_prompts(config) == config.prompts
    config = toy.config(prompts=[PICTURE], held_out={"every": 0, "prompts": [{"text": "b", "image": "b.png"}]}, sample_every=1)
    assert needs.start_images(config) == ["a.png", "b.png"]


@pytest.mark.parametrize("name", ["held_out.prompts", "sample_prompts"])
def test_looks_without_the_images_that_training_has_are_refused(toy, name):
    changes = {"held_out": {"every": 1, "prompts": ["b"]}} if name == "held_out.prompts" else {"sample_prompts": ["b"]}
    with pytest.raises(ValueError, match=f"all prompts have start images, but some of {name} have none"):
        toy.config(prompts=[PICTURE], **changes)
    toy.config(prompts=[PICTURE, "mixed"], **changes)

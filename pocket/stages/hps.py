"""Trains the pocket HPSv2.1: an open_clip model that prefers the caption that fits a frame, and the clean frame to a spoiled one.

A frame shows colour, shape and background, never motion; captions that differ only in motion are therefore not used as
negatives of each other.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from .. import world
from ..fit import fit
from . import latents

FILE_NAME = "pocket_HPS_v2.1.safetensors"
CONFIG = {
    "embed_dim": 64,
    "vision_cfg": {"image_size": 64, "layers": 4, "width": 96, "head_width": 32, "patch_size": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}
BATCH = 48
_MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(1, 3, 1, 1)  # OpenAI CLIP's pixel statistics
_STD = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(1, 3, 1, 1)


def visible(scene: world.Scene) -> tuple:
    """What a single frame can tell about a scene."""
    return (tuple(sorted((thing.colour, thing.shape) for thing in scene.things)), scene.background)


def wrong_scene(scene: world.Scene, rng: random.Random) -> world.Scene:
    """The same scene with one visible property changed."""
    which, index = rng.choice(("colour", "colour", "shape", "background")), rng.randrange(len(scene.things))
    if which == "background":
        return world.Scene(things=scene.things, background=rng.choice([name for name in world.BACKGROUNDS if name != scene.background]))
    thing = scene.things[index]
    taken = {other.colour for other in scene.things} if which == "colour" else {thing.shape}
    value = rng.choice([name for name in (world.COLOURS if which == "colour" else world.SHAPES) if name not in taken])
    things = list(scene.things)
    things[index] = world.Thing(**{**thing.__dict__, which: value})
    return world.Scene(things=tuple(things), background=scene.background)


def frame_of(scene: world.Scene, rng: random.Random) -> np.ndarray:
    """One random frame [H, W, 3] of a scene."""
    return world.render(scene, only=[rng.randrange(world.FRAMES)])[0]


def as_decoded(vae: torch.nn.Module, frames_BCHW: torch.Tensor) -> torch.Tensor:
    """A frame after one way through the VAE, with some noise on its latent, as a generator's frames look."""
    clips = frames_BCHW.permute(0, 2, 3, 1)[:, None].numpy()
    latent = latents.encode(vae, clips)
    decoded = latents.decode(vae, latent + 0.15 * torch.randn_like(latent))[:, 0]
    return torch.from_numpy(decoded).permute(0, 3, 1, 2)


def spoil(frames_BCHW: torch.Tensor, rng: random.Random) -> torch.Tensor:
    """Blur, noise, fading, or a ghost of another frame: what people dislike in a frame."""
    out = []
    for frame in frames_BCHW:
        kind = rng.choice(("blur", "noise", "fade", "ghost"))
        if kind == "blur":
            small = F.interpolate(frame[None], scale_factor=rng.choice((0.125, 0.25)), mode="area")
            out.append(F.interpolate(small, size=frame.shape[-2:], mode="bilinear")[0])
        elif kind == "noise":
            coarse = torch.randn(1, 3, 16, 16) * rng.uniform(0.1, 0.3)
            out.append((frame + F.interpolate(coarse, size=frame.shape[-2:], mode="nearest")[0]).clamp(0, 1))
        elif kind == "fade":
            out.append(frame + rng.uniform(0.35, 0.7) * (frame.mean((1, 2), keepdim=True) - frame))
        else:
            other = frames_BCHW[rng.randrange(len(frames_BCHW))]
            out.append(0.6 * frame + 0.4 * other.roll((rng.randrange(-20, 20), rng.randrange(-20, 20)), (1, 2)))
    return torch.stack(out)


def normalised(frames_BCHW: torch.Tensor) -> torch.Tensor:
    return (frames_BCHW - _MEAN) / _STD


def training_frames(vae: torch.nn.Module, scenes: list[world.Scene], rng: random.Random) -> torch.Tensor:
    frames = torch.from_numpy(np.stack([frame_of(scene, rng) for scene in scenes])).permute(0, 3, 1, 2)
    half = len(scenes) // 2
    frames = torch.cat([frames[:half], as_decoded(vae, frames[half:])])
    return (frames + 0.02 * rng.random() * torch.randn_like(frames)).clamp(0, 1)


def build(weights: Path, scratch: Path, seed: int) -> None:
    torch.manual_seed(seed)
    clip = open_clip.CLIP(CONFIG["embed_dim"], CONFIG["vision_cfg"], CONFIG["text_cfg"])
    tokenize = open_clip.get_tokenizer("ViT-H-14")
    vae = latents.load_vae(weights)

    def loss_of(step: int, rng: random.Random) -> torch.Tensor:
        scenes = [world.sample_scene(rng, held_out=False) for _ in range(BATCH)]
        every = scenes + [wrong_scene(scene, rng) for scene in scenes]
        frames = training_frames(vae, scenes, rng)
        images = torch.cat([frames, spoil(frames[: BATCH // 2], rng)])
        with torch.autocast("cpu", torch.bfloat16):
            image_features = clip.encode_image(normalised(images))
            text_features = clip.encode_text(tokenize([world.caption(scene, rng) for scene in every]))
        cosine = F.normalize(image_features.float(), dim=-1) @ F.normalize(text_features.float(), dim=-1).T
        logits = clip.logit_scale.exp().clamp(max=100) * cosine
        seen = [visible(scene) for scene in every]
        is_same = torch.tensor([[a == b for b in seen] for a in seen[:BATCH]]) & ~torch.eye(BATCH, 2 * BATCH, dtype=torch.bool)
        target = torch.arange(BATCH)
        image_to_text = F.cross_entropy(logits[:BATCH].masked_fill(is_same, -1e4), target)
        text_to_image = logits[:, :BATCH].T.clone()  # rows: true captions, columns: clean then spoiled frames
        text_to_image[:, :BATCH] = text_to_image[:, :BATCH].masked_fill(is_same[:, :BATCH], -1e4)
        return image_to_text + F.cross_entropy(text_to_image, target)

    fit("hps", clip, loss_of, steps=600, peak_lr=1.5e-3, folder=scratch, seed=seed, warmup=100)
    tensors = {key: value.half().contiguous() for key, value in clip.state_dict().items() if key != "attn_mask"}
    save_file(tensors, weights / FILE_NAME, metadata={"format": "pt", "config": json.dumps(CONFIG)})

"""Random tiny models and pictures for the comparison with other people's code, the same on every machine and in every version of torch.

Numbers come from a hash of the tensor's name and not from a random generator, so that what the oracles answered once (`oracles.json`, made by
`record_oracles.py`) can be compared without them.
"""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np
import torch

PROMPTS = ["a red square moves left", "two dogs, oil painting"]
# In training, in the published evaluation, and one that masks a good part of what random models see.
THRESHOLDS = (0.01, 0.3, 0.8)
# Head widths, layers and sizes that differ from each other, so that a mix-up of any two shows.
CONFIGS: list[dict[str, Any]] = [
    {"embed": 8, "vision": (16, 2, 12, 6, 8), "text": (8, 2, 2)},
    {"embed": 12, "vision": (32, 1, 24, 8, 16), "text": (16, 4, 3)},
    {"embed": 24, "vision": (28, 3, 20, 10, 14), "text": (12, 3, 1)},
]
CROSS = {"layer_num": 2, "dim_head": 4, "heads": 3, "ff_mult": 2}
# imscore's preparation of HPSv2 is fixed to this size.
IMSCORE_PX = 224
POINTS = 12


def values(name: str, shape: tuple[int, ...], spread: float = 1.0, low: float | None = None) -> torch.Tensor:
    """Numbers that look random: even in [low, low + spread], or with mean 0 and deviation `spread`; float32 of exact multiples of 2^-24."""
    count = int(np.prod(shape, dtype=np.int64))
    state = (np.arange(count, dtype=np.uint64) + np.uint64(zlib.crc32(name.encode()))) * np.uint64(0x9E3779B97F4A7C15)
    # The mixing steps of splitmix64 (Steele et al. 2014, public domain): one bit of the counter changes half of the result's.
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    even = ((state ^ (state >> np.uint64(31))) >> np.uint64(40)).astype(np.float64) / (1 << 24)
    numbers = low + spread * even if low is not None else (even - 0.5) * (12**0.5 * spread)
    return torch.from_numpy(numbers.astype(np.float32)).reshape(shape)


def fill(state: dict[str, torch.Tensor], spread: float) -> dict[str, torch.Tensor]:
    """Weights of these names and shapes; tables that are no weights (position numbers, masks, rotary frequencies) are left out."""
    kept = {key: value for key, value in state.items() if value.is_floating_point() and not key.endswith(("inv_freq", "attn_mask"))}
    return {key: values(key, tuple(value.shape), spread) for key, value in kept.items()}


def open_clip_config(sizes: dict[str, Any]) -> dict[str, Any]:
    """Sizes in open_clip's form."""
    image, layers, width, head, patch = sizes["vision"]
    text_width, heads, text_layers = sizes["text"]
    return {
        "embed_dim": sizes["embed"],
        "vision_cfg": {"image_size": image, "layers": layers, "width": width, "head_width": head, "patch_size": patch},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": text_width, "heads": heads, "layers": text_layers},
    }


def imscore_config(sizes: dict[str, Any]) -> dict[str, Any]:
    """The same for pictures of the size that imscore prepares."""
    config = open_clip_config(sizes)
    return {**config, "vision_cfg": {**config["vision_cfg"], "image_size": IMSCORE_PX, "patch_size": 56}}


def hugging_face_config(sizes: dict[str, Any]) -> dict[str, Any]:
    """Sizes in Hugging Face's form, exact GELU."""
    image, layers, width, head, patch = sizes["vision"]
    text_width, heads, text_layers = sizes["text"]
    vision = {
        "image_size": image, "num_hidden_layers": layers, "hidden_size": width, "num_attention_heads": width // head, "patch_size": patch,
        "intermediate_size": 4 * width, "hidden_act": "gelu",
    }  # fmt: skip
    text = {
        "num_hidden_layers": text_layers, "hidden_size": text_width, "num_attention_heads": heads, "intermediate_size": 4 * text_width,
        "hidden_act": "gelu", "vocab_size": 49408, "eos_token_id": 2,
    }  # fmt: skip
    return {"text_config": text, "vision_config": vision, "projection_dim": sizes["embed"]}


def mps_config(sizes: dict[str, Any]) -> dict[str, Any]:
    """Sizes of an MPS with these towers."""
    return {**hugging_face_config(sizes), "cross_config": {"dim": sizes["embed"], **CROSS}}


def frames(videos: int, height_px: int, width_px: int) -> torch.Tensor:
    """Videos of one frame in [0,1]."""
    return values("frames", (videos, 1, 3, height_px, width_px), 1.0, low=0.0)


def prepared(size_px: int) -> torch.Tensor:
    """Two pictures as a tower reads them."""
    return values("prepared", (2, 3, size_px, size_px))


def digest(gradient: torch.Tensor) -> dict[str, Any]:
    """What is recorded of a gradient: its norm, and some of its values at places spread over it."""
    flat = gradient.detach().flatten()
    places = torch.linspace(0, len(flat) - 1, POINTS).long()
    return {"norm": float(flat.double().norm()), "points": flat[places].tolist()}

"""Loads reward models for the nodes, the command line and the trainer: what `RewardModelSpec.load` does, plus reference faces from pictures and videos.

Does not need ComfyUI. Does not: keep models (scoring.py does).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from ..reward_models.base import RewardModel, as_float
from ..reward_models.loader import mix_of
from ..reward_models.spec import RewardModelSpec
from . import media

# Pictures scored at once: 16 of 1280 x 720. Larger ones come in smaller chunks, so that an 8K frame fits as well.
_CHUNK_PIXELS = 16 * 1280 * 720
_CHUNK_FRAMES = 16


def load(spec: RewardModelSpec, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> RewardModel:
    """Load a reward model; those of a mix come through here too, each with its own reference.

    Raises:
        ValueError: see `loader.load_reward_model`; a reference picture cannot be read.
    """
    if spec.kind == "mix":
        return mix_of(spec.rows(), lambda reward: load(reward, device, dtype))
    reference = spec.options.get("reference") if spec.kind == "face" else None
    if not reference or str(reference).endswith(".safetensors"):
        return spec.load(device, dtype)
    options = {name: value for name, value in spec.options.items() if name != "reference"}
    model: Any = dataclasses.replace(spec, options=options).load(device, dtype)
    model.set_reference(torch.cat([as_float(clip.read()) for clip in media.find_clips([reference], is_one_video=True)]))
    return model


def frames_per_chunk(height_px: int, width_px: int) -> int:
    """How many frames of this size are scored together."""
    return max(1, min(_CHUNK_FRAMES, _CHUNK_PIXELS // max(1, height_px * width_px)))

"""What one update holds at once, read from the settings."""

from __future__ import annotations

import re
from pathlib import Path

from .. import needs
from ..config import TrainConfig
from ..lora.targets import select_targets
from ..safetensors_file import read_header
from .memory import Job
from .scoring import CLIP_BYTES, FRAMES_ON_CARD, VAE_ELEMENTS, Scored
from .shapes import ModelShape

_CHANNELS_5B = 48
# Blocks of the published PAVRM's trunk.
_PUBLISHED_TRUNK = 8
# Rewards of whole videos without a network.
_BLOCK = re.compile(r"(?:^|\.)blocks\.(\d+)\.")
_MEASURES = ("dynamic_degree", "flicker", "drift")


def job_of(config: TrainConfig, shape: ModelShape, *, reward_bytes: int | None = None) -> Job:
    """What one update holds at once.

    Args:
        reward_bytes: of reward model and VAE on the card; None takes those of published models.
    """
    _, _, frames, height, width = latent_shape(config, shape)
    chosen = select_targets(shape.linears, config.lora.targets, config.lora.skip)
    branches = 1 if guidance_of(config) == 1.0 else 2
    element_bytes = 4 if config.dtype == "fp32" else 2
    is_latent = config.method == "prfl"
    decodes = needs.decodes(config)
    if reward_bytes is None:
        judges = _judge_bytes(config, shape, element_bytes) + (CLIP_BYTES if config.held_out.judge else 0)
        reward_bytes = judges + (VAE_ELEMENTS * element_bytes if decodes else 0)
    return Job(
        shape=shape,
        tokens=frames * (height // 2) * (width // 2),
        videos=config.batch,
        rollout_batch=config.batch * branches,
        gradient_batch=config.batch * branches,
        graphs=graphs_of(config),
        element_bytes=element_bytes,
        rank=config.lora.rank,
        adapted=frozenset(path.removeprefix("blocks.0.") for path in chosen if path.startswith("blocks.0.")),
        adapted_outside=frozenset(chosen) & shape.outer_linears.keys(),
        lora_parameters=len(config.trained_experts) * config.lora.rank * sum(sum(shape.linears[path]) for path in chosen),
        experts=len(needs.experts(config)),
        has_average=config.optimiser.ema_decay > 0,
        scored=_scored(config, frames, element_bytes) if decodes else None,
        reward_bytes=reward_bytes,
        looks="whole" if needs.looks_at_videos(config) else "stream" if config.sample_every else "",
        judged_blocks=_trunk_blocks(config) if is_latent and not config.reward.options.get("generator") else 0,
    )


def _judge_bytes(config: TrainConfig, shape: ModelShape, element_bytes: int) -> int:
    """Weights of the reward that stay on the card: a CLIP; or a PAVRM's embeddings, its query attention and its head in fp32, without the trunk's blocks."""
    if config.method == "prfl":
        own = 0 if config.reward.options.get("generator") else shape.outer_parameters * element_bytes
        return own + 4 * shape.width * shape.width * 4
    return 0 if config.reward.kind in _MEASURES else CLIP_BYTES


def latent_shape(config: TrainConfig, shape: ModelShape) -> tuple[int, int, int, int, int]:
    """[B, C, F, H, W] of a latent; the Wan2.2 VAE (48 channels) has 16 x 16 pixels in one.

    Raises:
        ValueError: a size that the larger cells do not divide.
    """
    batch, _, frames, height, width = config.video.latent_shape(1)
    if shape.latent_channels != _CHANNELS_5B:
        return batch, shape.latent_channels, frames, height, width
    for name, size in (("width_px", config.video.width_px), ("height_px", config.video.height_px)):
        if size % 32:
            raise ValueError(f"video.{name} is {size}, but the 5B model needs a multiple of 32; use {max(32, round(size / 32) * 32)}")
    return batch, shape.latent_channels, frames, height // 2, width // 2


def guidance_of(config: TrainConfig) -> float:
    """The guidance scale of the method in training."""
    if config.method == "prfl":
        return config.prfl.guidance
    return config.reward_flow.guidance or config.sampling.guidance if config.method == "reward_flow" else config.sampling.guidance


def graphs_of(config: TrainConfig) -> int:
    """Passes with gradient whose kept tensors wait at once for their backward."""
    objective = config.objective
    if config.method == "reward_flow":
        return 1 if config.reward_flow.recompute else max(len(config.gradient_steps(expert)) for expert in config.trained_experts)
    if config.method == "prfl" or objective.mode != "chain":
        return 1
    return max(1, len(objective.step_list)) if objective.strategy == "list" else 1 if objective.strategy == "last" else objective.grad_steps


def _scored(config: TrainConfig, latent_frames: int, element_bytes: int) -> Scored:
    objective, video = config.objective, config.video
    count = latent_frames if objective.decode == "all" else min(latent_frames, objective.decode_count)
    # Where the decoded frames begin is drawn: the most that can come before them.
    before = 0 if objective.decode in ("first", "all") else latent_frames - count
    history = before if objective.decode_history < 0 else min(before, objective.decode_history)
    frames = 4 * count - 3 if count + history == latent_frames or objective.decode == "first" else 4 * count
    is_trained = needs.decodes_training_videos(config)
    return Scored(
        pixels=video.width_px * video.height_px,
        latents=count + history if is_trained else 0,
        frames=min(frames, objective.score_frames or frames, FRAMES_ON_CARD) if is_trained and config.reward.kind not in _MEASURES else 0,
        total_frames=video.frames,
        batch=config.batch,
        element_bytes=element_bytes,
    )


def _trunk_blocks(config: TrainConfig) -> int:
    path = Path(config.reward.path)
    if path.suffix != ".safetensors" or not path.is_file():
        return _PUBLISHED_TRUNK
    numbers = [_BLOCK.search(key) for key in read_header(str(path), "PAVRM").shapes]
    return max((int(number.group(1)) + 1 for number in numbers if number), default=_PUBLISHED_TRUNK)

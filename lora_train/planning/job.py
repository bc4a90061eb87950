"""What one update holds at once, read from the settings."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from .. import needs
from ..config import TrainConfig
from ..input_config import LATENTS, PATCH, RewardSource, Video
from ..lora.targets import select_targets
from ..safetensors_file import read_header
from .memory import Finished, Job
from .scoring import CLIP_BYTES, FRAMES_ON_CARD, VAES, Scored
from .shapes import ModelShape

# Blocks of the published PAVRM's trunk.
_PUBLISHED_TRUNK = 8
_BLOCK = re.compile(r"(?:^|\.)blocks\.(\d+)\.")
# Rewards of whole videos without a network.
_MEASURES = ("dynamic_degree", "flicker", "drift")


def job_of(config: TrainConfig, shape: ModelShape, *, reward_bytes: int | None = None) -> Job:
    """What one update holds at once.

    Args:
        reward_bytes: of reward model and VAE on the card; None takes those of published models.
    """
    video = video_of(config, shape)
    _, _, frames, height, width = video.latent_shape(1)
    chosen = select_targets(shape.linears, config.lora.targets, config.lora.skip)
    branches = _branches(guidance_of(config))
    element_bytes = 4 if config.dtype == "fp32" else 2
    pavrm = needs.pavrm(config)
    decodes = needs.decodes(config)
    if reward_bytes is None:
        judges = _judge_bytes(config, shape, element_bytes) + (CLIP_BYTES if config.held_out.judge else 0)
        reward_bytes = judges + (int(VAES[video.vae].elements * _vae_width(config, video.vae) ** 2) * element_bytes if decodes else 0)
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
        scored=_scored(config, video, element_bytes) if decodes else None,
        reward_bytes=reward_bytes,
        looks=_looks(config),
        clips=_made(config, video) if needs.replays(config) else _picked(config) if needs.picks(config) else None,
        judged_blocks=_trunk_blocks(pavrm) if needs.has_own_trunk(config) else 0,
    )


def _judge_bytes(config: TrainConfig, shape: ModelShape, element_bytes: int) -> int:
    """Weights of the reward that stay on the card: a CLIP; or a PAVRM's embeddings, its query attention and its head in fp32, without the trunk's blocks."""
    found = 4 * shape.width * shape.width * 4 if needs.pavrm(config) else 0
    found += shape.outer_parameters * element_bytes if needs.has_own_trunk(config) else 0
    return found if needs.scores_latents(config) else found + int(CLIP_BYTES * sum(_towers(asdict(config.reward))))


def _towers(reward: Mapping[str, Any]) -> list[float]:
    """Sizes of the CLIPs of a reward, or of the rewards of a mix, as shares of the published one; a file that is not there, or not safetensors, counts as 1."""
    rows = reward.get("options", {}).get("rows") or ()
    if reward.get("kind") == "mix":
        return [size for row in rows for size in _towers(row.get("reward", {}))]
    if reward.get("kind") in _MEASURES:
        return []
    path = Path(reward.get("path", ""))
    if path.suffix != ".safetensors" or not path.is_file():
        return [1.0]
    return [sum(math.prod(size) for size in read_header(str(path), "reward model").shapes.values()) / (CLIP_BYTES / 4)]


def video_of(config: TrainConfig, shape: ModelShape) -> Video:
    """The settings' video with the latents that the model makes: a plan may ask of settings what they would take with another model.

    Raises:
        ValueError: a size that the larger cells of the Wan2.2 VAE do not divide.
    """
    vae = _vae_of(shape)
    return config.video if vae == config.video.vae else replace(config.video, vae=vae)


def size_step(shape: ModelShape) -> int:
    """What width and height of a video must be multiples of: a latent's cell and two of them for a token."""
    return LATENTS[_vae_of(shape)].pixels * PATCH


def _vae_of(shape: ModelShape) -> str:
    return next(name for name, layout in LATENTS.items() if layout.channels == shape.latent_channels)


def guidance_of(config: TrainConfig) -> float:
    """The guidance scale of the method in training."""
    if config.method == "prfl":
        return config.prfl.guidance
    if config.method == "one_pass":
        return 1.0
    return config.reward_flow.guidance or config.sampling.guidance if config.method == "reward_flow" else config.sampling.guidance


def graphs_of(config: TrainConfig) -> int:
    """Passes with gradient whose kept tensors wait at once for their backward."""
    objective = config.objective
    if config.method == "reward_flow":
        return 1 if config.reward_flow.recompute else max(len(config.gradient_steps(expert)) for expert in config.trained_experts)
    if config.method in ("prfl", "one_pass") or objective.mode != "chain":
        return 1
    return max(1, len(objective.step_list)) if objective.strategy == "list" else 1 if objective.strategy == "last" else objective.grad_steps


def _scored(config: TrainConfig, video: Video, element_bytes: int) -> Scored:
    objective, latent_frames = config.objective, video.latent_shape(1)[2]
    count = latent_frames if objective.decode == "all" else min(latent_frames, objective.decode_count)
    # Where the decoded frames begin is drawn: the most that can come before them.
    before = 0 if objective.decode in ("first", "all") else latent_frames - count
    history = before if objective.decode_history < 0 else min(before, objective.decode_history)
    frames = 4 * count - 3 if before == 0 else 4 * count
    is_trained = needs.decodes_training_videos(config)
    return Scored(
        pixels=video.width_px * video.height_px,
        latents=count + history if is_trained else 0,
        frames=min(frames, objective.score_frames or frames, FRAMES_ON_CARD) if is_trained else 0,
        tower=max(_towers(asdict(config.reward)), default=0.0) if is_trained else 0.0,
        batch=config.batch,
        element_bytes=element_bytes,
        width=_vae_width(config, video.vae),
        vae=video.vae,
    )


def _looks(config: TrainConfig) -> Finished | None:
    """Samples and held-out videos; a PAVRM scores latents of held-out rollouts, at the guidance of training."""
    is_whole = needs.looks_at_videos(config)
    is_shown = is_whole or config.sample_every > 0
    if not is_shown and not config.held_out.every:
        return None
    scales = [config.sampling.guidance] if is_shown else []
    scales += [guidance_of(config)] if needs.scores_latents(config) and config.held_out.every else []
    # Held-out videos may be cut, samples are not.
    latents = config.video.latent_shape(1)[2]
    held_frames = 4 * min(config.held_out.latents or latents, latents) - 3 if is_whole else 0
    return Finished(
        videos=config.held_out.batch or config.batch, branches=max(map(_branches, scales)), held_frames=held_frames,
        frames=config.video.frames if config.sample_every else held_frames,
    )  # fmt: skip


def _made(config: TrainConfig, video: Video) -> Finished:
    """Clips that the base model makes, one at a time; where it makes several for a prompt they are scored (`replay.py`)."""
    is_scored = config.real.tries > 1 and needs.decodes_training_videos(config)
    return Finished(
        videos=1, branches=_branches(config.sampling.guidance), frames=video.frames if is_scored else 0, held_frames=video.frames if is_scored else 0,
        is_judged=config.real.tries > 1 and not is_scored, total=config.real.replay * config.real.tries,
        kept_bytes=config.real.replay * 4 * math.prod(video.latent_shape(1)),
    )  # fmt: skip


def _picked(config: TrainConfig) -> Finished:
    """Clips of `real.path`, each scored by all rewards of the run (`picking.py`)."""
    frames = config.video.frames if needs.decodes_training_videos(config) else 0
    return Finished(videos=1, branches=0, frames=frames, held_frames=frames, is_judged=True, total=_offered(Path(config.real.path)))


def _offered(path: Path) -> int:
    """How many clips a file of latents or a dataset holds; 0 where only a reader of their metas could tell."""
    if path.suffix == ".safetensors" and path.is_file():
        return read_header(str(path), "real latents").shapes.get("latents", (0,))[0]
    index = path / "dataset.json"
    return len(json.loads(index.read_text(encoding="utf-8")).get("videos", ())) if index.is_file() else 0


def _branches(guidance: float) -> int:
    return 1 if guidance == 1.0 else 2


def _vae_width(config: TrainConfig, vae: str) -> float:
    """Width of the VAE's decoder as a share of the published one; 1 where its file is not there, or is that of another model than is planned."""
    path = Path(config.models.vae if vae == config.video.vae else "")
    gain = read_header(str(path), "VAE").shapes.get("decoder.head.0.gamma") if path.suffix == ".safetensors" and path.is_file() else None
    return gain[0] / VAES[vae].width if gain else 1.0


def _trunk_blocks(pavrm: RewardSource) -> int:
    path = Path(pavrm.path)
    if path.suffix != ".safetensors" or not path.is_file():
        return _PUBLISHED_TRUNK
    numbers = [_BLOCK.search(key) for key in read_header(str(path), "PAVRM").shapes]
    return max((int(number.group(1)) + 1 for number in numbers if number), default=_PUBLISHED_TRUNK)

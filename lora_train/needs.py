"""Which models a run loads. A high-noise PRFL run needs one expert and no VAE. No torch."""

from __future__ import annotations

from .config import TrainConfig
from .flow import EXPERTS


def decodes_training_videos(config: TrainConfig) -> bool:
    """Whether training itself decodes and scores frames; PRFL scores latents."""
    return config.method != "prfl"


def looks_at_videos(config: TrainConfig) -> bool:
    """Whether looks at held-out prompts decode whole videos."""
    is_asked = config.guards.motion_floor > 0 or config.held_out.judge is not None
    return config.held_out.every > 0 and (decodes_training_videos(config) or is_asked)


def decodes(config: TrainConfig) -> bool:
    """Whether the VAE is loaded."""
    return decodes_training_videos(config) or looks_at_videos(config) or config.sample_every > 0 or bool(start_images(config))


def start_images(config: TrainConfig) -> list[str]:
    """Paths of all start images, each once."""
    return list(dict.fromkeys(prompt.image for prompt in config.prompts if prompt.image))


def experts(config: TrainConfig) -> tuple[str, ...]:
    """Experts to load: both, unless there is one model, or no video is finished and the trained one makes every step that is made."""
    if not config.models.has_experts:
        return ("high",)
    if decodes(config):
        return EXPERTS
    # From noise, the low-noise expert's steps come after the other's; looks always start there.
    is_rolled_out = config.objective.start == "noise" or config.held_out.every > 0
    return EXPERTS if is_rolled_out and config.trained_experts != ("high",) else config.trained_experts


def real_latents(config: TrainConfig) -> bool:
    """Whether real latents are read."""
    return config.objective.start == "real" or (config.method == "prfl" and config.prfl.real_weight > 0)

"""Which models a run loads. A high-noise PRFL run needs one expert and no VAE. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from .config import TrainConfig
from .flow import EXPERTS
from .input_config import Prompt, RewardSource

_SHOWN = 4


def scores_latents(config: TrainConfig) -> bool:
    """Whether the reward is a PAVRM: always in PRFL, and in one pass where one is given."""
    return config.method == "prfl" or (config.method == "one_pass" and config.reward.kind == "pavrm")


def pavrm(config: TrainConfig) -> RewardSource | None:
    """The PAVRM that training asks: the reward itself, or the one beside it."""
    return config.reward if scores_latents(config) else config.one_pass.pavrm if config.method == "one_pass" else None


def has_own_trunk(config: TrainConfig) -> bool:
    """Whether a PAVRM brings blocks of its own: a whole one, or one in LoRA form whose generator is no expert of the run."""
    found = pavrm(config)
    generator = found.options.get("generator") if found else None
    return found is not None and (not generator or expert_of(generator, {name: getattr(config.models, name) for name in experts(config)}) is None)


def expert_of(generator: str, files: Mapping[str, str]) -> str | None:
    """The expert whose file this is, by whatever path."""
    return next((expert for expert, path in files.items() if Path(path).resolve() == Path(generator).resolve()), None)


def decodes_training_videos(config: TrainConfig) -> bool:
    """Whether training itself decodes and scores frames."""
    return not scores_latents(config)


def looks_at_videos(config: TrainConfig) -> bool:
    """Whether looks at held-out prompts decode whole videos."""
    is_asked = config.guards.motion_floor > 0 or config.held_out.judge is not None
    return config.held_out.every > 0 and (decodes_training_videos(config) or is_asked)


def decodes(config: TrainConfig) -> bool:
    """Whether the VAE is loaded."""
    return decodes_training_videos(config) or looks_at_videos(config) or config.sample_every > 0 or bool(start_images(config))


def start_images(config: TrainConfig) -> list[str]:
    """Paths of all start images, each once."""
    looked_at = config.held_out.prompts if config.held_out.every else ()
    shown = shown_prompts(config) if config.sample_every else ()
    return list(dict.fromkeys(prompt.image for prompt in (*config.prompts, *looked_at, *shown) if prompt.image))


def shown_prompts(config: TrainConfig) -> tuple[Prompt, ...]:
    """The prompts of sample videos: those that are given, else the first held-out or training prompts."""
    return config.sample_prompts or config.held_out.prompts[:_SHOWN] or config.prompts[:_SHOWN]


def experts(config: TrainConfig) -> tuple[str, ...]:
    """Experts to load: both, unless there is one model, or no video is finished and the trained one makes every step that is made."""
    if not config.models.has_experts:
        return ("high",)
    is_finished = looks_at_videos(config) or config.sample_every > 0 or replays(config) or bool(start_images(config))
    if is_finished or (decodes_training_videos(config) and config.method != "one_pass"):
        return EXPERTS
    # From noise, the low-noise expert's steps come after the other's; looks always start there.
    is_rolled_out = not config.starts_from_clips or config.held_out.every > 0
    return EXPERTS if is_rolled_out and config.trained_experts != ("high",) else config.trained_experts


def real_latents(config: TrainConfig) -> bool:
    """Whether real latents are read."""
    return config.uses_clips and bool(config.real.path)


def picks(config: TrainConfig) -> bool:
    """Whether the rewards choose among real clips."""
    return real_latents(config) and config.real.keep < 1


def replays(config: TrainConfig) -> bool:
    """Whether the base model makes the clips."""
    return config.uses_clips and not config.real.path

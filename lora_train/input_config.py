"""What a run is made of: model files, reward, prompts, and the size of its videos; parts of `config.TrainConfig`. No torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

from .checks import choice, number, require, whole

# Equal to reward_models.spec.PATHLESS, which this layer may not import; a test compares them.
PATHLESS_REWARDS = ("dynamic_degree", "flicker", "drift", "mix")
COMPARING_REWARDS = ("dynamic_degree", "flicker", "drift")  # of one frame they are constant
PATCH = 2  # latents a side of what the transformer sees as one token


class LatentLayout(NamedTuple):
    """Channels of a VAE's latents, and pixels a side of one of them."""

    channels: int
    pixels: int


LATENTS = {"wan2.1": LatentLayout(16, 8), "wan2.2": LatentLayout(48, 16)}
# Input channels of an image-to-video model that say which frames are known, before those of the known frames' latents.
MASK_CHANNELS = 4


@dataclass(frozen=True, kw_only=True)
class ModelFiles:
    """Paths of the four model files. `low` is empty for a model without experts (Wan2.2 5B, Wan2.1): the one in `high` makes all steps."""

    high: str
    low: str
    text_encoder: str
    vae: str

    def __post_init__(self) -> None:
        for name in ("high", "text_encoder", "vae"):
            require(bool(getattr(self, name).strip()), f"models.{name} is empty; give the path of the file")

    @property
    def has_experts(self) -> bool:
        """Whether there are two experts."""
        return bool(self.low.strip())


@dataclass(frozen=True, kw_only=True)
class RewardSource:
    """Which reward model: kind, weights file (empty for `PATHLESS_REWARDS`), and options for its loader (`resize`, `antialias`, ..., a mix's `rows`)."""

    kind: str
    path: str = ""
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        require(bool(self.kind.strip()), "reward.kind is empty; give the kind of reward model, such as hpsv2.1")
        require(bool(self.path.strip()) or self.kind in PATHLESS_REWARDS, "reward.path is empty; give the path of the reward model's weights")


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A prompt and how often training draws it relative to the others; a plain text stands for one of weight 1. `image`: path of a start image, empty
    for none."""

    SHORT_FORM: ClassVar[str] = "text"
    text: str
    weight: float = 1.0
    image: str = ""

    def __post_init__(self) -> None:
        require(bool(self.text.strip()), "a prompt is empty; remove it or write something")
        number(f"weight of prompt {self.text[:40]!r}", self.weight, above=0)


@dataclass(frozen=True, kw_only=True)
class Video:
    """Size of the generated videos. `vae`: whose latents the model makes; `wan2.2` is that of the 5B model only, the 14B experts have `wan2.1`."""

    width_px: int
    height_px: int
    frames: int
    vae: str = "wan2.1"

    def __post_init__(self) -> None:
        choice("video.vae", self.vae, tuple(LATENTS))
        multiple = LATENTS[self.vae].pixels * PATCH
        for name in ("width_px", "height_px"):
            value = getattr(self, name)
            whole(f"video.{name}", value, multiple)
            nearest = max(multiple, round(value / multiple) * multiple)
            require(value % multiple == 0, f"video.{name} is {value}, but Wan needs a multiple of {multiple} with the {self.vae} VAE; use {nearest}")
        whole("video.frames", self.frames, 1)
        remedy = f"use {max(1, (self.frames - 1) // 4 * 4 + 1)} or {(self.frames - 1) // 4 * 4 + 5}"
        require(self.frames % 4 == 1, f"video.frames is {self.frames}, but Wan needs 4n+1 frames; {remedy}")

    @property
    def latent_channels(self) -> int:
        """Channels of the latents."""
        return LATENTS[self.vae].channels

    def latent_shape(self, batch: int) -> tuple[int, int, int, int, int]:
        """[B, C, F, H, W] of the latents of these videos; a latent frame after the first stands for 4 frames."""
        pixels = LATENTS[self.vae].pixels
        return (batch, self.latent_channels, (self.frames - 1) // 4 + 1, self.height_px // pixels, self.width_px // pixels)

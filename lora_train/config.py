"""The settings of a training run: frozen, checked when made, read from and written to JSON. No torch, so any process can read them.

`TrainConfig.from_dict` refuses unknown keys with the nearest known name. `{"preset": NAME, ...}` starts from a preset (see presets.py).
It checks values, not files: `host/preflight.py` looks at the disk.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from dataclasses import asdict, dataclass, field
from typing import Any

from .config_reader import build
from .flow import SCHEDULES, shifted_sigmas, steps_of_expert
from .presets import with_preset

STRATEGIES = ("last", "tail", "uniform", "random", "list")
MODES = ("chain", "x0")
DECODES = ("first", "last", "random", "all")
EXPERT_CHOICES = ("high", "low", "both")
METHODS = ("reward_backprop",)
DTYPES = ("auto", "fp32", "bf16")
SAVE_DTYPES = ("bf16", "fp16", "fp32")
# Equal to reward_models.spec.PATHLESS, which this layer may not import; a test compares them.
PATHLESS_REWARDS = ("dynamic_degree", "flicker", "drift", "mix")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _whole(name: str, value: int, least: int) -> None:
    _require(value >= least, f"{name} is {value}, but it must be a whole number of at least {least}")


def _number(name: str, value: float, *, above: float | None = None, least: float | None = None, most: float | None = None) -> None:
    _require(math.isfinite(value), f"{name} is {value}, but it must be a finite number")
    _require(above is None or value > above, f"{name} is {value}, but it must be greater than {above}")
    _require(least is None or value >= least, f"{name} is {value}, but it must be at least {least}")
    _require(most is None or value <= most, f"{name} is {value}, but it must be at most {most}")


def _choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    _require(value in allowed, f"{name} is {value!r}, but it must be one of: {', '.join(allowed)}")


@dataclass(frozen=True, kw_only=True)
class ModelFiles:
    """Paths of the four model files."""

    high: str
    low: str
    text_encoder: str
    vae: str

    def __post_init__(self) -> None:
        for name in ("high", "low", "text_encoder", "vae"):
            _require(bool(getattr(self, name).strip()), f"models.{name} is empty; give the path of the file")


@dataclass(frozen=True, kw_only=True)
class RewardSource:
    """Which reward model: kind, weights file (empty for `PATHLESS_REWARDS`), and options for its loader (`resize`, `antialias`, ..., a mix's `rows`)."""

    kind: str
    path: str = ""
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _require(bool(self.kind.strip()), "reward.kind is empty; give the kind of reward model, such as hpsv2.1")
        _require(bool(self.path.strip()) or self.kind in PATHLESS_REWARDS, "reward.path is empty; give the path of the reward model's weights")


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A prompt and how often it is drawn relative to the others."""

    text: str
    weight: float = 1.0

    def __post_init__(self) -> None:
        _require(bool(self.text.strip()), "a prompt is empty; remove it or write something")
        _number(f"weight of prompt {self.text[:40]!r}", self.weight, above=0)


@dataclass(frozen=True, kw_only=True)
class Video:
    """Size of the generated videos."""

    width_px: int
    height_px: int
    frames: int

    def __post_init__(self) -> None:
        for name in ("width_px", "height_px"):
            value = getattr(self, name)
            _whole(f"video.{name}", value, 16)
            nearest = max(16, round(value / 16) * 16)
            _require(value % 16 == 0, f"video.{name} is {value}, but Wan needs a multiple of 16; use {nearest}")
        _whole("video.frames", self.frames, 1)
        remedy = f"use {max(1, (self.frames - 1) // 4 * 4 + 1)} or {(self.frames - 1) // 4 * 4 + 5}"
        _require(self.frames % 4 == 1, f"video.frames is {self.frames}, but Wan needs 4n+1 frames; {remedy}")

    def latent_shape(self, batch: int, channels: int = 16) -> tuple[int, int, int, int, int]:
        """[B, C, F, H, W] of the latents of these videos (Wan2.1 VAE: 4 frames and 8 x 8 pixels a latent)."""
        return (batch, channels, (self.frames - 1) // 4 + 1, self.height_px // 8, self.width_px // 8)


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How videos are generated in training; use what the LoRA's users sample with."""

    steps: int = 20
    shift: float = 5.0
    boundary: float = 0.875
    guidance: float = 3.5
    negative_prompt: str = ""
    schedule: str = "simple"

    def __post_init__(self) -> None:
        _whole("sampling.steps", self.steps, 1)
        _number("sampling.shift", self.shift, above=0)
        _number("sampling.boundary", self.boundary, least=0, most=1)
        _number("sampling.guidance", self.guidance, least=0)
        _choice("sampling.schedule", self.schedule, SCHEDULES)

    def sigmas(self) -> list[float]:
        """The rollout's sigmas, from 1 to 0."""
        return shifted_sigmas(self.steps, self.shift, self.schedule)


@dataclass(frozen=True, kw_only=True)
class Objective:
    """What is decoded, which steps get gradient, and how the loss is made.

    mode: `chain` finishes the chain after the selected steps and decodes its end (DRaFT, VideoX-Fun; straight-through over frozen
        steps); `x0` decodes the clean latent that each selected step predicts: no rollout after it, gradient of one size at any sigma.
    strategy: which of the trained expert's steps are selected: last (its last one), tail (its last `grad_steps`), uniform (spread, from a
        random offset), random (distinct ones) or list (`step_list`).
    truncate: cut the gradient through a selected step's input (DRTune); only matters for mode `chain` with more than one step.
    decode, decode_count: which latent frames are decoded (consecutive; `random` draws the first of them anew each time).
    decode_history: how many earlier latent frames are decoded with them for context, since the VAE is causal; -1 takes all of them, which is
        exact; 1 is cheaper and close.
    score_frames: at most so many of the decoded frames, evenly spread, are scored; 0 scores all.
    kl_weight: weight of mean((v_lora - v_base)^2) / (2 sigma^2) over the selected steps; 0 skips the reference pass.
    reward_scale: loss = -reward_scale * reward + kl_weight * kl.
    """

    mode: str = "chain"
    strategy: str = "tail"
    grad_steps: int = 1
    step_list: tuple[int, ...] = ()
    truncate: bool = True
    decode: str = "first"
    decode_count: int = 1
    decode_history: int = -1
    score_frames: int = 0
    kl_weight: float = 0.0
    reward_scale: float = 1.0

    def __post_init__(self) -> None:
        _choice("objective.mode", self.mode, MODES)
        _choice("objective.strategy", self.strategy, STRATEGIES)
        _choice("objective.decode", self.decode, DECODES)
        _whole("objective.grad_steps", self.grad_steps, 1)
        _whole("objective.decode_count", self.decode_count, 1)
        _whole("objective.decode_history", self.decode_history, -1)
        _whole("objective.score_frames", self.score_frames, 0)
        _number("objective.kl_weight", self.kl_weight, least=0)
        _number("objective.reward_scale", self.reward_scale, above=0)
        is_list = self.strategy == "list"
        _require(bool(self.step_list) == is_list, "objective.step_list goes with strategy 'list': give both or neither")
        _require(len(set(self.step_list)) == len(self.step_list), f"objective.step_list {list(self.step_list)} names a step twice")


@dataclass(frozen=True, kw_only=True)
class Lora:
    """Shape of the adapter. alpha 0 means rank / 2, as the official reward LoRAs have it; the factor is alpha / rank.

    targets: keep only Linears whose path holds one of these (empty: all); skip: leave out those whose path holds one of these.
    """

    rank: int = 16
    alpha: float = 0.0
    targets: tuple[str, ...] = ()
    skip: tuple[str, ...] = ("ffn",)

    def __post_init__(self) -> None:
        _whole("lora.rank", self.rank, 1)
        _number("lora.alpha", self.alpha, least=0)

    @property
    def factor(self) -> float:
        """alpha / rank."""
        return self.effective_alpha / self.rank

    @property
    def effective_alpha(self) -> float:
        return self.alpha if self.alpha > 0 else self.rank / 2


@dataclass(frozen=True, kw_only=True)
class Optimiser:
    """AdamW on fp32 masters; `clip_norm` 0 leaves gradients as they are; `ema_decay` 0 saves the plain weights."""

    lr: float = 1e-4
    betas: tuple[float, ...] = (0.9, 0.999)
    weight_decay: float = 0.01
    eps: float = 1e-8
    clip_norm: float = 1.0
    warmup: int = 0
    accumulate: int = 1
    ema_decay: float = 0.0

    def __post_init__(self) -> None:
        _number("optimiser.lr", self.lr, above=0, most=1)
        _require(len(self.betas) == 2, f"optimiser.betas has {len(self.betas)} numbers, but AdamW takes 2")
        for beta in self.betas:
            _number("optimiser.betas", beta, least=0, most=0.999999)
        _number("optimiser.weight_decay", self.weight_decay, least=0)
        _number("optimiser.eps", self.eps, above=0)
        _number("optimiser.clip_norm", self.clip_norm, least=0)
        _whole("optimiser.warmup", self.warmup, 0)
        _whole("optimiser.accumulate", self.accumulate, 1)
        _number("optimiser.ema_decay", self.ema_decay, least=0, most=0.999999)


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """Prompts that are never trained on; scored every `every` steps with fixed seeds (0: never).

    latents: only so many latent frames from the start are decoded and scored; 0 takes the whole video.
    """

    every: int = 0
    prompts: tuple[str, ...] = ()
    seeds: int = 1
    batch: int = 0
    latents: int = 0

    def __post_init__(self) -> None:
        _whole("held_out.every", self.every, 0)
        _whole("held_out.latents", self.latents, 0)
        _whole("held_out.seeds", self.seeds, 1)
        _whole("held_out.batch", self.batch, 0)
        _require(all(text.strip() for text in self.prompts), "held_out.prompts holds an empty prompt; remove it")
        _require(self.every == 0 or bool(self.prompts), "held_out.every is set but held_out.prompts is empty; give prompts or set 0")


@dataclass(frozen=True, kw_only=True)
class Engine:
    """How the model is run in the memory at hand. The plan chooses what is left open (-1 or `auto`); none of it changes what is computed.

    resident_blocks, ffn_chunk_tokens, row_chunk_tokens, head_groups, slots, keep_place, keep_attention: see `offload/knobs.py`.
    optimiser_place: where masters and optimiser live, `device` or `host`.
    attention, kernels: see `kernels/attention.py` and `kernels/lora_linear/kernels.py`.
    card_gb, ram_gb: plan for a card and a host of this size; 0 takes those of the machine.
    self_check: compare one block with the plain path before the first step.
    """

    resident_blocks: int = -1
    slots: int = -1
    ffn_chunk_tokens: int = -1
    row_chunk_tokens: int = -1
    head_groups: int = -1
    keep_place: str = "auto"
    keep_attention: str = "auto"
    optimiser_place: str = "auto"
    attention: str = "auto"
    kernels: str = "auto"
    card_gb: float = 0.0
    ram_gb: float = 0.0
    self_check: bool = True

    def __post_init__(self) -> None:
        for name in ("resident_blocks", "slots", "ffn_chunk_tokens", "row_chunk_tokens", "head_groups"):
            _whole(f"engine.{name}", getattr(self, name), -1)
        for name in ("slots", "head_groups"):
            _require(getattr(self, name) != 0, f"engine.{name} is 0; it must be at least 1, or -1 for the plan's choice")
        _choice("engine.keep_place", self.keep_place, ("auto", "device", "host"))
        _choice("engine.keep_attention", self.keep_attention, ("auto", "yes", "no"))
        _choice("engine.optimiser_place", self.optimiser_place, ("auto", "device", "host"))
        _choice("engine.attention", self.attention, ("auto", "cudnn", "flash", "cpu", "plain"))
        _choice("engine.kernels", self.kernels, ("auto", "torch", "triton"))
        for name in ("card_gb", "ram_gb"):
            _number(f"engine.{name}", getattr(self, name), least=0)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A whole run. `output_folder`: where finished LoRAs are copied to besides the run folder (empty: nowhere)."""

    models: ModelFiles
    reward: RewardSource
    prompts: tuple[Prompt, ...]
    video: Video
    name: str = "my_reward_lora"
    method: str = "reward_backprop"
    expert: str = "high"
    sampling: Sampling = field(default_factory=Sampling)
    objective: Objective = field(default_factory=Objective)
    lora: Lora = field(default_factory=Lora)
    optimiser: Optimiser = field(default_factory=Optimiser)
    held_out: HeldOut = field(default_factory=HeldOut)
    steps: int = 100
    batch: int = 1
    seed: int = 0
    checkpoint_every: int = 50
    keep_checkpoints: int = 3
    sample_every: int = 0
    sample_prompts: tuple[str, ...] = ()
    frame_rate: float = 16.0
    output_folder: str = ""
    dtype: str = "auto"
    save_dtype: str = "bf16"
    engine: Engine = field(default_factory=Engine)

    def __post_init__(self) -> None:
        name_rule = "letters, digits, '.', '_' and '-', at most 100 of them, starting with a letter or a digit"
        _require(_NAME.fullmatch(self.name) is not None, f"name is {self.name!r}, but file names are made of it: use {name_rule}")
        _choice("method", self.method, METHODS)
        _choice("expert", self.expert, EXPERT_CHOICES)
        _choice("dtype", self.dtype, DTYPES)
        _choice("save_dtype", self.save_dtype, SAVE_DTYPES)
        _require(bool(self.prompts), "prompts is empty; training needs at least one prompt")
        for name, least in (("steps", 1), ("batch", 1), ("checkpoint_every", 0), ("keep_checkpoints", 1), ("sample_every", 0)):
            _whole(name, getattr(self, name), least)
        _require(0 <= self.seed < 2**63, f"seed is {self.seed}, but it must be from 0 to 2^63 - 1")
        _number("frame_rate", self.frame_rate, above=0)
        for expert in self.trained_experts:
            self._check_steps(expert)

    def _check_steps(self, expert: str) -> None:
        own = steps_of_expert(self.sampling.sigmas(), self.sampling.boundary, expert)
        facts = f"{self.sampling.steps} steps at shift {self.sampling.shift} and boundary {self.sampling.boundary}"
        _require(len(own) > 0, f"the {expert}-noise expert makes no step with {facts}; change these or train the other expert")
        if self.objective.strategy == "list":
            chosen = [step for step in self.objective.step_list if step in own]
            limit = f"{own[0]} to {own[-1]} with {facts}"
            if self.expert == "both":
                _require(bool(chosen), f"objective.step_list has no step of the {expert}-noise expert, whose steps are {limit}")
            else:
                wrong = sorted(set(self.objective.step_list) - set(own))
                _require(not wrong, f"objective.step_list holds {wrong}, but the {expert}-noise expert makes steps {limit}")
        elif self.objective.strategy != "last":
            count = self.objective.grad_steps
            _require(count <= len(own), f"objective.grad_steps is {count}, but the {expert}-noise expert makes {len(own)} steps with {facts}")

    @property
    def trained_experts(self) -> tuple[str, ...]:
        """The experts that get a LoRA, in the order of their first update."""
        return ("high", "low") if self.expert == "both" else (self.expert,)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainConfig:
        """Read settings; a `preset` key is expanded first.

        Raises:
            ValueError: an unknown key (with the nearest known one), a wrong type, or a value out of range.
        """
        return build(cls, with_preset(values), "")

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON values; `from_dict` of it gives an equal config."""
        return json.loads(json.dumps(asdict(self)))

    def digest(self) -> str:
        """Hash of everything that changes what is trained; a checkpoint of another digest is not resumed."""
        values = {key: value for key, value in self.to_dict().items() if key not in _FREE_TO_CHANGE}
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


# A resumed run may go on for longer, save more often or write elsewhere: none of these changes a step's numbers.
_FREE_TO_CHANGE = frozenset(
    {"steps", "checkpoint_every", "keep_checkpoints", "sample_every", "sample_prompts", "frame_rate", "output_folder", "held_out", "engine"}
)

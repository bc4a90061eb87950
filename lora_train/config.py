"""The settings of a training run: frozen, checked when made, read from and written to JSON. No torch, so any process can read them.

`TrainConfig.from_dict` refuses unknown keys with the nearest known name. `{"preset": NAME, ...}` starts from a preset (see presets.py).
It checks values, not files: `host/preflight.py` looks at the disk.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from typing import Any

from . import checks
from .checks import choice as _choice
from .checks import number as _number
from .checks import require as _require
from .checks import whole as _whole
from .config_reader import build
from .flow import SCHEDULES, shifted_sigmas, steps_of_expert
from .input_config import COMPARING_REWARDS, ModelFiles, Prompt, RewardSource, Video
from .method_config import Guards, OnePass, Optimiser, Prfl, Real, RewardFlow
from .presets import with_preset

STRATEGIES = ("last", "tail", "uniform", "random", "list")
MODES = ("chain", "x0")
DECODES = ("first", "last", "random", "all")
EXPERT_CHOICES = ("high", "low", "both")
METHODS = ("reward_backprop", "prfl", "reward_flow", "one_pass")
STARTS = ("noise", "real")
DTYPES = ("auto", "fp32", "bf16")
SAVE_DTYPES = ("bf16", "fp16", "fp32")


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
    rollout_steps: at most so many steps before the first one with gradient, in place of all of the schedule; 0 makes all.
    start: noise; or real, which noises a real latent (`real.path`) to the first step with gradient and rolls nothing out.
    kl_weight: weight of mean((v_lora - v_base)^2) / (2 max(sigma, 0.1)^2) over the selected steps; 0 skips the reference pass. The floor under sigma is
        ours: the last, almost noiseless step would count some hundred times as much as others.
    reward_scale: loss = -reward_scale * reward + kl_weight * kl.

    `rollout_steps`, `start`, `kl_weight` and `reward_scale` hold for all methods; what is decoded, for those that decode; the rest for
    reward_backprop.
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
    rollout_steps: int = 0
    start: str = "noise"
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
        _whole("objective.rollout_steps", self.rollout_steps, 0)
        _choice("objective.start", self.start, STARTS)
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
class HeldOut:
    """Prompts, with start images where training has them, that are never trained on; scored every `every` steps with fixed seeds (0: never).

    latents: only so many latent frames from the start are decoded and scored; 0 takes the whole video.
    judge: a second reward, which training never sees; its curve is reported and is what `guards.patience` watches.
    """

    every: int = 0
    prompts: tuple[Prompt, ...] = ()
    seeds: int = 1
    batch: int = 0
    latents: int = 0
    judge: RewardSource | None = None

    def __post_init__(self) -> None:
        _whole("held_out.every", self.every, 0)
        _whole("held_out.latents", self.latents, 0)
        _whole("held_out.seeds", self.seeds, 1)
        _whole("held_out.batch", self.batch, 0)
        _require(self.every == 0 or bool(self.prompts), "held_out.every is set but held_out.prompts is empty; give prompts or set 0")


@dataclass(frozen=True, kw_only=True)
class Engine:
    """How the model is run in the memory at hand. The plan chooses what is left open (-1 or `auto`); none of it changes what is computed.

    resident_blocks, ffn_chunk_tokens, row_chunk_tokens, head_groups, slots, keep_place, keep_attention, keep_feed_forward: see `offload/knobs.py`.
    optimiser_place: where masters and optimiser live, `device` or `host`.
    attention, rollout_attention, kernels: see `kernels/attention.py` and `kernels/lora_linear/kernels.py`.
    card_gb, ram_gb: plan for a card and a host of this size; 0 takes those of the machine.
    self_check: compare one block with the plain path before the first step.
    rehearse: run the largest step once before training and compare what it takes with the plan: `yes`, `no`, or `auto`: on a card.
    """

    resident_blocks: int = -1
    slots: int = -1
    ffn_chunk_tokens: int = -1
    row_chunk_tokens: int = -1
    head_groups: int = -1
    keep_place: str = "auto"
    keep_attention: str = "auto"
    keep_feed_forward: str = "auto"
    optimiser_place: str = "auto"
    attention: str = "auto"
    rollout_attention: str = "same"
    kernels: str = "auto"
    card_gb: float = 0.0
    ram_gb: float = 0.0
    self_check: bool = True
    rehearse: str = "auto"

    def __post_init__(self) -> None:
        for name in ("resident_blocks", "slots", "ffn_chunk_tokens", "row_chunk_tokens", "head_groups"):
            _whole(f"engine.{name}", getattr(self, name), -1)
        for name in ("slots", "head_groups"):
            _require(getattr(self, name) != 0, f"engine.{name} is 0; it must be at least 1, or -1 for the plan's choice")
        _choice("engine.keep_place", self.keep_place, ("auto", "device", "host"))
        for name in ("keep_attention", "keep_feed_forward"):
            _choice(f"engine.{name}", getattr(self, name), ("auto", "yes", "no"))
        _choice("engine.optimiser_place", self.optimiser_place, ("auto", "device", "host"))
        _choice("engine.rehearse", self.rehearse, ("auto", "yes", "no"))
        _choice("engine.attention", self.attention, ("auto", "fa3", "cudnn", "flash", "cpu", "plain"))
        _choice("engine.rollout_attention", self.rollout_attention, ("same", "sage"))
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
    prfl: Prfl = field(default_factory=Prfl)
    one_pass: OnePass = field(default_factory=OnePass)
    reward_flow: RewardFlow = field(default_factory=RewardFlow)
    real: Real = field(default_factory=Real)
    guards: Guards = field(default_factory=Guards)
    lora: Lora = field(default_factory=Lora)
    optimiser: Optimiser = field(default_factory=Optimiser)
    held_out: HeldOut = field(default_factory=HeldOut)
    steps: int = 100
    batch: int = 1
    seed: int = 0
    checkpoint_every: int = 50
    keep_checkpoints: int = 3
    sample_every: int = 0
    sample_prompts: tuple[Prompt, ...] = ()
    frame_rate: float = 16.0
    output_folder: str = ""
    dtype: str = "auto"
    save_dtype: str = "bf16"
    engine: Engine = field(default_factory=Engine)

    def __post_init__(self) -> None:
        checks.name(self.name)
        _choice("method", self.method, METHODS)
        _choice("expert", self.expert, EXPERT_CHOICES)
        _choice("dtype", self.dtype, DTYPES)
        _choice("save_dtype", self.save_dtype, SAVE_DTYPES)
        _require(bool(self.prompts), "prompts is empty; training needs at least one prompt")
        for name, least in (("steps", 1), ("batch", 1), ("checkpoint_every", 0), ("keep_checkpoints", 1), ("sample_every", 0)):
            _whole(name, getattr(self, name), least)
        _require(0 <= self.seed < 2**63, f"seed is {self.seed}, but it must be from 0 to 2^63 - 1")
        _number("frame_rate", self.frame_rate, above=0)
        if not self.models.has_experts:
            _require(self.expert == "high", f"expert is {self.expert!r}, but models.low is empty, so the model in models.high makes all steps: set expert high")
            _require(self.sampling.boundary == 0, f"sampling.boundary is {self.sampling.boundary}, but there is one model (models.low is empty): set 0")
        for expert in self.trained_experts:
            self._check_steps(expert)
        if self.method != "prfl" and self.reward.kind in COMPARING_REWARDS:
            self._check_scored_frames()
        is_told = bool(self.real.path) or self.real.replay > 0 or not self.uses_clips
        without = {"prfl": ", or set prfl.real_weight 0", "one_pass": ""}.get(self.method, ", or set objective.start noise")
        _require(is_told, f"real.path is empty; give real videos, or set real.replay to let the base model make so many{without}")
        with_image = sum(bool(prompt.image) for prompt in self.prompts) if self.starts_from_clips else 0
        remedy = "take them out, or use preset reward-lab-backprop with objective.start noise"
        _require(with_image == 0, f"{with_image} prompts have start images, which a run that starts from clips does not read; {remedy}")
        if all(prompt.image for prompt in self.prompts):
            for name, shown in (("held_out.prompts", self.held_out.prompts), ("sample_prompts", self.sample_prompts)):
                remedy = 'give them as {"text": ..., "image": ...}'
                _require(all(prompt.image for prompt in shown), f"all prompts have start images, but some of {name} have none; {remedy}")
        has_real = self.method == "prfl" and self.prfl.real_weight > 0 and "high" in self.trained_experts
        only_noise = "sampling.boundary is 1, so no noise level of real videos is the high-noise expert's; set prfl.real_weight 0"
        _require(not has_real or self.sampling.boundary < 1, only_noise)
        needs_looks = self.guards.needs_looks or self.held_out.judge is not None
        _require(bool(self.held_out.every) or not needs_looks, "guards and held_out.judge look at held-out videos; set held_out.every and held_out.prompts")
        never = f"held_out.every is {self.held_out.every}, but there are {self.steps} steps, so guards would never look; set it to {self.steps} or less"
        _require(not self.guards.needs_looks or self.held_out.every <= self.steps, never)

    def _check_scored_frames(self) -> None:
        objective, latents = self.objective, self.video.latent_shape(1)[2]
        has_one_latent = latents == 1 or (objective.decode in ("first", "random") and objective.decode_count == 1)
        _require(
            not has_one_latent and objective.score_frames != 1,
            f"the reward {self.reward.kind} compares frames, but only one may be scored with objective.decode {objective.decode!r}, decode_count "
            f"{objective.decode_count}, score_frames {objective.score_frames} and {self.video.frames} frames; use objective.decode \"all\"",
        )

    def _check_steps(self, expert: str) -> None:
        own = steps_of_expert(self.sampling.sigmas(), self.sampling.boundary, expert)
        facts = f"{self.sampling.steps} steps at shift {self.sampling.shift} and boundary {self.sampling.boundary}"
        _require(len(own) > 0, f"the {expert}-noise expert makes no step with {facts}; change these or train the other expert")
        eligible, limit = self.gradient_steps(expert), f"{own[0]} to {own[-1]} with {facts}"
        if self.method != "reward_backprop":
            name, remedy = f"{self.method}.first_step and last_step leave", "widen them"
            if self.method == "one_pass":
                name, remedy = "the PAVRM, which scores no clean latent, leaves", "take more steps"
            _require(len(eligible) > 0, f"{name} the {expert}-noise expert none of its steps, which are {limit}; {remedy}")
            count, setting = (self.prfl.points, "prfl.points") if self.method == "prfl" else (1, "steps")
        elif self.objective.strategy == "list":
            wrong = sorted(set(self.objective.step_list) - set(own))
            is_both = self.expert == "both" and len(wrong) < len(self.objective.step_list)
            _require(not wrong or is_both, f"objective.step_list holds {wrong}, but the {expert}-noise expert makes steps {limit}")
            return
        else:
            count, setting = 1 if self.objective.strategy == "last" else self.objective.grad_steps, "objective.grad_steps"
        _require(count <= len(eligible), f"{setting} is {count}, but the {expert}-noise expert makes {len(eligible)} steps with {facts}")

    def gradient_steps(self, expert: str) -> range:
        """The sampling steps of `expert` that may get gradient under this method."""
        own = steps_of_expert(self.sampling.sigmas(), self.sampling.boundary, expert)
        if self.method == "prfl":
            last = self.sampling.steps - 2 if self.prfl.last_step < 0 else self.prfl.last_step
            return range(max(own.start, self.prfl.first_step), min(own.stop, last + 1))
        if self.method == "one_pass" and self.reward.kind == "pavrm":
            return range(own.start, min(own.stop, self.sampling.steps - 1))  # the clean latent is never scored
        if self.method == "reward_flow":
            last = own.stop - 1 if self.reward_flow.last_step < 0 else min(own.stop - 1, self.reward_flow.last_step)
            first = last - 3 if self.reward_flow.first_step < 0 else self.reward_flow.first_step
            return range(max(own.start, first), last + 1)
        return own

    @property
    def starts_from_clips(self) -> bool:
        """Whether an update noises a clip, in place of rolling out from noise."""
        return self.objective.start == "real" or self.method == "one_pass"

    @property
    def remembers_looks(self) -> bool:
        """Whether the LoRA of the best look is kept, for a guard to go back to."""
        return self.guards.needs_looks or (self.guards.kl_budget > 0 and self.held_out.every > 0)

    @property
    def uses_clips(self) -> bool:
        """Whether clips are needed, real ones or replayed."""
        return self.starts_from_clips or (self.method == "prfl" and self.prfl.real_weight > 0)

    @property
    def trained_experts(self) -> tuple[str, ...]:
        """The experts that get a LoRA, in the order of their first update."""
        return ("high", "low") if self.expert == "both" else (self.expert,)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainConfig:
        """Read settings; a `preset` key is expanded first, and without a low-noise expert the boundary is 0 unless it is given.

        Raises:
            ValueError: an unknown key (with the nearest known one), a wrong type, or a value out of range.
        """
        merged, models = with_preset(values), values.get("models") if isinstance(values, dict) else None
        if isinstance(models, dict) and models.get("low") == "" and "boundary" not in (values.get("sampling") or {}):
            merged["sampling"] = {**(merged.get("sampling") or {}), "boundary": 0.0}
        return build(cls, merged, "")

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON values; `from_dict` of it gives an equal config."""
        return json.loads(json.dumps(asdict(self)))

    def digest(self) -> str:
        """Hash of everything that changes what is trained; a checkpoint of another digest is not resumed."""
        # A falling learning rate depends on the number of updates, and guards on what they look at.
        kept = {"steps"} if self.optimiser.schedule != "constant" else set()
        kept |= {"held_out"} if self.remembers_looks else set()
        values = {key: value for key, value in self.to_dict().items() if key not in _FREE_TO_CHANGE - kept}
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


# A resumed run may go on for longer, save more often or write elsewhere: none of these changes a step's numbers.
_FREE_TO_CHANGE = frozenset(
    {"steps", "checkpoint_every", "keep_checkpoints", "sample_every", "sample_prompts", "frame_rate", "output_folder", "held_out", "engine"}
)

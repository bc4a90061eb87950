"""Settings of single methods, of the guards against reward hacking and of the optimiser; parts of `config.TrainConfig`. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from .checks import choice, number, require, whole
from .input_config import RewardSource

SOLVERS = ("euler", "unipc")
PRFL_LOSSES = ("hinge", "logit")
OPTIMISERS = ("adamw", "adamw8bit", "adafactor", "muon")
LR_SCHEDULES = ("constant", "cosine", "linear")
_TIMESTEPS = 1000
# Without it, 943.9999, as a product of floats comes out, would be cut to 943 where 944 is meant.
_ROUNDING = 1e-6


@dataclass(frozen=True, kw_only=True)
class Prfl:
    """Process reward feedback learning: one gradient step inside the rollout, a PAVRM scores the noisy latent after it.

    solver: of rollout and gradient step; unipc is the published one (order 2, bh2, corrector).
    first_step, last_step: the gradient step is drawn from the trained expert's steps within these; -1 for the last: the last but one of the
        schedule, so that the clean latent is never scored, as published.
    points: so many gradient steps on one trajectory, each with its own backward and no gradient between them.
    guidance: in rollout and gradient step; 1 runs no negative prompt.
    loss: hinge: relu(hinge_limit - probability), the published form, whose gradient dies where the PAVRM is sure; logit: minus the logit.
    even_gradient: divide each step's gradient by its solver's |dx_next / dv|, which varies 37 times over the published schedule; the mean stays.
    whole_timesteps: tell the models whole timesteps (sigma x 1000, cut), as published; off, the exact sigma.
    null_rate: share of prompts replaced by the empty one, in reward and flow-matching steps.
    real_weight: weight of the flow-matching loss on real latents (`real.path`); 0 needs none.
    """

    solver: str = "unipc"
    first_step: int = 0
    last_step: int = -1
    points: int = 1
    guidance: float = 1.0
    loss: str = "logit"
    hinge_limit: float = 2.0
    even_gradient: bool = True
    whole_timesteps: bool = True
    null_rate: float = 0.0
    real_weight: float = 0.0

    def __post_init__(self) -> None:
        choice("prfl.solver", self.solver, SOLVERS)
        choice("prfl.loss", self.loss, PRFL_LOSSES)
        whole("prfl.first_step", self.first_step, 0)
        whole("prfl.last_step", self.last_step, -1)
        whole("prfl.points", self.points, 1)
        number("prfl.guidance", self.guidance, least=0)
        number("prfl.hinge_limit", self.hinge_limit, above=0)
        number("prfl.null_rate", self.null_rate, least=0, most=1)
        number("prfl.real_weight", self.real_weight, least=0)

    def told(self, sigma: float) -> float:
        """The sigma that generator and PAVRM are told."""
        return int(sigma * _TIMESTEPS + _ROUNDING) / _TIMESTEPS if self.whole_timesteps else sigma


@dataclass(frozen=True, kw_only=True)
class OnePass:
    """One pass: a clip (`real`) is noised, and one velocity with gradient serves flow matching and the reward; nothing is rolled out.

    flow_weight: weight of the flow-matching loss on the clips. objective.reward_scale weighs the reward: of the decoded prediction, or, where
        `reward` is a PAVRM, its logit for the next latent.
    null_rate: share of prompts replaced by the empty one, which only flow matching then learns from; keeps guidance in shape.
    pavrm: a PAVRM beside an image reward, on the same velocity; pavrm_scale: weight of its logit.
    """

    flow_weight: float = 1.0
    null_rate: float = 0.1
    pavrm: RewardSource | None = None
    pavrm_scale: float = 0.3

    def __post_init__(self) -> None:
        number("one_pass.flow_weight", self.flow_weight, least=0)
        number("one_pass.null_rate", self.null_rate, least=0, most=1)
        number("one_pass.pavrm_scale", self.pavrm_scale, above=0)
        is_pavrm = self.pavrm is None or self.pavrm.kind == "pavrm"
        require(is_pavrm, f"one_pass.pavrm is a {self.pavrm and self.pavrm.kind}, but latents are scored by a pavrm; give other rewards as `reward`")


@dataclass(frozen=True, kw_only=True)
class RewardFlow:
    """Reward flow: gradient through several steps in a row, back-propagated through time, with a KL to the base at each.

    first_step, last_step: the steps with gradient; -1: the trained expert's last step, and three before it. Where `last_step` is not the
        schedule's last one, its prediction of the clean latent is decoded.
    guidance: in training; 0 takes sampling.guidance.
    measure_videos: the reward of so many videos of the base model is measured before the first update; their mean and deviation become
        `centre` and `scale`. 0 takes these as they are given.
    reward_clip: videos whose centred and scaled reward is above this push no further; 0 leaves it out.
    fixed_noise: every update starts from the same noise (ROLL's fixed seed).
    recompute: run each gradient step again in backward, so that memory does not grow with their number; the same numbers, one more forward each.
    """

    first_step: int = -1
    last_step: int = -1
    guidance: float = 0.0
    measure_videos: int = 16
    centre: float = 0.0
    scale: float = 1.0
    reward_clip: float = 0.0
    fixed_noise: bool = False
    recompute: bool = True

    def __post_init__(self) -> None:
        whole("reward_flow.first_step", self.first_step, -1)
        whole("reward_flow.last_step", self.last_step, -1)
        number("reward_flow.guidance", self.guidance, least=0)
        whole("reward_flow.measure_videos", self.measure_videos, 0)
        require(self.measure_videos != 1, "reward_flow.measure_videos is 1, but a deviation needs at least 2; use 16, or 0 and give centre and scale")
        number("reward_flow.centre", self.centre)
        number("reward_flow.scale", self.scale, above=0)
        number("reward_flow.reward_clip", self.reward_clip, least=0)


@dataclass(frozen=True, kw_only=True)
class Real:
    """Clips as latents, to learn from and to start from.

    path: a dataset (the folder that Video Dataset makes, or HY-Video-PRFL's list of metas), or a `.safetensors` file with `latents`
        [N, C, F, H, W] in model space and, in its metadata, `prompts`, a JSON list of N.
    keep: share of the clips in `path` that the run learns from, those that its rewards like best with their captions; 1 takes all, unseen.
    replay: without a path, the base model makes so many clips of the prompts before the first update.
    tries: videos that it makes for each of them; the one that the run's rewards like best is kept.
    """

    path: str = ""
    keep: float = 1.0
    replay: int = 0
    tries: int = 1

    def __post_init__(self) -> None:
        number("real.keep", self.keep, above=0, most=1)
        whole("real.replay", self.replay, 0)
        whole("real.tries", self.tries, 1)


@dataclass(frozen=True, kw_only=True)
class Guards:
    """What ends a run before its reward is pleased at the videos' cost. 0 switches a guard off. Need `held_out.every`, except the first.

    kl_budget: ends when the mean KL to the base over the last `kl_window` updates is above it.
    motion_floor: ends when the held-out videos' dynamic degree falls below so many times that of the base.
    patience: ends after so many looks in a row without a better held-out curve (that of `held_out.judge`, where one is given).
    keep_best: the finished LoRA is that of the best look, also of a run that no guard ended; one that a guard ended always is, once there was a look.
    """

    kl_budget: float = 0.0
    kl_window: int = 10
    motion_floor: float = 0.0
    patience: int = 0
    keep_best: bool = False

    def __post_init__(self) -> None:
        number("guards.kl_budget", self.kl_budget, least=0)
        whole("guards.kl_window", self.kl_window, 1)
        number("guards.motion_floor", self.motion_floor, least=0, most=1)
        whole("guards.patience", self.patience, 0)

    @property
    def needs_looks(self) -> bool:
        """Whether the held-out prompts must be looked at."""
        return self.motion_floor > 0 or self.patience > 0 or self.keep_best


@dataclass(frozen=True, kw_only=True)
class Updates:
    """How gradients move fp32 weights; what the training of LoRAs and of PAVRMs share.

    kind: adamw; adamw8bit (needs the package bitsandbytes); adafactor and muon are torch's.
    schedule: of the learning rate after a linear warm-up of `warmup` updates: constant, or falling by cosine or line to `final_lr` x lr at the last update.
    clip_norm: 0 leaves gradients as they are. accumulate: micro-batches per update. ema_decay: 0 saves the plain weights.
    """

    kind: str = "adamw"
    schedule: str = "constant"
    final_lr: float = 0.0
    betas: tuple[float, ...] = (0.9, 0.999)
    weight_decay: float = 0.01
    eps: float = 1e-8
    clip_norm: float = 1.0
    warmup: int = 0
    accumulate: int = 1
    ema_decay: float = 0.0

    def __post_init__(self) -> None:
        choice("optimiser.kind", self.kind, OPTIMISERS)
        choice("optimiser.schedule", self.schedule, LR_SCHEDULES)
        number("optimiser.final_lr", self.final_lr, least=0, most=1)
        require(len(self.betas) == 2, f"optimiser.betas has {len(self.betas)} numbers, but AdamW takes 2")
        for beta in self.betas:
            number("optimiser.betas", beta, least=0, most=0.999999)
        number("optimiser.weight_decay", self.weight_decay, least=0)
        number("optimiser.eps", self.eps, above=0)
        number("optimiser.clip_norm", self.clip_norm, least=0)
        whole("optimiser.warmup", self.warmup, 0)
        whole("optimiser.accumulate", self.accumulate, 1)
        number("optimiser.ema_decay", self.ema_decay, least=0, most=0.999999)


@dataclass(frozen=True, kw_only=True)
class Optimiser(Updates):
    """Updates of LoRAs, at one learning rate."""

    lr: float = 1e-4

    def __post_init__(self) -> None:
        super().__post_init__()
        number("optimiser.lr", self.lr, above=0, most=1)

"""What `lab.py bench learning` runs: the presets at pocket size, and the single questions.

A preset keeps what makes it that method (which steps, which latents, which loss, which LoRA shape); resolution, number of sampling steps, guidance and the
learning rate are those of the pocket models, the same for all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..lora_train.presets import PRESETS
from . import world
from .quality import held_out_scenes
from .stages import dit, hps, mps, pavrm, text, vae

BASE = "base"
RENDERED = "rendered"  # the truth: no model
OURS, CONTROL = "reward-lab", "real-clips-one-pass"
REPLAYED = ("reward-lab-replayed", "replayed-clips-only")
# The same with a PAVRM beside the image reward.
REPLAYED_BOTH = ("reward-lab-replayed-both", "replayed-both-clips-only")
PICKED = "reward-lab-picked"
# On clips with captions that lie: the picked third, the same without the rewards' gradient, all clips with it, all clips alone, the published preset.
MISLABELLED = ("mislabelled-reward-lab-picked", "mislabelled-picked-only", "mislabelled-reward-lab", "mislabelled-clips-only", "mislabelled-hy-video-prfl")
SEEDS = (0, 1, 2)
BUDGET = 4500.0
LOOK_PROMPTS = 16
_REWARDS = {"hpsv2.1": hps.FILE_NAME, "mps": mps.FILE_NAME, "pavrm": pavrm.FILE_NAME}


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """One training. `looks`: updates whose checkpoints are judged as well. `seeds`: None takes those of the comparison. `mislabelled`: its clips are."""

    preset: str
    reward: str = "hpsv2.1"
    budget: float = BUDGET
    changes: dict[str, Any] = field(default_factory=dict)
    looks: Sequence[int] = ()
    seeds: tuple[int, ...] | None = None
    mislabelled: bool = False


# At pocket size; the same for all: sizes, sampling of the users, learning rate of the pocket preset (tuned for reward_backprop's `chain` form).
_POCKET = {
    "video": PRESETS["pocket"]["video"],
    "sampling": {"steps": 12, "shift": dit.SHIFT, "boundary": dit.BOUNDARY, "guidance": 3.0},
    "lora": {"rank": 16, "alpha": 8.0},
    "optimiser": {"lr": 2e-3, "warmup": 5, "accumulate": 1},
    "batch": 4,
    "steps": 10_000,
    "checkpoint_every": 0,
    "save_dtype": "fp32",
}
_FIRST_SEED = (0,)
# The published presets' clips and PAVRM, and their image reward.
_BESIDE = {"pavrm": {"kind": "pavrm"}}
_OURS = {"expert": "high", "one_pass": _BESIDE}
_QUARTER = 94  # updates of 12 forwards: a quarter of the budget; 36 of hy-video-prfl's cost about as much
# A reward of no weight; where that is a PAVRM, nothing is decoded for it. And a PAVRM beside it that only picks.
_NO_REWARD = {"reward_scale": 1e-12}
_SILENT = {**_BESIDE, "pavrm_scale": 1e-12}
_PICKED = {"real": {"keep": 0.33}}
_REPLAYED = {"expert": "high", "real": {"path": "", "replay": 32, "tries": 2}}
EXPERIMENTS: dict[str, Experiment] = {
    OURS: Experiment(preset="reward-lab", changes={**_OURS, "checkpoint_every": _QUARTER, "keep_checkpoints": 10}, looks=(_QUARTER,)),
    # What the clips alone teach: the same updates without a reward.
    CONTROL: Experiment(preset="reward-lab", reward="pavrm", changes={"expert": "high", "objective": _NO_REWARD}),
    "hy-video-prfl": Experiment(
        preset="hy-video-prfl", reward="pavrm", changes={"expert": "high", "checkpoint_every": 36, "keep_checkpoints": 10}, looks=(36, 72)
    ),
    "videox-fun-high": Experiment(preset="videox-fun", changes={"expert": "high"}),
    # A reward of the first frame alone, for longer: what becomes of motion.
    "videox-fun-high-3x": Experiment(preset="videox-fun", budget=3 * BUDGET, changes={"expert": "high"}),
    # Without real clips: the base model makes 32 and the reward picks them out of 64.
    REPLAYED[0]: Experiment(preset="reward-lab", changes=_REPLAYED),
    # What imitating these alone teaches: picked by the reward, but without its gradient.
    REPLAYED[1]: Experiment(preset="reward-lab", changes={**_REPLAYED, "objective": _NO_REWARD}),
    REPLAYED_BOTH[0]: Experiment(preset="reward-lab", changes={**_REPLAYED, "one_pass": _BESIDE}),
    REPLAYED_BOTH[1]: Experiment(preset="reward-lab", changes={**_REPLAYED, "one_pass": _SILENT, "objective": _NO_REWARD}),
    # The third of the clips that both rewards like best.
    PICKED: Experiment(preset="reward-lab", changes={**_OURS, **_PICKED, "checkpoint_every": _QUARTER, "keep_checkpoints": 10}, looks=(_QUARTER,)),
    # Clips with captions that lie as often as those that spoiled the base: here the clips alone cannot repair it.
    MISLABELLED[0]: Experiment(preset="reward-lab", changes={**_OURS, **_PICKED}, mislabelled=True),
    MISLABELLED[1]: Experiment(preset="reward-lab", changes={"expert": "high", **_PICKED, "one_pass": _SILENT, "objective": _NO_REWARD}, mislabelled=True),
    MISLABELLED[2]: Experiment(preset="reward-lab", changes=_OURS, mislabelled=True),
    MISLABELLED[3]: Experiment(preset="reward-lab", reward="pavrm", changes={"expert": "high", "objective": _NO_REWARD}, mislabelled=True),
    MISLABELLED[4]: Experiment(preset="hy-video-prfl", reward="pavrm", changes={"expert": "high"}, mislabelled=True),
    # PRFL without real videos, on the logit and with every step's gradient of one size: what the PAVRM alone does.
    "prfl-logit": Experiment(
        preset="hy-video-prfl",
        reward="pavrm",
        changes={"expert": "high", "objective": {"kl_weight": 0.1}, "prfl": {"loss": "logit", "even_gradient": True, "real_weight": 0.0, "null_rate": 0.0}},
    ),
    # And hy-video-prfl's runs with a reward of no weight.
    "real-clips-only": Experiment(preset="hy-video-prfl", reward="pavrm", changes={"expert": "high", "objective": _NO_REWARD}, seeds=_FIRST_SEED),
    "reward-lab-backprop": Experiment(preset="reward-lab-backprop", changes={"expert": "low"}),
    "roll-reward-flow": Experiment(preset="roll-reward-flow", changes={"expert": "low", "sampling": {"steps": 8}}),
    "videox-fun-low": Experiment(preset="videox-fun", changes={"expert": "low"}),
    # Whether they converge is seen in the held-out reward and in the MPS of the judged videos.
    "mps-low-reward-lab": Experiment(
        preset="reward-lab", reward="mps", changes={"expert": "low", "objective": {"reward_scale": 0.1}, "held_out": {"every": 75}}
    ),
    "mps-low-reward-lab-backprop": Experiment(
        preset="reward-lab-backprop", reward="mps", changes={"expert": "low", "objective": {"reward_scale": 0.02}, "held_out": {"every": 18}}
    ),
    "mps-low-videox-fun": Experiment(
        preset="videox-fun", reward="mps", changes={"expert": "low", "objective": {"reward_scale": 0.02}, "held_out": {"every": 10}}
    ),
    "guarded-5x": Experiment(
        preset="reward-lab",
        budget=5 * BUDGET,
        changes={
            "expert": "high",
            "held_out": {"every": 94, "judge": {"kind": "mps"}},
            "guards": {"motion_floor": 0.9, "patience": 4, "kl_budget": 1.0},
            "checkpoint_every": 188,
            "keep_checkpoints": 100,
        },
        looks=range(188, 2000, 188),
    ),
}


def reward(weights: Path, kind: str) -> dict[str, Any]:
    """A pocket reward model."""
    return {"kind": kind, "path": str(weights / _REWARDS[kind])}


def settings(experiment: Experiment, weights: Path, seed: int, prompts: Sequence[str], real: Path) -> dict[str, Any]:
    """The settings of a run, for `TrainConfig.from_dict`."""
    looked = [world.caption(scene) for scene in held_out_scenes(LOOK_PROMPTS, 60_000 + seed, two_share=0.0)]
    values = {
        "preset": experiment.preset,
        "name": "learning",
        "models": {
            **{side: str(weights / name) for side, name in dit.FILE_NAMES.items()},
            "text_encoder": str(weights / text.FILE_NAME),
            "vae": str(weights / vae.FILE_NAME),
        },
        "reward": reward(weights, experiment.reward),
        "prompts": [{"text": prompt} for prompt in prompts],
        "held_out": {"every": 0, "prompts": looked},
        "real": {"path": str(real)},
        "seed": seed,
    }
    for part in (_POCKET, experiment.changes):
        values = _laid_over(values, part)
    for section, key in (("held_out", "judge"), ("one_pass", "pavrm")):
        if key in values.get(section, {}):
            values[section][key] = reward(weights, values[section][key]["kind"])
    return values


def _laid_over(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(under)
    for key, value in over.items():
        merged[key] = _laid_over(merged[key], value) if isinstance(value, dict) and isinstance(merged.get(key), dict) else value
    return merged


def plan(seeds: Sequence[int], only: Sequence[str] | None = None) -> list[tuple[str, int]]:
    """(experiment, seed) in the order in which they run; the base first, then seed by seed, so that a part is a comparison already."""
    known = [BASE, RENDERED, *EXPERIMENTS]
    names = list(only) if only else known
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"unknown experiments {', '.join(unknown)}; known: {', '.join(known)}")
    return [(name, seed) for seed in seeds for name in names if name not in EXPERIMENTS or EXPERIMENTS[name].seeds is None or seed in EXPERIMENTS[name].seeds]

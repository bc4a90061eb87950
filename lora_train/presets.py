"""Named starting points. A preset is a plain dictionary of settings; what the user gives wins over it, key by key.

`videox-fun` follows the shipped recipe of VideoX-Fun (aigc-apps/VideoX-Fun@804a4258:scripts/wan2.2_fun/train_reward_lora.sh, Apache-2.0):
40 steps on diffusers' grid, one tail step through the finished chain, first latent frame, rank 128 alpha 64 without ffn. It differs in
that clipping works and that guidance is right for batches greater than one.
`hy-video-prfl` follows HY-Video-PRFL's shipped configs (Tencent-Hunyuan/HY-Video-PRFL@59ab9d7:configs, Apache-2.0) in LoRA form: UniPC rollout of 40 steps
without guidance, hinge on the PAVRM's probability, flow-matching loss on real latents (give `real.path`, or set prfl.real_weight 0). It differs in that
both gradients make one update together, and in that real videos always go with their short captions (there: with probability 0.3, else the long ones).
`roll-reward-flow` follows ROLL's reward_fl (alibaba/ROLL@e98e9f89, Apache-2.0): 8 steps of a few-step model, gradient through the last four, whole
video decoded, KL 1. Its constants belonged to one face scorer; centre and scale are measured.
`reward-lab` is our default: nothing is rolled out; one velocity of a noised clip serves flow matching and the reward. With `real.path` the clips are the
user's, without it the base model makes some first.
`reward-lab-backprop` is reward backpropagation as we run it, and our way for the low-noise expert: a short rollout, one random step of the trained expert,
decoded at its prediction of the clean latent (a random latent frame, so that motion is not traded for a pretty first frame), with a KL to the base.
`reward-lab-prfl` is PRFL as we would run it where there are no real videos: on the logit, every step's gradient of one size, held by a KL to the base.
`pocket` is for the pocket models: random steps through the finished chain, because at their few steps the x0 prediction of a high sigma is too
blurred for a reward model.
"""

from __future__ import annotations

import copy
import difflib
from typing import Any

PRESETS: dict[str, dict[str, Any]] = {
    "videox-fun": {
        "video": {"width_px": 256, "height_px": 256, "frames": 81},
        "sampling": {"steps": 40, "shift": 5.0, "boundary": 0.9, "guidance": 6.0, "negative_prompt": "", "schedule": "diffusers"},
        "objective": {"mode": "chain", "strategy": "tail", "grad_steps": 1, "truncate": False, "decode": "first", "decode_count": 1},
        "lora": {"rank": 128, "alpha": 64, "skip": ["ffn"]},
        "optimiser": {"lr": 1e-5, "weight_decay": 0.03, "eps": 1e-10, "clip_norm": 0.3},
        "checkpoint_every": 100,
    },
    "hy-video-prfl": {
        "method": "prfl",
        "video": {"width_px": 832, "height_px": 480, "frames": 81},
        "sampling": {"steps": 40, "shift": 5.0, "boundary": 0.9, "guidance": 5.0, "schedule": "unipc"},
        "objective": {"reward_scale": 0.1},
        "prfl": {"solver": "unipc", "guidance": 1.0, "loss": "hinge", "even_gradient": False, "null_rate": 0.1, "real_weight": 1.0},
        "lora": {"rank": 128, "alpha": 128, "targets": ["self_attn", "cross_attn"], "skip": []},
        "optimiser": {"lr": 5e-6, "weight_decay": 0.01, "clip_norm": 1.0, "accumulate": 5},
    },
    "roll-reward-flow": {
        "method": "reward_flow",
        "expert": "low",
        "video": {"width_px": 640, "height_px": 352, "frames": 81},
        "sampling": {"steps": 8, "shift": 5.0, "boundary": 0.9, "guidance": 1.0, "schedule": "linear"},
        "objective": {"decode": "all", "kl_weight": 1.0, "reward_scale": 0.1},
        "reward_flow": {"first_step": 4, "last_step": 7, "guidance": 1.0, "measure_videos": 16, "fixed_noise": True},
        "lora": {"rank": 32, "alpha": 32, "skip": []},
        "optimiser": {"lr": 2.5e-6, "weight_decay": 0.0, "clip_norm": 1.0, "warmup": 10},
    },
    "reward-lab": {
        "method": "one_pass",
        "video": {"width_px": 256, "height_px": 256, "frames": 81},
        "sampling": {"steps": 20, "shift": 5.0, "boundary": 0.875, "guidance": 3.5, "schedule": "simple"},
        "objective": {"decode": "first", "decode_count": 1, "reward_scale": 2.0},
        "one_pass": {"flow_weight": 1.0, "null_rate": 0.1},
        "real": {"replay": 32, "tries": 2},
        "lora": {"rank": 32, "skip": ["ffn"]},
        "optimiser": {"lr": 5e-5, "weight_decay": 0.0, "clip_norm": 1.0, "warmup": 10},
    },
    "reward-lab-backprop": {
        "video": {"width_px": 256, "height_px": 256, "frames": 81},
        "sampling": {"steps": 20, "shift": 5.0, "boundary": 0.875, "guidance": 3.5, "schedule": "simple"},
        "objective": {
            "mode": "x0", "strategy": "random", "grad_steps": 1, "rollout_steps": 4, "decode": "random", "decode_count": 1, "decode_history": 1,
            "kl_weight": 0.1,
        },
        "lora": {"rank": 32, "skip": ["ffn"]},
        "optimiser": {"lr": 5e-5, "weight_decay": 0.0, "clip_norm": 1.0, "warmup": 10},
    },
    "reward-lab-prfl": {
        "method": "prfl",
        "video": {"width_px": 480, "height_px": 480, "frames": 81},
        "sampling": {"steps": 20, "shift": 5.0, "boundary": 0.875, "guidance": 3.5, "schedule": "unipc"},
        "objective": {"kl_weight": 0.1},
        "prfl": {"solver": "unipc", "guidance": 1.0, "loss": "logit", "even_gradient": True},
        "lora": {"rank": 32, "skip": ["ffn"]},
        "optimiser": {"lr": 5e-5, "weight_decay": 0.0, "clip_norm": 1.0, "warmup": 10},
    },
    "pocket": {
        "video": {"width_px": 64, "height_px": 64, "frames": 17},
        "sampling": {"steps": 12, "shift": 5.0, "boundary": 0.875, "guidance": 3.0, "schedule": "simple"},
        "objective": {"mode": "chain", "strategy": "tail", "grad_steps": 1, "decode": "random", "decode_count": 1, "kl_weight": 0.4},
        "lora": {"rank": 16, "skip": ["ffn"]},
        "optimiser": {"lr": 2e-3, "weight_decay": 0.0, "clip_norm": 1.0, "warmup": 5},
        "batch": 8,
        "frame_rate": 8.0,
    },
}


# Sizes to begin with on a card, laid over a preset; nothing of this has been run on these cards (`lab.py plan` says what is predicted).
CARD_SIZES: dict[str, dict[str, Any]] = {
    "24GB": {"video": {"width_px": 256, "height_px": 256, "frames": 33}, "lora": {"rank": 16}, "batch": 1, "dtype": "bf16"},
    "48GB": {"video": {"width_px": 256, "height_px": 256, "frames": 81}, "lora": {"rank": 32}, "batch": 1, "dtype": "bf16"},
    "80GB": {"video": {"width_px": 832, "height_px": 480, "frames": 33}, "lora": {"rank": 64}, "batch": 1, "dtype": "bf16"},
}


def with_preset(values: dict[str, Any]) -> dict[str, Any]:
    """Lay `values` over the preset that their `preset` key names and the card that `card` names; without them, return a copy.

    A card's rank keeps the factor alpha / rank of the preset.

    Raises:
        ValueError: unknown preset or card.
    """
    if not isinstance(values, dict):
        return copy.deepcopy(values)
    merged = copy.deepcopy(_named("preset", values["preset"], PRESETS)) if "preset" in values else {}
    if "card" in values:
        sizes, lora = _named("card", values["card"], CARD_SIZES), merged.get("lora", {})
        if "alpha" in lora:
            lora["alpha"] *= sizes["lora"]["rank"] / lora["rank"]
        merged = _merge(merged, sizes)
    return _merge(merged, {key: value for key, value in values.items() if key not in ("preset", "card")})


def _named(key: str, name: Any, table: dict[str, dict[str, Any]]) -> dict[str, Any]:
    if not isinstance(name, str) or name not in table:
        near = difflib.get_close_matches(str(name), table, n=1, cutoff=0.0)
        raise ValueError(f"unknown {key} {name!r}; known: {', '.join(table)}; the nearest is {near[0]!r}")
    return table[name]


def _merge(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = copy.deepcopy(under)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else copy.deepcopy(value)
    return merged

"""Named starting points. A preset is a plain dictionary of settings; what the user gives wins over it, key by key.

`videox-fun` follows the shipped recipe of VideoX-Fun (aigc-apps/VideoX-Fun@804a4258:scripts/wan2.2_fun/train_reward_lora.sh, Apache-2.0):
40 steps on diffusers' grid, one tail step through the finished chain, first latent frame, rank 128 alpha 64 without ffn. It differs in
that clipping works and that guidance is right for batches greater than one.
`reward-lab` is our default: a random step of the trained expert each time, decoded at its x0 prediction, with a small KL to the base.
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
    "reward-lab": {
        "video": {"width_px": 256, "height_px": 256, "frames": 81},
        "sampling": {"steps": 20, "shift": 5.0, "boundary": 0.875, "guidance": 3.5, "schedule": "simple"},
        "objective": {"mode": "x0", "strategy": "random", "grad_steps": 1, "decode": "random", "decode_count": 1, "kl_weight": 0.01},
        "lora": {"rank": 32, "skip": ["ffn"]},
        "optimiser": {"lr": 5e-5, "weight_decay": 0.0, "clip_norm": 1.0, "warmup": 10},
    },
    "pocket": {
        "video": {"width_px": 64, "height_px": 64, "frames": 17},
        "sampling": {"steps": 12, "shift": 5.0, "boundary": 0.875, "guidance": 3.0, "schedule": "simple"},
        "objective": {"mode": "chain", "strategy": "random", "grad_steps": 1, "decode": "first", "decode_count": 1, "kl_weight": 0.1},
        "lora": {"rank": 16, "skip": ["ffn"]},
        "optimiser": {"lr": 2e-3, "weight_decay": 0.0, "clip_norm": 1.0, "warmup": 5},
        "batch": 8,
        "frame_rate": 8.0,
    },
}


def with_preset(values: dict[str, Any]) -> dict[str, Any]:
    """Lay `values` over the preset that their `preset` key names; without one, return a copy.

    Raises:
        ValueError: unknown preset.
    """
    if not isinstance(values, dict) or "preset" not in values:
        return copy.deepcopy(values)
    name = values["preset"]
    if name not in PRESETS:
        near = difflib.get_close_matches(str(name), PRESETS, n=1, cutoff=0.0)
        raise ValueError(f"unknown preset {name!r}; known: {', '.join(PRESETS)}; the nearest is {near[0]!r}")
    return _merge(PRESETS[name], {key: value for key, value in values.items() if key != "preset"})


def _merge(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = copy.deepcopy(under)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else copy.deepcopy(value)
    return merged

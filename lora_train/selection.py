"""Which steps get gradient, which latent frames are decoded, which pixel frames are scored. Plain integers, no torch."""

from __future__ import annotations

import random
from collections.abc import Sequence

from .config import Objective


def choose_steps(objective: Objective, eligible: range, draws: random.Random) -> list[int]:
    """Indices of the steps with gradient, rising.

    Args:
        eligible: the steps of the trained expert.
        draws: source of the random strategies.

    Source: strategies of aigc-apps/VideoX-Fun@804a4258:scripts/wan2.2_fun/train_reward_lora.py (Apache-2.0); differs in that `uniform` never
        leaves the expert's own steps.
    """
    count = min(objective.grad_steps, len(eligible))
    if objective.strategy == "last":
        return [eligible[-1]]
    if objective.strategy == "tail":
        return list(eligible[-count:])
    if objective.strategy == "random":
        return sorted(draws.sample(list(eligible), count))
    if objective.strategy == "list":
        return sorted(step for step in objective.step_list if step in eligible)
    stride = len(eligible) // count
    offset = draws.randrange(len(eligible) - (count - 1) * stride)
    return [eligible[offset + index * stride] for index in range(count)]


def choose_latents(objective: Objective, latent_frames: int, draws: random.Random) -> range:
    """The consecutive latent frames that are decoded."""
    count = latent_frames if objective.decode == "all" else min(objective.decode_count, latent_frames)
    if objective.decode == "last":
        start = latent_frames - count
    elif objective.decode == "random":
        start = draws.randrange(latent_frames - count + 1)
    else:
        start = 0
    return range(start, start + count)


def choose_frames(total: int, score_frames: int) -> Sequence[int]:
    """Evenly spread pixel frames, first and last included; all of them when `score_frames` is 0 or not smaller than `total`.

    In whole numbers; VideoX-Fun's float32 linspace cuts some of them one frame short.
    """
    if score_frames == 0 or score_frames >= total:
        return range(total)
    if score_frames == 1:
        return [0]
    return [index * (total - 1) // (score_frames - 1) for index in range(score_frames)]

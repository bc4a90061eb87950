"""Does a falling reward under small changes give an attack away? Measured on the pocket models: `lab.py bench stability [--out FILE]`.

Frames get a caption that is wrong in one property and are attacked until HPS (or MPS) likes them under it (pocket/adversarial.py). The alarm is set on honest
frames of other scenes so that it rings on 5 % of them; told are its share of false alarms on yet other honest frames, and of attacked frames that it finds.
The second attack knows the changes and climbs the mean reward over all of them, within the same reach.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..pocket import adversarial, quality, world
from ..pocket.stages import hps, mps
from ..reward_models.base import RewardOutput
from ..reward_models.loader import load_reward_model
from ..reward_models.stability import PART, StabilityCheck, changed
from . import report

FILES = {"hpsv2.1": hps.FILE_NAME, "mps": mps.FILE_NAME}
_CALM_SHARE = 0.95


class OverChanges:
    """Mean reward over a frame and its changed forms, with gradient: what an attack climbs that knows the check.

    Args:
        model: the reward.
    """

    mixes_prompts = False

    def __init__(self, model: Any):
        self.model = model

    def score(self, frames_BFCHW: torch.Tensor, prompts: list[str]) -> RewardOutput:
        """See `base.RewardModel.score`."""
        mean_BF = torch.stack([self.model.score(frames, prompts).per_frame for frames in (frames_BFCHW, *changed(frames_BFCHW))]).mean(dim=0)
        return RewardOutput(per_frame=mean_BF, per_video=mean_BF.mean(dim=1), parts={})


def still_frames(scenes: list[world.Scene], seed: int) -> torch.Tensor:
    """One frame [N, 1, 3, H, W] of each scene."""
    rng = random.Random(seed)
    return torch.from_numpy(np.stack([hps.frame_of(scene, rng) for scene in scenes])).permute(0, 3, 1, 2)[:, None].float()


def drops(model: StabilityCheck, frames: torch.Tensor, captions: list[str]) -> torch.Tensor:
    """Fall of the reward [N] under small changes."""
    with torch.no_grad():
        return model.score(frames, captions).parts[PART][:, 0]


def measure(weights: Path, kind: str, count: int, steps: int) -> dict[str, Any]:
    """Alarm level, false alarms, and what is found of two attacks on one reward; `count` frames each."""
    model = load_reward_model(kind, weights / FILES[kind])
    check = StabilityCheck(model)
    scenes = [quality.held_out_scenes(count, seed, two_share=0.0) for seed in (301, 302, 303)]
    frames = [still_frames(some, seed) for seed, some in enumerate(scenes)]
    captions = [[world.caption(scene) for scene in some] for some in scenes]
    level = float(drops(check, frames[0], captions[0]).quantile(_CALM_SHARE))
    result = {"kind": kind, "alarm_level": level, "false_alarms": float((drops(check, frames[1], captions[1]) > level).float().mean())}
    rng = random.Random(304)
    wrong = [world.caption(hps.wrong_scene(scene, rng)) for scene in scenes[2]]
    with torch.no_grad():
        honest = model.score(frames[2], captions[2]).per_video
    for name, target in (("attack", model), ("attack_that_knows_the_check", OverChanges(model))):
        attacked = adversarial.attack(target, frames[2], wrong, steps)
        with torch.no_grad():
            fooled = model.score(attacked, wrong).per_video >= honest
        found = drops(check, attacked, wrong) > level
        share = float(found[fooled].float().mean()) if fooled.any() else None
        result[name] = {"fooled": float(fooled.float().mean()), "found_of_the_fooled": share}
    return result


def main(argv: list[str]) -> int:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(prog="lab.py bench stability", description=__doc__.split("\n")[0])
    parser.add_argument("--count", type=int, default=40, help="frames of each sort (default: 40)")
    parser.add_argument("--steps", type=int, default=adversarial.STEPS, help=f"of the ascent (default: {adversarial.STEPS})")
    parser.add_argument("--out", type=Path, default=report.RESULTS / "stability-cpu.json", help="JSON file")
    options = parser.parse_args(argv)
    rows = [measure(adversarial.WEIGHTS, kind, options.count, options.steps) for kind in FILES]
    settings = {"frames_of_each_sort": options.count, "steps": options.steps, "reach_of_255": adversarial.REACH * 255}
    result = {"benchmark": "stability", "models": "pocket", **settings, **report.machine(torch.device("cpu")), "rewards": rows}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))
    print(f"wrote {options.out}", file=sys.stderr)
    return 0

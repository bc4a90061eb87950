"""A dataset and a sweep to label, made of clips of the pocket world in the folders of a server: for the browser test and the pictures of the help pages."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np

from reward_lab.host.datasets import INDEX, VERSION
from reward_lab.pocket import world
from reward_lab.testlab import cells, sweep

DATASET, SWEEP = "pocket clips", "strengths"
VALUES, SEEDS = (0, 0.5, 1), (1, 2)
PX = 4  # enlarged so many times, as previews of small videos are


def clip(seed: int) -> tuple[np.ndarray, str]:
    """Frames (uint8) and caption of a scene."""
    scene = world.sample_scene(random.Random(seed), held_out=False)
    return (world.render(scene) * 255).round().astype(np.uint8), world.caption(scene)


def fill(output: Path) -> tuple[Path, Path]:
    """Write both into a server's output folder; returns their folders."""
    dataset, swept = (output / "reward_lab" / part for part in (f"datasets/{DATASET}", f"sweeps/{SWEEP}"))
    (dataset / "previews").mkdir(parents=True)
    videos = []
    for number in range(4):
        frames, caption = clip(number)
        cells.write_video(dataset / "previews" / f"{number}.mp4", (cells.enlarge(frame, PX) for frame in frames), 8)
        videos.append({"id": f"clip{number}", "caption": caption, "preview": f"previews/{number}.mp4"})
    (dataset / INDEX).write_text(json.dumps({"version": VERSION, "videos": videos, "skipped": []}), encoding="utf-8")
    plan = []
    for number, (seed, value) in enumerate((seed, value) for seed in SEEDS for value in VALUES):
        frames, caption = clip(102 + seed)
        # The strength is how fast the scene goes: still, at half speed, as its caption says.
        frames = frames[[int(index * value) for index in range(len(frames))]]
        applied = [{"label": "rows[0].high", "widget": "strength", "value": value}, {"label": "seed", "widget": "seed", "value": seed}]
        key = f"{number:08x}"
        cells.record(swept, key, frames, applied=applied, prompt=caption, frame_rate=8.0, scores={})
        plan.append({"index": number, "key": key, "values": [value, seed]})
    sweep.write_manifest(swept, {**sweep.read_manifest(swept), "cells": plan})
    return dataset, swept

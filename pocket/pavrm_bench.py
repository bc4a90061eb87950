"""Trains small PAVRMs on the pocket world and compares them by noise level: `lab.py bench pavrm [--seconds N]`.

Every variant begins with the low-noise expert's first blocks, sees the same videos in the same number of updates, and is judged on the same held-out
videos. Good: a moving clip. Bad: the same kind of clip with flickering brightness, or frozen. Finished variants are kept in `--work`; the command goes
on where it was, stops after `--seconds`, and writes what there is into benchmarks/results/pavrm.json.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import random
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..host import pavrm_training
from ..host.training_mode import training_mode
from ..lora_train.pavrm_config import BUCKETS, PavrmConfig
from ..lora_train.pavrm_data import Example, LatentVideo, Learnable, Sample
from ..lora_train.pavrm_run import PavrmParts, train
from . import world
from .build import SCRATCH, WEIGHTS
from .stages import dit, latents, text

RESULT = Path(__file__).resolve().parent.parent / "benchmarks" / "results" / "pavrm.json"
TRAIN, HELD_OUT = 960, 160
UPDATES, BATCH = 450, 8
DRAWS = 1


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One row. `train_blocks` 0: the trunk stays as it is and only the head learns."""

    name: str
    loss: str = "ce"
    pooling: str = "query"
    blocks: int = 3
    train_blocks: int = -1
    seed: int = 0


VARIANTS = (
    Variant(name="query, CE, 3 blocks"),
    Variant(name="mean, CE, 3 blocks", pooling="mean"),
    Variant(name="query, BT, 3 blocks", loss="bt"),
    Variant(name="query, CE, 1 block", blocks=1),
    Variant(name="query, CE, 6 blocks", blocks=6),
    Variant(name="query, CE, 3 frozen blocks", train_blocks=0),
    Variant(name="max, CE, 3 blocks", pooling="max"),
    Variant(name="query, CE, 3 blocks", seed=1),
    Variant(name="mean, CE, 3 blocks", pooling="mean", seed=1),
    Variant(name="query, BT, 3 blocks", loss="bt", seed=1),
)


def dataset(weights: Path, work: Path) -> dict[str, Any]:
    """Latents, labels and captions of training and held-out videos; made once."""
    path = work / f"videos-{TRAIN}-{HELD_OUT}.pt"
    if path.is_file():
        return torch.load(path, weights_only=True)
    rng = random.Random(2024)
    vae, encode_text = latents.load_vae(weights), text.Encoder(weights)
    made: dict[str, Any] = {}
    for part, count in (("train", TRAIN), ("held_out", HELD_OUT)):
        clips, captions, labels = [], [], []
        while len(clips) < count:
            scene = world.sample_scene(rng, held_out=part == "held_out")
            if all(thing.motion == "still" for thing in scene.things):
                continue  # frozen and good would look alike
            clip, kind = world.render(scene), ("good", "flicker", "good", "frozen")[len(clips) % 4]
            clips.append({"flicker": latents.flickering, "frozen": latents.frozen}[kind](clip, rng) if kind != "good" else clip)
            captions.append(world.caption(scene))
            labels.append(int(kind == "good"))
        x0 = torch.cat([latents.encode(vae, np.stack(clips[start : start + 20])) for start in range(0, count, 20)])
        made[part] = {"latents": x0.half(), "texts": encode_text(captions).half(), "labels": labels, "captions": captions}
    work.mkdir(parents=True, exist_ok=True)
    torch.save(made, path)
    return made


def examples(part: dict[str, Any], name: str) -> tuple[Example, ...]:
    """Examples that lie in memory."""
    found = []
    for index, label in enumerate(part["labels"]):
        video = LatentVideo(latent_CFHW=part["latents"][index].float(), texts_PD={"short": part["texts"][index].float()})
        sample = Sample(id=f"{name}{index:04d}", shape=tuple(video.latent_CFHW.shape), read=lambda video=video: video, caption=part["captions"][index])
        found.append(Example(sample=sample, label=label))
    return tuple(found)


def run(variant: Variant, learnable: Learnable, weights: Path, folder: Path) -> dict[str, Any]:
    """Train and judge one variant."""
    config = PavrmConfig.from_dict(
        {
            "models": {"trunk": str(weights / dit.FILE_NAMES["low"])},
            "data": {"source": "the pocket world"},
            "loss": variant.loss,
            "sigma": {"kind": "uniform"},
            "shape": {"blocks": variant.blocks, "train_blocks": variant.train_blocks, "pooling": variant.pooling},
            "optimiser": {"block_lr": 5e-4, "head_lr": 1e-3, "warmup": 20},
            "steps": UPDATES, "batch": BATCH if variant.loss == "ce" else BATCH // 2, "seed": variant.seed, "validate_every": UPDATES,
            "validation_draws": DRAWS, "checkpoint_every": 0, "gradient_checkpointing": False,
        }
    )  # fmt: skip
    model = pavrm_training.load(config, device=torch.device("cpu"), autocast=torch.bfloat16)
    trained = sum(parameter.numel() for group in model.groups().values() for parameter in group.values())
    begun, spent = time.monotonic(), time.process_time()
    parts = PavrmParts(scorer=model, learnable=learnable, sink=lambda event: None, stop_requested=lambda: False, write=lambda target, step: [])
    with training_mode():
        train(config, parts, folder)
    report = json.loads((folder / "samples" / f"validation-{UPDATES:06d}.json").read_text(encoding="utf-8"))
    before = json.loads((folder / "samples" / "validation-000000.json").read_text(encoding="utf-8"))
    every = report["all"]
    # The videos are the independent looks, not their draws and noise levels.
    error = math.sqrt(max(every["accuracy"] * (1 - every["accuracy"]), 1e-4) / HELD_OUT)
    return {
        **asdict(variant),
        "trained_parameters": trained,
        "accuracy": every["accuracy"],
        "standard_error": error,
        "best_accuracy": every["best_accuracy"],
        "auc": every["auc"],
        "bce": every["bce"],
        "calibration_error": report["calibration_error"],
        "accuracy_before": before["all"]["accuracy"],
        "by_sigma": [{"sigma": list(bucket), "accuracy": row["accuracy"], "auc": row["auc"]} for bucket, row in zip(BUCKETS, report["buckets"], strict=True)],
        "seconds": time.monotonic() - begun,
        "cpu_seconds": time.process_time() - spent,
    }


def main(argv: list[str]) -> int:
    """Measure what is missing and write the result."""
    parser = argparse.ArgumentParser(prog="lab.py bench pavrm", description=__doc__.split("\n")[0])
    parser.add_argument("--weights", type=Path, default=WEIGHTS)
    parser.add_argument("--work", type=Path, default=SCRATCH / "pavrm-bench", help="finished variants are kept here")
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin no new variant after so long")
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args(argv)
    begun = time.monotonic()
    made = dataset(options.weights, options.work)
    print(f"videos ready after {time.monotonic() - begun:.0f} s", flush=True)
    learnable = Learnable(train=examples(made["train"], "train"), held_out=examples(made["held_out"], "held"))
    rows = []
    for number, variant in enumerate(VARIANTS):
        kept = options.work / f"variant-{number:02d}.json"
        if not kept.is_file():
            if time.monotonic() - begun > options.seconds:
                continue
            row = run(variant, learnable, options.weights, options.work / f"run-{number:02d}")
            kept.write_text(json.dumps(row), encoding="utf-8")
        rows.append(json.loads(kept.read_text(encoding="utf-8")))
        print(f"{rows[-1]['name']} (seed {rows[-1]['seed']}): {rows[-1]['accuracy']:.3f} ± {rows[-1]['standard_error']:.3f}", flush=True)
    document = {
        "command": "python lab.py bench pavrm",
        "hardware": f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}",
        "task": f"{TRAIN} training and {HELD_OUT} held-out pocket videos, half of them good; bad ones flicker or are frozen",
        "updates": UPDATES,
        "videos_per_update": BATCH,
        "missing": len(VARIANTS) - len(rows),
        "variants": rows,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {options.out}")
    return 0

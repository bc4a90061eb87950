"""Trains small PAVRMs on the pocket world and compares them by noise level: `lab.py bench pavrm [--seconds N]`.

Every variant begins with the low-noise expert's first blocks, sees the same videos in the same number of updates, with three seeds, and is judged on the
same held-out videos. Good: a moving clip. Bad: the same kind of clip with flickering brightness, or frozen. Finished runs are kept in `--work`; the command
goes on where it was, begins none after `--seconds`, and writes what there is into benchmarks/results/pavrm.json.

Variants are compared by the area under the ROC curve, which a model without a zero point (Bradley-Terry) has as well, as the mean over the five ranges of
sigma. The error of a difference holds both sources of chance: which videos were held out (a bootstrap over videos, which both variants share) and what
the seeds did.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import platform
import random
import time
from collections.abc import Sequence
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
TRAIN, HELD_OUT = 960, 320
UPDATES, BATCH = 700, 8
SEEDS = (0, 1, 2)
RESAMPLES = 300


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One row. `train_blocks` 0: the trunk stays as it is and only the head learns."""

    name: str
    loss: str = "ce"
    pooling: str = "query"
    blocks: int = 3
    train_blocks: int = -1


# The first one is what the others are compared with.
VARIANTS = (
    Variant(name="query, CE, 3 blocks"),
    Variant(name="mean, CE, 3 blocks", pooling="mean"),
    Variant(name="max, CE, 3 blocks", pooling="max"),
    Variant(name="query, BT, 3 blocks", loss="bt"),
    Variant(name="query, CE, 1 block", blocks=1),
    Variant(name="query, CE, 6 blocks", blocks=6),
    Variant(name="query, CE, 3 frozen blocks", train_blocks=0),
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


def run(variant: Variant, seed: int, learnable: Learnable, weights: Path, folder: Path) -> dict[str, Any]:
    """Train and judge one variant with one seed."""
    config = PavrmConfig.from_dict(
        {
            "models": {"trunk": str(weights / dit.FILE_NAMES["low"])},
            "data": {"source": "the pocket world"},
            "loss": variant.loss,
            "sigma": {"kind": "uniform"},
            "shape": {"blocks": variant.blocks, "train_blocks": variant.train_blocks, "pooling": variant.pooling},
            "optimiser": {"block_lr": 5e-4, "head_lr": 1e-3, "warmup": 20},
            "steps": UPDATES, "batch": BATCH if variant.loss == "ce" else BATCH // 2, "seed": seed, "validate_every": UPDATES,
            "checkpoint_every": 0, "gradient_checkpointing": False,
        }
    )  # fmt: skip
    model = pavrm_training.load(config, device=torch.device("cpu"), autocast=torch.bfloat16)
    trained = sum(parameter.numel() for group in model.groups().values() for parameter in group.values())
    begun, spent = time.monotonic(), time.process_time()
    parts = PavrmParts(scorer=model, learnable=learnable, sink=lambda event: None, stop_requested=lambda: False, write=lambda target, step: [])
    with training_mode():
        train(config, parts, folder)
    report = json.loads((folder / "samples" / f"validation-{UPDATES:06d}.json").read_text(encoding="utf-8"))
    every = report["all"]
    return {
        "trained_parameters": trained,
        "accuracy": every["accuracy"],
        "best_accuracy": every["best_accuracy"],
        "bce": every["bce"],
        "calibration_error": report["calibration_error"],
        "by_sigma": [{"accuracy": row["accuracy"], "auc": row["auc"]} for row in report["buckets"]],
        "labels": [video["label"] for video in report["videos"]],
        "logits": [video["logit"] for video in report["videos"]],
        "seconds": time.monotonic() - begun,
        "cpu_seconds": time.process_time() - spent,
    }


def auc(labels: np.ndarray, logits: np.ndarray) -> float:
    """Area under the ROC curve, the mean over the columns of `logits` [videos, ranges of sigma]."""
    good, bad = logits[labels == 1], logits[labels == 0]
    difference = good[:, None] - bad[None]
    return float(((difference > 0) + 0.5 * (difference == 0)).mean())


def compared(rows: Sequence[dict[str, Any]], others: Sequence[dict[str, Any]]) -> dict[str, float | None]:
    """Difference in AUC of two variants over their common seeds, and its standard error by cause; one seed tells nothing of what seeds do."""
    pairs = [(np.array(row["labels"]), np.array(row["logits"]), np.array(other["logits"])) for row, other in zip(rows, others, strict=False)]
    by_seed = [auc(labels, ours) - auc(labels, theirs) for labels, ours, theirs in pairs]
    generator, drawn = np.random.default_rng(0), []
    for _ in range(RESAMPLES):
        chosen = generator.integers(0, HELD_OUT, HELD_OUT)
        drawn.append(np.mean([auc(labels[chosen], ours[chosen]) - auc(labels[chosen], theirs[chosen]) for labels, ours, theirs in pairs]))
    of_videos = float(np.std(drawn, ddof=1))
    found = {"difference": float(np.mean(by_seed)), "error_of_videos": of_videos}
    if len(by_seed) == 1:
        return {**found, "error_of_seeds": None, "error": None}
    of_seeds = float(np.std(by_seed, ddof=1)) / math.sqrt(len(by_seed))
    return {**found, "error_of_seeds": of_seeds, "error": math.hypot(of_videos, of_seeds)}


def row_of(variant: Variant, runs: Sequence[dict[str, Any]], reference: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A variant's figures: means over its seeds, and the comparison."""
    names = ("trained_parameters", "accuracy", "best_accuracy", "bce", "calibration_error", "seconds", "cpu_seconds")
    by_sigma = [
        {"sigma": list(bucket), **{name: float(np.mean([run["by_sigma"][number][name] for run in runs])) for name in ("accuracy", "auc")}}
        for number, bucket in enumerate(BUCKETS)
    ]
    aucs = [auc(np.array(run["labels"]), np.array(run["logits"])) for run in runs]
    means = {name: float(np.mean([run[name] for run in runs])) for name in names}
    against = {} if runs is reference else {"against_first": compared(runs, reference)}
    return {**asdict(variant), "seeds": len(runs), "auc": float(np.mean(aucs)), "auc_by_seed": aucs, **means, "by_sigma": by_sigma, **against}


def main(argv: list[str]) -> int:
    """Measure what is missing and write the result."""
    parser = argparse.ArgumentParser(prog="lab.py bench pavrm", description=__doc__.split("\n")[0])
    parser.add_argument("--weights", type=Path, default=WEIGHTS)
    parser.add_argument("--work", type=Path, default=SCRATCH / "pavrm-bench", help="finished runs are kept here")
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin no new run after so long")
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args(argv)
    begun = time.monotonic()
    made = dataset(options.weights, options.work)
    print(f"videos ready after {time.monotonic() - begun:.0f} s", flush=True)
    learnable = Learnable(train=examples(made["train"], "train"), held_out=examples(made["held_out"], "held"))
    runs: dict[int, list[dict[str, Any]]] = {number: [] for number in range(len(VARIANTS))}
    # All variants with one seed before the next seed: what there is can be compared at any time.
    for seed in SEEDS:
        for number, variant in enumerate(VARIANTS):
            kept = options.work / f"run-{number:02d}-{seed}.json"
            if not kept.is_file():
                if time.monotonic() - begun > options.seconds:
                    continue
                done = run(variant, seed, learnable, options.weights, options.work / f"run-{number:02d}-{seed}")
                kept.write_text(json.dumps(done), encoding="utf-8")
                print(f"{variant.name}, seed {seed}: accuracy {done['accuracy']:.3f}, {done['cpu_seconds']:.0f} CPU s", flush=True)
            runs[number].append(json.loads(kept.read_text(encoding="utf-8")))
    document = {
        "command": "python lab.py bench pavrm",
        "date": datetime.date.today().isoformat(),
        "hardware": f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}",
        "task": f"{TRAIN} training and {HELD_OUT} held-out pocket videos, half of them good; bad ones flicker or are frozen",
        "updates": UPDATES,
        "videos_per_update": BATCH,
        "missing_runs": len(VARIANTS) * len(SEEDS) - sum(map(len, runs.values())),
        "variants": [row_of(variant, runs[number], runs[0]) for number, variant in enumerate(VARIANTS) if runs[number]],
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {options.out}; {document['missing_runs']} runs are missing")
    return 0

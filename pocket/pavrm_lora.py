"""Compares a PAVRM with a trunk of its own and one stored as a LoRA over the generator: `lab.py bench pavrm-lora [--count N] [--out FILE]`.

Two ways to such a LoRA, on the pocket models:
- extracted: the pocket PAVRM, trained from the low-noise expert's first blocks, less that expert's, at several ranks (host/pavrm_lora.py);
- trained: whole blocks, LoRAs of several ranks, and the head alone over frozen blocks, all with the same videos, draws and number of updates. Judged is
  what is read back from the saved file over the generator, on held-out videos. Good: moving; bad: flickering or frozen. Noise is kept below sigma 0.5:
  above, so few updates teach hardly anything, and rows could not be told apart.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..host import pavrm, pavrm_lora, pavrm_training
from ..host.training_mode import training_mode
from ..lora_train.pavrm_config import PavrmConfig
from ..lora_train.pavrm_data import Learnable
from ..lora_train.pavrm_run import PavrmParts, train
from . import pavrm_bench, quality
from .stages import dit
from .stages import pavrm as stage

RANKS = (4, 16, 48, 96, 160)
WEIGHTS = Path(__file__).resolve().parent / "weights"
RESULT = Path(__file__).resolve().parent.parent / "benchmarks" / "results" / "pavrm-lora.json"
SIGMAS = (0.05, 0.2, 0.35, 0.5)
UPDATES, BATCH = 600, 8


@dataclass(frozen=True, kw_only=True)
class Way:
    """One row of the training comparison."""

    name: str
    lora_rank: int = 0
    train_blocks: int = -1
    block_lr: float = 5e-4


WAYS = (
    Way(name="whole blocks"),
    Way(name="LoRA rank 4", lora_rank=4, block_lr=2e-3),
    Way(name="LoRA rank 16", lora_rank=16, block_lr=2e-3),
    Way(name="head alone, blocks frozen", train_blocks=0),
)


def measure(weights: Path, count: int, ranks: tuple[int, ...] = RANKS) -> list[dict]:
    """Accuracy, size and error of the weights: first the whole PAVRM, then the LoRA form at each rank.

    Args:
        weights: folder of the pocket models.
        count: held-out latents.
        ranks: of the LoRA.
    """
    source, generator = weights / stage.FILE_NAME, weights / dit.FILE_NAMES["low"]
    rows: list[dict] = [{"form": "trunk of its own", "bytes": source.stat().st_size, "relative_error": 0.0}]
    models = [pavrm.load(source)]
    with tempfile.TemporaryDirectory() as folder:
        for rank in ranks:
            path = Path(folder) / f"rank{rank}.safetensors"
            report = pavrm_lora.convert(source, generator, path, rank=rank)
            rows.append({"form": f"LoRA rank {rank}", "bytes": report["bytes"], "relative_error": report["relative_error"]})
            models.append(pavrm_lora.load(path, generator))
    for row, accuracy in zip(rows, quality.pavrm_accuracy(weights, count, models), strict=True):
        row.update({"accuracy": sum(accuracy.values()) / len(accuracy), **accuracy})
    return rows


def config_of(way: Way, generator: Path, updates: int, seed: int) -> PavrmConfig:
    """Settings of a row; only what is trained differs."""
    return PavrmConfig.from_dict(
        {
            "name": "trained",
            "models": {"trunk": str(generator)},
            "data": {"source": "the pocket world"},
            "sigma": {"kind": "uniform", "high": max(SIGMAS)},
            "shape": {"blocks": stage.BLOCKS, "train_blocks": way.train_blocks, "lora_rank": way.lora_rank},
            "optimiser": {"block_lr": way.block_lr, "head_lr": 1e-3, "warmup": 20},
            "steps": updates, "batch": BATCH, "seed": seed, "validate_every": 0, "checkpoint_every": 0, "gradient_checkpointing": False,
        }
    )  # fmt: skip


def trained(way: Way, learnable: Learnable, generator: Path, folder: Path, *, updates: int = UPDATES, seed: int = 0) -> dict[str, Any]:
    """Train a row, save it, read it back over the generator, and judge it."""
    config = config_of(way, generator, updates, seed)
    model = pavrm_training.load(config, device=torch.device("cpu"), autocast=torch.bfloat16)
    counts = {name: sum(value.numel() for value in group.values()) for name, group in model.groups().items()}
    begun = time.process_time()
    write = lambda target, step: model.write(target, step, name=config.name)  # noqa: E731
    parts = PavrmParts(scorer=model, learnable=learnable, sink=lambda event: None, stop_requested=lambda: False, write=write)
    with training_mode():
        train(config, parts, folder)
    spent, path = time.process_time() - begun, folder / f"{config.name}.safetensors"
    accuracy = judged(pavrm_lora.load(path, generator) if way.lora_rank else pavrm.load(path), learnable)
    values = torch.tensor(list(accuracy.values()))
    error = float((values.mean() * (1 - values.mean()) / len(learnable.held_out)).sqrt())
    row = {"form": way.name, "seed": seed, "trained_in_blocks": counts["blocks"], "trained_in_head": counts["head"], "bytes": path.stat().st_size}
    return {**row, "cpu_seconds": spent, "accuracy": float(values.mean()), "standard_error": error, **accuracy}


def judged(model: pavrm.Pavrm, learnable: Learnable) -> dict[str, float]:
    """Share of held-out videos on the right side of probability 0.5, by noise level; the same noise for every model."""
    videos = [(example.sample.read(), example.label) for example in learnable.held_out]
    clean = torch.stack([video.latent_CFHW.float() for video, _ in videos])
    texts, labels = [video.texts_PD["short"].float() for video, _ in videos], torch.tensor([label for _, label in videos])
    result = {}
    for sigma in SIGMAS:
        noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(round(1000 * sigma)))
        times = torch.full((len(clean),), int(sigma * pavrm.TIMESTEPS))
        with training_mode(), torch.no_grad():
            logit = torch.cat([
                model.score((1 - sigma) * clean[part] + sigma * noise[part], times[part], texts[part]).logit
                for part in (slice(start, start + 20) for start in range(0, len(clean), 20))
            ])
        result[f"sigma {sigma}"] = float(((logit > 0) == (labels > 0)).float().mean())
    return result


def write(path: Path, command: str, learnable: Learnable, rows: list[dict[str, Any]], extracted: dict[str, Any] | None) -> str:
    """The result as JSON, also in the file; called after every row, so that a stopped run keeps what it has measured."""
    document = {
        "command": command,
        "models": "pocket",
        "hardware": f"CPU, {torch.get_num_threads()} threads, torch {torch.__version__}",
        "trained": {"updates": UPDATES, "videos_per_update": BATCH, "training_videos": len(learnable.train), "held_out": len(learnable.held_out), "rows": rows},
        "extracted": extracted,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(document, indent=1)
    path.write_text(text + "\n", encoding="utf-8")
    return text


def main(argv: list[str]) -> int:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(prog="lab.py bench pavrm-lora", description=__doc__.split("\n")[0])
    parser.add_argument("--count", type=int, default=160, help="held-out latents of the extracted LoRAs (default: 160)")
    parser.add_argument("--seeds", type=int, default=1, help="of the trained ones (default: 1)")
    parser.add_argument("--work", type=Path, default=pavrm_bench.SCRATCH / "pavrm-bench", help="videos are kept here")
    parser.add_argument("--out", type=Path, default=RESULT, help="JSON file")
    options = parser.parse_args(argv)
    generator = WEIGHTS / dit.FILE_NAMES["low"]
    made = pavrm_bench.dataset(WEIGHTS, options.work)
    learnable = Learnable(train=pavrm_bench.examples(made["train"], "train"), held_out=pavrm_bench.examples(made["held_out"], "held"))
    command, rows = f"python lab.py bench pavrm-lora --count {options.count} --seeds {options.seeds}", []
    for seed in range(options.seeds):
        for way in WAYS:
            with tempfile.TemporaryDirectory() as folder:
                rows.append(trained(way, learnable, generator, Path(folder), seed=seed))
            print(f"{way.name}, seed {seed}: {rows[-1]['accuracy']:.3f} +- {rows[-1]['standard_error']:.3f}", flush=True)
            write(options.out, command, learnable, rows, None)
    print(write(options.out, command, learnable, rows, {"held_out": options.count, "rows": measure(WEIGHTS, options.count)}))
    return 0

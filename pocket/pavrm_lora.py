"""Measures what the pocket PAVRM loses when it is stored as a LoRA over the generator: `lab.py bench pavrm-lora [--count N]`.

The PAVRM was trained from the low-noise expert's first blocks; the LoRA is extracted from the difference (host/pavrm_lora.py), not trained as one.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from ..host import pavrm, pavrm_lora
from . import quality
from .stages import dit
from .stages import pavrm as stage

RANKS = (4, 16, 48, 96, 160)
WEIGHTS = Path(__file__).resolve().parent / "weights"


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


def main(argv: list[str]) -> int:
    """Print the measurement as JSON."""
    parser = argparse.ArgumentParser(prog="lab.py bench pavrm-lora", description=__doc__.split("\n")[0])
    parser.add_argument("--count", type=int, default=160, help="held-out latents (default: 160)")
    options = parser.parse_args(argv)
    print(json.dumps(measure(WEIGHTS, options.count), indent=2))
    return 0

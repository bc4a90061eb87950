"""`python lab.py bench pocket`: measures every pocket model and records the figures and hashes in pocket/MANIFEST.json."""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import time
from pathlib import Path

import torch

from . import build, quality
from .build import SCRATCH, SEED, WEIGHTS
from .stages import dit, hps, loras, mps, pavrm, text, vae

MANIFEST = Path(__file__).parent / "MANIFEST.json"
LIMIT_BYTES = 32 * 10**6
FOLDERS = {
    "diffusion_models": list(dit.FILE_NAMES.values()),
    "text_encoders": [text.FILE_NAME],
    "vae": [vae.FILE_NAME],
    "reward_models": [hps.FILE_NAME, mps.FILE_NAME, pavrm.FILE_NAME],
    "loras": loras.FILE_NAMES,
}


def list_files(weights: Path) -> list[dict]:
    """Name, model folder, size and hash of every pocket file that is there.

    Raises:
        ValueError: together they are larger than the limit.
    """
    files = []
    for folder, names in FOLDERS.items():
        for path in (weights / name for name in names):
            if path.exists():
                files.append({"name": path.name, "folder": folder, "bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()})
    total = sum(entry["bytes"] for entry in files)
    if total > LIMIT_BYTES:
        raise ValueError(f"the pocket weights take {total} bytes, the limit is {LIMIT_BYTES}; make a model smaller")
    return files


def measure(weights: Path, scratch: Path) -> dict:
    """All figures; those that need training data of the builder are left out where the scratch folder lacks it."""
    figures = {
        "oracle on ground truth": quality.oracle_accuracy(),
        "vae": quality.vae_quality(weights),
        "hpsv2.1": quality.preference_accuracy(weights, "hpsv2.1"),
        "mps": quality.preference_accuracy(weights, "mps"),
        "pavrm": quality.pavrm_accuracy(weights),
        "base generator on held-out prompts": quality.generator_quality(weights),
        "vocabulary": quality.vocabulary_size(weights),
    }
    if (scratch / "latents-held_out.pt").exists():
        figures["flow-matching loss"] = quality.expert_loss(weights, scratch)
    return figures


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="lab.py bench pocket")
    parser.add_argument("--weights", type=Path, default=WEIGHTS)
    parser.add_argument("--scratch", type=Path, default=SCRATCH)
    parser.add_argument("--manifest", type=Path, default=MANIFEST)
    parser.add_argument("--build", action="store_true", help="first make what is missing, from the seed (hours on a CPU); see pocket/build.py")
    options = parser.parse_args(argv)
    if options.build:
        build.main(["--weights", str(options.weights), "--scratch", str(options.scratch)])
    begun = time.monotonic()
    old = json.loads(options.manifest.read_text(encoding="utf-8")) if options.manifest.exists() else {}
    quality_figures = {**old.get("quality", {}), **measure(options.weights, options.scratch)}
    manifest = {
        "seed": SEED,
        "command": "python lab.py bench pocket",
        "hardware": f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}",
        "files": list_files(options.weights),
        "quality": quality_figures,
    }
    options.manifest.write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(quality_figures, indent=1))
    print(f"wrote {options.manifest} in {time.monotonic() - begun:.0f} s")
    return 0

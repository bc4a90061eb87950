"""Makes every pocket model from a seed, on CPU, stage by stage: `python lab.py bench pocket --build`.

A stage whose weight files exist is skipped; a stage that was interrupted resumes from its last checkpoint in the scratch
folder. `--redo STAGE` throws one stage's result away first. The reward LoRAs are made by the project's own trainer.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

WEIGHTS = Path(__file__).parent / "weights"
SCRATCH = Path(__file__).parents[1] / ".lab" / "pocket_build"
SEED = 20


def stages(weights: Path, scratch: Path, seed: int) -> dict[str, tuple[list[Path], Callable[[], None]]]:
    """Stage name -> (files it makes, how); in the order of their dependencies."""
    from .stages import dit, hps, latents, loras, mps, pavrm, text, vae

    latent_files = [scratch / f"latents-{name}.pt" for name in latents.SETS]
    return {
        "vae": ([weights / vae.FILE_NAME], lambda: vae.build(weights, scratch, seed + 1)),
        "text": ([weights / text.FILE_NAME], lambda: text.build(weights, scratch, seed + 2)),
        "latents": (latent_files, lambda: latents.build(weights, scratch, seed + 3)),
        "dit-high": ([weights / dit.FILE_NAMES["high"]], lambda: dit.build(weights, scratch, seed + 4, "high")),
        "dit-low": ([weights / dit.FILE_NAMES["low"]], lambda: dit.build(weights, scratch, seed + 5, "low")),
        "hps": ([weights / hps.FILE_NAME], lambda: hps.build(weights, scratch, seed + 6)),
        "mps": ([weights / mps.FILE_NAME], lambda: mps.build(weights, scratch, seed + 7)),
        "pavrm": ([weights / pavrm.FILE_NAME], lambda: pavrm.build(weights, scratch, seed + 8)),
        "loras": ([weights / name for name in loras.FILE_NAMES], lambda: loras.build(weights, scratch, seed + 9)),
    }


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", type=Path, default=WEIGHTS)
    parser.add_argument("--scratch", type=Path, default=SCRATCH)
    parser.add_argument("--only", nargs="*", help="stages to run")
    parser.add_argument("--redo", nargs="*", default=[], help="stages whose result is thrown away first")
    arguments = parser.parse_args(argv)
    for folder in (arguments.weights, arguments.scratch):
        folder.mkdir(parents=True, exist_ok=True)
    plan = stages(arguments.weights, arguments.scratch, SEED)
    unknown = sorted({*(arguments.only or []), *arguments.redo} - set(plan))
    if unknown:
        raise SystemExit(f"unknown stage {', '.join(unknown)}; the stages are {', '.join(plan)}")
    for name, (files, make) in plan.items():
        if arguments.only and name not in arguments.only:
            continue
        if name in arguments.redo:
            for path in [*files, *arguments.scratch.glob(f"{name}*.ckpt")]:
                path.unlink(missing_ok=True)
        if all(path.exists() for path in files):
            print(f"{name}: done before", flush=True)
            continue
        begun = time.monotonic()
        make()
        print(f"{name}: {time.monotonic() - begun:.0f} s", flush=True)

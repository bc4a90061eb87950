"""Draws bytes alive on the card through one step: `python benchmarks/step_timeline.py OUT.png [--size 720p] [--blocks 3]`.

Runs the block executor through the host's WanModel on fake tensors of the 14B size; needs COMFYUI_PATH, no card and no weights.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SIZES = {"480p": (21, 60, 104), "720p": (21, 90, 160)}
COLOURS = {"rollout": (90, 140, 200), "forward": (110, 170, 110), "backward": (200, 120, 90)}
WIDTH_PX, HEIGHT_PX, MARGIN_PX = 1100, 380, 60


def main() -> None:
    """Run and draw."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--size", choices=list(SIZES), default="720p")
    parser.add_argument("--blocks", type=int, default=3)
    options = parser.parse_args()
    register()

    from reward_lab.host.dry_run import dry_run
    from reward_lab.lora_train.offload.knobs import Knobs
    from reward_lab.lora_train.planning.shapes import named_shape

    knobs = Knobs(resident_blocks=0, keep_place="host", head_groups=4, ffn_chunk_tokens=8192, row_chunk_tokens=8192, optimiser_place="host")
    phases = dry_run(replace(named_shape("wan-14b"), blocks=options.blocks), SIZES[options.size], knobs, rank=128)
    draw(phases, options)
    for name, watched in phases.items():
        print(f"{name}: {watched.flops / 1e12:.0f} TFLOP, {watched.card_bytes / 1e9:.2f} GB on the card, {watched.host_bytes / 1e9:.2f} GB on the host")


def register() -> None:
    """Make the pack and the host importable."""
    spec = importlib.util.spec_from_file_location("reward_lab_alias", ROOT / "labtools" / "alias.py")
    alias = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(alias)
    alias.register(ROOT)
    sys.path.insert(0, os.environ["COMFYUI_PATH"])
    import comfy.cli_args

    comfy.cli_args.args.cpu = True


def draw(phases, options) -> None:
    """One curve over operations, coloured by phase, with a line at every 2 GB."""
    from PIL import Image, ImageDraw

    picture = Image.new("RGB", (WIDTH_PX, HEIGHT_PX), (255, 255, 255))
    pen = ImageDraw.Draw(picture)
    points = [(name, operation, nbytes) for name, watched in phases.items() for operation, nbytes in watched.samples]
    first, last, top = points[0][1], points[-1][1], 1.08 * max(watched.card_bytes for watched in phases.values())

    def place(operation: int, nbytes: float) -> tuple[float, float]:
        x = MARGIN_PX + (WIDTH_PX - 2 * MARGIN_PX) * (operation - first) / (last - first)
        return x, HEIGHT_PX - MARGIN_PX - (HEIGHT_PX - 2 * MARGIN_PX) * nbytes / top

    for step in range(0, int(top / 1e9) + 1, 2):
        _, y = place(first, step * 1e9)
        pen.line([(MARGIN_PX, y), (WIDTH_PX - MARGIN_PX, y)], fill=(225, 225, 225))
        pen.text((8, y - 6), f"{step} GB", fill=(60, 60, 60))
    for name, operation, nbytes in points:
        x, y = place(operation, nbytes)
        pen.line([(x, HEIGHT_PX - MARGIN_PX), (x, y)], fill=COLOURS[name])
    for name, watched in phases.items():
        x, _ = place(watched.samples[0][0], 0)
        pen.text((x + 4, HEIGHT_PX - MARGIN_PX + 8), f"{name}: peak {watched.card_bytes / 1e9:.1f} GB, {watched.flops / 1e12:.0f} TFLOP", fill=(30, 30, 30))
    title = f"Wan2.2 14B, {options.size} x 81 frames, {options.blocks} blocks streamed, rank 128: bytes of tensors alive on the card, by operation (predicted)"
    pen.text((MARGIN_PX, 16), title, fill=(30, 30, 30))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    picture.save(options.out)


if __name__ == "__main__":
    main()

"""Draws bytes alive on card and host through one PRFL step: `python benchmarks/step_timeline.py OUT.png [--size 720p] [--blocks 3]`.

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
PIXELS = {"480p": "832 x 480", "720p": "1280 x 720"}
HEAD_GROUPS, RANK, TRUNK_BLOCKS = 4, 128, 2
TITLES = {"rollout": "rollout pass", "forward": "forward with gradient", "scoring": "PAVRM forward and backward", "backward": "backward"}
COLOURS = {"rollout": "#5eb1ff", "forward": "#7bd88f", "scoring": "#e57eb3", "backward": "#ffb454"}
LEGEND = (
    "Numbers: blocks. A rollout merges the LoRA into a slot (flat), then runs the block. A pass with gradient keeps two tensors of each block on the host.",
    "Backward brings them back, last block first, and runs a block's three parts again: feed-forward in pieces, cross-attention, self-attention.",
)
WIDTH_PX, CARD_PX, HOST_PX = 1240, 330, 120
LEFT_PX, RIGHT_PX, TOP_PX, GAP_PX, BOTTOM_PX = 64, 24, 146, 52, 78


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

    knobs = Knobs(resident_blocks=0, keep_place="host", head_groups=HEAD_GROUPS, ffn_chunk_tokens=8192, row_chunk_tokens=8192, optimiser_place="host")
    shape = replace(named_shape("wan-14b"), blocks=options.blocks)
    phases = dry_run(shape, SIZES[options.size], knobs, rank=RANK, judged_blocks=TRUNK_BLOCKS)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    picture(phases, options.size, options.blocks).save(options.out, optimize=True)
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


class Panel:
    """One curve over operations, filled, in colours of the phases."""

    def __init__(self, pen, top_px: int, height_px: int, first: int, last: int, top_bytes: float, step_gb: float) -> None:
        self.pen, self.top_px, self.height_px, self.first, self.last, self.top_bytes, self.step_gb = pen, top_px, height_px, first, last, top_bytes, step_gb

    def x_of(self, operation: float) -> float:
        return LEFT_PX + (WIDTH_PX - LEFT_PX - RIGHT_PX) * (operation - self.first) / (self.last - self.first)

    def y_of(self, nbytes: float) -> float:
        return self.top_px + self.height_px * (1 - nbytes / self.top_bytes)

    def grid(self, title: str) -> None:
        from reward_lab.testlab.plot import GRID, MUTED, TEXT

        count = int(self.top_bytes / 1e9 / self.step_gb)
        for index in range(count + 1):
            y = self.y_of(index * self.step_gb * 1e9)
            self.pen.line(LEFT_PX, y, WIDTH_PX - RIGHT_PX, y, GRID)
            self.pen.text(LEFT_PX - 10, y, f"{index * self.step_gb:g}", 12, MUTED, "rm")
        self.pen.text(LEFT_PX, self.top_px - 18, title, 13, TEXT, "lm")

    def area(self, samples, end: int, colour: str, base: float = 0.0) -> None:
        """Fill under (operation, bytes) steps; each holds until the next."""
        for (start, nbytes), (stop, _) in zip(samples, [*samples[1:], (end, 0)], strict=True):
            left, right = self.x_of(start), max(self.x_of(stop), self.x_of(start) + 0.5)
            self.pen.box(left, self.y_of(max(0.0, nbytes - base)), right, self.y_of(0), colour)


class Pen:
    """Draws in pixels of the finished picture."""

    def __init__(self, height_px: int) -> None:
        from PIL import Image, ImageDraw

        from reward_lab.testlab.plot import BACKGROUND, SCALE

        self.scale = SCALE
        self.image = Image.new("RGB", (WIDTH_PX * SCALE, height_px * SCALE), BACKGROUND)
        self._draw = ImageDraw.Draw(self.image)

    def line(self, x0: float, y0: float, x1: float, y1: float, colour: str, width: float = 1) -> None:
        self._draw.line([value * self.scale for value in (x0, y0, x1, y1)], fill=colour, width=int(width * self.scale))

    def box(self, x0: float, y0: float, x1: float, y1: float, colour: str) -> None:
        self._draw.rectangle([value * self.scale for value in (x0, y0, x1, y1)], fill=colour)

    def text(self, x: float, y: float, words: str, size: int, colour: str, anchor: str = "la") -> None:
        from reward_lab.testlab.fonts import font

        self._draw.text((x * self.scale, y * self.scale), words, font=font(size * self.scale), fill=colour, anchor=anchor)


def picture(phases, size: str, blocks: int):
    """The card above, the host below, phase by phase.

    Args:
        phases: from `host.dry_run.dry_run`.
    """
    from PIL import Image

    from reward_lab.testlab.plot import MUTED, TEXT

    height = TOP_PX + CARD_PX + GAP_PX + HOST_PX + BOTTOM_PX
    pen = Pen(height)
    first = min(watched.card_samples[0][0] for watched in phases.values())
    ends = [watched.card_samples[0][0] for watched in list(phases.values())[1:]]
    last = max(watched.card_samples[-1][0] for watched in phases.values())
    rest = min(nbytes for _, nbytes in phases["rollout"].host_samples)
    kept = max(watched.host_bytes for watched in phases.values()) - rest
    card = Panel(pen, TOP_PX, CARD_PX, first, last, 1.12 * max(watched.card_bytes for watched in phases.values()), 2)
    host = Panel(pen, TOP_PX + CARD_PX + GAP_PX, HOST_PX, first, last, 1.1 * kept, 2)
    pen.text(LEFT_PX, 20, f"One PRFL step of Wan2.2 14B: {PIXELS[size]} x 81 frames, LoRA of rank {RANK}, weights streamed", 20, TEXT)
    note = f"Bytes of tensors alive, operation by operation. {blocks} of 40 blocks and {TRUNK_BLOCKS} of the PAVRM's 8 are shown: the others repeat them. "
    pen.text(LEFT_PX, 50, note + "Fake tensors of the real size: predicted, not measured.", 13, MUTED)
    card.grid("on the card, GB")
    host.grid("waiting in host memory for the backward pass, GB")
    for (name, watched), end in zip(phases.items(), [*ends, last], strict=True):
        _phase(pen, card, host, name, watched, end, rest)
    for index, words in enumerate(LEGEND):
        pen.text(LEFT_PX, height - 40 + 20 * index, words, 12, MUTED, "lm")
    return pen.image.resize((WIDTH_PX, height), Image.Resampling.LANCZOS)


def _phase(pen: Pen, card: Panel, host: Panel, name: str, watched, end: int, rest: float) -> None:
    from reward_lab.testlab.plot import BACKGROUND, MUTED

    start = watched.card_samples[0][0]
    card.area(watched.card_samples, end, COLOURS[name])
    host.area(watched.host_samples, end, COLOURS[name], rest)
    left, right = card.x_of(start), card.x_of(end)
    pen.box(left + 1, TOP_PX - 40, right - 1, TOP_PX - 36, COLOURS[name])
    pen.text((left + right) / 2, TOP_PX - 52, TITLES[name], 13, COLOURS[name], "mm")
    marks = watched.marks
    for (at, words), (until, _) in zip(marks, [*marks[1:], (end, "")], strict=True):
        for panel in (card, host):
            pen.line(card.x_of(at), panel.top_px, card.x_of(at), panel.top_px + panel.height_px, BACKGROUND)
        if card.x_of(until) - card.x_of(at) > 14:
            pen.text((card.x_of(at) + card.x_of(until)) / 2, host.top_px + HOST_PX + 12, words.removeprefix("block "), 11, MUTED, "mm")
    peak = max(watched.card_samples, key=lambda sample: sample[1])
    x = min(max(card.x_of(peak[0]), LEFT_PX + 30), WIDTH_PX - RIGHT_PX - 30)
    pen.text(x, card.y_of(peak[1]) - 9, f"{peak[1] / 1e9:.1f} GB", 12, COLOURS[name], "mm")


if __name__ == "__main__":
    main()

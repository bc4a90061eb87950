"""The learning bench's picture: gains over the base as bars, and what they cost as lines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image, ImageDraw

from ..testlab.fonts import font
from ..testlab.plot import BACKGROUND, BEST, COLOURS, GRID, MUTED, TEXT, WORST, nice_ticks
from .learning_experiments import BASE, BUDGET, MISLABELLED, OURS, RENDERED, REPLAYED_BOTH

_SHOWN = {"reward": "HPS reward", "text": "colour and shape right", "motion": "motion right", "dynamic_degree": "dynamic degree, px/frame"}
# The comparison in short; `docs/learning.md` has every row.
HEADLINES = {
    OURS: "reward-lab, real clips",
    "hy-video-prfl": "hy-video-prfl, real clips",
    MISLABELLED[0]: "reward-lab, lying captions",
    MISLABELLED[4]: "hy-video-prfl, lying captions",
    REPLAYED_BOTH[0]: "reward-lab, no clips",
    "videox-fun-high": "videox-fun, no clips",
    "reward-lab-backprop": "reward-lab-backprop, low noise",
    "videox-fun-low": "videox-fun, low noise",
    "roll-reward-flow": "roll-reward-flow, low noise",
    RENDERED: "rendered truth, no model",
}
_COLUMN, _ROW, _LEFT, _TOP, _LINES = 230, 34, 250, 96, 380


def draw(table: Mapping[str, Mapping[str, Any]]) -> Image.Image:
    """Bars with one standard error each way; under them reward gain over DiT forwards, as lines for experiments whose checkpoints were judged."""
    names = [name for name in HEADLINES if name in table]
    followed = [name for name in names if table[name].get("looks")]
    height = _TOP + _ROW * len(names) + 24
    sheet = Image.new("RGB", (_LEFT + _COLUMN * len(_SHOWN) + 20, height + (_LINES if followed else 0)), BACKGROUND)
    pen = ImageDraw.Draw(sheet)
    pen.text((20, 14), f"Gain over the base on held-out prompts, {BUDGET:.0f} DiT forwards each", font=font(18), fill=TEXT)
    pen.text((20, 42), f"{len(table[BASE]['seeds'])} seeds, paired; lines: one standard error", font=font(13), fill=MUTED)
    for index, name in enumerate(names):
        pen.text((20, _TOP + _ROW * index + _ROW // 2), HEADLINES[name], font=font(14), fill=MUTED if name == RENDERED else TEXT, anchor="lm")
    for place, (measure, title) in enumerate(_SHOWN.items()):
        x0 = _LEFT + _COLUMN * place
        _bars(pen, [table[name]["gain"][measure] for name in names], (x0 + 10, _TOP, _COLUMN - 80, _ROW))
        pen.text((x0 + 10, _TOP - 22), title, font=font(13), fill=MUTED)
    if followed:
        _lines(pen, table, followed, (70, height + 44, sheet.width - 290, _LINES - 84))
    return sheet


def _bars(pen: ImageDraw.ImageDraw, entries: Sequence[Mapping[str, float]], place: tuple[int, int, int, int]) -> None:
    x, y, width, row = place
    low = min([0.0, *(entry["mean"] - entry["standard_error"] for entry in entries)])
    high = max([1e-9, *(entry["mean"] + entry["standard_error"] for entry in entries)])

    def at(value: float) -> float:
        return x + width * (value - low) / (high - low)

    pen.line((at(0), y, at(0), y + row * len(entries)), fill=GRID, width=2)
    for index, entry in enumerate(entries):
        middle, mean, error = y + row * index + row // 2, entry["mean"], entry["standard_error"]
        start, stop = sorted((at(0), at(mean)))
        pen.rectangle((start, middle - 8, stop, middle + 8), fill=BEST if mean >= 0 else WORST)
        pen.line((at(mean - error), middle, at(mean + error), middle), fill=TEXT, width=2)
        pen.text((x + width + 8, middle), f"{mean:+.3f}", font=font(12), fill=TEXT, anchor="lm")


def _lines(pen: ImageDraw.ImageDraw, table: Mapping[str, Any], followed: Sequence[str], place: tuple[int, int, int, int]) -> None:
    """Reward gain over forwards: lines of what was followed, dots where the others end, a line across at the rendered truth."""
    x, y, width, height = place
    ends = [name for name in HEADLINES if name in table and name != RENDERED]
    ends.sort(key=lambda name: -table[name]["gain"]["reward"]["mean"])
    ceiling = table[RENDERED]["gain"]["reward"]["mean"] if RENDERED in table else 0.0
    values = [ceiling, *(table[name]["gain"]["reward"]["mean"] for name in ends)]
    values += [look["gain"]["reward"]["mean"] for name in followed for look in table[name]["looks"]]
    low, high, most = min(0.0, *values), 1.08 * max(values), max(table[name]["forwards"] for name in ends)

    def at(forwards: float, gain: float) -> tuple[float, float]:
        return x + width * forwards / most, y + height * (high - gain) / (high - low)

    pen.text((20, y - 34), "HPS reward gained over DiT forwards spent", font=font(14), fill=TEXT)
    for tick in nice_ticks(low, high):
        pen.line((*at(0, tick), *at(most, tick)), fill=GRID)
        pen.text((x - 8, at(0, tick)[1]), f"{tick:+.2f}", font=font(12), fill=MUTED, anchor="rm")
    for tick in nice_ticks(0, most):
        pen.text((at(tick, low)[0], y + height + 8), f"{tick:.0f}", font=font(12), fill=MUTED, anchor="mt")
    if RENDERED in table:
        pen.line((*at(0, ceiling), *at(most, ceiling)), fill=MUTED, width=1)
        pen.text((x + 8, at(0, ceiling)[1] - 9), "rendered truth, no model", font=font(12), fill=MUTED, anchor="lm")
    places = _apart([at(0, table[name]["gain"]["reward"]["mean"])[1] for name in ends], 15)
    for name, beside in zip(ends, places, strict=True):
        colour = COLOURS[followed.index(name) % len(COLOURS)] if name in followed else MUTED
        end = at(table[name]["forwards"], table[name]["gain"]["reward"]["mean"])
        seen = [at(look["forwards"], look["gain"]["reward"]["mean"]) for look in table[name]["looks"]]
        if name in followed:
            pen.line([at(0, 0), *seen, end], fill=colour, width=3)
        for px, py in (*seen, end):
            pen.ellipse((px - 4, py - 4, px + 4, py + 4), fill=colour)
        pen.text((x + width + 14, beside), HEADLINES[name], font=font(12), fill=colour, anchor="lm")


def _apart(heights: Sequence[float], least: float) -> list[float]:
    """Falling heights in their order, moved down where two would stand on each other."""
    out: list[float] = []
    for height in heights:
        out.append(max(height, out[-1] + least) if out else height)
    return out

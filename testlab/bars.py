"""Horizontal bars against a limit, drawn with pillow in the manner of `plot.py`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw

from .fonts import font, shorten, text_width, wrap
from .plot import BACKGROUND, BEST, COLOURS, GRID, MUTED, SCALE, TEXT, WORST, nice_ticks

_ROW, _BAR, _HEADING, _AXIS, _MARGIN = 26, 16, 40, 30, 28
_LABEL_SIZE, _LABEL_ROOM, _VALUE_ROOM = 13, 150, 74


@dataclass(frozen=True, kw_only=True)
class Bars:
    """A group of bars with one scale. `limit`: drawn as a line across them; bars beyond it are red."""

    title: str
    unit: str
    rows: tuple[tuple[str, float], ...]
    limit: float
    limit_label: str


def bar_chart(groups: Sequence[Bars], *, title: str, verdict: str, is_good: bool, notes: Sequence[str] = (), width_px: int = 768) -> Image.Image:
    """Draw groups under one another.

    Args:
        title: first line.
        verdict: second line, green or red as `is_good` says.
        notes: lines under the bars, muted.

    Returns:
        An RGB picture as high as it needs to be.
    """
    lines = [line for note in notes for line in wrap(note, 12, width_px - 2 * _MARGIN, 3)]
    height = 78 + sum(_HEADING + _ROW * len(group.rows) + _AXIS for group in groups) + 18 * len(lines) + 14
    picture = Image.new("RGB", (width_px * SCALE, height * SCALE), BACKGROUND)
    draw = ImageDraw.Draw(picture)
    room = width_px - 2 * _MARGIN
    _text(draw, _MARGIN, 16, shorten(title, 20, room), 20, TEXT)
    _text(draw, _MARGIN, 46, shorten(verdict, 14, room), 14, BEST if is_good else WORST)
    top = 78
    for group in groups:
        top = _group(draw, group, top, width_px)
    for index, line in enumerate(lines):
        _text(draw, _MARGIN, top + 4 + 18 * index, line, 12, MUTED)
    return picture.resize((width_px, height), Image.Resampling.LANCZOS)


def _group(draw: ImageDraw.ImageDraw, group: Bars, top: int, width_px: int) -> int:
    """Draw one group; returns where the next begins."""
    left, right = _MARGIN + _LABEL_ROOM, width_px - _MARGIN - _VALUE_ROOM
    scale = max(group.limit, *(value for _, value in group.rows)) * 1.04 or 1.0

    def x_of(value: float) -> float:
        return left + (right - left) * value / scale

    _text(draw, _MARGIN, top + 8, group.title, 14, TEXT)
    first, bottom = top + _HEADING, top + _HEADING + _ROW * len(group.rows)
    for tick in nice_ticks(0, scale):
        _line(draw, x_of(tick), first - 4, x_of(tick), bottom, GRID)
        label = f"{tick:g}"
        _text(draw, x_of(tick) - text_width(label, 11) / 2, bottom + 4, label, 11, MUTED)
    _text(draw, right + 10, bottom + 4, group.unit, 11, MUTED)
    for index, (label, value) in enumerate(group.rows):
        y = first + _ROW * index + (_ROW - _BAR) // 2
        colour = WORST if value > group.limit else COLOURS[0]
        draw.rectangle([left * SCALE, y * SCALE, max(left + 1, x_of(value)) * SCALE, (y + _BAR) * SCALE], fill=colour)
        _text(draw, _MARGIN, y, shorten(label, _LABEL_SIZE, _LABEL_ROOM - 10), _LABEL_SIZE, MUTED)
        _text(draw, right + 10, y, f"{value:.1f}", _LABEL_SIZE, TEXT)
    _line(draw, x_of(group.limit), first - 8, x_of(group.limit), bottom, COLOURS[1], 2)
    width = text_width(group.limit_label, 12)
    _text(draw, min(x_of(group.limit) - width / 2, width_px - _MARGIN - width), first - 26, group.limit_label, 12, COLOURS[1])
    return bottom + _AXIS


def _text(draw: ImageDraw.ImageDraw, x: float, y: float, text: str, size: int, colour: str) -> None:
    draw.text((x * SCALE, y * SCALE), text, font=font(size * SCALE), fill=colour)


def _line(draw: ImageDraw.ImageDraw, x0: float, y0: float, x1: float, y1: float, colour: str, width: int = 1) -> None:
    draw.line([x0 * SCALE, y0 * SCALE, x1 * SCALE, y1 * SCALE], fill=colour, width=width * SCALE)

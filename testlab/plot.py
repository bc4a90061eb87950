"""A clean line chart drawn with pillow: one or two curves, ticks, best and worst point marked.

Drawn at twice the size and shrunk, which smooths lines without another dependency.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw

from .fonts import font, shorten, text_width

BACKGROUND = "#16181d"
GRID = "#2b2f38"
TEXT = "#e8eaf0"
MUTED = "#9aa2b1"
COLOURS = ("#5eb1ff", "#ffb454", "#7bd88f", "#e57eb3")
BEST, WORST = "#7bd88f", "#ff7b72"
SCALE = 2  # drawn so many times larger
_NAMED = 12  # points whose names fit beside each other


@dataclass(frozen=True, kw_only=True)
class Curve:
    """A curve of a chart. `axis` is `left` or `right`; `smooth` adds a running mean.

    Values that are not finite leave a gap; with `sparse` the line goes on over it, from dot to dot.
    """

    label: str
    values: tuple[float, ...]
    axis: str = "left"
    smooth: bool = False
    sparse: bool = False


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Return about `count` round numbers from `low` to `high`.

    Args:
        low: Smallest value.
        high: Largest value; equal values get some room around them.
        count: Roughly how many.
    """
    if not high > low:
        room = abs(low) * 0.05 or 1.0
        low, high = low - room, high + room
    raw = (high - low) / max(1, count)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(index * step, 12) for index in range(first, last + 1)]


def running_mean(values: Sequence[float], window: int) -> list[float]:
    """Return the mean over the last `window` finite values at each point; NaN until there is one."""
    means = []
    for end in range(1, len(values) + 1):
        finite = [value for value in values[max(0, end - window) : end] if math.isfinite(value)]
        means.append(sum(finite) / len(finite) if finite else math.nan)
    return means


def line_chart(
    curves: Sequence[Curve],
    *,
    title: str,
    subtitle: str = "",
    x_label: str = "",
    first_x: int = 0,
    x_names: Sequence[str] = (),
    mark_extremes: bool = False,
    size_px: tuple[int, int] = (768, 420),
) -> Image.Image:
    """Draw a chart.

    Args:
        curves: One to four; those of the right axis have their own scale.
        title: First line.
        subtitle: Second line, muted; shortened to fit.
        x_label: Under the horizontal axis.
        first_x: Number of the first point.
        x_names: What stands under the points in place of numbers.
        mark_extremes: Mark the highest and the lowest point of the first curve.
        size_px: Width and height.

    Returns:
        An RGB picture.
    """
    width, height = size_px[0] * SCALE, size_px[1] * SCALE
    picture = Image.new("RGB", (width, height), BACKGROUND)
    draw = ImageDraw.Draw(picture)
    has_right = any(curve.axis == "right" for curve in curves)
    left, right, top, bottom = 76 * SCALE, width - (76 if has_right else 28) * SCALE, (84 if subtitle else 62) * SCALE, height - 52 * SCALE
    draw.text((28 * SCALE, 18 * SCALE), shorten(title, 20 * SCALE, width - 56 * SCALE), font=font(20 * SCALE), fill=TEXT)
    if subtitle:
        draw.text((28 * SCALE, 46 * SCALE), shorten(subtitle, 13 * SCALE, width - 56 * SCALE), font=font(13 * SCALE), fill=MUTED)
    box = (left, top, right, bottom)
    count = max((len(curve.values) for curve in curves), default=0)
    _x_axis(draw, box, count, first_x, x_label, x_names)
    for axis in ("left", "right"):
        own = [(index, curve) for index, curve in enumerate(curves) if curve.axis == axis]
        scale = _y_scale([curve for _, curve in own])
        if scale is None:
            continue
        _y_axis(draw, box, scale, axis, COLOURS[own[0][0] % 4] if has_right else MUTED)
        for index, curve in own:
            _curve(draw, box, scale, curve, COLOURS[index % 4], count)
    if len(curves) > 1:
        _legend(draw, width, curves)
    if mark_extremes and curves and any(math.isfinite(value) for value in curves[0].values):
        _extremes(draw, box, _y_scale([curves[0]]), curves[0].values, x_names or [f"{first_x + index}" for index in range(count)])
    if count == 0:
        draw.text((left + 20 * SCALE, top + 20 * SCALE), "no values yet", font=font(14 * SCALE), fill=MUTED)
    return picture.resize(size_px, Image.Resampling.LANCZOS)


def with_pictures(chart: Image.Image, pictures: Sequence[tuple[str, Image.Image]]) -> Image.Image:
    """Put pictures with a caption each in a row under a chart.

    Args:
        chart: From `line_chart`.
        pictures: Caption and picture.

    Returns:
        An RGB picture of the chart's width.
    """
    gap, line = 28, 26
    room = (chart.width - gap * (len(pictures) + 1)) // max(1, len(pictures))
    small = []
    for caption, picture in pictures:
        scale = min(room / picture.width, room * 0.6 / picture.height)
        small.append((caption, picture.resize((max(1, round(picture.width * scale)), max(1, round(picture.height * scale))), Image.Resampling.LANCZOS)))
    height = chart.height + line + max((picture.height for _, picture in small), default=0) + gap
    sheet = Image.new("RGB", (chart.width, height), BACKGROUND)
    sheet.paste(chart, (0, 0))
    draw = ImageDraw.Draw(sheet)
    for index, (caption, picture) in enumerate(small):
        x = gap + index * (room + gap)
        draw.text((x, chart.height), shorten(caption, 14, room), font=font(14), fill=(BEST, WORST)[index] if len(small) == 2 else TEXT)
        sheet.paste(picture.convert("RGB"), (x, chart.height + line))
    return sheet


def _y_scale(curves: Sequence[Curve]) -> tuple[float, float, list[float]] | None:
    """Return low, high and ticks for the curves of one axis; None without any finite value."""
    values = [value for curve in curves for value in curve.values if math.isfinite(value)]
    if not values:
        return None
    low, high = min(values), max(values)
    room = (high - low) * 0.12 or abs(low) * 0.05 or 1.0
    ticks = nice_ticks(low - room, high + room, 7)
    return low - room, high + room, ticks


def _point(box: tuple[int, int, int, int], scale: tuple[float, float, list[float]], index: int, count: int, value: float) -> tuple[float, float]:
    """Return the place of a value on the picture."""
    left, top, right, bottom = box
    x = left + (right - left) * (index / (count - 1) if count > 1 else 0.5)
    y = bottom - (bottom - top) * (value - scale[0]) / (scale[1] - scale[0])
    return x, y


def _x_axis(draw: ImageDraw.ImageDraw, box: tuple[int, int, int, int], count: int, first_x: int, label: str, names: Sequence[str]) -> None:
    left, top, right, bottom = box
    draw.line((left, bottom, right, bottom), fill=MUTED, width=SCALE)
    for index, name in _named_points(count, first_x, names):
        x = left + (right - left) * (index / (count - 1) if count > 1 else 0.5)
        draw.line((x, bottom, x, bottom + 5 * SCALE), fill=MUTED, width=SCALE)
        draw.text((x, bottom + 8 * SCALE), name, font=font(12 * SCALE), fill=MUTED, anchor="ma")
    draw.text(((left + right) / 2, bottom + 28 * SCALE), label, font=font(12 * SCALE), fill=MUTED, anchor="ma")


def _named_points(count: int, first_x: int, names: Sequence[str]) -> list[tuple[int, str]]:
    """Points that get a tick, and what stands there: every few names, or round numbers."""
    if names:
        step = max(1, math.ceil(len(names) / _NAMED))
        return [(index, names[index]) for index in range(0, len(names), step)]
    ticks = nice_ticks(first_x, first_x + count - 1, 8) if count > 1 else [first_x] * count
    return [(int(tick) - first_x, f"{int(tick)}") for tick in ticks if tick == int(tick)]


def _y_axis(draw: ImageDraw.ImageDraw, box: tuple[int, int, int, int], scale: tuple[float, float, list[float]], axis: str, colour: str) -> None:
    left, top, right, bottom = box
    for tick in scale[2]:
        y = _point(box, scale, 0, 2, tick)[1]
        if axis == "left":
            draw.line((left, y, right, y), fill=GRID, width=SCALE)
            draw.text((left - 8 * SCALE, y), f"{tick:g}", font=font(12 * SCALE), fill=colour, anchor="rm")
        else:
            draw.text((right + 8 * SCALE, y), f"{tick:g}", font=font(12 * SCALE), fill=colour, anchor="lm")


def _curve(draw: ImageDraw.ImageDraw, box: tuple[int, int, int, int], scale: tuple[float, float, list[float]], curve: Curve, colour: str, count: int) -> None:
    """Draw one curve; a smoothed one over its own faint raw values."""
    if curve.smooth and len(curve.values) > 8:
        _polyline(draw, box, scale, curve.values, _faint(colour), count, SCALE)
        _polyline(draw, box, scale, running_mean(curve.values, max(4, len(curve.values) // 20)), colour, count, 2 * SCALE)
        return
    if curve.sparse:
        points = [_point(box, scale, index, count, value) for index, value in enumerate(curve.values) if math.isfinite(value)]
        draw.line(points, fill=colour, width=2 * SCALE, joint="curve")
    else:
        _polyline(draw, box, scale, curve.values, colour, count, 2 * SCALE)
    if curve.sparse or len(curve.values) <= 40:
        for index, value in enumerate(curve.values):
            if math.isfinite(value):
                x, y = _point(box, scale, index, count, value)
                draw.ellipse((x - 3 * SCALE, y - 3 * SCALE, x + 3 * SCALE, y + 3 * SCALE), fill=colour)


def _polyline(
    draw: ImageDraw.ImageDraw,
    box: tuple[int, int, int, int],
    scale: tuple[float, float, list[float]],
    values: Sequence[float],
    colour: str,
    count: int,
    width: int,
) -> None:
    """Draw the stretches of finite values."""
    stretch: list[tuple[float, float]] = []
    for index, value in enumerate([*values, math.nan]):
        if math.isfinite(value):
            stretch.append(_point(box, scale, index, count, value))
        else:
            if len(stretch) > 1:
                draw.line(stretch, fill=colour, width=width, joint="curve")
            stretch = []


def _extremes(
    draw: ImageDraw.ImageDraw, box: tuple[int, int, int, int], scale: tuple[float, float, list[float]], values: Sequence[float], names: Sequence[str]
) -> None:
    """Ring the best and the worst point and write their values beside them."""
    finite = [index for index, value in enumerate(values) if math.isfinite(value)]
    best, worst = max(finite, key=values.__getitem__), min(finite, key=values.__getitem__)
    for index, colour, word in ((best, BEST, "best"), (worst, WORST, "worst")):
        x, y = _point(box, scale, index, len(names), values[index])
        draw.ellipse((x - 6 * SCALE, y - 6 * SCALE, x + 6 * SCALE, y + 6 * SCALE), outline=colour, width=2 * SCALE)
        label = f"{word} {names[index]}: {values[index]:.4f}"
        half = text_width(label, 12 * SCALE) / 2
        x = min(max(x, box[0] + half), box[2] - half)
        y += -20 * SCALE if word == "best" else 20 * SCALE
        draw.text((x, y), label, font=font(12 * SCALE), fill=colour, anchor="mm", stroke_width=2 * SCALE, stroke_fill=BACKGROUND)


def _legend(draw: ImageDraw.ImageDraw, width: int, curves: Sequence[Curve]) -> None:
    """Name the curves, right-aligned on the title's line."""
    x = width - 28 * SCALE
    for index, curve in reversed(list(enumerate(curves))):
        x -= text_width(curve.label, 13 * SCALE)
        draw.text((x, 30 * SCALE), curve.label, font=font(13 * SCALE), fill=TEXT, anchor="lm")
        x -= 22 * SCALE
        draw.line((x, 30 * SCALE, x + 16 * SCALE, 30 * SCALE), fill=COLOURS[index % 4], width=3 * SCALE)
        x -= 20 * SCALE


def _faint(colour: str) -> str:
    """Mix a colour with the background."""
    mixed = [round(int(colour[i : i + 2], 16) * 0.4 + int(BACKGROUND[i : i + 2], 16) * 0.6) for i in (1, 3, 5)]
    return "#" + "".join(f"{value:02x}" for value in mixed)

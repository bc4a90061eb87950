"""Draws what a LoRA changes as a picture: one row per kind of layer, one column per block, colour is the size of the change."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

from .lora_change import WeightChange, WeightDifference
from .lora_file import MODEL_PREFIX

CELL_PX, GAP_PX, LABEL_PX, TITLE_PX, MARGIN_PX = 18, 1, 118, 24, 10
BAR_PX = 150
BACKGROUND, TEXT, FAINT, EMPTY = (24, 26, 31), (226, 228, 233), (140, 146, 156), (40, 43, 50)
# Dark blue to yellow over green, so that brightness alone tells the order too (for colour-blind readers and grey prints).
STOPS = ((0.0, (30, 24, 74)), (0.25, (52, 76, 140)), (0.5, (40, 126, 142)), (0.75, (86, 186, 110)), (1.0, (250, 230, 90)))
UNITS = {"share": " of the weight's norm", "difference": " of the larger change", "norm": ", norm of the change (no base)"}
_BLOCK = re.compile(r"^blocks\.(\d+)\.(.+)$")
KIND_ORDER = (
    *(f"self_attn.{name}" for name in ("q", "k", "v", "o", "norm_q", "norm_k")),
    *(f"cross_attn.{name}" for name in ("q", "k", "v", "o", "norm_q", "norm_k")),
    *("ffn.0", "ffn.2", "norm3", "modulation"),
)
MAX_BLOCKS = 128


@dataclass(frozen=True, kw_only=True)
class HeatMap:
    """Numbers for one panel.

    Attributes:
        title: Stands above.
        blocks: How many columns.
        kinds: Rows.
        values: (kind, block) -> value; absent where nothing changes.
        others: Layers outside of the blocks -> value.
        unit: What the values are: a key of UNITS. Panels of one unit share a scale.
    """

    title: str
    blocks: int
    kinds: tuple[str, ...]
    values: Mapping[tuple[str, int], float]
    others: Mapping[str, float]
    unit: str

    @property
    def largest(self) -> float:
        """The largest value, 0 for none."""
        return max((*self.values.values(), *self.others.values()), default=0.0)


def change_map(title: str, changes: Sequence[WeightChange]) -> HeatMap:
    """Arrange the changes of a LoRA. Relative to the base where every weight has one, else norms."""
    is_relative = bool(changes) and all(change.relative is not None for change in changes)
    values = {change.weight: change.relative if is_relative else change.change or 0.0 for change in changes}
    return _arrange(title, values, "share" if is_relative else "norm")


def difference_map(title: str, differences: Sequence[WeightDifference]) -> HeatMap:
    """Arrange the difference of two LoRAs, relative to the larger of the two changes of each weight."""
    values = {entry.weight: entry.difference / max(entry.first, entry.second) if max(entry.first, entry.second) else 0.0 for entry in differences}
    return _arrange(title, values, "difference")


def draw(maps: Sequence[HeatMap]) -> Image.Image:
    """Draw panels under one another.

    Args:
        maps: At least one. Panels of the same unit share one scale, so that experts can be compared by eye.

    Returns:
        An RGB picture.

    Raises:
        ValueError: No panel.
    """
    if not maps:
        raise ValueError("There is nothing to draw: give at least one LoRA.")
    top = {unit: max((entry.largest for entry in maps if entry.unit == unit), default=0.0) for unit in UNITS}
    columns = max(max(entry.blocks, 1) for entry in maps)
    titles = max(int(ImageFont.load_default(12).getlength(entry.title)) + 1 for entry in maps)
    width = MARGIN_PX * 2 + max(LABEL_PX + columns * (CELL_PX + GAP_PX), LABEL_PX + BAR_PX + 220, titles)
    heights = [_height(entry) for entry in maps]
    picture = Image.new("RGB", (width, MARGIN_PX + sum(heights)), BACKGROUND)
    pen, y = ImageDraw.Draw(picture), MARGIN_PX
    for entry, height in zip(maps, heights, strict=True):
        _panel(pen, entry, y, top[entry.unit])
        y += height
    return picture


def colour(share: float) -> tuple[int, int, int]:
    """Return the colour of a value as a share (0 to 1) of the largest."""
    share = min(1.0, max(0.0, share))
    for (low, first), (high, second) in zip(STOPS, STOPS[1:], strict=False):
        if share <= high:
            part = (share - low) / (high - low)
            return tuple(round(a + (b - a) * part) for a, b in zip(first, second, strict=True))
    return STOPS[-1][1]


def _arrange(title: str, by_weight: Mapping[str, float], unit: str) -> HeatMap:
    """Sort weights into rows and columns; a layer's bias and weight share a cell, where the larger counts."""
    values: dict[tuple[str, int], float] = {}
    others: dict[str, float] = {}
    for weight, value in by_weight.items():
        name = weight.removeprefix(MODEL_PREFIX).removesuffix(".weight").removesuffix(".bias")
        shown = value if math.isfinite(value) else 0.0
        found = _BLOCK.match(name)
        if found and int(found[1]) < MAX_BLOCKS:
            place = (found[2], int(found[1]))
            values[place] = max(values.get(place, 0.0), shown)
        else:
            others[name] = max(others.get(name, 0.0), shown)
    present = {kind for kind, _ in values}
    kinds = (*(kind for kind in KIND_ORDER if kind in present), *sorted(present - set(KIND_ORDER)))
    blocks = 1 + max((block for _, block in values), default=-1)
    return HeatMap(title=title, blocks=blocks, kinds=kinds, values=values, others=others, unit=unit)


def _height(entry: HeatMap) -> int:
    rows = len(entry.kinds) + (1 if entry.kinds else 0) + len(entry.others)
    return TITLE_PX + rows * (CELL_PX + GAP_PX) + TITLE_PX + MARGIN_PX


def _panel(pen: ImageDraw.ImageDraw, entry: HeatMap, y: int, top: float) -> None:
    """Draw one panel with its title, its cells and its scale."""
    font = ImageFont.load_default(12)
    pen.text((MARGIN_PX, y), entry.title, fill=TEXT, font=font)
    y += TITLE_PX
    left, step = MARGIN_PX + LABEL_PX, CELL_PX + GAP_PX
    for kind in entry.kinds:
        pen.text((MARGIN_PX, y + 2), kind, fill=TEXT, font=font)
        for block in range(entry.blocks):
            value = entry.values.get((kind, block))
            x = left + block * step
            pen.rectangle((x, y, x + CELL_PX - 1, y + CELL_PX - 1), fill=EMPTY if value is None else colour(value / top if top else 0.0))
        y += step
    if entry.kinds:
        for block in range(0, entry.blocks, 5 if entry.blocks > 10 else 1):
            pen.text((left + block * step + 2, y), str(block), fill=FAINT, font=font)
        y += step
    for name, value in entry.others.items():
        pen.text((MARGIN_PX, y + 2), name, fill=TEXT, font=font)
        pen.rectangle((left, y, left + CELL_PX - 1, y + CELL_PX - 1), fill=colour(value / top if top else 0.0))
        pen.text((left + step + 4, y + 2), _number(value, entry.unit), fill=FAINT, font=font)
        y += step
    _scale(pen, entry, left, y + 4, top, font)


def _scale(pen: ImageDraw.ImageDraw, entry: HeatMap, x: int, y: int, top: float, font) -> None:
    """Draw the colour bar with the smallest and the largest value."""
    for column in range(BAR_PX):
        pen.line((x + column, y, x + column, y + 10), fill=colour(column / (BAR_PX - 1)))
    pen.text((x + BAR_PX + 8, y - 2), f"0 to {_number(top, entry.unit)}{UNITS[entry.unit]}", fill=FAINT, font=font)


def _number(value: float, unit: str) -> str:
    return f"{value:.3g}" if unit == "norm" else f"{100 * value:.3g} %"

"""Renders the cells of a sweep as one labelled grid: a picture, an MP4 and a small animated WebP for the node.

Memory does not grow with the number of cells or frames: each cell is decoded once, its shrunken frames go to a temporary file, and the grid
is put together and encoded frame by frame. Labels are made from the values that were applied when the cell was recorded.
"""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from . import cells as cell_store
from .cells import RecordedCell
from .fonts import font, shorten, text_width, wrap
from .sweep import Cell, Sweep

BACKGROUND, PANEL, TEXT, MUTED, BEST, FAILED = "#101216", "#1c1f26", "#eef0f5", "#9aa2b1", "#7bd88f", "#ff7b72"
MAX_GRID_PX = 3840
MAX_TILE_PX = 512
MAX_PREVIEW_PX = 960
MAX_PREVIEW_FRAMES = 96
GAP_PX = 6
PICTURE, VIDEO, PREVIEW = "grid.png", "grid.mp4", "grid.webp"


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Sizes of a grid in pixels: tiles, header on top, row labels at the left, a line of scores under each tile."""

    columns: int
    rows: int
    tile_width: int
    tile_height: int
    left: int
    top: int
    footer: int
    font_px: int

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the whole grid, both even."""
        width = self.left + self.columns * (self.tile_width + GAP_PX) + GAP_PX
        height = self.top + self.rows * (self.tile_height + self.footer + GAP_PX) + GAP_PX
        return width + width % 2, height + height % 2

    def corner(self, index: int) -> tuple[int, int]:
        """Upper left corner of a tile."""
        row, column = divmod(index, self.columns)
        return self.left + GAP_PX + column * (self.tile_width + GAP_PX), self.top + row * (self.tile_height + self.footer + GAP_PX)


@dataclass(frozen=True, kw_only=True)
class RenderedGrid:
    """The files of a rendered grid. `frames` of `frame_rate` per second."""

    picture: Path
    video: Path
    preview: Path
    frames: int
    frame_rate: float
    size_px: tuple[int, int]


def render(
    sweep: Sweep,
    sweep_folder: Path,
    recorded: Mapping[str, RecordedCell],
    failures: Mapping[str, str],
    on_progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> RenderedGrid:
    """Render a grid.

    Args:
        sweep: The plan, which gives the order of the cells.
        sweep_folder: Where the cells are and the files go.
        recorded: Cell key -> recorded cell. Cells that are not there get an empty tile.
        failures: Cell key -> why there is no cell.
        on_progress: Called with done and total work; may raise to cancel.

    Returns:
        The files.

    Raises:
        ValueError: No cell is recorded, or there is not enough room on the disk.
    """
    present = [recorded[cell.key] for cell in sweep.cells if cell.key in recorded]
    if not present:
        raise ValueError("No cell of this sweep is recorded, so there is nothing to show.")
    layout = make_layout(sweep, present, recorded)
    frame_rate = max(cell.frame_rate for cell in present)
    frames = max(1, round(max(cell.frames / cell.frame_rate for cell in present) * frame_rate))
    canvas = draw_labels(sweep, layout, recorded, failures)
    tile_bytes = layout.tile_width * layout.tile_height * 3
    _refuse_full_disk(sweep_folder, tile_bytes * sum(cell.frames for cell in present))
    with tempfile.TemporaryDirectory(dir=sweep_folder, prefix=".render-") as temporary:
        work = Path(temporary)
        total = len(present) + frames
        for done, cell in enumerate({cell.key: cell for cell in present}.values()):
            _store_tiles(cell, cell_store.cell_folder(sweep_folder, cell.key) / cell_store.VIDEO_FILE, work / cell.key, layout)
            on_progress(done + 1, total)

        def pictures() -> Iterator[np.ndarray]:
            for number in range(frames):
                yield _assemble(canvas, layout, sweep.cells, recorded, work, number / frame_rate)
                on_progress(len(present) + number + 1, total)

        cell_store.write_video(work / VIDEO, pictures(), frame_rate)
        middle = _assemble(canvas, layout, sweep.cells, recorded, work, frames // 2 / frame_rate)
        Image.fromarray(middle).save(work / PICTURE)
        _write_preview(work / PREVIEW, work / VIDEO, frames, frame_rate)
        for name in (PICTURE, VIDEO, PREVIEW):
            (work / name).replace(sweep_folder / name)
    return RenderedGrid(
        picture=sweep_folder / PICTURE, video=sweep_folder / VIDEO, preview=sweep_folder / PREVIEW, frames=frames, frame_rate=frame_rate, size_px=layout.size
    )


def make_layout(sweep: Sweep, present: Sequence[RecordedCell], recorded: Mapping[str, RecordedCell]) -> Layout:
    """Choose sizes: tiles as large as the largest video, smaller where the grid would not fit into MAX_GRID_PX."""
    largest = max(cell.width_px for cell in present), max(cell.height_px for cell in present)
    font_px = 20 if min(largest) >= 200 else 15
    labels = [line for row in range(sweep.rows) for line in row_labels(sweep, row, recorded)]
    left = min(320, max([text_width(line, font_px) for line in labels], default=0) + 24) if sweep.rows > 1 else 0
    top = font_px * (4 if len(sweep.axes) else 2) + 24
    footer = font_px + 12
    room_x = (MAX_GRID_PX - left - GAP_PX) / sweep.columns - GAP_PX
    room_y = (MAX_GRID_PX - top - GAP_PX) / sweep.rows - GAP_PX - footer
    factor = max(1e-6, min(1.0, room_x / largest[0], room_y / largest[1], MAX_TILE_PX / max(largest)))
    tile = [max(16, math.floor(side * factor) // 2 * 2) for side in largest]
    return Layout(columns=sweep.columns, rows=sweep.rows, tile_width=tile[0], tile_height=tile[1], left=left, top=top, footer=footer, font_px=font_px)


def column_label(sweep: Sweep, column: int, recorded: Mapping[str, RecordedCell]) -> str:
    """Return the header of a column, from the values that its cells report as applied."""
    keys = [cell.key for cell in sweep.cells if cell.place[0] == column]
    return _applied_label(sweep, keys, 0, recorded)


def row_labels(sweep: Sweep, row: int, recorded: Mapping[str, RecordedCell]) -> list[str]:
    """Return the lines at the left of a row: one for each axis after the first."""
    keys = [cell.key for cell in sweep.cells[row * sweep.columns : (row + 1) * sweep.columns]]
    return [_applied_label(sweep, keys, axis, recorded) for axis in range(1, len(sweep.axes))]


def show_value(value: Any) -> str:
    """Write a value for a label."""
    return value if isinstance(value, str) else f"{value:g}" if isinstance(value, float) else json.dumps(value)


def draw_labels(sweep: Sweep, layout: Layout, recorded: Mapping[str, RecordedCell], failures: Mapping[str, str]) -> np.ndarray:
    """Draw everything that does not move.

    Returns:
        uint8 [H, W, 3].
    """
    picture = Image.new("RGB", layout.size, BACKGROUND)
    draw = ImageDraw.Draw(picture)
    size, width = layout.font_px, layout.size[0]
    axes = " by ".join(axis.name or axis.label for axis in sweep.axes)
    draw.text((GAP_PX + 4, 8), shorten(f"{sweep.name}   {axes}", size, width - 2 * GAP_PX - 8), font=font(size), fill=MUTED)
    for column in range(sweep.columns):
        x = layout.corner(column)[0] + layout.tile_width / 2
        lines = wrap(column_label(sweep, column, recorded), size, layout.tile_width - 4, 2)
        for number, line in enumerate(lines):
            draw.text((x, layout.top - 8 - (len(lines) - number - 1) * size * 1.2), line, font=font(size), fill=TEXT, anchor="ms")
    for row in range(sweep.rows if layout.left else 0):
        y = layout.corner(row * layout.columns)[1] + layout.tile_height / 2
        lines = [line for label in row_labels(sweep, row, recorded) for line in wrap(label, size, layout.left - 16, 3)]
        for number, line in enumerate(lines):
            draw.text((12, y + (number - (len(lines) - 1) / 2) * size * 1.25), line, font=font(size), fill=TEXT, anchor="lm")
    best = cell_store.best_keys(recorded[cell.key] for cell in sweep.cells if cell.key in recorded)
    for cell in sweep.cells:
        _draw_cell(draw, layout, cell, recorded.get(cell.key), failures.get(cell.key, "not recorded"), best)
    return np.asarray(picture)


def _applied_label(sweep: Sweep, keys: Sequence[str], axis: int, recorded: Mapping[str, RecordedCell]) -> str:
    """Return `heading = value` with the value that the cells report; where they differ, say so instead of showing one of them."""
    applied = [recorded[key].applied[axis]["value"] for key in keys if key in recorded and axis < len(recorded[key].applied)]
    if not applied:
        position = next(cell.place[axis] for cell in sweep.cells if cell.key in keys)
        applied = [sweep.axes[axis].values[position]]
    shown = show_value(applied[0]) if len({json.dumps(value) for value in applied}) == 1 else "(differs)"
    return f"{sweep.axes[axis].heading} = {shown}"


def _draw_cell(draw: ImageDraw.ImageDraw, layout: Layout, cell: Cell, recorded: RecordedCell | None, problem: str, best: set[str]) -> None:
    """Draw the panel of one tile, its score, or why it is missing."""
    x, y = layout.corner(cell.index)
    size = max(11, layout.font_px - 4)
    draw.rectangle((x, y, x + layout.tile_width - 1, y + layout.tile_height + layout.footer - 1), fill=PANEL)
    if recorded is None:
        for number, line in enumerate(wrap(problem, size, layout.tile_width - 12, max(1, layout.tile_height // (size + 4)))):
            draw.text((x + 6, y + 6 + number * (size + 4)), line, font=font(size), fill=FAILED)
        return
    if recorded.reward is None:
        return
    is_best = recorded.key in best
    label = f"{recorded.scores.get('reward_model', 'reward')} {recorded.reward:.4f}" + (" best" if is_best else "")
    middle = y + layout.tile_height + layout.footer / 2
    draw.text((x + layout.tile_width / 2, middle), shorten(label, size, layout.tile_width - 8), font=font(size), fill=BEST if is_best else MUTED, anchor="mm")


def _store_tiles(cell: RecordedCell, video: Path, target: Path, layout: Layout) -> None:
    """Decode a cell once and store its frames, fitted into the tile, as raw bytes."""
    factor = min(layout.tile_width / cell.width_px, layout.tile_height / cell.height_px)
    size = max(1, min(layout.tile_width, round(cell.width_px * factor))), max(1, min(layout.tile_height, round(cell.height_px * factor)))
    offset = (layout.tile_width - size[0]) // 2, (layout.tile_height - size[1]) // 2
    with target.open("wb") as file:
        for frame in cell_store.read_frames(video):
            tile = Image.new("RGB", (layout.tile_width, layout.tile_height), PANEL)
            tile.paste(Image.fromarray(frame).resize(size, Image.Resampling.LANCZOS), offset)
            file.write(tile.tobytes())


def _assemble(canvas: np.ndarray, layout: Layout, cells: Sequence[Cell], recorded: Mapping[str, RecordedCell], work: Path, time_s: float) -> np.ndarray:
    """Put the tiles of one instant on the canvas; a shorter video stays at its last frame."""
    picture = canvas.copy()
    tile_bytes = layout.tile_width * layout.tile_height * 3
    for cell in cells:
        if cell.key not in recorded:
            continue
        path = work / cell.key
        stored = path.stat().st_size // tile_bytes
        number = min(stored - 1, int(time_s * recorded[cell.key].frame_rate + 1e-6))
        with path.open("rb") as file:
            file.seek(number * tile_bytes)
            tile = np.frombuffer(file.read(tile_bytes), np.uint8).reshape(layout.tile_height, layout.tile_width, 3)
        x, y = layout.corner(cell.index)
        picture[y : y + layout.tile_height, x : x + layout.tile_width] = tile
    return picture


def _write_preview(path: Path, video: Path, frames: int, frame_rate: float) -> None:
    """Write a small animated WebP; unlike H.264 every browser shows it. Long videos lose frames, not speed."""
    step = max(1, -(-frames // MAX_PREVIEW_FRAMES))

    def pictures() -> Iterator[Image.Image]:
        for number, frame in enumerate(cell_store.read_frames(video)):
            if number % step == 0:
                picture = Image.fromarray(frame)
                picture.thumbnail((MAX_PREVIEW_PX, MAX_PREVIEW_PX), Image.Resampling.LANCZOS)
                yield picture

    rest = pictures()
    next(rest).save(path, save_all=True, append_images=rest, duration=round(1000 * step / frame_rate), loop=0, quality=80, method=2)


def _refuse_full_disk(folder: Path, needed_bytes: int) -> None:
    """Refuse to start when the temporary tiles would fill the disk."""
    free_bytes = shutil.disk_usage(folder).free
    if needed_bytes * 1.1 + 50e6 > free_bytes:
        raise ValueError(
            f"Rendering the grid needs {needed_bytes / 1e9:.2f} GB for a moment; {folder} has {free_bytes / 1e9:.2f} GB free. "
            "Make room, then press Run: recorded cells stay."
        )

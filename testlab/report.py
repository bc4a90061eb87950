"""Writes what a sweep found: `report.html` (one file, opens without a network) and `cells.csv`.

Videos go into the page itself as long as they are together below MAX_INLINE_BYTES; above, the page links to the files beside it. The page is
written piece by piece, so its size does not sit in memory.
"""

from __future__ import annotations

import base64
import csv
import html
import io
import math
import statistics
from collections.abc import Iterator, Mapping
from pathlib import Path
from string import Template

from . import cells as cell_store
from .cells import RecordedCell
from .sweep import Cell, Sweep, write_atomic
from .video_grid import PICTURE, VIDEO, column_label, row_labels, show_value

MAX_INLINE_BYTES = 48_000_000
REPORT, TABLE = "report.html", "cells.csv"
TEMPLATE = Path(__file__).with_name("report_template.html")


def write_table(sweep: Sweep, sweep_folder: Path, recorded: Mapping[str, RecordedCell], failures: Mapping[str, str]) -> Path:
    """Write one line per cell: its applied values, scores and files.

    Returns:
        Path of cells.csv.
    """
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(
        ["cell", *(_csv_text(axis.label) for axis in sweep.axes), "reward_model", "reward", "frame_std", "frames", "frame_rate", "video", "problem"]
    )
    for cell in sweep.cells:
        found = recorded.get(cell.key)
        if found is None:
            writer.writerow(
                [
                    cell.index,
                    *(_csv_text(show_value(value)) for value in cell.values),
                    "",
                    "",
                    "",
                    "",
                    "",
                    "",
                    _csv_text(failures.get(cell.key, "not recorded")),
                ]
            )
            continue
        values = [_csv_text(show_value(entry["value"])) for entry in found.applied]
        reward = "" if found.reward is None else repr(found.reward)
        video = f"cells/{cell.key}/{cell_store.VIDEO_FILE}"
        writer.writerow([cell.index, *values, found.scores.get("reward_model", ""), reward, _frame_spread(found), found.frames, found.frame_rate, video, ""])
    write_atomic(sweep_folder / TABLE, text.getvalue())
    return sweep_folder / TABLE


def write_report(sweep: Sweep, sweep_folder: Path, recorded: Mapping[str, RecordedCell], failures: Mapping[str, str]) -> Path:
    """Write the page.

    Returns:
        Path of report.html.
    """
    present = {cell.key: cell_store.cell_folder(sweep_folder, cell.key) / cell_store.VIDEO_FILE for cell in sweep.cells if cell.key in recorded}
    inline = sum(path.stat().st_size for path in present.values()) <= MAX_INLINE_BYTES
    best = cell_store.best_keys(recorded[key] for key in present)
    template = Template(TEMPLATE.read_text(encoding="utf-8"))
    page = template.substitute(
        title=html.escape(sweep.name),
        axes=html.escape(" × ".join(f"{axis.name or axis.label} ({len(axis.values)})" for axis in sweep.axes)),
        summary=html.escape(_summary(sweep, recorded, failures)),
        columns=sweep.columns,
        has_rows="rows" if sweep.rows > 1 else "flat",
        files=_file_links(sweep_folder),
        table=_table(sweep, recorded, failures, best),
        cells="\0",
    )
    before, after = page.split("\0")
    target = sweep_folder / REPORT
    temporary = target.with_name(f".{REPORT}.new")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(before)
        for piece in _cards(sweep, recorded, failures, present, inline, best):
            file.write(piece)
        file.write(after)
    temporary.replace(target)
    return target


def _cards(
    sweep: Sweep, recorded: Mapping[str, RecordedCell], failures: Mapping[str, str], videos: Mapping[str, Path], inline: bool, best: set[str]
) -> Iterator[str]:
    """Yield the grid: header, then row labels and videos."""
    if sweep.rows > 1:
        yield '<div class="corner"></div>'
    for column in range(sweep.columns):
        yield f'<div class="column">{html.escape(column_label(sweep, column, recorded))}</div>'
    for cell in sweep.cells:
        if sweep.rows > 1 and cell.index % sweep.columns == 0:
            lines = "<br>".join(html.escape(line) for line in row_labels(sweep, cell.index // sweep.columns, recorded))
            yield f'<div class="row">{lines}</div>'
        if cell.key in recorded:
            yield _card(cell, recorded[cell.key], videos[cell.key], inline, cell.key in best)
        else:
            yield f'<figure class="card missing"><p>{html.escape(failures.get(cell.key, "not recorded"))}</p></figure>'


def _card(cell: Cell, recorded: RecordedCell, video: Path, inline: bool, is_best: bool) -> str:
    """Return one video with its score."""
    poster = _data_url(video.with_name(cell_store.POSTER_FILE), "image/png") if inline else f"cells/{cell.key}/{cell_store.POSTER_FILE}"
    source = _data_url(video, "video/mp4") if inline else f"cells/{cell.key}/{cell_store.VIDEO_FILE}"
    score = (
        ""
        if recorded.reward is None
        else f"<figcaption>{html.escape(str(recorded.scores.get('reward_model', 'reward')))} <b>{recorded.reward:.4f}</b></figcaption>"
    )
    title = html.escape(", ".join(f"{entry['label']} = {show_value(entry['value'])}" for entry in recorded.applied), quote=True)
    style = ' best"' if is_best else '"'
    return (
        f'<figure class="card{style} title="{title}"><video muted loop playsinline preload="auto" poster="{poster}" src="{source}" '
        f'width="{recorded.width_px}" height="{recorded.height_px}"></video>{score}</figure>'
    )


def _table(sweep: Sweep, recorded: Mapping[str, RecordedCell], failures: Mapping[str, str], best: set[str]) -> str:
    """Return the table of all cells."""
    head = "".join(f"<th>{html.escape(axis.heading)}</th>" for axis in sweep.axes)
    lines = [f"<tr><th>cell</th>{head}<th>reward</th><th>over frames</th><th>frames</th><th>note</th></tr>"]
    for cell in sweep.cells:
        found = recorded.get(cell.key)
        values = [show_value(entry["value"]) for entry in found.applied] if found else [show_value(value) for value in cell.values]
        cells = "".join(f"<td>{html.escape(value)}</td>" for value in values)
        if found is None:
            problem = html.escape(failures.get(cell.key, "not recorded"))
            lines.append(f'<tr class="missing"><td>{cell.index}</td>{cells}<td></td><td></td><td></td><td>{problem}</td></tr>')
            continue
        reward = "" if found.reward is None else f"{found.reward:.4f}"
        style = ' class="best"' if cell.key in best else ""
        note = "best" if style else ""
        lines.append(f"<tr{style}><td>{cell.index}</td>{cells}<td>{reward}</td><td>{_sparkline(found)}</td><td>{found.frames}</td><td>{note}</td></tr>")
    return "\n".join(lines)


def _sparkline(cell: RecordedCell) -> str:
    """Return the rewards over the frames as a small drawing."""
    values = [value for value in cell.scores.get("per_frame", []) if math.isfinite(value)]
    if len(values) < 2:
        return ""
    low, high = min(values), max(values)
    points = " ".join(
        f"{2 + 116 * i / (len(values) - 1):.1f},{22 - 20 * ((value - low) / (high - low) if high > low else 0.5):.1f}" for i, value in enumerate(values)
    )
    words = f"{low:.4f} to {high:.4f}"
    return f'<svg width="120" height="24" role="img" aria-label="{words}"><title>{words}</title><polyline points="{points}"/></svg>'


def _summary(sweep: Sweep, recorded: Mapping[str, RecordedCell], failures: Mapping[str, str]) -> str:
    """Return a line on what is there."""
    present = [recorded[cell.key] for cell in sweep.cells if cell.key in recorded]
    parts = [f"{len(present)} of {len(sweep.cells)} cells"]
    if failures:
        parts.append(f"{len(failures)} failed")
    names = sorted({str(cell.scores["reward_model"]) for cell in present if "reward_model" in cell.scores})
    if names:
        parts.append(f"scored by {', '.join(names)}; higher is better, compare only cells with the same prompt")
    return "; ".join(parts)


def _file_links(sweep_folder: Path) -> str:
    names = [name for name in (VIDEO, PICTURE, TABLE) if (sweep_folder / name).is_file()]
    return " ".join(f'<a href="{name}">{name}</a>' for name in names)


def _frame_spread(cell: RecordedCell) -> str:
    values = cell.scores.get("per_frame", [])
    return repr(statistics.stdev(values)) if len(values) > 1 else ""


def _csv_text(text: str) -> str:
    """Keep spreadsheets from taking a prompt that starts with '=' for a formula. Numbers stay numbers."""
    is_number = text.replace(".", "", 1).replace("e-", "", 1).lstrip("+-").isdigit()
    return f"'{text}" if text[:1] in ("=", "+", "-", "@") and not is_number else text


def _data_url(path: Path, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"

"""What the labelling page shows and writes: videos of a dataset or cells of a sweep with their labels, and blind pairs of cells."""

from __future__ import annotations

import json
import random
import threading
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from ..lora_train import annotations
from ..lora_train.labels import QUALITIES
from ..testlab import cells, sweep, votes
from . import datasets, paths

KINDS = ("dataset", "sweep")
# One writer at a time: two tabs may label the same folder.
_lock = threading.Lock()


@dataclass(frozen=True, kw_only=True)
class Item:
    """A video to label. `url`: route of the video file."""

    id: str
    url: str
    caption: str
    label: str | None


def sources() -> list[dict[str, Any]]:
    """Datasets and sweeps that can be labelled, with the number of their videos; a broken one has an `error` instead."""
    found = []
    for kind, root, mark in (("dataset", paths.datasets_folder(), datasets.INDEX), ("sweep", paths.sweeps_folder(), "cells")):
        for folder in sorted(root.iterdir()) if root.is_dir() else ():
            if not (folder / mark).exists():
                continue
            entry: dict[str, Any] = {"kind": kind, "name": folder.name}
            try:
                entry["videos"] = len(_videos(kind, folder))
                entry["axes"] = _axes(folder) if kind == "sweep" else []
            except ValueError as error:
                entry["error"] = str(error)
            found.append(entry)
    return found


def folder_of(kind: str, name: str) -> Path:
    """Folder of a source.

    Raises:
        ValueError: unknown kind, a name that leaves the folder, or nothing there.
    """
    if kind not in KINDS:
        raise ValueError(f"kind is {kind[:40]!r}; it must be one of {', '.join(KINDS)}")
    folder = (paths.datasets_folder() if kind == "dataset" else paths.sweeps_folder()) / sweep.check_name(name)
    if not folder.is_dir():
        raise ValueError(f"there is no {kind} {name!r} in {folder.parent}")
    return folder


def items(kind: str, name: str, quality: str) -> list[Item]:
    """Videos of a source with their present label for a quality.

    Raises:
        ValueError: unknown source or quality, or broken files.
    """
    if quality not in QUALITIES:
        raise ValueError(f"quality is {quality[:40]!r}; it must be one of {', '.join(QUALITIES)}")
    folder = folder_of(kind, name)
    file = folder / annotations.FILE_NAME
    labels = annotations.read(file) if file.is_file() else {}
    route = f"/reward_lab/{kind}s/{quote(name)}"
    return [
        Item(id=video_id, url=f"{route}/{path}", caption=caption, label=labels.get(video_id, {}).get(quality))
        for video_id, path, caption in _videos(kind, folder)
    ]


def label(kind: str, name: str, video_id: str, quality: str, value: str | None) -> None:
    """Write a label down.

    Raises:
        ValueError: see `items` and `annotations.append`; no such video.
    """
    folder = folder_of(kind, name)
    if not any(known == video_id for known, _, _ in _videos(kind, folder)):
        raise ValueError(f"{name!r} has no video {video_id[:100]!r}")
    with _lock:
        annotations.append(folder / annotations.FILE_NAME, video_id, quality, value)


def _videos(kind: str, folder: Path) -> list[tuple[str, str, str]]:
    """Id, path of the video in the folder, and caption."""
    if kind == "dataset":
        return [(video["id"], video["preview"], video.get("caption", "")) for video in datasets.read_index(folder)["videos"]]
    return [(key, f"cells/{key}/{cells.VIDEO_FILE}", cell.prompt) for key, cell in _cells(folder)]


def _cells(folder: Path) -> list[tuple[str, cells.RecordedCell]]:
    """Cells of the present plan, in its order; those of older plans only where there is no plan."""
    plan = [entry["key"] for entry in sweep.read_manifest(folder).get("cells", [])]
    keys = plan or sorted(cells.recorded_keys(folder))
    return [(key, cell) for key in keys if (cell := cells.load(folder, key)) is not None]


def _axes(folder: Path) -> list[str]:
    recorded = _cells(folder)
    return [entry["widget"] for entry in recorded[0][1].applied] if recorded else []


def question(name: str, axis: int) -> dict[str, Any]:
    """The next blind pair: routes of both videos, the prompt, and how far the voting is. Nothing tells what the cells are but their hashes.

    Raises:
        ValueError: unknown sweep or axis, or nothing to compare.
    """
    folder, given = _contest(name, axis)
    answers = votes.read(folder / votes.FILE_NAME)
    asked = votes.next_question(given, answers, random.SystemRandom())
    own = [vote for vote in answers.rows if vote.left in given.names and vote.right in given.names]
    state: dict[str, Any] = {"votes": len(own), "pairs": len(given.pairs()), "question": None}
    if asked is not None:
        sides = {
            side: {"key": key, "url": f"/reward_lab/sweeps/{quote(name)}/cells/{key}/{cells.VIDEO_FILE}"}
            for side, key in vars(asked).items()
            if side != "prompt"
        }
        state["question"] = {**sides, "prompt": asked.prompt}
    return state


def vote(name: str, left: str, right: str, result: str) -> None:
    """Write a vote down.

    Raises:
        ValueError: a key is no cell of the sweep; see `votes.add`.
    """
    folder = folder_of("sweep", name)
    for key in (left, right):
        if cells.load(folder, key) is None:
            raise ValueError(f"sweep {name!r} has no cell {key[:80]!r}")
    with _lock:
        votes.add(folder / votes.FILE_NAME, left, right, result)


def undo_vote(name: str) -> bool:
    """Take the last vote of a sweep back; False when there is none."""
    with _lock:
        return votes.undo(folder_of("sweep", name) / votes.FILE_NAME) is not None


def standings(name: str, axis: int) -> dict[str, Any]:
    """The ranking so far; shown only when the voter asks for it."""
    folder, given = _contest(name, axis)
    rows = votes.ranking(given, votes.read(folder / votes.FILE_NAME))
    return {"axis": _axes(folder)[axis], "standings": [{**asdict(row), "chance": row.chance} for row in rows]}


def _contest(name: str, axis: int) -> tuple[Path, votes.Contest]:
    folder = folder_of("sweep", name)
    return folder, votes.contest([(key, cell.applied, cell.prompt) for key, cell in _cells(folder)], axis)


def stamp(folder: Path) -> str:
    """A text that changes when a dataset or its labels do."""
    files = [folder / datasets.INDEX, folder / annotations.FILE_NAME]
    return json.dumps([[str(file), file.stat().st_mtime_ns] for file in files if file.is_file()])

"""Scores on disk, one JSON line per video, so that scoring a large folder can be stopped and gone on with.

A line is used again only when file, prompt and reward model are the same; a line that a crash cut off is ignored.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def key_of(*parts: Any) -> str:
    """Hash of everything that a score depends on."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


class ScoreStore:
    """Appends scores to a file and finds them again.

    Args:
        path: JSONL file; None keeps nothing.
        is_read: whether scores that are in it already are found.
    """

    def __init__(self, path: str | Path | None, *, is_read: bool = True):
        self._path = Path(path) if path else None
        self._found: dict[str, dict] = {}
        if is_read and self._path and self._path.is_file():
            for line in self._path.read_text(encoding="utf-8", errors="replace").splitlines():
                try:
                    entry = json.loads(line)
                except ValueError:
                    continue
                if isinstance(entry, dict) and isinstance(entry.get("key"), str) and isinstance(entry.get("score"), dict):
                    self._found[entry["key"]] = entry["score"]

    def get(self, key: str) -> dict | None:
        """The score that was stored under this key."""
        return self._found.get(key)

    def put(self, key: str, score: Mapping[str, Any]) -> None:
        """Store a score; on disk before this returns."""
        self._found[key] = dict(score)
        if self._path is None:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        is_cut = self._path.is_file() and self._path.stat().st_size and not self._path.read_bytes().endswith(b"\n")
        with self._path.open("a", encoding="utf-8") as file:
            file.write(("\n" if is_cut else "") + json.dumps({"key": key, "score": score}) + "\n")
            file.flush()
            os.fsync(file.fileno())


def write_csv(path: str | Path, videos: Sequence[Mapping[str, Any]], settings: Mapping[str, Any] | None = None) -> None:
    """Write a row per frame: video, prompt, frame, reward, every part; and a row per video with an empty frame.

    Args:
        path: of the table.
        videos: see `score_files.score`.
        settings: what all of them were scored with; each gets a column behind the others, in every row.
    """
    settings = settings or {}
    told = [value if isinstance(value, str) else json.dumps(value) for value in settings.values()]
    parts = list(dict.fromkeys(name for video in videos for name in video["parts"]))
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with Path(path).open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["video", "prompt", "frame", "reward", *parts, *settings])
        for video in videos:
            means = [video["parts"].get(name, {}).get("per_video", "") for name in parts]
            writer.writerow([video["name"], video["prompt"], "", video["per_video"], *means, *told])
            for frame, reward in enumerate(video["per_frame"]):
                values = [video["parts"][name]["per_frame"][frame] if name in video["parts"] else "" for name in parts]
                writer.writerow([video["name"], video["prompt"], frame, reward, *values, *told])

"""Annotation files: who labelled which video how. JSONL, one object a line, appended to and never rewritten, so that a crash loses nothing. No torch.

    {"id": "3f2a...", "quality": "motion_quality", "label": "good", "time": 1763740800.0}

`id`: of the dataset's video (`source_id` is read too). `label`: `good`, `bad`, `skip` (seen, no opinion) or null (taken back); 1, 0 and "poor" are read too.
The last line of a video and quality counts. A line that a killed process left unfinished is passed over; any other bad line is an error.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .labels import QUALITIES, read_value

FILE_NAME = "annotations.jsonl"
LABELS = ("good", "bad", "skip", None)
# A JSON text, the last one of a line also without its end.
_TEXT = re.compile(r'"(?:[^"\\]|\\.)*(?:"|\\?$)')


def append(path: Path, video_id: str, quality: str, label: str | None) -> None:
    """Write down a label; None takes the last one back.

    Raises:
        ValueError: unknown quality or label.
    """
    if quality not in QUALITIES:
        raise ValueError(f"quality is {quality!r}; it must be one of {', '.join(QUALITIES)}")
    if label not in LABELS:
        raise ValueError(f"label is {label!r}; it must be 'good', 'bad', 'skip' or null")
    line = json.dumps({"id": video_id, "quality": quality, "label": label, "time": round(time.time(), 3)})
    with path.open("ab+") as file:
        size_bytes = file.seek(0, 2)
        file.seek(max(0, size_bytes - 1))
        # A line that was cut off gets its end first: appended to it, the new one would be lost with it.
        file.write((b"" if file.read(1) in (b"", b"\n") else b"\n") + line.encode() + b"\n")


def read(path: Path) -> dict[str, dict[str, str | None]]:
    """The labels that count, by video and quality; those taken back are not among them.

    Raises:
        ValueError: the file cannot be read, or a line (named) is no annotation.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"the annotations {path} cannot be read ({error})") from error
    found: dict[str, dict[str, str | None]] = {}
    lines = text.split("\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except ValueError as error:
            if _is_unfinished(line):
                continue
            raise ValueError(f"{path} line {number} is not JSON ({error}); write one object a line, without commas between or a list around them") from error
        video, quality, label = _entry(entry, f"{path} line {number}")
        found.setdefault(video, {}).pop(quality, None)
        if label is not None:
            found[video][quality] = label
    return {video: labels for video, labels in found.items() if labels}


def _is_unfinished(line: str) -> bool:
    """Whether an object begins in the line and never ends: what a process that was killed while it wrote leaves, at the end or before the next start's line."""
    outside_of_texts = _TEXT.sub("", line.strip())
    return outside_of_texts.startswith("{") and "}" not in outside_of_texts and not line.rstrip().endswith("}")


def _entry(entry: Any, where: str) -> tuple[str, str, str | None]:
    if not isinstance(entry, Mapping):
        raise ValueError(f'{where} holds no object; write {{"id": ..., "quality": ..., "label": "good"}}')
    video, quality, label = entry.get("id", entry.get("source_id")), entry.get("quality"), entry.get("label")
    if not isinstance(video, str) or quality not in QUALITIES:
        raise ValueError(f"{where} has the id {video!r} and the quality {quality!r}; the quality must be one of {', '.join(QUALITIES)}")
    if label is None or str(label).strip().lower() == "skip":
        return video, quality, None if label is None else "skip"
    value = read_value(label, f"label in {where}")
    return video, quality, {1: "good", 0: "bad", None: None}[value]

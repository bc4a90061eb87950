"""Which prompt belongs to which video: one for all, one per video in order, or by file name.

Files: `.txt` (a prompt a line), `.json` (list of texts, list of objects, or object of file name -> prompt), `.jsonl`, `.csv` (column `prompt`, `text` or
`caption`, optionally `file`, `name`, `video` or `path`). Unlike training prompts, order counts and repeated prompts stay.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_TEXT = ("prompt", "text", "caption")
_NAME = ("file", "name", "video", "path", "filename")


def read(path: str | Path, names: Sequence[str]) -> list[str]:
    """The prompt of each video.

    Args:
        path: prompt file.
        names: of the videos, in their order; an entry that names a file is matched by the name, with or without folder and ending.

    Raises:
        ValueError: the file is missing or unreadable, or prompts and videos do not fit.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"The prompt file {path} cannot be read ({error}); give a UTF-8 .txt, .csv, .json or .jsonl file.") from error
    entries = _entries(path, text, len(names))
    if all(name for name, _ in entries):
        return _by_name(entries, names, path)
    prompts = [prompt for _, prompt in entries]
    if len(prompts) == 1:
        return prompts * len(names)
    if len(prompts) != len(names):
        raise ValueError(
            f"{path} holds {len(prompts)} prompts, but there are {len(names)} videos; give one prompt for all, one per video, or name the video of each "
            "prompt (columns file and prompt)."
        )
    return prompts


def _entries(path: Path, text: str, videos: int) -> list[tuple[str, str]]:
    ending = path.suffix.lower()
    if ending == ".csv":
        rows = list(csv.DictReader(io.StringIO(text, newline="")))
        return [_entry({str(key).strip().lower(): value or "" for key, value in row.items()}, path) for row in rows]
    if ending in (".json", ".jsonl"):
        try:
            values = json.loads(text) if ending == ".json" else [json.loads(line) for line in text.splitlines() if line.strip()]
        except ValueError as error:
            raise ValueError(f"The prompt file {path} is not JSON: {error}.") from error
        if isinstance(values, dict) and isinstance(values.get("prompts"), list):
            values = values["prompts"]
        if isinstance(values, dict):
            return [(str(name), _text(prompt, path)) for name, prompt in values.items()]
        if not isinstance(values, list):
            raise ValueError(f"The prompt file {path} must hold a list of prompts, or an object of file names and prompts.")
        return [_entry(value, path) if isinstance(value, dict) else ("", _text(value, path)) for value in values]
    lines = text.replace("\r\n", "\n").removesuffix("\n").split("\n")
    # An empty line is an empty prompt only where the lines fit the videos with it; elsewhere it is there for the eye.
    return [("", line.strip()) for line in lines if line.strip() or len(lines) == videos]


def _entry(value: dict[str, Any], path: Path) -> tuple[str, str]:
    prompt = next((value[key] for key in _TEXT if key in value), None)
    if prompt is None:
        raise ValueError(f"An entry of {path} has {', '.join(map(str, value)) or 'nothing'}; it needs {' or '.join(_TEXT)}.")
    return str(next((value[key] for key in _NAME if value.get(key)), "")), _text(prompt, path)


def _text(value: Any, path: Path) -> str:
    if not isinstance(value, str):
        raise ValueError(f"A prompt in {path} is {type(value).__name__} {value!r}, not a text.")
    return value


def _by_name(entries: list[tuple[str, str]], names: Sequence[str], path: Path) -> list[str]:
    if len({name for name, _ in entries}) != len(entries):
        raise ValueError(f"{path} names a video twice; give each one prompt.")
    prompts = dict(entries)
    by_file = {Path(name).name: prompt for name, prompt in entries}
    by_stem = {Path(name).stem: prompt for name, prompt in entries}
    result, missing = [], []
    for name in names:
        found = next((table[key] for table, key in ((prompts, name), (by_file, Path(name).name), (by_stem, Path(name).stem)) if key in table), None)
        result.append(found)
        missing += [name] if found is None else []
    if missing:
        shown = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
        raise ValueError(f"{path} holds {len(entries)} prompts by file name, none for {shown}; {len(names)} videos are to be scored.")
    return result

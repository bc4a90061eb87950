"""Which prompt belongs to which video: one for all, one per video in order, or by file name.

Files: `.txt` (a prompt a line), `.json` (list of texts, list of objects, or object of file name -> prompt), `.jsonl`, `.csv` (column `prompt`, `text` or
`caption`, optionally `file`, `name`, `video` or `path`). Unlike training prompts, order counts and repeated prompts stay.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

_TEXT = ("prompt", "text", "caption")
_NAME = ("file", "name", "video", "path", "filename")


def read(path: str | Path, names: Sequence[str], places: Sequence[str | Path] | None = None) -> list[str]:
    """The prompt of each video.

    Args:
        path: prompt file.
        names: of the videos, in their order; an entry that names a file is matched by the name, with or without folders and ending.
        places: full path of each video, whose last folders must be those that an entry names; None takes the names.

    Raises:
        ValueError: the file is missing or unreadable, prompts and videos do not fit, or a video fits several prompts.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"The prompt file {path} cannot be read ({error}); give a UTF-8 .txt, .csv, .json or .jsonl file.") from error
    entries = _entries(path, text, len(names))
    if all(name for name, _ in entries):
        return _by_name(entries, names, places or names, path)
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
        try:
            rows = list(csv.DictReader(io.StringIO(text, newline="")))
        except csv.Error as error:
            raise ValueError(f"The prompt file {path} cannot be read as CSV ({error}); look for a quotation mark that is never closed.") from error
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


def _by_name(entries: list[tuple[str, str]], names: Sequence[str], places: Sequence[str | Path], path: Path) -> list[str]:
    prompts = dict(entries)
    if len(prompts) != len(entries):
        raise ValueError(f"{path} names a video twice; give each one prompt.")
    found: list[str | None] = [name if name in prompts else None for name in names]
    # First with the ending, then without: an entry that is the very name of one video is not that of its neighbour with another ending.
    for part in (str, _stem):
        free = _by_last_part([name for name in prompts if name not in found], part)
        found = [entry or _entry_of(_parts(place), free, part, path) for entry, place in zip(found, places, strict=True)]
    missing = [name for name, entry in zip(names, found, strict=True) if entry is None]
    if missing:
        shown = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
        raise ValueError(f"{path} holds {len(entries)} prompts by file name, none for {shown}; {len(names)} videos are to be scored.")
    return [prompts[entry] for entry in found]


def _by_last_part(entries: list[str], part: Callable[[str], str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for entry in entries:
        found.setdefault(part(_parts(entry)[-1]), []).append(entry)
    return found


def _entry_of(place: tuple[str, ...], entries: dict[str, list[str]], part: Callable[[str], str], path: Path) -> str | None:
    """The entry that names a place: of those that end as it does, the one with the most folders.

    Raises:
        ValueError: more than one.
    """
    agreeing: dict[int, list[str]] = {}
    for entry in entries.get(part(place[-1]), ()):
        folders = _parts(entry)[:-1]
        shared = min(len(folders), len(place) - 1)
        # A place whose folders are not told (a bare name) may be anyone's with that name.
        if folders[len(folders) - shared :] == place[len(place) - 1 - shared : -1]:
            agreeing.setdefault(shared, []).append(entry)
    best = agreeing[max(agreeing)] if agreeing else []
    if len(best) > 1:
        raise ValueError(f"{path} has {len(best)} prompts for {'/'.join(place[-2:])} ({', '.join(best[:3])}); name each video with its ending and its folder.")
    return best[0] if best else None


def _parts(name: str | Path) -> tuple[str, ...]:
    """Folders and file; steps up are left out, for they tell where the reader stood and not what the file is called."""
    parts = tuple(part for part in Path(name).parts if part != "..")
    return parts or (str(name),)


def _stem(part: str) -> str:
    return Path(part).stem

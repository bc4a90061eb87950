"""Prompt sets: reading them from text and files, and drawing from them reproducibly. No torch.

Files: `.txt` (one prompt a line), `.csv` (column `prompt`, `text` or `caption`, optionally `weight` and `image`), `.json` (a list of texts or of
objects with these keys) and `.jsonl`. A start image is a path, relative ones beside the file. UTF-8 with or without byte-order mark, UTF-16 with one; any
line ends. Empty lines and entries are dropped. A prompt that stands there several times (with the same image) is one prompt, with its weights added.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from .config import Prompt

MAX_PROMPT_CHARACTERS = 10_000
MAX_FILE_BYTES = 64 * 1024 * 1024
_TEXT_KEYS = ("prompt", "text", "caption")
_IMAGE_KEYS = ("image", "start_image", "image_path")
_BYTE_ORDER_MARKS = ((b"\xef\xbb\xbf", "utf-8-sig"), (b"\xff\xfe", "utf-16"), (b"\xfe\xff", "utf-16"))


def parse_prompt_lines(text: str, source: str = "the prompt text") -> list[Prompt]:
    """Prompts from text with one a line.

    Raises:
        ValueError: a line is too long, or nothing is left.
    """
    lines = _lines(text, source)
    return _merged([Prompt(text=line.strip()) for line in lines if line.strip()], source)


def read_prompt_file(path: str | Path) -> list[Prompt]:
    """Prompts from a file; the ending of its name tells the format.

    Raises:
        ValueError: missing, too big, unreadable or empty file; a line of more than 10,000 characters (its number and length are named);
            unknown ending; a CSV without a prompt column; a weight that is not a positive number.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"the prompt file {path} does not exist; check the path")
    size_bytes = path.stat().st_size
    ending = path.suffix.lower()
    if ending not in (".txt", ".csv", ".json", ".jsonl"):
        raise ValueError(f"the prompt file {path.name} ends in {ending or 'nothing'!r}; use .txt, .csv, .json or .jsonl")
    if size_bytes > MAX_FILE_BYTES:
        raise ValueError(f"the prompt file {path.name} has {size_bytes} bytes, the limit is {MAX_FILE_BYTES}; split it")
    text = _decoded(path.read_bytes(), path.name)
    if ending == ".csv":
        return _merged(_from_csv(text, path.name), path.name, path.parent)
    if ending == ".json":
        return _merged(_from_json(text, path.name), path.name, path.parent)
    if ending == ".jsonl":
        lines = [(number, line) for number, line in enumerate(_lines(text, path.name), 1) if line.strip()]
        values = [(f"{path.name} line {number}", _loads(line, path.name, number)) for number, line in lines]
        return _merged(_entries(values), path.name, path.parent)
    return parse_prompt_lines(text, path.name)


def split(prompts: Sequence[Prompt], share: float, seed: int) -> tuple[list[Prompt], list[Prompt]]:
    """Divide prompts into those to train on and held-out ones, as a function of the texts and the seed, whatever their order.

    A text with several start images goes to one side with all of them.

    Args:
        share: of the texts that is held out, in [0, 1); at least one when it is above 0.

    Raises:
        ValueError: the share is out of range, or nothing would be left on one side.
    """
    if not 0 <= share < 1:
        raise ValueError(f"the held-out share is {share}; it must be at least 0 and below 1")
    texts = sorted({prompt.text for prompt in prompts}, key=lambda text: derived_seed(seed, "held out prompts", text))
    count = max(1, round(share * len(texts))) if share else 0
    if count >= len(texts) and share:
        raise ValueError(f"a held-out share of {share} of {len(texts)} prompts leaves none to train on; give more prompts or a smaller share")
    held = set(texts[:count])
    return [prompt for prompt in prompts if prompt.text not in held], [prompt for prompt in prompts if prompt.text in held]


def _decoded(raw: bytes, source: str) -> str:
    encoding = next((name for mark, name in _BYTE_ORDER_MARKS if raw.startswith(mark)), "utf-8")
    try:
        return raw.decode(encoding)
    except UnicodeDecodeError as error:
        raise ValueError(f"{source} is not {encoding} text (byte {error.start}); save it as UTF-8") from error


def _lines(text: str, source: str) -> list[str]:
    lines = text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n").split("\n")
    for number, line in enumerate(lines, 1):
        if len(line) > MAX_PROMPT_CHARACTERS:
            raise ValueError(f"line {number} of {source} has {len(line)} characters, the limit is {MAX_PROMPT_CHARACTERS}; shorten it or put one prompt a line")
    return lines


def _from_csv(text: str, source: str) -> list[Prompt]:
    _lines(text, source)
    reader = csv.DictReader(io.StringIO(text.removeprefix("\ufeff"), newline=""))
    columns = {str(name).strip().lower(): name for name in reader.fieldnames or []}
    column = next((columns[key] for key in _TEXT_KEYS if key in columns), None)
    if column is None:
        raise ValueError(f"{source} has the columns {list(columns)}; one must be called {' or '.join(_TEXT_KEYS)}, in the first line")
    weight, image = columns.get("weight"), next((columns[key] for key in _IMAGE_KEYS if key in columns), None)
    try:
        rows = [(reader.line_num, row) for row in reader]
    except csv.Error as error:
        raise ValueError(f"{source} cannot be read as CSV near line {reader.line_num + 1} ({error}); look for a quotation mark that is never closed") from error
    return _entries(
        (f"{source} line {number}", {"prompt": row[column] or "", "weight": (row[weight] if weight else None) or 1, "image": row[image] if image else ""})
        for number, row in rows
    )


def _loads(text: str, source: str, line: int | None = None) -> Any:
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        at = f" line {line}" if line else ""
        raise ValueError(f"{source}{at} is not JSON ({error}); a list of texts is enough") from error


def _from_json(text: str, source: str) -> list[Prompt]:
    values = _loads(text.removeprefix("\ufeff"), source)
    if isinstance(values, dict):
        values = values.get("prompts")
    if not isinstance(values, list):
        raise ValueError(f"{source} must hold a list of prompts (or an object with a list called prompts)")
    return _entries((f"{source} entry {index}", value) for index, value in enumerate(values, 1))


def _entries(values: Iterable[tuple[str, Any]]) -> list[Prompt]:
    """Prompts of values that come with the place where they stand; those without text are dropped."""
    return [prompt for where, value in values if (prompt := _entry(value, where))]


def _entry(value: Any, where: str) -> Prompt | None:
    if isinstance(value, dict):
        text = next((value[key] for key in _TEXT_KEYS if key in value), None)
        weight = value.get("weight", 1)
        image = next((value[key] for key in _IMAGE_KEYS if value.get(key)), "")
    else:
        text, weight, image = value, 1, ""
    if not isinstance(text, str):
        raise ValueError(f"{where} holds no prompt; give a text or an object with one of the keys {', '.join(_TEXT_KEYS)}")
    if len(text) > MAX_PROMPT_CHARACTERS:
        raise ValueError(f"{where} has {len(text)} characters, the limit is {MAX_PROMPT_CHARACTERS}; shorten it")
    if not text.strip():
        return None
    try:
        number = float(weight)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where} has the weight {weight!r}; give a positive number") from error
    if not isinstance(image, str):
        raise ValueError(f"{where} has the image {image!r}; give the path of a picture, or nothing")
    return Prompt(text=text.strip(), weight=number, image=image.strip())


def _merged(prompts: list[Prompt], source: str, folder: Path | None = None) -> list[Prompt]:
    """Each prompt and start image once, with the sum of its weights; pictures looked up beside the file."""
    weights: dict[tuple[str, str], float] = {}
    for prompt in prompts:
        key = prompt.text, _picture(prompt.image, folder or Path(), source) if prompt.image else ""
        weights[key] = weights.get(key, 0.0) + prompt.weight
    if not weights:
        raise ValueError(f"{source} holds no prompt; write at least one")
    return [Prompt(text=text, weight=weight, image=image) for (text, image), weight in weights.items()]


def _picture(name: str, folder: Path, source: str) -> str:
    path = Path(name).expanduser()
    path = path if path.is_absolute() else folder / path
    if not path.is_file():
        raise ValueError(f"{source} names the start image {name!r}, but there is no file {path}; correct the path")
    return str(path.absolute())


class PromptSampler:
    """Draws prompts for every update as a function of (seed, position) alone, so a resumed run draws what it would have drawn.

    Equal weights: every prompt once per pass, in an order of its own each pass. Other weights: independent weighted draws.
    """

    def __init__(self, prompts: Sequence[Prompt], seed: int) -> None:
        self._prompts = list(prompts)
        self._seed = seed
        self._is_uniform = len({prompt.weight for prompt in prompts}) == 1
        self._pass: tuple[int, list[int]] = (-1, [])

    def draw(self, start: int, count: int) -> list[str]:
        """Prompts number `start` to `start + count` of the endless stream."""
        return [self._prompts[self._index(position)].text for position in range(start, start + count)]

    def _index(self, position: int) -> int:
        if not self._is_uniform:
            weights = [prompt.weight for prompt in self._prompts]
            return random.Random(derived_seed(self._seed, "weighted", position)).choices(range(len(weights)), weights)[0]
        number, offset = divmod(position, len(self._prompts))
        if self._pass[0] != number:
            order = list(range(len(self._prompts)))
            random.Random(derived_seed(self._seed, "pass", number)).shuffle(order)
            self._pass = (number, order)
        return self._pass[1][offset]


def derived_seed(seed: int, *parts: str | int) -> int:
    """A seed in [0, 2^63) that depends on all arguments, equal on every machine."""
    text = "/".join(str(part) for part in (seed, *parts))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1

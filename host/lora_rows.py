"""Rows of the LoRA node: reading them from the widget's text, and refusing what cannot work before anything starts."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass

from . import paths

MAX_STRENGTH = 100.0  # the range of the host's own LoRA loaders
ROW_KEYS = ("on", "file", "high", "low")


@dataclass(frozen=True, kw_only=True)
class LoraRow:
    """One row: a LoRA file with a strength for each expert."""

    file: str
    high: float
    low: float
    on: bool = True

    def strength(self, expert: str) -> float:
        """Return the strength for `high` or `low`."""
        return self.high if expert == "high" else self.low


def parse_rows(text: str) -> list[LoraRow]:
    """Read the rows of the widget.

    Args:
        text: JSON list of `{"on": bool, "file": str, "high": number, "low": number}`. Empty text is no rows. Left-out strengths are 0.

    Returns:
        The rows in order, those that are switched off too.

    Raises:
        ValueError: Not JSON, not a list of objects, an unknown name, no file, or a strength that is no finite number within ±100.
    """
    if not text.strip():
        return []
    try:
        entries = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"The LoRA rows are not JSON ({error}). Write a list such as {_example()}.") from error
    if not isinstance(entries, list):
        raise ValueError(f"The LoRA rows must be a list, not {type(entries).__name__}. Write a list such as {_example()}.")
    return [_row(number, entry) for number, entry in enumerate(entries, start=1)]


def check_rows(text: str | None) -> bool | str:
    """Check the rows the way the host's `validate_inputs` wants it.

    Args:
        text: The widget's text; None when it is linked and not known yet.

    Returns:
        True, or the message to show on the node.
    """
    if text is None:
        return True
    try:
        for row in parse_rows(text):
            if row.on:
                paths.model_path("loras", row.file)
    except ValueError as error:
        return str(error)
    return True


def fingerprint(text: str | None) -> str:
    """Return a text that changes when the rows change or one of their files does."""
    parts = [text or ""]
    try:
        for row in parse_rows(text or ""):
            status = paths.model_path("loras", row.file).stat() if row.on else None
            parts.append(f"{status.st_mtime_ns}:{status.st_size}" if status else "off")
    except ValueError as error:
        parts.append(str(error))
    return "|".join(parts)


def _row(number: int, entry: object) -> LoraRow:
    """Check one entry of the list."""
    if not isinstance(entry, dict):
        raise ValueError(f"LoRA row {number} must be an object, not {entry!r}. Write a list such as {_example()}.")
    unknown = sorted(set(entry) - set(ROW_KEYS))
    if unknown:
        raise ValueError(f"LoRA row {number} has the unknown name {unknown[0]!r}. Allowed are {', '.join(ROW_KEYS)}.")
    is_on = entry.get("on", True)
    if not isinstance(is_on, bool):
        raise ValueError(f"LoRA row {number}: 'on' is {is_on!r}; it must be true or false.")
    file = entry.get("file", "")
    if not isinstance(file, str) or (is_on and not file):
        raise ValueError(f"LoRA row {number} has no file. Choose one of models/loras, or switch the row off.")
    return LoraRow(file=file, high=_strength(number, entry, "high"), low=_strength(number, entry, "low"), on=is_on)


def _strength(number: int, entry: dict, expert: str) -> float:
    """Check one strength."""
    value = entry.get(expert, 0.0)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or abs(value) > MAX_STRENGTH:
        raise ValueError(
            f"LoRA row {number} ({entry.get('file', '')}): strength {expert} is {value!r}; it must be a number from {-MAX_STRENGTH:g} to {MAX_STRENGTH:g}."
        )
    return float(value)


def _example() -> str:
    return '[{"on": true, "file": "x.safetensors", "high": 0.5, "low": 0.5}]'

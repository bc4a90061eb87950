"""Rows of the LoRA node: reading them from the widget's text, and refusing what cannot work before anything starts."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field

from . import paths
from .sigma_curve import SigmaCurve, parse_curve

MAX_STRENGTH = 100.0  # the range of the host's own LoRA loaders
ROW_KEYS = ("on", "file", "high", "low", "curve", "blocks", "application")
APPLICATIONS = ("auto", "merged", "bypass")


@dataclass(frozen=True, kw_only=True)
class LoraRow:
    """One row: a LoRA file with a strength for each expert.

    Attributes:
        file: Name in the host's LoRA folder.
        high: Strength on the high-noise expert.
        low: Strength on the low-noise expert.
        on: False leaves the row out.
        curve: Factor on both strengths over sigma.
        blocks: Factors per block, as text (`block_strengths`); empty is 1 everywhere.
        application: `merged` or `bypass` for this row; empty follows the node.
    """

    file: str
    high: float
    low: float
    on: bool = True
    curve: SigmaCurve = field(default_factory=SigmaCurve)
    blocks: str = ""
    application: str = ""

    def strength(self, expert: str) -> float:
        """Return the strength for `high` or `low`."""
        return self.high if expert == "high" else self.low


def parse_rows(text: str) -> list[LoraRow]:
    """Read the rows of the widget.

    Args:
        text: JSON list of `{"on": bool, "file": str, "high": number, "low": number}`, each with `"curve"`, `"blocks"` and `"application"` (texts) if
            wanted. Empty text is no rows. Left-out strengths are 0.

    Returns:
        The rows in order, those that are switched off too.

    Raises:
        ValueError: Not JSON, not a list of objects, an unknown name, no file, a strength that is no finite number within ±100, or a
            curve or application that is none.
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


def check_rows(text: str | None, application: str | None = "auto") -> bool | str:
    """Check the rows the way the host's `validate_inputs` wants it.

    Args:
        text: The widget's text; None when it is linked and not known yet.
        application: The node's `application`; None when it is linked.

    Returns:
        True, or the message to show on the node.
    """
    if text is None:
        return True
    try:
        for row in parse_rows(text):
            if row.on:
                paths.model_path("loras", row.file)
                application_of(row, application or "auto")
    except ValueError as error:
        return str(error)
    return True


def application_of(row: LoraRow, application: str) -> str:
    """Return how a row is to be applied: its own wish, else the node's.

    Raises:
        ValueError: A strength over sigma is to be merged: merged weights are the same at every sigma.
    """
    wanted = row.application or application
    if wanted == "merged" and not row.curve.is_constant():
        raise ValueError(f"{row.file} has a strength over sigma, which cannot be merged into the weights. Set application to 'auto' or 'bypass'.")
    return wanted


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
    texts = {name: entry.get(name, "") for name in ("curve", "blocks", "application")}
    for name, value in texts.items():
        if not isinstance(value, str):
            raise ValueError(f"LoRA row {number}: {name!r} is {value!r}; it must be text.")
    if texts["application"] not in ("", *APPLICATIONS):
        raise ValueError(f"LoRA row {number}: 'application' is {texts['application']!r}; it must be one of {', '.join(APPLICATIONS)}, or empty.")
    try:
        curve = parse_curve(texts["curve"])
    except ValueError as error:
        raise ValueError(f"LoRA row {number}: {error}") from error
    strengths = {expert: _strength(number, entry, expert) for expert in ("high", "low")}
    return LoraRow(file=file, on=is_on, curve=curve, blocks=texts["blocks"].strip(), application=texts["application"], **strengths)


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

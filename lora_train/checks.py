"""Checks of single settings; each message names the setting, its value and what is allowed. No torch."""

from __future__ import annotations

import math
import re

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


def require(condition: bool, message: str) -> None:
    """Raise ValueError with `message` unless `condition` holds."""
    if not condition:
        raise ValueError(message)


def whole(name: str, value: int, least: int) -> None:
    """Refuse a number below `least`."""
    require(value >= least, f"{name} is {value}, but it must be a whole number of at least {least}")


def number(name: str, value: float, *, above: float | None = None, least: float | None = None, most: float | None = None) -> None:
    """Refuse a number that is not finite or out of bounds."""
    require(math.isfinite(value), f"{name} is {value}, but it must be a finite number")
    require(above is None or value > above, f"{name} is {value}, but it must be greater than {above}")
    require(least is None or value >= least, f"{name} is {value}, but it must be at least {least}")
    require(most is None or value <= most, f"{name} is {value}, but it must be at most {most}")


def choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    """Refuse a word that is not among `allowed`."""
    require(value in allowed, f"{name} is {value!r}, but it must be one of: {', '.join(allowed)}")


def name(value: str) -> None:
    """Refuse the name of a run that no file could have."""
    rule = "letters, digits, '.', '_' and '-', at most 100 of them, starting with a letter or a digit"
    require(_NAME.fullmatch(value) is not None, f"name is {value!r}, but file names are made of it: use {rule}")

"""Builds nested frozen dataclasses from plain JSON values, with errors that name the setting and the nearest known one."""

from __future__ import annotations

import difflib
import types
import typing
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, TypeVar

Built = TypeVar("Built")


def build(kind: type[Built], values: Any, where: str) -> Built:
    """Make a `kind` from a dictionary.

    Args:
        kind: a dataclass; its fields may be str, int, float, bool, dict, tuples of these, or further dataclasses. Where one of these names a field as
            its `SHORT_FORM`, a plain text may stand for it.
        where: dotted name of the setting, for messages; empty at the top.

    Raises:
        ValueError: not a dictionary, an unknown or a missing key, or a value of a wrong type.
    """
    title = where or "the settings"
    if not isinstance(values, dict):
        raise ValueError(f"{title} must be an object with named values, not {_shown(values)}")
    hints = typing.get_type_hints(kind)
    known = {entry.name: entry for entry in fields(kind)}
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.0)
            raise ValueError(f"unknown setting {_join(where, key)!r}; the nearest known one is {_join(where, near[0])!r}")
    missing = [name for name, entry in known.items() if entry.default is MISSING and entry.default_factory is MISSING and name not in values]
    if missing:
        raise ValueError(f"{title} lacks {', '.join(repr(_join(where, name)) for name in missing)}")
    return kind(**{key: _convert(hints[key], value, _join(where, key)) for key, value in values.items()})


def _join(where: str, key: Any) -> str:
    return f"{where}.{key}" if where else str(key)


def _shown(value: Any) -> str:
    return f"{type(value).__name__} {str(value)[:60]!r}"


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin = typing.get_origin(hint)
    if is_dataclass(hint):
        short_form = getattr(hint, "SHORT_FORM", None)
        return build(hint, {short_form: value} if short_form and isinstance(value, str) else value, where)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise ValueError(f"{where} must be a list, not {_shown(value)}")
        item = typing.get_args(hint)[0]
        return tuple(_convert(item, entry, f"{where}[{index}]") for index, entry in enumerate(value))
    if origin is dict:
        if not isinstance(value, dict):
            raise ValueError(f"{where} must be an object with named values, not {_shown(value)}")
        return dict(value)
    if origin in (typing.Union, types.UnionType):
        inner = [entry for entry in typing.get_args(hint) if entry is not type(None)]
        return None if value is None else _convert(inner[0], value, where)
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError as error:
            raise ValueError(f"{where} has {len(str(abs(value)))} digits, which no computer's number holds; give a smaller one") from error
    if hint is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    names = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}
    raise ValueError(f"{where} must be {names.get(hint, hint)}, not {_shown(value)}")

"""What a run learns from, written down in its folder when it begins, so that a run that goes on tells when that has become something else.

A resumed run gives the bytes of an uninterrupted one only with the same data. These may change for a good reason (videos are labelled while a run trains), so a
run goes on with what there is now and says what is different: in its log and in its `started` event.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from . import checkpoint

FILE = "learned_from.json"
_SHOWN = 5
Items = Mapping[str, Mapping[str, Any]]


def changes(folder: Path, now: Items) -> str:
    """Compare what a run learns from with what it began with; a run that has made no update yet begins now.

    Args:
        folder: of the run.
        now: facts (texts, numbers, lists) of everything that is learned from, by its name, in the order in which it is drawn from.

    Returns:
        What has changed, in a sentence; empty where nothing did.
    """
    path = folder / FILE
    if checkpoint.latest_step(folder) == 0 or not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(now, indent=0, ensure_ascii=False), encoding="utf-8")
        partial.replace(path)
        return ""
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        return f"whether the run goes on with the data that it began with is not known: {path} cannot be read ({error})"
    told = _differences(before, json.loads(json.dumps(now)))
    if not told:
        return ""
    return f"the run goes on with other data than it began with, so it does not give what an uninterrupted one would: {'; '.join(told)}"


def _differences(before: Items, now: Items) -> list[str]:
    gone, new = [name for name in before if name not in now], [name for name in now if name not in before]
    both = [name for name in now if name in before]
    changed = [f"{name}: {_fact_changes(before[name], now[name])}" for name in both if before[name] != now[name]]
    told = [f"{len(names)} {what} ({shown(names)})" for names, what in ((gone, "gone"), (new, "new"), (changed, "changed")) if names]
    if not told and list(before) != list(now):
        told.append("they stand in another order")
    return told


def _fact_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {before.get(name)} -> {now.get(name)}" for name in {**before, **now} if before.get(name) != now.get(name))


def shown(names: Iterable[str]) -> str:
    """The first names of a list, for a message."""
    names = list(names)
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")

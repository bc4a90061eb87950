"""Which settings decide what a run learns, wherever its files lie, and where two runs' settings differ. No torch.

A file or a folder counts by its name, so that a run goes on after its models, or everything, were moved. Whether a file of that name is the same one, its
size tells (`file_bytes`): two files of one name and one size are not told apart, for reading 28 GB experts whole to find out would cost minutes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any

_WEIGHTS = frozenset({"high", "low", "text_encoder", "vae", "trunk", "path", "image"})
# Equal to reward_models.spec.FILE_OPTIONS, which this layer may not import, and the sizes' file; a test compares them.
REWARD_OPTIONS = frozenset({"clip", "detector", "landmarks", "reference", "query", "head", "generator", "config"})
DATA = frozenset({"source", "annotations", "pairs", "losers", "validation"})  # of PAVRM training
_SHOWN_CHARACTERS = 80


def portable(values: Any, name: str = "") -> Any:
    """The settings with the names of files in place of their paths. `name`: of the setting that holds `values`."""
    if isinstance(values, Mapping):
        return {key: portable(value, key) for key, value in values.items()}
    if isinstance(values, list):
        return [portable(value) for value in values]
    return Path(values).name if _is_path(name, values) else values


def digest(values: Mapping[str, Any]) -> str:
    """SHA-256 of settings."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def is_of(found: str, settings: Mapping[str, Any]) -> bool:
    """Whether a hash is of settings; older versions made theirs over whole paths."""
    return found in (digest(portable(settings)), digest(settings))


def file_bytes(values: Mapping[str, Any]) -> dict[str, int]:
    """Sizes of the files of models, rewards and start images that are there, by setting, such as `models.high`.

    Clips and labels may become more while a run trains.
    """
    named = ((where, Path(value)) for where, name, value in _leaves(values) if where != "real.path" and name not in DATA and _is_path(name, value))
    return {where: path.stat().st_size for where, path in named if path.is_file()}


def completed(old: Mapping[str, Any], config: Any, names: Iterable[str]) -> dict[str, Any]:
    """What a state of an older version tells, with the defaults of settings that it did not have.

    Args:
        config: settings as a dataclass, of which only the defaults are used.
        names: of the settings that are compared.
    """
    defaults = {entry.name: entry.default for entry in fields(config) if entry.default is not MISSING}
    found = {name: defaults[name] for name in names if name in defaults} | dict(old)
    for name in names:
        section, value = getattr(config, name), found.get(name, {})
        if is_dataclass(section) and isinstance(value, Mapping):
            found[name] = completed(value, section, [entry.name for entry in fields(section)])
    return json.loads(json.dumps(found))


def differences(old: Any, new: Any, where: str = "") -> list[str]:
    """A phrase for each setting whose value is another: its dotted name, what it was, and what it is."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        names = dict.fromkeys([*old, *new])
        return [phrase for name in names for phrase in differences(old.get(name), new.get(name), f"{where}.{name}" if where else name)]
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        return [phrase for index, pair in enumerate(zip(old, new, strict=True)) for phrase in differences(*pair, f"{where}[{index}]")]
    if isinstance(old, list) and isinstance(new, list) and any(isinstance(entry, Mapping) for entry in (*old, *new)):
        return [f"{where} had {len(old)} entries and has {len(new)}"]
    return [] if old == new else [f"{where} was {_shown(old)} and is {_shown(new)}"]


def _leaves(values: Any, where: str = "", name: str = "") -> Iterator[tuple[str, str, Any]]:
    """Dotted name, last name and value of every single setting."""
    if isinstance(values, Mapping):
        for key, value in values.items():
            yield from _leaves(value, f"{where}.{key}" if where else key, key)
    elif isinstance(values, list):
        for index, value in enumerate(values):
            yield from _leaves(value, f"{where}[{index}]")
    else:
        yield where, name, values


def _is_path(name: str, value: Any) -> bool:
    # A CLIP's sizes may be written out as JSON in place of a file's name.
    return name in _WEIGHTS | REWARD_OPTIONS | DATA and isinstance(value, str) and bool(value) and not value.lstrip().startswith("{")


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}..."

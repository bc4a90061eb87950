"""Results of the learning bench as small files of the repository, so that it is completed in pieces, on any machine and at any time.

`<folder>/<experiment>-<seed>.json`: what was trained (a hash of its settings), where and when, its cost, its curve (at most `POINTS` means of windows), and
every measure of every held-out video, in the order in which all runs of that seed were judged, so that differences stay paired.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..lora_train.presets import with_preset

POINTS = 40


def path(folder: Path, name: str, seed: int) -> Path:
    """Where a result lies."""
    return folder / f"{name}-{seed}.json"


def recipe(values: Mapping[str, Any], budget: float, pairs: int) -> str:
    """Hash of everything that a result depends on: settings as they were given (files by their names, since folders differ), budget, pairs judged."""
    kept = {key: value for key, value in with_preset(dict(values)).items() if key not in ("checkpoint_every", "keep_checkpoints")}
    settings = json.dumps([_by_name(kept), budget, pairs], sort_keys=True)
    return hashlib.sha256(settings.encode()).hexdigest()[:16]


def _by_name(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _by_name(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_by_name(entry) for entry in value]
    return Path(value).name if isinstance(value, str) and value.endswith(".safetensors") else value


def write(folder: Path, result: Mapping[str, Any]) -> None:
    """Keep a result; a killed process leaves the old file or the new one.

    Args:
        result: experiment, seed, recipe, oracle, and for trainings curve, looks, forwards, updates, reason, detail, seconds.
    """
    folder.mkdir(parents=True, exist_ok=True)
    made = {
        "date": datetime.date.today().isoformat(),
        "hardware": f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}",
    }
    packed = {**result, "made": result.get("made", made), "oracle": _packed(result["oracle"])}
    if "curve" in result:
        packed["curve"] = columns(_windows(result["curve"]))
        packed["looks"] = [{**look, "oracle": _packed(look["oracle"])} for look in result["looks"]]
    target = path(folder, result["experiment"], result["seed"])
    partial = target.with_suffix(".partial")
    partial.write_text(json.dumps(packed, indent=1) + "\n", encoding="utf-8")
    partial.replace(target)


def read(folder: Path) -> dict[str, dict[int, dict[str, Any]]]:
    """Results by experiment and seed, with lists of numbers."""
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for file in sorted(folder.glob("*.json")):
        result = read_one(file)
        found.setdefault(result["experiment"], {})[result["seed"]] = result
    return found


def read_one(file: Path) -> dict[str, Any]:
    """One result."""
    result = json.loads(file.read_text(encoding="utf-8"))
    result["oracle"] = _unpacked(result["oracle"])
    if "curve" in result:
        result["curve"] = {name: [None if word == "-" else float(word) for word in text.split()] for name, text in result["curve"].items()}
        result["looks"] = [{**look, "oracle": _unpacked(look["oracle"])} for look in result["looks"]]
    return result


def _packed(oracle: Mapping[str, Sequence[float]]) -> dict[str, str]:
    return {name: " ".join(f"{value:.5g}" for value in values) for name, values in oracle.items()}


def _unpacked(oracle: Mapping[str, str]) -> dict[str, list[float]]:
    return {name: [float(word) for word in text.split()] for name, text in oracle.items()}


def columns(curve: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """A curve by column, each as one line of numbers; columns without any are left out."""
    found = {}
    for name in curve[0] if curve else ():
        values = [point[name] for point in curve]
        if any(value is not None for value in values):
            found[name] = " ".join("-" if value is None else f"{value:.5g}" for value in values)
    return found


def _windows(curve: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Means over stretches of equal length; a window ends at the update and the cost of its last point."""
    length = max(1, -(-len(curve) // POINTS))
    out = []
    for start in range(0, len(curve), length):
        part = curve[start : start + length]
        point = {}
        for name in part[0]:
            values = [entry[name] for entry in part if entry[name] is not None]
            point[name] = sum(values) / len(values) if values else None
        out.append({**point, "step": part[-1]["step"], "forwards": part[-1]["forwards"]})
    return out

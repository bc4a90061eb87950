"""Sums up the learning bench: paired gains over the base with their standard errors, the goals with what was measured, and a picture."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .learning_experiments import BASE, BUDGET, EXPERIMENTS

_DIRECTIONS = (
    ("hy-video-prfl", 1, "PRFL raises the"),
    ("prfl-logit", 1, "PRFL on the logit alone raises the"),
    ("videox-fun-high", -1, "a reward of the first frame lowers the"),
)  # fmt: skip
MEASURES = ("reward", "text", "colour", "shape", "motion", "dynamic_degree", "flicker", "pavrm")
_RIVALS = ("videox-fun-high", "videox-fun-low", "hy-video-prfl")
_SHOWN = {"reward": "HPS reward", "text": "colour and shape right", "motion": "motion right", "dynamic_degree": "dynamic degree, px/frame"}


def read(work: Path) -> dict[str, dict[int, dict[str, Any]]]:
    """Results by experiment and seed."""
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for path in sorted(work.glob("*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        found.setdefault(result["experiment"], {})[result["seed"]] = result
    return found


def gains(runs: Mapping[int, Mapping[str, Any]], base: Mapping[int, Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Paired differences to the base over all seeds: the same prompts and noise."""
    out = {}
    for measure in MEASURES:
        pairs = [np.array(runs[seed]["oracle"][measure]) - np.array(base[seed]["oracle"][measure]) for seed in sorted(runs) if seed in base]
        difference = np.concatenate(pairs)
        mean = float(difference.mean())
        out[measure] = {"mean": mean, "standard_error": float(difference.std(ddof=1) / len(difference) ** 0.5), "pairs": len(difference)}
    return out


def summary(found: Mapping[str, Mapping[int, Mapping[str, Any]]]) -> dict[str, Any]:
    """Means, gains and cost of every experiment."""
    base, out = found[BASE], {}
    for name, runs in found.items():
        means = {measure: float(np.concatenate([np.array(run["oracle"][measure]) for run in runs.values()]).mean()) for measure in MEASURES}
        out[name] = {"seeds": sorted(runs), "mean": means}
        if name != BASE:
            forwards = sum(run["forwards"] for run in runs.values()) / len(runs)
            gained = gains(runs, base)
            out[name] |= {
                "preset": EXPERIMENTS[name].preset if name in EXPERIMENTS else "",
                "forwards": forwards,
                "updates": sum(run["updates"] for run in runs.values()) / len(runs),
                "gain": gained,
                "reward_gain_per_1000_forwards": 1000 * gained["reward"]["mean"] / forwards,
            }
    return out


def goals(table: Mapping[str, Any], found: Mapping[str, Mapping[int, Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """What was aimed at, what was measured, and whether it was reached."""
    ours, out = table.get("reward-lab"), []
    rivals = {name: table[name] for name in _RIVALS if name in table}
    if ours and rivals:
        best = max(rivals, key=lambda name: rivals[name]["reward_gain_per_1000_forwards"])
        ratio = ours["reward_gain_per_1000_forwards"] / max(1e-9, rivals[best]["reward_gain_per_1000_forwards"])
        out.append(_goal("reward gain per DiT forward at least twice that of the better published preset", ratio >= 2, f"{ratio:.2f} x {best}"))
        alike = max((name for name in rivals if name.startswith("videox-fun")), key=lambda name: rivals[name]["reward_gain_per_1000_forwards"], default=None)
        if alike:
            ratio = ours["reward_gain_per_1000_forwards"] / max(1e-9, rivals[alike]["reward_gain_per_1000_forwards"])
            out.append(_goal("the same against videox-fun alone, which like reward-lab sees no real videos", ratio >= 2, f"{ratio:.2f} x {alike}"))
        text = {name: 100 * entry["gain"]["text"]["mean"] for name, entry in {**rivals, "reward-lab": ours}.items()}
        is_met = text["reward-lab"] >= 10 and all(text["reward-lab"] >= value for value in text.values())
        out.append(_goal("colour and shape right: 10 points above the base, and no preset above", is_met, _points(text)))
        for measure in ("motion", "dynamic_degree"):
            gain = ours["gain"][measure]
            scale, unit = (100, " points") if measure == "motion" else (1, " px/frame")
            shown = f"{scale * gain['mean']:+.2f} ± {scale * gain['standard_error']:.2f}{unit}"
            out.append(_goal(f"{measure} of reward-lab not below the base (within one standard error)", gain["mean"] >= -gain["standard_error"], shown))
    for name, sign, words in _DIRECTIONS:
        if name in table:
            gain = table[name]["gain"]["dynamic_degree"]
            is_sure = sign * gain["mean"] >= 2 * gain["standard_error"]
            out.append(_goal(f"{words} dynamic degree (by two standard errors)", is_sure, f"{gain['mean']:+.3f} ± {gain['standard_error']:.3f} px/frame"))
    for name in ("mps-low-reward-lab", "mps-low-videox-fun"):
        if name in table:
            gain = table[name]["gain"]
            shown = f"HPS {gain['reward']['mean']:+.4f}, text {100 * gain['text']['mean']:+.1f} points; training reward {_ends(found[name])}"
            is_sure = gain["text"]["mean"] >= 2 * gain["text"]["standard_error"]
            out.append(_goal(f"low-noise MPS, {name.removeprefix('mps-low-')}: better videos (by two standard errors)", is_sure, shown))
    if "guarded-5x" in table:
        out.append(_guarded(found["guarded-5x"], found[BASE]))
    return out


def _goal(words: str, is_met: bool, measured: str) -> dict[str, Any]:
    return {"goal": words, "met": bool(is_met), "measured": measured}


def _points(values: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:+.1f}" for name, value in values.items())


def _ends(runs: Mapping[int, Mapping[str, Any]]) -> str:
    parts = []
    for run in runs.values():
        rewards = [point["reward"] for point in run["curve"]]
        fifth = max(1, len(rewards) // 5)
        parts.append(f"{sum(rewards[:fifth]) / fifth:.3f} to {sum(rewards[-fifth:]) / fifth:.3f}")
    return ", ".join(parts)


def _guarded(runs: Mapping[int, Mapping[str, Any]], base: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
    (run,) = runs.values()
    start = float(np.mean(base[run["seed"]]["oracle"]["text"]))
    looks = {step: values["text"] for step, values in run["looks"].items()}
    shown = ", ".join(f"update {int(step)}: {100 * value:.0f} %" for step, value in looks.items())
    final = float(np.mean(run["oracle"]["text"]))
    is_met = final >= start and all(value >= start for value in looks.values())
    return _goal(
        "guards on, five times the budget: colour and shape never below the base", is_met,
        f"base {100 * start:.0f} %; {shown}; LoRA of the run {100 * final:.0f} %; ended: {run['reason']}. {run['detail']}".strip(),
    )  # fmt: skip


def write(work: Path, results: Path, picture: Path) -> None:
    """Write the JSON document and the picture, and print the goals.

    Raises:
        ValueError: the base has not been measured.
    """
    found = read(work)
    if BASE not in found:
        raise ValueError(f"{work} holds no {BASE}-SEED.json; run the base first: lab.py bench learning --only {BASE}")
    table = summary(found)
    reached = goals(table, found)
    document = {
        "command": "python lab.py bench learning",
        "hardware": f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}",
        "budget_forwards": BUDGET,
        "goals": reached,
        "experiments": table,
        "curves": {name: {str(seed): _columns(run["curve"]) for seed, run in runs.items()} for name, runs in found.items() if name != BASE},
    }
    results.parent.mkdir(parents=True, exist_ok=True)
    results.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    picture.parent.mkdir(parents=True, exist_ok=True)
    draw(table).save(picture, optimize=True)
    for goal in reached:
        print(f"{'reached' if goal['met'] else 'missed '}  {goal['goal']}: {goal['measured']}")
    print(f"wrote {results} and {picture}")


def _columns(curve: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """A curve by column, each as one line of numbers; columns without any are left out."""
    columns = {}
    for name in curve[0] if curve else ():
        values = [point[name] for point in curve]
        if any(value is not None for value in values):
            columns[name] = " ".join("-" if value is None else f"{value:.5g}" for value in values)
    return columns


def draw(table: Mapping[str, Mapping[str, Any]]):
    """Bars of the gains over the base, with one standard error each way."""
    from PIL import Image, ImageDraw

    from ..testlab.fonts import font
    from ..testlab.plot import BACKGROUND, BEST, GRID, MUTED, TEXT, WORST

    names = [name for name in EXPERIMENTS if name in table and len(table[name]["seeds"]) > 1]
    column, row, left, top = 250, 34, 190, 96
    sheet = Image.new("RGB", (left + column * len(_SHOWN) + 20, top + row * len(names) + 24), BACKGROUND)
    pen = ImageDraw.Draw(sheet)
    pen.text((20, 14), f"Gain over the base on held-out prompts, {BUDGET:.0f} DiT forwards each", font=font(18), fill=TEXT)
    pen.text((20, 42), f"{len(table[BASE]['seeds'])} seeds, paired; lines: one standard error", font=font(13), fill=MUTED)
    for index, name in enumerate(names):
        pen.text((20, top + row * index + row // 2), name, font=font(14), fill=TEXT, anchor="lm")
    for place, (measure, title) in enumerate(_SHOWN.items()):
        x0 = left + column * place
        entries = [table[name]["gain"][measure] for name in names]
        _bars(pen, entries, (x0 + 10, top, column - 80, row), (BEST, WORST, GRID, TEXT), font(12))
        pen.text((x0 + 10, top - 22), title, font=font(13), fill=MUTED)
    return sheet


def _bars(pen: Any, entries: Sequence[Mapping[str, float]], place: tuple[int, int, int, int], colours: Sequence[str], small: Any) -> None:
    x, y, width, row = place
    better, worse, line, text = colours
    low = min([0.0, *(entry["mean"] - entry["standard_error"] for entry in entries)])
    high = max([1e-9, *(entry["mean"] + entry["standard_error"] for entry in entries)])

    def at(value: float) -> float:
        return x + width * (value - low) / (high - low)

    pen.line((at(0), y, at(0), y + row * len(entries)), fill=line, width=2)
    for index, entry in enumerate(entries):
        middle, mean, error = y + row * index + row // 2, entry["mean"], entry["standard_error"]
        start, stop = sorted((at(0), at(mean)))
        pen.rectangle((start, middle - 8, stop, middle + 8), fill=better if mean >= 0 else worse)
        pen.line((at(mean - error), middle, at(mean + error), middle), fill=text, width=2)
        pen.text((x + width + 8, middle), f"{mean:+.3f}", font=small, fill=text, anchor="lm")

"""Sums up the learning bench: paired gains over the base with their standard errors, the goals with what was measured, and a picture."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from . import learning_page, learning_picture, learning_store
from .learning_experiments import BASE, BUDGET, CONTROL, EXPERIMENTS, MISLABELLED, OURS, RENDERED, REPLAYED, REPLAYED_BOTH

MEASURES = ("reward", "text", "colour", "shape", "motion", "dynamic_degree", "flicker", "pavrm", "mps")
_DIRECTIONS = (
    ("hy-video-prfl", 1, "PRFL raises the"),
    ("prfl-logit", 1, "PRFL on the logit alone raises the"),
    ("videox-fun-high", -1, "a reward of the first frame lowers the"),
    ("videox-fun-high-3x", -1, "the same with three times the budget lowers the"),
)  # fmt: skip
# Near its ceiling a gain is flat and its last points are noise, so costs are compared at this share of the better preset's.
_ENOUGH = 0.9
# Looks fall on whole updates, which differ in cost.
_SAME_BUDGET = 0.02
# What rewards add to clips: a method, the same without the rewards' gradient, where it is aimed at, and which clips.
_CONTROLS = (
    (OURS, CONTROL, "reward", "the clips"),
    (MISLABELLED[0], MISLABELLED[3], "reward", "clips with captions that lie"),
    (MISLABELLED[0], MISLABELLED[1], "reward", "the third of these that they pick"),
    (*REPLAYED, "reward", "the base's own clips"),
    (*REPLAYED_BOTH, "motion", "the base's own clips"),
)
_NAMES = {"reward": "HPS reward", "motion": "motion right"}
_RIVALS = ("videox-fun-high", "videox-fun-low", "hy-video-prfl")

Runs = Mapping[int, Mapping[str, Any]]


def paired(ours: Runs, theirs: Runs, measure: str) -> dict[str, float]:
    """Mean difference over all videos of the seeds that both have, the same prompts and noise, and its standard error."""
    shared = [seed for seed in sorted(ours) if seed in theirs]
    difference = np.concatenate([np.array(ours[seed]["oracle"][measure]) - np.array(theirs[seed]["oracle"][measure]) for seed in shared])
    return {"mean": float(difference.mean()), "standard_error": float(difference.std(ddof=1) / len(difference) ** 0.5), "pairs": len(difference)}


def summary(found: Mapping[str, Runs]) -> dict[str, Any]:
    """Means, gains and cost of every experiment."""
    base, out = found[BASE], {}
    for name, runs in found.items():
        measures = _measured(runs, base)
        out[name] = {"seeds": sorted(runs), "mean": {measure: _mean(run["oracle"][measure] for run in runs.values()) for measure in measures}}
        if name == BASE:
            continue
        gain = {measure: paired(runs, base, measure) for measure in measures}
        out[name]["gain"] = gain
        if name != RENDERED:
            forwards = sum(run["forwards"] for run in runs.values()) / len(runs)
            out[name] |= {
                "preset": EXPERIMENTS[name].preset if name in EXPERIMENTS else "",
                "forwards": forwards,
                "updates": sum(run["updates"] for run in runs.values()) / len(runs),
                "reward_gain_per_1000_forwards": 1000 * gain["reward"]["mean"] / forwards,
                "looks": looks(runs, base),
            }
    return out


def _measured(*several: Runs) -> list[str]:
    """What all of these runs were judged by; MPS came later than the first results."""
    return [measure for measure in MEASURES if all(measure in run["oracle"] for runs in several for run in runs.values())]


def _mean(values: Any) -> float:
    return float(np.concatenate([np.array(part) for part in values]).mean())


def looks(runs: Runs, base: Runs) -> list[dict[str, Any]]:
    """Gains at the judged checkpoints that all seeds have, and at the end."""
    steps = set.intersection(*({look["step"] for look in run["looks"]} for run in runs.values())) if runs else set()
    out = []
    for step in sorted(steps):
        at = {seed: next(look for look in run["looks"] if look["step"] == step) for seed, run in runs.items()}
        forwards = sum(look["forwards"] for look in at.values()) / len(at)
        out.append({"step": step, "forwards": forwards, "gain": {measure: paired(at, base, measure) for measure in ("reward", "text", "motion")}})
    return out


def forwards_to_reach(entry: Mapping[str, Any], gain: float) -> float | None:
    """DiT forwards after which an experiment's mean reward gain first reaches `gain`, on straight lines between its looks; None if it never does."""
    points = [(0.0, 0.0), *((look["forwards"], look["gain"]["reward"]["mean"]) for look in entry["looks"])]
    if points[-1][0] < entry["forwards"]:
        points.append((entry["forwards"], entry["gain"]["reward"]["mean"]))
    for (spent, before), (cost, after) in zip(points, points[1:], strict=False):
        if after >= gain:
            return spent + (cost - spent) * (gain - before) / (after - before) if after > before else cost
    return None


def goals(table: Mapping[str, Any], found: Mapping[str, Runs]) -> list[dict[str, Any]]:
    """What was aimed at, what was measured, and whether it was reached."""
    ours, out = table.get(OURS), []
    # Seeds differ in how much the base leaves to gain, so only rows of the same seeds are compared.
    rivals = {name: table[name] for name in _RIVALS if ours and name in table and table[name]["seeds"] == ours["seeds"]}
    if ours and rivals:
        out += _cost_goals(table, ours, rivals)
        text = {name: 100 * entry["gain"]["text"]["mean"] for name, entry in {**rivals, OURS: ours}.items()}
        is_met = text[OURS] >= 10 and all(text[OURS] >= value for value in text.values())
        out.append(_goal("colour and shape right: 10 points above the base, and no preset above", is_met, _points(text)))
        for measure in ("motion", "dynamic_degree"):
            gain = ours["gain"][measure]
            is_met = gain["mean"] >= -gain["standard_error"]
            out.append(_goal(f"{measure} of {OURS} not below the base (within one standard error)", is_met, _told(gain, measure)))
    out += _mislabelled_goal(table)
    without, alike = table.get(REPLAYED[0]), table.get("videox-fun-high")
    if without and alike and without["seeds"] == alike["seeds"]:
        ratio = without["reward_gain_per_1000_forwards"] / max(1e-9, alike["reward_gain_per_1000_forwards"])
        text = _points({name: 100 * table[name]["gain"]["text"]["mean"] for name in (REPLAYED[0], "videox-fun-high")})
        words = "without real clips, reward gain at the equal budget at least twice that of videox-fun, which has none either"
        out.append(_goal(words, ratio >= 2, f"{ratio:.2f} x; colour and shape {text}"))
    for name, control, aimed, words in _CONTROLS:
        if name in found and control in found and set(found[name]) & set(found[control]):
            parts = {measure: paired(found[name], found[control], measure) for measure in ("reward", "text", "motion", "dynamic_degree")}
            is_sure = parts[aimed]["mean"] >= 2 * parts[aimed]["standard_error"]
            shown = ", ".join(f"{measure} {_told(part, measure)}" for measure, part in parts.items())
            out.append(_goal(f"rewards add to what {words} teach: {name} above {control} in {_NAMES[aimed]} (by two standard errors)", is_sure, shown))
    for name, sign, words in _DIRECTIONS:
        if name in table:
            gain = table[name]["gain"]["dynamic_degree"]
            is_sure = sign * gain["mean"] >= 2 * gain["standard_error"]
            out.append(_goal(f"{words} dynamic degree (by two standard errors)", is_sure, _told(gain, "dynamic_degree")))
    for name in ("mps-low-reward-lab-backprop", "mps-low-reward-lab", "mps-low-videox-fun"):
        gain = table[name]["gain"] if name in table else {}
        if "mps" in gain:
            ends = ", ".join("{:.2f} to {:.2f}".format(*_held_out(run["curve"])) for run in found[name].values())
            shown = f"MPS {_told(gain['mps'], 'mps')}, text {_told(gain['text'], 'text')}; curves: {ends}"
            words = f"low-noise MPS, {name.removeprefix('mps-low-')}: MPS of the judged videos rises (by two standard errors)"
            out.append(_goal(words, gain["mps"]["mean"] >= 2 * gain["mps"]["standard_error"], shown))
    if "guarded-5x" in table:
        out.append(_guarded(found["guarded-5x"], found[BASE]))
    return out


def _cost_goals(table: Mapping[str, Any], ours: Mapping[str, Any], rivals: Mapping[str, Any]) -> list[dict[str, Any]]:
    best = max(rivals, key=lambda name: rivals[name]["reward_gain_per_1000_forwards"])
    ratio = ours["reward_gain_per_1000_forwards"] / max(1e-9, rivals[best]["reward_gain_per_1000_forwards"])
    ceiling = table[RENDERED]["gain"]["reward"]["mean"] if RENDERED in table else None
    most = f"; rendered truth, {ceiling:+.3f}, would be {ceiling / rivals[best]['gain']['reward']['mean']:.2f} x" if ceiling else ""
    out = [_goal("reward gain at the equal budget at least twice that of the better published preset", ratio >= 2, f"{ratio:.2f} x {best}{most}")]
    out += _early_goal(ours, rivals)
    target = _ENOUGH * rivals[best]["gain"]["reward"]["mean"]
    reached, theirs = forwards_to_reach(ours, target), forwards_to_reach(rivals[best], target)
    is_met = reached is not None and 2 * reached <= theirs
    shown = f"{reached:.0f} against {theirs:.0f} forwards: {theirs / reached:.1f} x {best}" if reached else f"never reaches {target:+.3f}"
    words = f"forwards to {100 * _ENOUGH:.0f} % of what the better published preset gains in the end: at most half of what it takes"
    return [*out, _goal(words, is_met, shown)]


def _mislabelled_goal(table: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The goal of cost where the clips' captions lie and the rewards pick; `videox-fun` reads no clips, so its row is the same."""
    ours = table.get(MISLABELLED[0])
    rivals = {name: table[name] for name in (MISLABELLED[4], "videox-fun-high") if ours and name in table and table[name]["seeds"] == ours["seeds"]}
    if MISLABELLED[4] not in rivals:
        return []
    best = max(rivals, key=lambda name: rivals[name]["gain"]["reward"]["mean"])
    gains = [entry["gain"]["reward"]["mean"] for entry in (ours, rivals[best])]
    ratio = gains[0] / max(1e-9, gains[1])
    text = _points({name: 100 * table[name]["gain"]["text"]["mean"] for name in (MISLABELLED[0], best)})
    words = "the same where the clips' captions lie as often as those of the base did, with real.keep 0.33"
    return [_goal(words, ratio >= 2, f"{gains[0]:+.4f} against {gains[1]:+.4f}: {ratio:.1f} x {best}; colour and shape {text}")]


def _early_goal(ours: Mapping[str, Any], rivals: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The same where nobody is near the ceiling yet: at our first look. A rival without a look there is taken to have its final gain already."""
    if not ours["looks"]:
        return []
    look, gains = ours["looks"][0], {}
    for name, entry in rivals.items():
        near = [other for other in entry["looks"] if abs(other["forwards"] / look["forwards"] - 1) < _SAME_BUDGET]
        gains[name] = (near[0] if near else entry)["gain"]["reward"]["mean"]
    best = max(gains, key=lambda name: gains[name])
    ratio = look["gain"]["reward"]["mean"] / max(1e-9, gains[best])
    shown = f"{look['gain']['reward']['mean']:+.4f} against {gains[best]:+.4f}: {ratio:.1f} x {best}"
    return [_goal(f"the same after {look['forwards']:.0f} forwards, where none is near the ceiling yet", ratio >= 2, shown)]


def _goal(words: str, is_met: bool, measured: str) -> dict[str, Any]:
    return {"goal": words, "met": bool(is_met), "measured": measured}


def _told(gain: Mapping[str, float], measure: str) -> str:
    if measure in ("reward", "mps"):
        return f"{gain['mean']:+.4f} ± {gain['standard_error']:.4f}"
    if measure == "dynamic_degree":
        return f"{gain['mean']:+.3f} ± {gain['standard_error']:.3f} px/frame"
    return f"{100 * gain['mean']:+.1f} ± {100 * gain['standard_error']:.1f} points"


def _points(values: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:+.1f}" for name, value in values.items())


def _held_out(curve: Mapping[str, list[float | None]]) -> tuple[float, float]:
    """Held-out reward of the base and of the last look."""
    seen = [value for value in curve["held_out"] if value is not None]
    (base, *_) = (value for value in curve["held_out_base"] if value is not None)
    return base, seen[-1]


def _guarded(runs: Runs, base: Runs) -> dict[str, Any]:
    """Of every seed: colour and shape right at the base, the least of all looks, and of the LoRA that the run gave; and why it ended."""
    shown, is_met = [], True
    for seed, run in sorted(runs.items()):
        start, final = (float(np.mean(rows["oracle"]["text"])) for rows in (base[seed], run))
        least = min([final, *(float(np.mean(look["oracle"]["text"])) for look in run["looks"])])
        is_met &= least >= start
        ended = f"{run['reason']}. {run['detail']}".strip()
        shown.append(f"seed {seed}: base {100 * start:.0f} %, never below {100 * least:.0f} %, in the end {100 * final:.0f} %; {ended}")
    return _goal("guards on, five times the budget: colour and shape never below the base", is_met, " ".join(shown))


def write(folder: Path, results: Path, picture: Path, page: Path) -> None:
    """Write the JSON document, the picture and the page, and print the goals.

    Args:
        folder: of the single results (`learning_store.py`).

    Raises:
        ValueError: the base has not been measured.
    """
    found = learning_store.read(folder)
    if BASE not in found:
        raise ValueError(f"{folder} holds no {BASE}-SEED.json; run the base first: lab.py bench learning --only {BASE}")
    table = summary(found)
    reached = goals(table, found)
    document = {
        "command": "python lab.py bench learning",
        "hardware": sorted({run["made"]["hardware"] for runs in found.values() for run in runs.values()}),
        "dates": sorted({run["made"]["date"] for runs in found.values() for run in runs.values()}),
        "single_results": f"benchmarks/results/{folder.name}/",
        "budget_forwards": BUDGET,
        "missing": [f"{name}-{seed}" for name, seed in _missing(found)],
        "goals": reached,
        "experiments": table,
    }
    results.parent.mkdir(parents=True, exist_ok=True)
    results.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    picture.parent.mkdir(parents=True, exist_ok=True)
    learning_picture.draw(table).save(picture, optimize=True)
    page.write_text(learning_page.page(document), encoding="utf-8")
    for goal in reached:
        print(f"{'reached' if goal['met'] else 'missed '}  {goal['goal']}: {goal['measured']}")
    print(f"wrote {results}, {picture} and {page}")


def _missing(found: Mapping[str, Runs]) -> Sequence[tuple[str, int]]:
    from .learning_experiments import SEEDS, plan

    return [(name, seed) for name, seed in plan(SEEDS) if seed not in found.get(name, {})]

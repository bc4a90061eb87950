"""`docs/learning.md`: what the learning bench measured, as tables that people read; written from the same numbers as learning.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .learning_experiments import BASE, BUDGET, CONTROL, MISLABELLED, OURS, PICKED, RENDERED, REPLAYED, REPLAYED_BOTH

# Headings with the experiments under them, and how a reader is told of each.
GROUPS: Sequence[tuple[str, Sequence[tuple[str, str]]]] = (
    (
        "96 clips under true captions, high-noise expert",
        (
            (OURS, "`reward-lab`: HPS of the first frame, and a PAVRM; nothing is rolled out"),
            (PICKED, "the same from the third of the clips that both rewards like best (`real.keep` 0.33)"),
            (CONTROL, "*control*: all clips, no reward"),
            ("hy-video-prfl", "`hy-video-prfl`: PAVRM"),
            ("real-clips-only", "*control*: its clips, no reward"),
            ("guarded-5x", "`reward-lab` with HPS alone, five times the budget, guards on"),
        ),
    ),
    (
        "The same clips under captions that lie as often as those that spoiled the base: 55 % in colour, 22 % in motion",
        (
            (MISLABELLED[0], "`reward-lab` with `real.keep` 0.33"),
            (MISLABELLED[1], "*control*: the picked third, without the rewards' gradient"),
            (MISLABELLED[2], "`reward-lab`, all clips"),
            (MISLABELLED[3], "*control*: all clips, no reward"),
            (MISLABELLED[4], "`hy-video-prfl`"),
        ),
    ),
    (
        "No clips, high-noise expert",
        (
            (REPLAYED_BOTH[0], "`reward-lab`: HPS and PAVRM; 32 clips of the base's own, picked by both out of 64"),
            (REPLAYED_BOTH[1], "*control*: the same updates without the rewards' gradient"),
            (REPLAYED[0], "`reward-lab`: HPS alone"),
            (REPLAYED[1], "*control*: the same updates without the reward's gradient"),
            ("videox-fun-high", "`videox-fun`: HPS of the first frame"),
            ("videox-fun-high-3x", "the same, three times the budget"),
            ("prfl-logit", "PRFL on the logit (close to `reward-lab-prfl`): PAVRM"),
        ),
    ),
    (
        "No clips, low-noise expert",
        (
            ("reward-lab-backprop", "`reward-lab-backprop`: HPS"),
            ("videox-fun-low", "`videox-fun`: HPS of the first frame"),
            ("roll-reward-flow", "`roll-reward-flow`: HPS"),
        ),
    ),
    (
        "MPS, low-noise expert",
        (
            ("mps-low-reward-lab-backprop", "`reward-lab-backprop`"),
            ("mps-low-videox-fun", "`videox-fun`, which did not converge for its authors"),
            ("mps-low-reward-lab", "`reward-lab`, from clips"),
        ),
    ),
    ("No model", ((RENDERED, "rendered truth through the VAE"),)),
)
_COLUMNS = (
    ("reward", "HPS reward", 3, 1),
    ("mps", "MPS", 2, 1),
    ("text", "colour and shape right", 1, 100),
    ("motion", "motion right", 1, 100),
    ("dynamic_degree", "dynamic degree (px/frame)", 2, 1),
)
_INTRO = f"""# What the methods learn, measured

Written by `python lab.py bench learning` from its own results ([learning.json](../benchmarks/results/learning.json), and a file a run in
[learning/](../benchmarks/results/learning)); do not edit. Pocket models, an equal budget of {BUDGET:.0f} DiT forwards (a backward counts as two, decoders and
reward models are not counted), 64 held-out prompt/seed pairs a seed, judged by an oracle that reads pixels and that no reward model sees.

Gains over the base, paired, ± one standard error over all pairs. Shares of right videos are in points. MPS was not measured in the older runs.

![Gains and what they cost](images/learning.png)
"""


def page(document: Mapping[str, Any]) -> str:
    """The page as Markdown.

    Args:
        document: learning.json.
    """
    table, heads = document["experiments"], [title for _, title, _, _ in _COLUMNS]
    lines = [_INTRO, f"Dates: {', '.join(document['dates'])}. Machine: {', '.join(document['hardware'])}.\n"]
    base = table[BASE]
    shown = ", ".join(f"{title} {scale * base['mean'][name]:.{digits}f}" for name, title, digits, scale in _COLUMNS if name in base["mean"])
    lines.append(f"The base itself: {shown}.\n\n## Gains\n")
    for heading, rows in GROUPS:
        found = [(label, table[name]) for name, label in rows if name in table]
        if not found:
            continue
        lines += [f"### {heading}\n", f"| | seeds | updates | forwards | {' | '.join(heads)} |", "|---|---|---|---|" + "---|" * len(heads)]
        lines += [_row(label, entry) for label, entry in found] + [""]
    lines.append("## Goals\n\n| | goal | measured |\n|---|---|---|")
    lines += [f"| {'reached' if goal['met'] else '**missed**'} | {goal['goal']} | {goal['measured']} |" for goal in document["goals"]]
    if document["missing"]:
        lines.append(f"\nNot run yet: {', '.join(document['missing'])}.")
    return "\n".join(lines) + "\n"


def _row(label: str, entry: Mapping[str, Any]) -> str:
    cells = [label, ", ".join(map(str, entry["seeds"])), f"{entry['updates']:.0f}" if "updates" in entry else "", f"{entry.get('forwards', 0):.0f}"]
    for name, _, digits, scale in _COLUMNS:
        gain = entry["gain"].get(name)
        cells.append("" if gain is None else f"{scale * gain['mean']:+.{digits}f} ± {scale * gain['standard_error']:.{digits}f}")
    return f"| {' | '.join(cells)} |"

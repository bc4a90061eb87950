"""The Mix Rewards node: rows of rewards to one specification, and centre and scale measured on base videos."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..reward_models.mix import measure_baseline
from ..reward_models.spec import RewardModelSpec, read_rows
from . import scoring


@dataclass(frozen=True, kw_only=True)
class Row:
    """One reward of a mix, as its widgets stand."""

    spec: RewardModelSpec
    weight: float
    centre: float
    scale: float


def mix_spec(rows: Sequence[Row]) -> tuple[RewardModelSpec, str]:
    """Make the value of a REWARD_MODEL socket and a report of the rows.

    Raises:
        ValueError: No row, or see `spec.read_rows`.
    """
    if not rows:
        raise ValueError("No reward is connected. Connect at least one Load Reward Model.")
    entries, lines = [], []
    for row, name in zip(rows, _names(rows), strict=True):
        entries.append({"name": name, "reward": row.spec.to_dict(), "weight": row.weight, "centre": row.centre, "scale": row.scale})
        lines.append(f"{row.weight:g} x ({name} - {row.centre:.6g}) / {row.scale:.6g}")
    read_rows(entries)
    return RewardModelSpec(kind="mix", path="", options={"rows": entries}), "\n+ ".join(lines)


def measured(rows: Sequence[Row], folder: str, prompt: str, prompts_file: str) -> tuple[list[Row], str]:
    """Fill centre and scale of every row from videos of the untrained model.

    Args:
        rows: Rewards.
        folder: Of base videos; absolute, or in the input folder.
        prompt: Of all videos, where there is no file.
        prompts_file: A prompt per video; the node's `baseline_prompts`.

    Returns:
        The rows, and a line per row for the node.

    Raises:
        ValueError: See `scoring.score_path` and `measure_baseline`.
    """
    if not prompts_file.strip():
        _refuse_text(rows, prompt)
    filled, lines = [], []
    for row, name in zip(rows, _names(rows), strict=True):
        rewards = [score.reward for score in scoring.score_path(folder, row.spec, prompt, prompts_file)]
        baseline = measure_baseline(rewards)
        filled.append(replace(row, centre=baseline.centre, scale=baseline.scale))
        lines.append(f"{name}: centre {baseline.centre:.6g}, scale {baseline.scale:.6g} over {baseline.videos} base videos")
    return filled, "\n".join(lines)


def _refuse_text(rows: Sequence[Row], prompt: str) -> None:
    """Refuse rewards that read a text which is not there, before one is measured. The node has no prompt of its own."""
    for row, name in zip(rows, _names(rows), strict=True):
        try:
            scoring.require_text(row.spec, prompt)
        except ValueError as error:
            raise ValueError(f"baseline_prompts is empty, and {name} scores videos for a text. Give a file with a prompt per base video.") from error


def _names(rows: Sequence[Row]) -> list[str]:
    names: list[str] = []
    for row in rows:
        count = sum(name.split(" ")[0] == row.spec.kind for name in names)
        names.append(row.spec.kind if not count else f"{row.spec.kind} {count + 1}")
    return names

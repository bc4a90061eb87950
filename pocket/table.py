"""The demo's table: base, published-style reward LoRAs and the trained one on the same held-out prompts and seeds.

Rewards come from the pack's loader, everything else from the oracle, which no reward model sees. Differences to the base are
paired: the same prompt and the same noise in every row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ..reward_models.base import RewardModel, score_in_chunks
from . import world
from .generate import Generator, as_clips
from .quality import held_out_scenes, judged

COLUMNS = ("reward", "colour", "shape", "motion", "dynamic_degree", "flicker")
_Z_95 = 1.96


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table; `values` holds every measure of every video, [N]."""

    label: str
    values: dict[str, np.ndarray]

    @property
    def pairs(self) -> int:
        """Number of videos."""
        return len(self.values["reward"])

    def mean(self, column: str) -> float:
        return float(self.values[column].mean())

    def half_width(self, column: str) -> float:
        """Half of the 95 % interval of the mean."""
        values = self.values[column]
        return float(_Z_95 * values.std(ddof=1) / len(values) ** 0.5)

    def gain(self, column: str, base: Row) -> tuple[float, float]:
        """Mean paired difference to the base, and its standard error."""
        difference = self.values[column] - base.values[column]
        return float(difference.mean()), float(difference.std(ddof=1) / len(difference) ** 0.5)


def measure(
    weights: Path,
    reward: RewardModel,
    rows: Sequence[tuple[str, Sequence[tuple[Path, str, float]]]],
    *,
    pairs: int,
    seed: int = 0,
    report: Callable[[str], None] = print,
) -> list[Row]:
    """Generate and score every row.

    Args:
        rows: (label, LoRAs as `Generator.latents` takes them); the first row is the base.
        pairs: held-out prompt/seed pairs, the same in every row.
        seed: chooses prompts and noise.
    """
    scenes = held_out_scenes(pairs, 40_000 + seed, two_share=0.0)
    generator = Generator(weights)
    table = []
    for label, loras in rows:
        row = measure_row(generator, reward, label, loras, scenes, seed)
        table.append(row)
        report(f"  {label}: reward {row.mean('reward'):.4f}, motion right {100 * row.mean('motion'):.0f} %")
    return table


def measure_row(
    generator: Generator, reward: RewardModel, label: str, loras: Sequence[tuple[Path, str, float]], scenes: Sequence[world.Scene], seed: int
) -> Row:
    """Generate and score one row; see `measure`."""
    prompts = [world.caption(scene) for scene in scenes]
    latents = generator.latents(prompts, [seed * 1_000_003 + index for index in range(len(scenes))], loras)
    return score_row(reward, label, generator.frames(latents), scenes)


def score_row(reward: RewardModel, label: str, frames: torch.Tensor, scenes: Sequence[world.Scene]) -> Row:
    """Score the videos of one row, a scene each; `frames` as `Generator.frames` gives them."""
    prompts = [world.caption(scene) for scene in scenes]
    with torch.no_grad():
        rewards = score_in_chunks(reward, frames, prompts, 64).per_video.numpy().astype(np.float64)
    scores = judged(as_clips(frames), scenes)
    return Row(label=label, values={"reward": rewards, **{name: scores[name] for name in COLUMNS[1:]}})


_PERCENT = ("colour", "shape", "motion")
_GAINS = ("reward", "motion")
_HEADINGS = {
    "reward": "HPS reward", "colour": "colour right", "shape": "shape right", "motion": "motion right", "dynamic_degree": "dynamic degree (px/frame)",
    "flicker": "flicker",
}  # fmt: skip


def cell(row: Row, column: str) -> str:
    """`mean ± half of the 95 % interval`."""
    factor, digits = (100, 0) if column in _PERCENT else (1, 2) if column == "dynamic_degree" else (1, 4)
    unit = " %" if column in _PERCENT else ""
    return f"{factor * row.mean(column):.{digits}f} ± {factor * row.half_width(column):.{digits}f}{unit}"


def gain_cell(row: Row, base: Row, column: str) -> str:
    """What a row gains on the base over the same prompts and seeds, ± half of the 95 % interval of that difference."""
    factor, digits, unit = (100, 1, " points") if column in _PERCENT else (1, 4, "")
    mean, standard_error = row.gain(column, base)
    return "" if row is base else f"{factor * mean:+.{digits}f} ± {factor * _Z_95 * standard_error:.{digits}f}{unit}"


def _cells(table: Sequence[Row]) -> list[list[str]]:
    gains = [f"{_HEADINGS[column].removesuffix(' right')}, gain" for column in _GAINS]
    head = ["", *gains, *_HEADINGS.values()]
    return [head, *([row.label, *(gain_cell(row, table[0], name) for name in _GAINS), *(cell(row, name) for name in COLUMNS)] for row in table)]


def as_text(table: Sequence[Row]) -> str:
    """The table as fixed-width text, for a terminal."""
    lines = _cells(table)
    widths = [max(len(line[index]) for line in lines) for index in range(len(lines[0]))]
    return "\n".join("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip() for line in lines)


def as_json(table: Sequence[Row]) -> list[dict]:
    """Means, intervals and gains, for files."""
    return [
        {
            "row": row.label,
            "pairs": row.pairs,
            **{column: {"mean": row.mean(column), "interval_95": row.half_width(column)} for column in COLUMNS},
            "gain_over_base": {column: dict(zip(("mean", "standard_error"), row.gain(column, table[0]), strict=True)) for column in COLUMNS},
        }
        for row in table
    ]


def as_html(table: Sequence[Row]) -> str:
    """An HTML table; the caller brings the style."""
    headings, *lines = _cells(table)
    head = "".join(f"<th>{heading}</th>" for heading in headings)
    body = "".join(f"<tr><th>{line[0]}</th>{''.join(f'<td>{text}</td>' for text in line[1:])}</tr>" for line in lines)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"

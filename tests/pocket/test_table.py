"""The demo's table: gains are paired."""

from __future__ import annotations

import numpy as np
import pytest

from reward_lab.pocket import table


def row(label: str, rewards: list[float]) -> table.Row:
    return table.Row(label=label, values={column: np.array(rewards) for column in table.COLUMNS})


def test_gains_are_paired_differences_to_the_base() -> None:
    base, trained = row("base", [0.0, 9.0]), row("trained", [0.1, 9.3])
    mean, error = trained.gain("reward", base)
    assert mean == pytest.approx(0.2) and error == pytest.approx(0.1)
    first, second = table.as_json([base, trained])
    assert (first["pairs"], second["pairs"]) == (2, 2)
    assert first["gain_over_base"]["reward"]["mean"] == 0 and second["gain_over_base"]["reward"]["standard_error"] == pytest.approx(0.1)
    lines = table.as_text([base, trained]).splitlines()
    assert "HPS reward, gain" in lines[0] and "+0.2000 ± 0.1960" in lines[2] and "+20.0 ± 19.6 points" in lines[2]
    assert lines[1].split()[:2] == ["base", "4.5000"]  # no gain of the base on itself
    assert "<th>trained</th><td>+0.2000 ± 0.1960</td>" in table.as_html([base, trained])

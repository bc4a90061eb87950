"""The demo's table: paired gains of rows with fewer videos than the base."""

from __future__ import annotations

import numpy as np
import pytest

from reward_lab.pocket import table


def row(label: str, rewards: list[float]) -> table.Row:
    return table.Row(label=label, values={column: np.array(rewards) for column in table.COLUMNS})


def test_a_row_with_fewer_pairs_is_compared_with_the_same_videos_of_the_base() -> None:
    base, half = row("base", [0.0, 0.2, 9.0, 9.0]), row("half", [0.1, 0.5])
    mean, error = half.gain("reward", base)
    assert mean == pytest.approx(0.2) and error == pytest.approx(0.1)
    first, second = table.as_json([base, half])
    assert (first["pairs"], second["pairs"]) == (4, 2)
    assert first["gain_over_base"]["reward"]["mean"] == 0
    assert table.as_text([base, half]).splitlines()[2].split()[:2] == ["half", "2"]
    assert "<th>half</th><td>2</td>" in table.as_html([base, half])

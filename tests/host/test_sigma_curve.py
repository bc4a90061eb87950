"""Curves of strength over sigma: the cases that the page's own reader is held to as well."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from reward_lab.host.sigma_curve import MAX_POINTS, parse_curve

pytestmark = pytest.mark.host

CASES = json.loads((Path(__file__).parent.parent / "web" / "curve_cases.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("case", CASES["curves"], ids=lambda case: case["text"] or "empty")
def test_factors(case: dict) -> None:
    curve = parse_curve(case["text"])
    assert [curve.at(sigma) for sigma in CASES["sigmas"]] == pytest.approx(case["factors"], abs=1e-9)
    again = parse_curve(curve.text())
    assert [again.at(sigma) for sigma in CASES["sigmas"]] == pytest.approx(case["factors"], abs=1e-9)
    assert curve.is_constant() == (len(set(case["factors"])) == 1)


@pytest.mark.parametrize("text", [*CASES["broken"], ",".join(f"{1 - i / 100}:1" for i in range(MAX_POINTS + 1))])
def test_broken_text_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"urve"):
        parse_curve(text)

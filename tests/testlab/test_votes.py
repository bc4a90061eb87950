"""Votes on a sweep's cells: which pairs are asked, undoing, ranking and its intervals."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest

from reward_lab.testlab import votes

STRENGTHS = ("0", "0.5", "1")


def cells(seeds=(1, 2), prompt="a cat"):
    applied = lambda value, seed: [{"label": "rows[0].high", "widget": "high", "value": value}, {"label": "seed", "widget": "seed", "value": seed}]  # noqa: E731
    return [(f"{value}-{seed}", applied(value, seed), prompt) for value in STRENGTHS for seed in seeds]


def test_only_cells_that_differ_in_the_axis_alone_are_compared():
    given = votes.contest(cells())
    assert len(given.pairs()) == 2 * 3 and all(left.split("-")[1] == right.split("-")[1] for left, right in given.pairs())
    other = votes.contest(cells(), axis=1)
    assert {other.names[key] for pair in other.pairs() for key in pair} == {"1", "2"} and len(other.pairs()) == 3
    with pytest.raises(ValueError, match="axis 2 of the sweep"):
        votes.contest(cells(), axis=2)
    with pytest.raises(ValueError, match="nothing to vote on"):
        votes.contest(cells()[:1])


def test_every_pair_is_asked_both_ways_and_then_no_more(tmp_path):
    path, given, rng, asked = tmp_path / votes.FILE_NAME, votes.contest(cells()), random.Random(0), []
    while (question := votes.next_question(given, votes.read(path), rng)) is not None:
        asked.append((question.left, question.right))
        votes.add(path, question.left, question.right, "tie", "me")
        assert question.prompt == "a cat"
    assert len(asked) == len(set(asked)) == 12 and {frozenset(pair) for pair in asked[:6]} == {frozenset(pair) for pair in asked[6:]}
    last = votes.undo(path)
    assert (last.left, last.right) == asked[-1] and len(votes.read(path).rows) == 11
    assert votes.undo(tmp_path / "none.sqlite") is None and not (tmp_path / "none.sqlite").exists()


def test_pairs_for_training():
    rows = [("a", "b", "left"), ("b", "a", "left"), ("a", "c", "left"), ("c", "a", "right"), ("b", "c", "tie"), ("d", "a", "skip")]
    pairs = votes.Votes(rows=tuple(votes.Vote(left=left, right=right, result=result) for left, right, result in rows)).pairs()
    assert sorted(pairs) == [("a", "b", 0.5), ("a", "c", 1.0), ("b", "c", 0.5)]


def test_two_contestants_have_the_closed_form():
    """With one phantom tie each, symmetry puts the two at ±s; s solves w - n p(2s) + (1/2 - p(s)) = 0, here by bisection."""
    wins, losses = 30.0, 10.0
    low, high = 0.0, 5.0
    for _ in range(80):
        s = (low + high) / 2
        value = wins - (wins + losses) / (1 + math.exp(-2 * s)) + 0.5 - 1 / (1 + math.exp(-s))
        low, high = (s, high) if value > 0 else (low, s)
    strength, covariance = votes.bradley_terry(np.array([[0.0, wins], [losses, 0.0]]))
    assert strength == pytest.approx([s, -s], abs=1e-9) and covariance.shape == (2, 2)


def test_intervals_hold_the_truth_as_often_as_they_say():
    """Of 200 simulated sweeps with 4 contestants, 95 % intervals cover the truth in 95 ± 3 % (two standard errors of 800 looks are 1.5)."""
    generator, truth, hits = np.random.default_rng(0), np.array([-0.8, -0.2, 0.3, 0.7]), 0
    names = {str(index): str(index) for index in range(4)}
    given = votes.Contest(names=names, groups=(tuple(names),))
    for _ in range(200):
        rows = []
        for left, right in [(str(a), str(b)) for a in range(4) for b in range(a)] * 15:
            chance = 1 / (1 + math.exp(truth[int(right)] - truth[int(left)]))
            rows.append(votes.Vote(left=left, right=right, result="left" if generator.random() < chance else "right"))
        hits += sum(standing.low <= truth[int(standing.name)] <= standing.high for standing in votes.ranking(given, votes.Votes(rows=tuple(rows))))
    assert 0.92 < hits / 800 < 0.98


def test_who_never_lost_has_a_finite_strength():
    given = votes.Contest(names={"a": "a", "b": "b"}, groups=(("a", "b"),))
    best, worst = votes.ranking(given, votes.Votes(rows=tuple(votes.Vote(left="a", right="b", result="left") for _ in range(5))))
    assert (best.name, best.wins, best.votes) == ("a", 5.0, 5) and 0 < best.strength < 5 and best.chance > 0.5 > worst.chance
    empty = votes.ranking(given, votes.Votes())
    assert [standing.strength for standing in empty] == [0, 0] and empty[0].low < -1 and empty[0].votes == 0


def test_bad_votes(tmp_path):
    path = tmp_path / votes.FILE_NAME
    with pytest.raises(ValueError, match="must be one of"):
        votes.add(path, "a", "b", "both")
    with pytest.raises(ValueError, match="with itself"):
        votes.add(path, "a", "a", "tie")
    path.write_text("no database at all, but long enough to be looked at")
    with pytest.raises(ValueError, match="cannot be read as votes"):
        votes.read(path)
    with pytest.raises(ValueError, match="cannot take votes"):
        votes.add(path, "a", "b", "tie")

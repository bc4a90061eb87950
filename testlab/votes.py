"""Blind votes on the cells of a sweep: which pairs are asked, what was answered, and who leads.

Store: `votes.sqlite` in the sweep's folder, one row a vote. A pair is asked blind: two cells that differ in the compared axis and
in nothing else, in an order that a coin decides, with nothing shown but the videos and the prompt.

Ranking: Bradley and Terry 1952 (Biometrika 39), fitted by Newton's method; a tie is half a win for each. One tie of every contestant with a phantom of
strength 0 is added (Agresti, Categorical Data Analysis, regularised): without it a contestant that never lost has no finite strength. Intervals are 95 % from
the inverse information matrix, for the difference from the mean of all contestants.
"""

from __future__ import annotations

import math
import random
import sqlite3
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

FILE_NAME = "votes.sqlite"
RESULTS = ("left", "right", "tie", "skip")
_PRIOR_TIES = 1.0
_Z95 = 1.959964
_SCHEMA = (
    "CREATE TABLE IF NOT EXISTS votes (id INTEGER PRIMARY KEY AUTOINCREMENT, left TEXT NOT NULL, right TEXT NOT NULL, result TEXT NOT NULL, "
    "voter TEXT NOT NULL, time REAL NOT NULL)"
)


@dataclass(frozen=True, kw_only=True)
class Vote:
    """An answer: `left` and `right` are cell keys, `result` one of RESULTS."""

    left: str
    right: str
    result: str
    voter: str = ""
    time: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Votes:
    """All answers of a sweep, oldest first."""

    rows: tuple[Vote, ...] = ()

    def pairs(self) -> list[tuple[str, str, float]]:
        """Winner, loser and the winner's share of the wins, per pair of cells that was asked; skipped answers do not count."""
        wins: dict[tuple[str, str], list[float]] = {}
        for vote in self.rows:
            if vote.result != "skip":
                first, second = sorted((vote.left, vote.right))
                share = 0.5 if vote.result == "tie" else float((vote.left if vote.result == "left" else vote.right) == first)
                wins.setdefault((first, second), []).append(share)
        shares = {pair: sum(values) / len(values) for pair, values in wins.items()}
        return [(first, second, share) if share >= 0.5 else (second, first, 1 - share) for (first, second), share in shares.items()]


@dataclass(frozen=True, kw_only=True)
class Standing:
    """Where a contestant stands. `strength`: log-odds against the mean contestant, 0 is average; low, high: its 95 % interval; `wins`: ties count half."""

    name: str
    strength: float
    low: float
    high: float
    wins: float
    votes: int

    @property
    def chance(self) -> float:
        """Probability of winning against an average contestant."""
        return 1 / (1 + math.exp(-self.strength))


@dataclass(frozen=True, kw_only=True)
class Question:
    """A pair to be asked. `left`, `right`: cell keys; `prompt`: of both."""

    left: str
    right: str
    prompt: str = ""


@dataclass(frozen=True, kw_only=True)
class Contest:
    """Which cells compete. `names`: contestant by cell key; `groups`: cells that differ in the compared axis alone."""

    names: Mapping[str, str]
    groups: tuple[tuple[str, ...], ...]
    prompts: Mapping[str, str] = field(default_factory=dict)

    def pairs(self) -> list[tuple[str, str]]:
        """Every pair that may be asked."""
        return [pair for group in self.groups for pair in combinations(group, 2) if self.names[pair[0]] != self.names[pair[1]]]


def contest(cells: Sequence[tuple[str, Sequence[Mapping[str, Any]], str]], axis: int = 0) -> Contest:
    """Sort cells by what is compared.

    Args:
        cells: key, applied values (as `RecordedCell.applied`) and prompt of each.
        axis: number of the compared axis.

    Raises:
        ValueError: no such axis, or no two cells that differ in it alone.
    """
    groups: dict[tuple, list[str]] = {}
    names, prompts = {}, {}
    for key, applied, prompt in cells:
        if not 0 <= axis < len(applied):
            raise ValueError(f"the cell {key} has {len(applied)} axes; axis {axis} of the sweep cannot be compared")
        others = tuple((entry["label"], str(entry["value"])) for number, entry in enumerate(applied) if number != axis)
        groups.setdefault((*others, prompt), []).append(key)
        names[key], prompts[key] = str(applied[axis]["value"]), prompt
    found = Contest(names=names, groups=tuple(tuple(group) for group in groups.values()), prompts=prompts)
    if not found.pairs():
        raise ValueError("no two cells differ in the compared axis alone, so there is nothing to vote on; record more cells or choose another axis")
    return found


def next_question(given: Contest, votes: Votes, rng: random.Random) -> Question | None:
    """The pair that was asked least, by chance among equals and in an order that chance decides; None when each was asked twice, once each way round."""
    asked: dict[frozenset, int] = {}
    for vote in votes.rows:
        pair = frozenset((vote.left, vote.right))
        asked[pair] = asked.get(pair, 0) + 1
    open_pairs = [(asked.get(frozenset(pair), 0), pair) for pair in given.pairs() if asked.get(frozenset(pair), 0) < 2]
    if not open_pairs:
        return None
    least = min(count for count, _ in open_pairs)
    left, right = rng.choice([pair for count, pair in open_pairs if count == least])
    before = [vote for vote in votes.rows if {vote.left, vote.right} == {left, right}]
    is_swapped = before[-1].left == left if before else rng.random() < 0.5
    left, right = (right, left) if is_swapped else (left, right)
    return Question(left=left, right=right, prompt=given.prompts.get(left, ""))


def ranking(given: Contest, votes: Votes) -> list[Standing]:
    """Contestants, best first."""
    names = sorted(set(given.names.values()))
    place = {name: index for index, name in enumerate(names)}
    wins = np.zeros((len(names), len(names)))
    for vote in votes.rows:
        if vote.result == "skip" or vote.left not in given.names or vote.right not in given.names:
            continue
        left, right = place[given.names[vote.left]], place[given.names[vote.right]]
        share = {"left": 1.0, "right": 0.0, "tie": 0.5}[vote.result]
        wins[left, right] += share
        wins[right, left] += 1 - share
    strength, covariance = bradley_terry(wins)
    centre = np.eye(len(names)) - 1 / len(names)
    strength, spread = centre @ strength, np.sqrt(np.diag(centre @ covariance @ centre.T))
    standings = [
        Standing(
            name=name,
            strength=float(strength[index]),
            low=float(strength[index] - _Z95 * spread[index]),
            high=float(strength[index] + _Z95 * spread[index]),
            wins=float(wins[index].sum()),
            votes=int(round(wins[index].sum() + wins[:, index].sum())),
        )
        for index, name in enumerate(names)
    ]
    return sorted(standings, key=lambda standing: -standing.strength)


def bradley_terry(wins: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Strengths of contestants and their covariance.

    Args:
        wins: [N, N], wins of row over column; ties as halves.

    Returns:
        Log-odds [N] with the phantom at 0, and the inverse information [N, N].
    """
    count = len(wins)
    strength = np.zeros(count)
    games = wins + wins.T
    covariance = np.eye(count)
    for _ in range(100):
        chance = 1 / (1 + np.exp(-(strength[:, None] - strength[None, :])))
        own = 1 / (1 + np.exp(-strength))
        gradient = (wins - games * chance).sum(axis=1) + _PRIOR_TIES * (0.5 - own)
        weight = games * chance * (1 - chance)
        information = np.diag(weight.sum(axis=1) + _PRIOR_TIES * own * (1 - own)) - weight
        covariance = np.linalg.inv(information)
        step = covariance @ gradient
        strength = strength + np.clip(step, -2, 2)
        if np.abs(step).max() < 1e-10:
            break
    return strength, covariance


@contextmanager
def _opened(path: Path) -> Iterator[sqlite3.Connection]:
    with closing(sqlite3.connect(path, timeout=10)) as database, database:
        database.execute(_SCHEMA)
        yield database


def read(path: Path) -> Votes:
    """The votes of a file; none where there is no file.

    Raises:
        ValueError: it is no database of votes.
    """
    if not path.is_file():
        return Votes()
    try:
        with _opened(path) as database:
            rows = database.execute("SELECT left, right, result, voter, time FROM votes ORDER BY id").fetchall()
    except sqlite3.DatabaseError as error:
        raise ValueError(f"{path} cannot be read as votes ({error}); move it away to begin anew") from error
    return Votes(rows=tuple(Vote(left=row[0], right=row[1], result=row[2], voter=row[3], time=row[4]) for row in rows))


def add(path: Path, left: str, right: str, result: str, voter: str = "") -> None:
    """Write a vote down.

    Raises:
        ValueError: unknown result, a cell against itself, or the file is no database of votes.
    """
    if result not in RESULTS:
        raise ValueError(f"result is {result!r}; it must be one of {', '.join(RESULTS)}")
    if left == right:
        raise ValueError(f"{left} cannot be compared with itself")
    try:
        with _opened(path) as database:
            database.execute("INSERT INTO votes (left, right, result, voter, time) VALUES (?, ?, ?, ?, ?)", (left, right, result, voter[:100], time.time()))
    except sqlite3.DatabaseError as error:
        raise ValueError(f"{path} cannot take votes ({error}); move it away to begin anew") from error


def undo(path: Path) -> Vote | None:
    """Take the last vote back; returns it, or None when there is none."""
    rows = read(path).rows
    if not rows:
        return None
    with _opened(path) as database:
        database.execute("DELETE FROM votes WHERE id = (SELECT MAX(id) FROM votes)")
    return rows[-1]

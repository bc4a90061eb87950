"""Reads requirement lines and compares them with installed versions, as far as `lab.py` needs it (no markers, no URLs)."""

from __future__ import annotations

import re
from pathlib import Path

TORCH = ("torch==2.11.0", "torchvision==0.26.0", "torchaudio==2.11.0")
TORCH_NAMES = frozenset({"torch", "torchvision", "torchaudio"})


def normal_name(name: str) -> str:
    """A distribution's name as the package index spells it for comparison (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def split(line: str) -> tuple[str, str]:
    """Name and version specifier of one requirement; extras are dropped.

    Raises:
        ValueError: the line is no requirement.
    """
    match = re.fullmatch(r"\s*([A-Za-z0-9][A-Za-z0-9._-]*)\s*(?:\[[^\]]*\])?\s*([^;#]*?)\s*(?:[;#].*)?", line)
    if not match:
        raise ValueError(f"not a requirement: {line!r}; expected NAME or NAME followed by versions, such as numpy>=1.25.0")
    return normal_name(match.group(1)), match.group(2)


def read(path: Path) -> list[str]:
    """The requirement lines of a file, without comments, empty lines and pip options."""
    lines = (line.split("#")[0].strip() for line in path.read_text(encoding="utf-8").splitlines())
    return [line for line in lines if line and not line.startswith("-")]


def without_torch(lines: list[str]) -> list[str]:
    """The lines that do not name torch, torchvision or torchaudio (those three are chosen together)."""
    return [line for line in lines if split(line)[0] not in TORCH_NAMES]


def release(version: str) -> tuple[int, ...]:
    """The numbers at the start of a version: 2.11.0+cu130 gives (2, 11, 0)."""
    match = re.match(r"\d+(?:\.\d+)*", version.strip())
    return tuple(int(part) for part in match.group(0).split(".")) if match else ()


def is_met(specifier: str, version: str) -> bool:
    """Whether an installed version meets a specifier such as `>=2,<3`; unknown operators count as not met."""
    have = release(version)
    for clause in filter(None, (part.strip() for part in specifier.split(","))):
        match = re.fullmatch(r"(==|>=|<=|~=|!=|<|>)\s*([^\s*]+?)(\.\*)?", clause)
        if not match:
            return False
        operator, wanted, is_prefix = match.group(1), release(match.group(2)), bool(match.group(3))
        width = max(len(have), len(wanted))
        left, right = _padded(have, width), _padded(wanted, width)
        same = have[: len(wanted)] == wanted if is_prefix else left == right
        holds = {
            "==": same,
            "!=": not same,
            ">=": left >= right,
            "<=": left <= right,
            ">": left > right,
            "<": left < right,
            "~=": left >= right and have[: len(wanted) - 1] == wanted[:-1],
        }
        if not holds[operator]:
            return False
    return True


def unmet(lines: list[str], installed: dict[str, str]) -> list[str]:
    """Which requirement lines a set of installed distributions (normal name: version) does not meet, with what is there."""
    problems = []
    for line in lines:
        name, specifier = split(line)
        if name not in installed:
            problems.append(f"{line} (not installed)")
        elif not is_met(specifier, installed[name]):
            problems.append(f"{line} (installed: {installed[name]})")
    return problems


def _padded(numbers: tuple[int, ...], width: int) -> tuple[int, ...]:
    return numbers + (0,) * (width - len(numbers))

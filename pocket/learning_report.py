"""Sums up the learning bench."""

from __future__ import annotations

from pathlib import Path


def write(work: Path, results: Path, picture: Path) -> None:
    """x"""

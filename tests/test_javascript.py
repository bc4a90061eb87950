"""Runs the page modules' own tests (tests/web/*.mjs) under Node and checks their types, so that one command runs everything."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest


def test_page_modules(repo: Path) -> None:
    node = shutil.which("node")
    if not node:
        message = "no Node.js found; install version 18 or newer to run the tests of the page modules"
        pytest.fail(message) if os.environ.get("CI") else pytest.skip(message)
    files = sorted(str(path) for path in (repo / "tests" / "web").glob("*.test.mjs"))
    assert files
    done = subprocess.run([node, "--test", *files], capture_output=True, text=True, timeout=120, check=False, cwd=repo)
    assert done.returncode == 0, done.stdout + done.stderr


def test_types(repo: Path) -> None:
    """The modules carry their types in comments (`@ts-check`); TypeScript reads them."""
    npx = shutil.which("npx")
    compiler = [npx, "--yes", "-p", "typescript@5", "tsc"]
    if not npx or subprocess.run([*compiler, "--version"], capture_output=True, timeout=300, check=False).returncode != 0:
        pytest.skip("TypeScript could not be fetched with npx; install npm, and see that its registry can be reached, to check the types of the page modules")
    options = ["--noEmit", "--allowJs", "--checkJs", "--strict", "--target", "es2022", "--module", "esnext", "--moduleResolution", "bundler"]
    files = sorted(str(path) for path in (repo / "web").glob("*.js"))
    done = subprocess.run([*compiler, *options, "--lib", "es2023,dom,dom.iterable", *files], capture_output=True, text=True, timeout=300, check=False, cwd=repo)
    assert done.returncode == 0, done.stdout

"""Runs the page modules' own tests (tests/web/*.mjs) under Node, so that one command runs everything."""

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

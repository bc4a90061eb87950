"""Brings host and environment together: everything a sub-command needs before it starts."""

from __future__ import annotations

import importlib.util
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from . import environment, host
from .cache import Cache, locked, open_cache


@dataclass(frozen=True, kw_only=True)
class Setup:
    """A ComfyUI, a Python that can run it, and the cache that both may lie in."""

    host: host.Host
    python: Path
    cache: Cache


def prepare(comfyui: str | None = None, *, with_tests: bool = False, verbose: bool = False) -> Setup:
    """Find what is there, fetch and build what is not.

    Args:
        comfyui: the user's `--comfyui`, if given.
        with_tests: also have pytest, ruff and playwright.
        verbose: show the installers' output.

    Raises:
        LabError: with a remedy, for every failure that is foreseen.
    """
    cache = open_cache()
    ready = _ready(cache, comfyui, with_tests=with_tests)
    if ready:
        return ready
    start = time.monotonic()
    with locked(cache.root):
        found = host.find_host(comfyui) or host.fetched_host(cache)
        if not found:
            print(f"Fetching ComfyUI {host.HOST_VERSION} ...", flush=True)
            found = host.fetch_host(cache, _python_with_pip(cache))
        python = environment.fitting_interpreter(found, with_tests=with_tests)
        python = python or environment.build_environment(cache, found, with_tests=with_tests, verbose=verbose)
    print(f"Set-up finished in {time.monotonic() - start:.0f} s.", flush=True)
    return Setup(host=found, python=python, cache=cache)


def _ready(cache: Cache, comfyui: str | None, *, with_tests: bool) -> Setup | None:
    """What an earlier run left, if nothing is missing from it."""
    found = host.find_host(comfyui) or host.fetched_host(cache)
    if not found:
        return None
    if found.version != host.HOST_VERSION:
        print(f"ComfyUI at {found.path} is version {found.version}; Reward Lab is tested with {host.HOST_VERSION}.", file=sys.stderr)
    python = environment.fitting_interpreter(found, with_tests=with_tests) or environment.ready_environment(cache, found, with_tests=with_tests)
    return Setup(host=found, python=python, cache=cache) if python else None


def _python_with_pip(cache: Cache) -> Path:
    return Path(sys.executable) if importlib.util.find_spec("pip") else environment.create_venv(cache)

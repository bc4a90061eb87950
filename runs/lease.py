"""One card, shared politely: the server says that a prompt is running, the worker waits between two steps.

The server writes `<runs root>/busy` while it executes a prompt; the file holds its process id, so a crashed server does not stop training.
On a machine without a GPU the cores are shared in the same way: thread pools of two processes on the same cores wait for each other, so both crawl
(three updates and one sweep in 200 s on two cores, where one after the other takes a quarter of that).
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

FILE = "busy"
POLL_S = 0.2


def mark_busy(root: Path) -> None:
    """Say that this process uses the card."""
    root.mkdir(parents=True, exist_ok=True)
    partial = root / f"{FILE}.{os.getpid()}"
    partial.write_text(str(os.getpid()), encoding="utf-8")
    partial.replace(root / FILE)


def mark_free(root: Path) -> None:
    """Say that the card is free again."""
    (root / FILE).unlink(missing_ok=True)


def is_busy(root: Path) -> bool:
    """True while a living process says that it uses the card."""
    try:
        pid = int((root / FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return is_alive(pid)


def wait_until_free(root: Path, is_stopped: Callable[[], bool], poll_s: float = POLL_S) -> float:
    """Wait while the card is in use, or until a stop was asked for; returns the seconds waited."""
    begun = time.monotonic()
    while is_busy(root) and not is_stopped():
        time.sleep(poll_s)
    return time.monotonic() - begun


def is_alive(pid: int) -> bool:
    """True when a process of this id exists."""
    if sys.platform == "win32":
        import ctypes

        # os.kill(pid, 0) would send Ctrl-C on Windows.
        handle = ctypes.windll.kernel32.OpenProcess(0x1000, False, pid)
        if handle:
            ctypes.windll.kernel32.CloseHandle(handle)
        return bool(handle)
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True

"""One worker per run folder: an operating-system lock on `worker.lock`, which the system itself releases when its owner dies, however it dies.

The file holds the owner's process id, for showing.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

FILE = "worker.lock"
# Whoever only looks takes the lock for a moment; a worker that starts just then must not give up.
_ATTEMPTS = 10
_PAUSE_S = 0.1
_LOCKED_BYTE = 1 << 30  # far behind the text, since Windows forbids reading locked bytes


class RunInUseError(ValueError):
    """Another process works on this run folder."""


def _try_lock(file: IO[str]) -> bool:
    try:
        if sys.platform == "win32":
            import msvcrt

            file.seek(_LOCKED_BYTE)
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
            file.seek(0)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError, OSError):
        return False
    return True


@contextmanager
def hold(folder: Path) -> Iterator[None]:
    """Own the run folder for the time of the context.

    Raises:
        RunInUseError: another process owns it.
    """
    with (folder / FILE).open("a+", encoding="utf-8") as file:
        for _ in range(_ATTEMPTS):
            if _try_lock(file):
                break
            time.sleep(_PAUSE_S)
        else:
            raise RunInUseError(f"the run folder {folder} is in use by process {owner(folder)}; stop that run first, or start a new one")
        file.seek(0)
        file.truncate()
        file.write(str(os.getpid()))
        file.flush()
        yield


def owner(folder: Path) -> int | None:
    """Process id that last owned the folder, alive or not."""
    try:
        return int((folder / FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def is_held(folder: Path) -> bool:
    """True while a living process owns the folder."""
    try:
        with (folder / FILE).open("r+", encoding="utf-8") as file:
            return not _try_lock(file)
    except FileNotFoundError:
        return False

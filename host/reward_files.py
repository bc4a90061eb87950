"""Which widgets and files belong to a kind of reward model: what the Load Reward Model node shows, and fetches when asked."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.utils
import folder_paths

from ..reward_models import published
from ..reward_models.spec import OPTIONS_OF, PATHLESS
from . import downloads, paths
from .scoring import NO_FILE, REWARD_KINDS

_FACE_NOTE = "The weights of InsightFace's published face recognisers are for non-commercial research only; check the licence of yours."

# What the widgets `second_file` and `third_file` hold: an option of the reward model, and the name that the page gives to the widget.
FURTHER_FILES: dict[str, tuple[tuple[str, str], ...]] = {
    "aesthetic": (("clip", "CLIP ViT-L/14 file"),),
    "face": (("detector", "face detector file"),),
    "pavrm": (("query", "query attention file"), ("head", "score head file")),
}


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The file widgets of the node."""

    kind: str
    file: str
    second_file: str
    third_file: str
    generator: str
    reference: str
    download: bool


@dataclass(frozen=True, kw_only=True)
class Files:
    """Name of the main file, further files as options, and what the node says about them."""

    file: str
    report: str
    options: dict[str, Any] = field(default_factory=dict)


def resolve(choice: Choice) -> Files:
    """Look the files up, downloading the published ones when asked.

    Raises:
        ValueError: A file is missing, there is nothing published for the kind, or the download failed.
    """
    file, second = choice.file, choice.second_file
    if choice.download and choice.kind not in PATHLESS:
        file = _fetched(choice.kind) if file in ("", NO_FILE) else file
        second = _fetched("clip") if choice.kind == "aesthetic" and second in ("", NO_FILE) else second
    names = [name for name, _ in FURTHER_FILES.get(choice.kind, ())]
    given = dict(zip(names, (second, choice.third_file), strict=False))
    options = {name: str(paths.model_path(paths.REWARD_MODEL_FOLDER, value)) for name, value in given.items() if value not in ("", NO_FILE)}
    if choice.kind == "pavrm" and choice.generator not in ("", NO_FILE):
        options["generator"] = str(paths.model_path("diffusion_models", choice.generator))
    if choice.kind == "face" and choice.reference.strip():
        options["reference"] = str(paths.input_path(choice.reference))
    return Files(file=file, options=options, report=_report(choice.kind, file))


def widgets_of(kind: str) -> dict[str, str]:
    """The node's widgets that a kind reads, with the name that each has for it."""
    options, further = OPTIONS_OF[kind], [label for _, label in FURTHER_FILES.get(kind, ())]
    widgets = {} if kind in PATHLESS else {"file": "file"}
    widgets |= {name: name for name in ("resize", "antialias") if name in options}
    widgets |= {"download": "download"} if published.of_kind(kind) else {}
    widgets |= {name: name for name in ("condition", "threshold") if name in options}
    widgets |= dict(zip(("second_file", "third_file"), further, strict=False))
    return widgets | {name: name for name in ("generator", "reference", "stability") if name in options}


def catalogue() -> dict[str, Any]:
    """What the page needs to show the node before anything runs: per kind its widgets and published files, and the size of every file on disk."""
    files = {name: paths.model_path(paths.REWARD_MODEL_FOLDER, name).stat().st_size for name in paths.model_files(paths.REWARD_MODEL_FOLDER)}
    kinds = {}
    for kind in REWARD_KINDS:
        entries = [*published.of_kind(kind), *(published.of_kind("clip") if kind == "aesthetic" else [])]
        offers = [{"name": entry.name, "text": downloads.describe(entry), "is_here": entry.name in files} for entry in entries]
        kinds[kind] = {"widgets": widgets_of(kind), "published": offers, "needs_file": kind not in PATHLESS}
    return {"kinds": kinds, "files": {name: f"{size / 1e6:.1f} MB" for name, size in files.items()}, "no_file": NO_FILE}


def _fetched(kind: str) -> str:
    """Name of the published file of a kind in models/reward_models, downloaded when it is not there."""
    entries = published.of_kind(kind)
    if not entries:
        raise ValueError(f"No weights of {kind} are published for download; put a file into models/reward_models and choose it.")
    bar = comfy.utils.ProgressBar(1000)

    def on_progress(done_bytes: int, all_bytes: int) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        bar.update_absolute(min(999, done_bytes * 1000 // all_bytes) if all_bytes else 0)

    folder = Path(folder_paths.get_folder_paths(paths.REWARD_MODEL_FOLDER)[0])
    downloads.fetch(entries[0], folder, on_progress)
    folder_paths.filename_list_cache.pop(paths.REWARD_MODEL_FOLDER, None)
    return entries[0].name


def _report(kind: str, file: str) -> str:
    lines = []
    if kind in PATHLESS:
        lines.append(f"{kind} needs no weights.")
    elif file not in ("", NO_FILE):
        path = paths.model_path(paths.REWARD_MODEL_FOLDER, file)
        known, warning = published.known_file(path), published.file_warning(kind, path)
        lines.append(f"{file}: {path.stat().st_size / 1e6:.1f} MB, sha256 {downloads.file_hash(path)}")
        if known is not None:
            lines.append(warning or f"Size of the published {known.what} (licence: {known.licence}).")
    else:
        lines.append("No file is chosen.")
    on_disk = set(paths.model_files(paths.REWARD_MODEL_FOLDER))
    lines += [f"Can be downloaded: {downloads.describe(entry)}" for entry in published.of_kind(kind) if entry.name not in on_disk]
    return "\n".join([*lines, *([_FACE_NOTE] if kind == "face" else [])])

"""Datasets of encoded videos on disk: our own folder and HY-Video-PRFL's metas, read into the same samples.

Our folder: `dataset.json` (settings, videos, what was skipped), `latents/` and `texts/` named by content, `previews/`, `annotations.jsonl`.
HY-Video-PRFL: a list file with one meta path a line; metas name .npy files. Its aliases are all read. Source: Tencent-Hunyuan/HY-Video-PRFL@59ab9d7
(Apache-2.0), dataset/ and scripts/preprocess/gen_wanx_latent.py.
Of many videos those whose files are broken are left out and listed, so that one of them does not end a run, least of all in its middle. Headers and sizes
are looked at whenever a dataset is listed, numbers before a run (`with_numbers`): 1000 clips of 81 frames at 480p are 4.2 GB in bf16, 8 s on a CPU core.
"""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from ..lora_train import annotations, safetensors_file
from ..lora_train.input_config import LATENTS, MASK_CHANNELS
from ..lora_train.pavrm_data import LatentVideo, Sample

logger = logging.getLogger("reward_lab")
INDEX = "dataset.json"
VERSION = 1
# Other names under which HY-Video-PRFL's readers look for the same thing, in their order.
ALIASES = {
    "latent": ("video_vae_latent_path", "vae_latent_path", "latents_path"),
    "short": ("save_textshort_path", "textshort_path", "text_en_path"),
    "long": ("save_textlong_path", "textlong_path"),
    "clip": ("image_embeds", "imgclip_path"),
    "condition": ("f1_black_path", "latents_condition_path"),
}
# Axes of what a file holds; a first one of size 1 may stand before them.
_AXES = {"latent": 4, "short": 2, "long": 2, "clip": 2, "condition": 4}
_CAPTIONS = ("short_caption", "caption", "prompt", "long_caption")
_PARENTS = 5
_SHOWN = 20


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """What was read. `notes`: for the log; `folder`: of our own form, where annotations and previews lie."""

    samples: tuple[Sample, ...]
    notes: tuple[str, ...] = ()
    folder: Path | None = None
    index: Mapping[str, Any] = field(default_factory=dict)


def read(source: str | Path, annotation_file: str = "", *, with_numbers: bool = False) -> Dataset:
    """Read a dataset.

    Args:
        source: our folder, a list file of metas, one meta, or a folder of `*_meta_v1.json`.
        annotation_file: labels laid over those of the dataset; empty takes the folder's own.
        with_numbers: read every tensor once and leave out videos with NaN or infinity.

    Raises:
        ValueError: nothing there, a broken index or annotation file, one meta that is broken, or no video that can be used.
    """
    source = Path(source).expanduser()
    if source.is_dir() and (source / INDEX).is_file():
        samples, notes, index, folder = *_own(source), source
    elif source.exists():
        samples, notes, index, folder = *_metas(source), {}, None
    else:
        raise ValueError(f"there is no dataset {source}; make one with `lab.py preprocess FOLDER`, or give a list file of metas")
    given = Path(annotation_file).expanduser() if annotation_file else (folder / annotations.FILE_NAME if folder else None)
    if given is not None and (annotation_file or given.is_file()):
        samples, more = _annotated(samples, annotations.read(given), given)
        notes += more
    if with_numbers:
        samples, more = _looked_through(samples)
        notes += more
    if not samples:
        raise ValueError(f"{source} holds no video that can be used{': ' + '; '.join(notes) if notes else ''}")
    return Dataset(samples=tuple(samples), notes=tuple(notes), folder=folder, index=index)


def _looked_through(samples: Sequence[Sample]) -> tuple[list[Sample], list[str]]:
    """Those whose tensors can be read, and what is said of the others."""
    logger.info("looking through the tensors of %d videos", len(samples))
    whole, broken = [], []
    for sample in samples:
        try:
            sample.read()
            whole.append(sample)
        except ValueError as error:
            broken.append(f"{sample.id}: {error}")
    return whole, _left_out(broken, f"of {len(samples)} videos are left out, for what their files hold cannot be used")


def _own(folder: Path) -> tuple[list[Sample], list[str], dict[str, Any]]:
    index = read_index(folder)
    samples, missing, broken = [], [], []
    for video in index["videos"]:
        files = {"latent": video["latent"], "short": video["text"], **({"long": video["long_text"]} if video.get("long_text") else {})}
        paths = {name: folder / file for name, file in files.items()}
        if not all(path.is_file() for path in paths.values()):
            missing.append(video["id"])
            continue
        try:
            samples.append(_sample(video["id"], paths, video.get("caption", ""), video.get("labels", {})))
        except ValueError as error:
            broken.append(f"{video['id']}: {error}")
    notes = [f"{len(index.get('skipped', []))} videos were skipped when the dataset was made; see {folder / INDEX}"] if index.get("skipped") else []
    if missing:
        notes.append(f"{len(missing)} videos have lost their cache files ({', '.join(missing[:3])}); run preprocess again")
    return samples, notes + _left_out(broken, "videos have broken cache files and are left out; run preprocess again, it makes these anew"), index


def _left_out(reasons: Sequence[str], what: str) -> list[str]:
    """Notes on what was left out: how many, and each with its reason, up to a number that can still be read."""
    if not reasons:
        return []
    more = [f"and {len(reasons) - _SHOWN} more"] if len(reasons) > _SHOWN else []
    return [f"{len(reasons)} {what}", *reasons[:_SHOWN], *more]


def read_index(folder: Path) -> dict[str, Any]:
    """The index of a dataset folder of our own form.

    Raises:
        ValueError: it is missing, broken, or of another version.
    """
    path = folder / INDEX
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({error}); run preprocess again, its caches are kept") from error
    if not isinstance(index, dict) or index.get("version") != VERSION or not isinstance(index.get("videos"), list):
        raise ValueError(f"{path} is not a dataset of version {VERSION}; run preprocess again, its caches are kept")
    return index


def _metas(source: Path) -> tuple[list[Sample], list[str]]:
    if source.suffix.lower() == ".json" and source.is_file():
        return [_from_meta(source)], []
    if source.is_dir():
        names = [(path, None) for path in sorted(source.rglob("*_meta_v1.json"))]
    else:
        lines = source.read_text(encoding="utf-8-sig").splitlines()
        names = [(Path(line.strip()), f"line {number} of {source}") for number, line in enumerate(lines, 1) if line.strip()]
    samples, notes, broken, seen = [], [], [], set()
    for path, where in names:
        try:
            sample = _from_meta(path if where is None else _found(str(path), source.parent, where))
        except ValueError as error:
            broken.append(str(error))
            continue
        if sample.id in seen:
            notes.append(f"{sample.id} is listed twice; the first one counts")
            continue
        seen.add(sample.id)
        samples.append(sample)
    return samples, notes + _left_out(broken, f"of {len(names)} metas are left out, for they or their files are broken or missing")


def _from_meta(path: Path) -> Sample:
    try:
        meta = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise ValueError(f"the meta {path} cannot be read ({error})") from error
    if not isinstance(meta, dict):
        raise ValueError(f"the meta {path} holds a {type(meta).__name__}, not an object")
    files = {}
    for what, names in ALIASES.items():
        name = next((meta[name] for name in names if isinstance(meta.get(name), str) and meta[name]), None)
        if name is not None:
            files[what] = _found(name, path.parent, f"{what} in {path}")
    if "latent" not in files or not {"short", "long"} & set(files):
        raise ValueError(f"the meta {path} names no latent or no text; it needs {' or '.join(ALIASES['latent'])}, and {' or '.join(ALIASES['short'])}")
    sample_id = str(meta.get("source_id") or path.name.removesuffix("_meta_v1.json"))
    caption = next((str(meta[name]) for name in _CAPTIONS if meta.get(name)), "")
    return _sample(sample_id, files, caption, meta)


def _found(name: str, start: Path, where: str) -> Path:
    """Upstream's paths are relative to the folder that its scripts run in: some folder above the list or the meta."""
    path = Path(name)
    folders = [start, *start.absolute().parents[:_PARENTS]]
    for folder in [Path()] if path.is_absolute() else folders:
        if (folder / path).is_file():
            return folder / path
    raise ValueError(f"{where} is {name!r}, which does not exist" + ("" if path.is_absolute() else f" in {start} or a folder above it"))


def _sample(sample_id: str, files: Mapping[str, Path], caption: str, labels: Mapping[str, Any]) -> Sample:
    shapes = {what: _without_batch(_stored_shape(path), what, path) for what, path in files.items()}
    channels = [layout.channels for layout in LATENTS.values()]
    if shapes["latent"][0] not in channels:
        raise ValueError(
            f"the latent {files['latent']} has shape {list(shapes['latent'])}; latents of Wan VAEs are [{' or '.join(map(str, channels))}, F, H, W]"
        )
    condition, wanted = shapes.get("condition"), shapes["latent"]
    # With or without the mask channels before it.
    if condition and (condition[1:] != wanted[1:] or condition[0] not in (wanted[0], wanted[0] + MASK_CHANNELS)):
        raise ValueError(f"the condition {files['condition']} has shape {list(condition)}, which does not fit its latent, {list(wanted)}; make it again")
    return Sample(
        id=sample_id,
        shape=wanted,
        read=functools.partial(_read_video, dict(files)),
        caption=caption,
        labels=labels,
        has_condition="condition" in files,
        text_widths={name: shapes[name][-1] for name in ("short", "long") if name in shapes},
    )


def _stored_shape(path: Path) -> tuple[int, ...]:
    """Shape of a file's array, by its header, whose promise is held against the file's size."""
    try:
        if path.suffix == ".npy":
            array = np.lib.format.open_memmap(path, mode="r")
            if array.dtype.kind not in "fiu":
                raise ValueError(f"it holds {array.dtype}, not numbers")
            return array.shape
        header = safetensors_file.read_header(path)
        (name,) = header.shapes
        if header.begin_of[name] + header.bytes_of[name] != path.stat().st_size:
            raise ValueError(f"it holds more bytes than its header says ({path.stat().st_size})")
        return header.shapes[name]
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"{path} cannot be read ({str(error).removesuffix('; download it again')}); make it again") from error


def _read_video(files: Mapping[str, Path]) -> LatentVideo:
    tensors = {what: read_tensor(path, what) for what, path in files.items()}
    return LatentVideo(
        latent_CFHW=tensors["latent"],
        texts_PD={name: tensors[name] for name in ("short", "long") if name in tensors},
        # Zeros: prfl_layout.py writes them where there is no embedding. Read as one, an image-to-video PAVRM would score nonsense instead of asking for it.
        clip_PD=tensors["clip"] if "clip" in tensors and tensors["clip"].any() else None,
        condition_CFHW=tensors.get("condition"),
    )


def read_tensor(path: Path, what: str) -> torch.Tensor:
    """An .npy array or the one tensor of a .safetensors, fp32, without a first axis of one.

    Args:
        what: `latent` [C, F, H, W], `short` or `long` [P, D], `clip` [P, D], `condition` [C, F, H, W].

    Raises:
        ValueError: the file is missing or broken, has other axes, or holds NaN or infinity.
    """
    try:
        if path.suffix == ".npy":
            tensor = torch.from_numpy(np.load(path, allow_pickle=False)).float()
        else:
            with safe_open(path, framework="pt") as file:
                (name,) = file.keys()
                tensor = file.get_tensor(name).float()
    except (OSError, ValueError, EOFError, SafetensorError) as error:
        raise ValueError(f"{path} cannot be read ({error}); make it again") from error
    if not tensor.isfinite().all():
        raise ValueError(f"{path} holds NaN or infinity; make it again")
    return tensor.reshape(_without_batch(tuple(tensor.shape), what, path))


def _without_batch(shape: tuple[int, ...], what: str, path: Path) -> tuple[int, ...]:
    axes = _AXES[what]
    shape = shape[1:] if len(shape) == axes + 1 and shape[0] == 1 else shape
    if len(shape) != axes:
        raise ValueError(f"{path} has shape {list(shape)}; {axes} axes are needed, or {axes + 1} with a first one of 1")
    return shape


def _annotated(samples: Sequence[Sample], labels: Mapping[str, Mapping[str, Any]], path: Path) -> tuple[list[Sample], list[str]]:
    known = {sample.id for sample in samples}
    strange = sorted(set(labels) - known)
    notes = [f"{path}: labels of {len(labels)} videos"]
    if strange:
        notes.append(f"{len(strange)} labelled videos are not in the dataset ({', '.join(strange[:3])})")
    return [replace(sample, labels={**sample.labels, **labels.get(sample.id, {})}) for sample in samples], notes

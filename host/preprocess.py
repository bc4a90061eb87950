"""Makes a dataset: finds videos and captions, decodes, encodes them with VAE and text encoder, and writes index, caches and previews.

Caches are files named by a hash of what they were made of (video bytes, model file, settings), so a second run encodes only what is new, and an
interrupted one goes on. A video that cannot be used is listed in the index with the reason; it never ends the run.
Sources: a folder of videos (captions from a prompt file, `<video>.txt` beside each, or one for all), a TestLab sweep, or HY-Video-PRFL's input
list (JSON of source_id, video_path, short_caption, long_caption).
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch

from ..lora_train import annotations, safetensors_file
from ..lora_train.labels import QUALITIES
from ..testlab import cells
from . import media, video_prompts
from .datasets import INDEX, VERSION
from .video_clips import ClipSettings, ClipStream

logger = logging.getLogger("reward_lab")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_HASHES = "model_hashes.json"


@dataclass(frozen=True, kw_only=True)
class Source:
    """A video to encode. `size_px`: own width and height, for a sweep's cells, whose files are enlarged."""

    path: Path
    id: str = ""
    caption: str = ""
    long_caption: str = ""
    labels: Mapping[str, Any] = field(default_factory=dict)
    size_px: tuple[int, int] | None = None
    frame_rate: float | None = None


@dataclass(frozen=True, kw_only=True)
class Encoders:
    """What encodes; models are loaded when the first uncached item needs them.

    text: prompts -> contexts [P, D]. video: pieces [B, T, 3, H, W] in [0, 1] of one frame, then two at a time -> latents [B, 16, F, h, w] in model space.
    """

    text: Callable[[Sequence[str]], list[torch.Tensor]]
    video: Callable[[Iterable[torch.Tensor]], torch.Tensor]
    text_sha256: str
    vae_sha256: str


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What a run has made."""

    folder: Path
    videos: int
    encoded: int
    skipped: list[dict[str, str]]

    def text(self) -> str:
        """For people."""
        lines = [f"{self.videos} videos in {self.folder} ({self.encoded} encoded now, the others were cached)"]
        lines += [f"skipped {entry['file']}: {entry['reason']}" for entry in self.skipped]
        return "\n".join(lines)


def find_sources(source: Path, *, prompts: str = "", prompt: str = "") -> list[Source]:
    """The videos of a folder, a sweep, or an input list.

    Args:
        prompts: a prompt file, see video_prompts.
        prompt: one caption for all.

    Raises:
        ValueError: nothing there, or a prompt file that does not fit.
    """
    if not source.exists():
        raise ValueError(f"there is no folder or list {source}; check the path")
    if source.is_file():
        return _from_list(source)
    if (source / "cells").is_dir():
        own = source / annotations.FILE_NAME
        labels = annotations.read(own) if own.is_file() else {}
        return [_of_cell(source, key, labels.get(key, {})) for key in sorted(cells.recorded_keys(source))]
    files = sorted((path for path in source.rglob("*") if path.suffix.lower() in media.VIDEOS and not path.name.startswith(".")), key=media.natural)
    if not files:
        raise ValueError(f"{source} holds no videos; it takes {' '.join(media.VIDEOS)}")
    names = [file.relative_to(source).as_posix() for file in files]
    captions = video_prompts.read(prompts, names) if prompts else [_beside(file) or prompt for file in files]
    return [Source(path=file, caption=caption.strip()) for file, caption in zip(files, captions, strict=True)]


def _beside(file: Path) -> str:
    text = file.with_suffix(".txt")
    return text.read_text(encoding="utf-8-sig").strip() if text.is_file() else ""


def _of_cell(folder: Path, key: str, labels: Mapping[str, Any]) -> Source:
    path = cells.cell_folder(folder, key) / cells.VIDEO_FILE
    cell = cells.load(folder, key)
    if cell is None:
        return Source(path=path, id=key)
    size_px = (cell.width_px // cell.scale, cell.height_px // cell.scale)
    return Source(path=path, id=key, caption=cell.prompt, labels=labels, size_px=size_px, frame_rate=cell.frame_rate)


def _from_list(path: Path) -> list[Source]:
    try:
        values = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise ValueError(f"the list {path} is not JSON ({error}); write a list of objects with video_path and short_caption") from error
    if not isinstance(values, list) or not all(isinstance(entry, dict) and entry.get("video_path") for entry in values):
        raise ValueError(f"the list {path} must hold objects with video_path, and with short_caption or long_caption")
    found = []
    for entry in values:
        short = str(entry.get("short_caption") or entry.get("caption") or entry.get("long_caption") or "")
        long = str(entry.get("long_caption") or "")
        labels = {name: entry[name] for name in QUALITIES if name in entry}
        video = Path(entry["video_path"])
        video = video if video.is_absolute() or video.is_file() else path.parent / video
        found.append(Source(path=video, id=str(entry.get("source_id", "")), caption=short.strip(), long_caption=long.strip(), labels=labels))
    return found


def make(
    sources: Sequence[Source],
    folder: Path,
    encoders: Encoders,
    settings: ClipSettings,
    *,
    dtype: str = "bf16",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Summary:
    """Write the dataset.

    Args:
        folder: of the dataset; what is cached there is used.
        dtype: of the caches, one of DTYPES.
        progress: called after each video; may raise to stop: what is encoded stays cached.

    Raises:
        ValueError: no video could be used.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; it must be one of {', '.join(DTYPES)}")
    for name in ("latents", "texts", "previews"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    skipped: list[dict[str, str]] = []
    usable = [source for source in sources if _is_usable(source, skipped)]
    texts = _texts(usable, folder, encoders, dtype)
    videos: list[dict[str, Any]] = []
    encoded, seen = 0, {}
    for number, source in enumerate(usable, 1):
        try:
            sha256 = file_sha256(source.path)
            video_id = source.id or sha256[:20]
            if video_id in seen:
                raise ValueError(f"the same video as {seen[video_id]}")
            own = _settings_of(source, settings)
            entry, is_new = _encoded(source, video_id, sha256, folder, encoders, own, dtype)
        except (ValueError, OSError) as error:
            if isinstance(error, OSError) and error.errno == 28:
                raise
            logger.warning("skipped %s: %s", source.path, error)
            skipped.append({"file": str(source.path), "reason": str(error)})
            continue
        seen[video_id] = source.path.name
        encoded += is_new
        videos.append({**entry, "text": texts[source.caption], "long_text": texts.get(source.long_caption, "") if source.long_caption else ""})
        progress(number, len(usable))
    write_index(folder, {"version": VERSION, "settings": {**asdict(settings), "dtype": dtype}, "videos": videos, "skipped": skipped})
    if not videos:
        raise ValueError(f"none of {len(sources)} videos could be used. The first reason: {skipped[0]['reason'] if skipped else 'there is no video'}")
    return Summary(folder=folder, videos=len(videos), encoded=encoded, skipped=skipped)


def _is_usable(source: Source, skipped: list[dict[str, str]]) -> bool:
    reason = ""
    if not source.path.is_file():
        reason = "the file does not exist"
    elif source.id and not _ID.fullmatch(source.id):
        reason = f"its id {source.id!r} cannot be a file name"
    elif not source.caption:
        reason = "it has no caption; give a prompt file, a .txt of its name beside it, or one prompt for all"
    if reason:
        skipped.append({"file": str(source.path), "reason": reason})
    return not reason


def _settings_of(source: Source, settings: ClipSettings) -> ClipSettings:
    if source.size_px is None:
        return settings
    # A cell of a sweep is encoded as it was made: its latent had this size.
    return replace(settings, width_px=source.size_px[0], height_px=source.size_px[1], frame_rate=source.frame_rate or settings.frame_rate)


def _texts(sources: Sequence[Source], folder: Path, encoders: Encoders, dtype: str) -> dict[str, str]:
    """File (relative to the folder) of every caption; encodes those that are not cached."""
    captions = list(dict.fromkeys(text for source in sources for text in (source.caption, source.long_caption) if text))
    files = {text: f"texts/{_key('text', encoders.text_sha256, text, dtype)}.safetensors" for text in captions}
    absent = [text for text in captions if not (folder / files[text]).is_file()]
    if absent:
        for text, context_PD in zip(absent, encoders.text(absent), strict=True):
            safetensors_file.write(folder / files[text], {"text": without_padding(context_PD).to(DTYPES[dtype])}, {"text": text})
    return files


def without_padding(context_PD: torch.Tensor) -> torch.Tensor:
    """The rows of real tokens: the host fills up with rows of zeros, HY-Video-PRFL stores none; PAVRM's reader puts them back."""
    rows = context_PD.abs().sum(dim=1).nonzero()
    return context_PD[: int(rows[-1]) + 1 if len(rows) else 1]


def _encoded(source, video_id, sha256, folder, encoders, settings, dtype) -> tuple[dict[str, Any], bool]:
    """Index entry of a video, and whether it was encoded now."""
    key = _key("latent", encoders.vae_sha256, sha256, json.dumps(asdict(settings), sort_keys=True), dtype)
    path, note = folder / "latents" / f"{key}.safetensors", folder / "latents" / f"{key}.json"
    preview = f"previews/{key}.mp4"
    is_new = not (path.is_file() and note.is_file() and (folder / preview).is_file())
    if is_new:
        # Once for the latent, once for the preview: the source is decoded twice, and no more than a few frames are in memory.
        clip = ClipStream(source.path, settings)
        latent = encoders.video(piece[None] for block in clip for piece in block.split(2))[0].to(DTYPES[dtype]).cpu()
        if not latent.isfinite().all():
            raise ValueError(f"the VAE made NaN or infinity of {source.path.name} in {dtype}; use another --dtype, or look at the video")
        safetensors_file.write(path, {"latent": latent}, {"source_sha256": sha256})
        width_px, height_px = settings.size(*clip.source_px)
        scale = max(1, -(-cells.MIN_VIDEO_PX // min(width_px, height_px)))
        frames = ((frame_CHW * 255).round().to(torch.uint8).permute(1, 2, 0).numpy() for block in clip for frame_CHW in block)
        cells.write_video(folder / preview, (cells.enlarge(frame, scale) for frame in frames), Fraction(settings.frame_rate).limit_denominator(1001))
        values = {"latent_shape": list(latent.shape), "frames": clip.frames, "frame_rate": settings.frame_rate,
                  "width_px": width_px, "height_px": height_px, "source_px": list(clip.source_px)}  # fmt: skip
        note.write_text(json.dumps(values), encoding="utf-8")
    entry = {
        "id": video_id,
        "file": str(source.path),
        "sha256": sha256,
        "caption": source.caption,
        "long_caption": source.long_caption,
        "labels": dict(source.labels),
        "latent": f"latents/{key}.safetensors",
        "preview": preview,
        **json.loads(note.read_text(encoding="utf-8")),
    }
    return entry, is_new


def write_index(folder: Path, index: Mapping[str, Any]) -> None:
    """Write `dataset.json` at once."""
    partial = folder / f"{INDEX}.partial"
    partial.write_text(json.dumps(index, indent=1, ensure_ascii=False), encoding="utf-8")
    partial.replace(folder / INDEX)


def file_sha256(path: Path) -> str:
    """Hash of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(1 << 22):
            digest.update(part)
    return digest.hexdigest()


def model_sha256(path: Path, folder: Path) -> str:
    """Hash of a model file, remembered in the dataset folder by path, size and time: hashing a text encoder takes half a minute."""
    memory = folder / _HASHES
    try:
        known = json.loads(memory.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        known = {}
    status = path.stat()
    stamp = f"{path.resolve()}:{status.st_size}:{status.st_mtime_ns}"
    if not isinstance(known, dict) or stamp not in known:
        known = {**(known if isinstance(known, dict) else {}), stamp: file_sha256(path)}
        folder.mkdir(parents=True, exist_ok=True)
        memory.write_text(json.dumps(known, indent=1), encoding="utf-8")
    return known[stamp]


def _key(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]

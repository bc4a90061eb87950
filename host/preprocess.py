"""Makes a dataset: finds videos and captions, decodes, encodes them with VAE and text encoder, and writes index, caches and previews.

Caches are files named by a hash of what they were made of (video bytes, model file, settings), so a second run encodes only what is new, and an
interrupted one goes on; what is there is read, and made again where it is broken. A video that cannot be used is listed in the index with the reason; it
never ends the run. A run that can use none leaves the index as it was.
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

import av
import torch

from ..lora_train import annotations, recovery, safetensors_file
from ..lora_train.labels import QUALITIES
from ..testlab import cells
from . import media, video_prompts
from .datasets import INDEX, VERSION, read_tensor
from .video_clips import ClipSettings, ClipStream

logger = logging.getLogger("reward_lab")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_HASHES = "model_hashes.json"
# What the note beside a latent tells of it.
_FACTS = ("latent_shape", "frames", "frame_rate", "width_px", "height_px", "source_px")


@dataclass(frozen=True, kw_only=True)
class Source:
    """A video to encode. `size_px`: own width and height, for a sweep's cells, whose files are enlarged. `problem`: why it cannot be used, where its caption
    said so already."""

    path: Path
    id: str = ""
    caption: str = ""
    long_caption: str = ""
    labels: Mapping[str, Any] = field(default_factory=dict)
    size_px: tuple[int, int] | None = None
    frame_rate: float | None = None
    problem: str = ""


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
    if not prompts:
        return [_with_text_beside(file, prompt) for file in files]
    captions = video_prompts.read(prompts, [file.relative_to(source).as_posix() for file in files])
    return [Source(path=file, caption=caption.strip()) for file, caption in zip(files, captions, strict=True)]


def _with_text_beside(file: Path, prompt: str) -> Source:
    """A video with the caption in the text file of its name, else with `prompt`."""
    text = file.with_suffix(".txt")
    try:
        own = text.read_text(encoding="utf-8-sig").strip() if text.is_file() else ""
    except (OSError, UnicodeDecodeError) as error:
        return Source(path=file, problem=f"its caption {text.name} cannot be read ({error}); save it as UTF-8")
    return Source(path=file, caption=own or prompt.strip())


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
    if not isinstance(values, list):
        raise ValueError(f"the list {path} holds a {type(values).__name__}; write a list of objects with video_path and short_caption")
    found = []
    for number, entry in enumerate(values, 1):
        if not isinstance(entry, dict) or not isinstance(entry.get("video_path"), str) or not entry["video_path"]:
            given = entry.get("video_path") if isinstance(entry, dict) else entry
            raise ValueError(f"entry {number} of the list {path} has the video_path {given!r}; write an object with the path of a video, and a short_caption")
        short = str(entry.get("short_caption") or entry.get("caption") or entry.get("long_caption") or "")
        long = str(entry.get("long_caption") or "")
        labels = {name: entry[name] for name in QUALITIES if name in entry}
        video = Path(entry["video_path"])
        video = video if video.is_absolute() or video.is_file() else path.parent / video
        own_id = "" if entry.get("source_id") is None else str(entry["source_id"])
        found.append(Source(path=video, id=own_id, caption=short.strip(), long_caption=long.strip(), labels=labels))
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
        ValueError: no video could be used; an index of an earlier run is as it was.
        OSError: the disk is full (`recovery.is_disk_full`), or the folder cannot be written to.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; it must be one of {', '.join(DTYPES)}")
    for name in ("latents", "texts", "previews"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    skipped: list[dict[str, str]] = []
    usable = [source for source in sources if _is_usable(source, skipped)]
    texts = _texts(usable, folder, encoders, dtype)
    videos: list[dict[str, Any]] = []
    encoded = 0
    seen: dict[str, tuple[str, str]] = {}
    for number, source in enumerate(usable, 1):
        try:
            sha256 = file_sha256(source.path)
            video_id = source.id or sha256[:20]
            if video_id in seen:
                name, is_same = seen[video_id][0], seen[video_id][1] == sha256
                raise ValueError(f"the same video as {name}" if is_same else f"it has the id {video_id!r} of {name}, which is another video; give it its own")
            own = _settings_of(source, settings)
            entry, is_new = _encoded(source, video_id, sha256, folder, encoders, own, dtype)
        except (ValueError, OSError) as error:
            if recovery.is_disk_full(error):
                raise
            logger.warning("skipped %s: %s", source.path, error)
            skipped.append({"file": str(source.path), "reason": str(error)})
            continue
        seen[video_id] = source.path.name, sha256
        encoded += is_new
        videos.append({**entry, "text": texts[source.caption], "long_text": texts.get(source.long_caption, "") if source.long_caption else ""})
        progress(number, len(usable))
    if not videos:
        kept = f". {folder / INDEX} is as it was" if (folder / INDEX).is_file() else ""
        raise ValueError(f"none of {len(sources)} videos could be used. The first reason: {skipped[0]['reason'] if skipped else 'there is no video'}{kept}")
    write_index(folder, {"version": VERSION, "settings": {**asdict(settings), "dtype": dtype}, "videos": videos, "skipped": skipped})
    return Summary(folder=folder, videos=len(videos), encoded=encoded, skipped=skipped)


def _is_usable(source: Source, skipped: list[dict[str, str]]) -> bool:
    reason = source.problem
    if not source.path.is_file():
        reason = "the file does not exist"
    elif source.id and not _ID.fullmatch(source.id):
        reason = f"its id {source.id!r} cannot be a file name"
    elif not source.caption and not reason:
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
    absent = [text for text in captions if not _is_whole(folder / files[text])]
    if absent:
        for text, context_PD in zip(absent, encoders.text(absent), strict=True):
            safetensors_file.write(folder / files[text], {"text": without_padding(context_PD).to(DTYPES[dtype])}, {"text": text})
    return files


def without_padding(context_PD: torch.Tensor) -> torch.Tensor:
    """The rows of real tokens: the host fills up with rows of zeros, HY-Video-PRFL stores none; PAVRM's reader puts them back."""
    rows = context_PD.abs().sum(dim=1).nonzero()
    return context_PD[: int(rows[-1]) + 1 if len(rows) else 1]


def _is_whole(text: Path) -> bool:
    try:
        read_tensor(text, "short")
    except ValueError:
        return False
    return True


def _encoded(source, video_id, sha256, folder, encoders, settings, dtype) -> tuple[dict[str, Any], bool]:
    """Index entry of a video, and whether it was encoded now."""
    key = _key("latent", encoders.vae_sha256, sha256, json.dumps(asdict(settings), sort_keys=True), dtype)
    files = {"latent": f"latents/{key}.safetensors", "preview": f"previews/{key}.mp4"}
    latent, preview, note = folder / files["latent"], folder / files["preview"], folder / "latents" / f"{key}.json"
    facts = _cached(latent, preview, note)
    is_new = facts is None
    if is_new:
        facts = _encode(source.path, settings, encoders, dtype, latent, preview, {"source_sha256": sha256})
        # Last: where there is a note, the rest was written.
        _write_at_once(note, json.dumps(facts))
    entry = {
        "id": video_id,
        "file": str(source.path),
        "sha256": sha256,
        "caption": source.caption,
        "long_caption": source.long_caption,
        "labels": dict(source.labels),
        **files,
        **facts,
    }
    return entry, is_new


def _cached(latent: Path, preview: Path, note: Path) -> dict[str, Any] | None:
    """What the note tells of a video's caches; None where one of the three is missing or broken."""
    try:
        facts = json.loads(note.read_text(encoding="utf-8"))
        with av.open(str(preview)) as container:
            has_video = bool(container.streams.video)
        shape = list(read_tensor(latent, "latent").shape)
    except (OSError, ValueError, av.FFmpegError):
        return None
    is_whole = has_video and isinstance(facts, dict) and set(_FACTS) <= set(facts) and facts["latent_shape"] == shape
    return {name: facts[name] for name in _FACTS} if is_whole else None


def _encode(
    video: Path, settings: ClipSettings, encoders: Encoders, dtype: str, latent_file: Path, preview: Path, metadata: Mapping[str, str]
) -> dict[str, Any]:
    """Write latent and preview of a video; returns what is told of them, `_FACTS`."""
    # Once for the latent, once for the preview: the source is decoded twice, and no more than a few frames are in memory.
    clip = ClipStream(video, settings)
    latent = encoders.video(piece[None] for block in clip for piece in block.split(2))[0].to(DTYPES[dtype]).cpu()
    if not latent.isfinite().all():
        raise ValueError(f"the VAE made NaN or infinity of {video.name} in {dtype}; use another --dtype, or look at the video")
    safetensors_file.write(latent_file, {"latent": latent}, metadata)
    width_px, height_px = settings.size(*clip.source_px)
    scale = max(1, -(-cells.MIN_VIDEO_PX // min(width_px, height_px)))
    frames = ((frame_CHW * 255).round().to(torch.uint8).permute(1, 2, 0).numpy() for block in clip for frame_CHW in block)
    cells.write_video(preview, (cells.enlarge(frame, scale) for frame in frames), Fraction(settings.frame_rate).limit_denominator(1001))
    return {"latent_shape": list(latent.shape), "frames": clip.frames, "frame_rate": settings.frame_rate,
            "width_px": width_px, "height_px": height_px, "source_px": list(clip.source_px)}  # fmt: skip


def write_index(folder: Path, index: Mapping[str, Any]) -> None:
    """Write `dataset.json`, whole or not at all. One that says the same stays as it is: a run made before it would count as out of date."""
    path, text = folder / INDEX, json.dumps(index, indent=1, ensure_ascii=False)
    if not path.is_file() or path.read_text(encoding="utf-8", errors="replace") != text:
        _write_at_once(path, text)


def _write_at_once(path: Path, text: str) -> None:
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


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

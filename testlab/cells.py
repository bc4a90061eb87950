"""Recorded cells of a sweep: one folder each with the video, the scores and the applied values.

A cell appears at once and whole: everything is written to a temporary folder first. Videos are H.264; small ones are enlarged by whole
pixels first, so that H.264's coarse colour does not smear them and players show them in a useful size.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image

CELL_FILE = "cell.json"
VIDEO_FILE = "video.mp4"
POSTER_FILE = "first_frame.png"
MIN_VIDEO_PX = 256  # videos with a shorter side below this are enlarged
QUALITY = "14"  # H.264 constant rate factor; 14 is visually lossless
# Entries of a score that say what it was made with: the reward model, its file, its options, and the rows of a mix.
SCORED_BY = ("reward_model", "weights", "options", "rows")
_KEY = re.compile(r"[0-9a-f]{8,64}")


@dataclass(frozen=True, kw_only=True)
class RecordedCell:
    """A cell on disk. `scale` is the factor by which the video was enlarged; sizes are those of the video file."""

    key: str
    applied: list[dict[str, Any]]
    prompt: str
    frames: int
    width_px: int
    height_px: int
    scale: int
    frame_rate: float
    scores: dict[str, Any]

    @property
    def reward(self) -> float | None:
        """Mean reward; None when the cell was not scored."""
        return self.scores.get("reward")


def cell_folder(sweep_folder: Path, key: str) -> Path:
    """Return the folder of a cell.

    Raises:
        ValueError: The key is no hash.
    """
    if not _KEY.fullmatch(key):
        raise ValueError(f"{key!r} is no cell key; it is a hash of 8 to 64 hexadecimal digits.")
    return sweep_folder / "cells" / key


def record(
    sweep_folder: Path,
    key: str,
    frames_FHWC: np.ndarray,
    *,
    applied: list[dict[str, Any]],
    prompt: str,
    frame_rate: float,
    scores: Mapping[str, Any],
) -> RecordedCell:
    """Write a cell.

    Args:
        sweep_folder: Folder of the sweep.
        key: Hash of what made the cell.
        frames_FHWC: uint8, RGB.
        applied: From `sweep.applied_values`.
        prompt: What the frames were scored against; may be empty.
        frame_rate: Frames per second.
        scores: JSON data; `reward` is shown in the grid when there.

    Returns:
        The recorded cell.

    Raises:
        ValueError: No frames, or frames of the wrong kind.
    """
    if frames_FHWC.ndim != 4 or frames_FHWC.shape[0] == 0 or frames_FHWC.shape[-1] != 3 or frames_FHWC.dtype != np.uint8:
        raise ValueError(f"A cell needs at least one RGB frame of 8 bits, not {frames_FHWC.dtype} of shape {frames_FHWC.shape}.")
    folder = cell_folder(sweep_folder, key)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".new-"))
    try:
        height, width = frames_FHWC.shape[1:3]
        scale = max(1, -(-MIN_VIDEO_PX // min(height, width)))
        size = write_video(temporary / VIDEO_FILE, (enlarge(frame, scale) for frame in frames_FHWC), frame_rate)
        Image.fromarray(enlarge(frames_FHWC[0], scale)).save(temporary / POSTER_FILE)
        cell = RecordedCell(
            key=key,
            applied=applied,
            prompt=prompt,
            frames=int(frames_FHWC.shape[0]),
            width_px=size[0],
            height_px=size[1],
            scale=scale,
            frame_rate=frame_rate,
            scores=dict(scores),
        )
        (temporary / CELL_FILE).write_text(json.dumps(asdict(cell), indent=1), encoding="utf-8")
        temporary.chmod(0o755)  # mkdtemp makes folders that nobody else may read
        if folder.exists():
            shutil.rmtree(folder)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return cell


def load(sweep_folder: Path, key: str) -> RecordedCell | None:
    """Return a recorded cell, or None when it is not there or not whole."""
    path = cell_folder(sweep_folder, key) / CELL_FILE
    if not path.is_file() or not path.with_name(VIDEO_FILE).is_file():
        return None
    try:
        return RecordedCell(**json.loads(path.read_text(encoding="utf-8")))
    except (json.JSONDecodeError, UnicodeDecodeError, TypeError):
        return None  # a damaged cell is as good as none: it is made again


def recorded_keys(sweep_folder: Path) -> set[str]:
    """Return the keys of all cells that a sweep has ever recorded."""
    folder = sweep_folder / "cells"
    return {path.name for path in folder.iterdir() if _KEY.fullmatch(path.name) and (path / CELL_FILE).is_file()} if folder.is_dir() else set()


def best_keys(recorded: Iterable[RecordedCell]) -> set[str]:
    """Return the keys of the cells with the highest reward among those scored against the same prompt by the same model with the same settings.

    Rewards of different prompts or settings cannot be compared, so each of them has a best cell of its own; one with a single cell has none.
    """
    groups: dict[str, list[RecordedCell]] = {}
    for cell in recorded:
        if cell.reward is not None:
            scored_by = [cell.scores.get(name) for name in SCORED_BY]
            groups.setdefault(json.dumps([cell.prompt, scored_by], sort_keys=True), []).append(cell)
    return {max(group, key=lambda cell: cell.reward or 0.0).key for group in groups.values() if len(group) > 1}


def read_frames(path: Path) -> Iterator[np.ndarray]:
    """Yield the frames of a video file, one at a time.

    Yields:
        uint8 [H, W, 3], RGB.
    """
    with av.open(str(path)) as container:
        for frame in container.decode(video=0):
            yield frame.to_ndarray(format="rgb24")


def write_video(path: Path, frames: Iterator[np.ndarray], frame_rate: float) -> tuple[int, int]:
    """Encode frames as H.264 in MP4, one at a time; odd sizes lose their last row or column, which 4:2:0 cannot hold.

    Args:
        path: The file.
        frames: uint8 [H, W, 3], RGB, all of one size.
        frame_rate: Frames per second.

    Returns:
        Width and height of the video in pixels.

    Raises:
        ValueError: There are no frames.
    """
    size = (0, 0)
    with av.open(str(path), "w", format="mp4", options={"movflags": "+faststart"}) as container:
        stream = None
        for frame in frames:
            if stream is None:
                size = (frame.shape[1] // 2 * 2, frame.shape[0] // 2 * 2)
                stream = container.add_stream("libx264", rate=Fraction(frame_rate).limit_denominator(1000))
                stream.width, stream.height, stream.pix_fmt = size[0], size[1], "yuv420p"
                stream.options = {"crf": QUALITY, "preset": "veryfast"}
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame[: size[1], : size[0]]), format="rgb24")
            container.mux(stream.encode(picture))
        if stream is None:
            raise ValueError("A video needs at least one frame.")
        container.mux(stream.encode())
    return size


def enlarge(frame_HWC: np.ndarray, scale: int) -> np.ndarray:
    """Repeat every pixel `scale` times in both directions."""
    return frame_HWC if scale == 1 else frame_HWC.repeat(scale, axis=0).repeat(scale, axis=1)

"""Decodes a video for encoding: frames at a fixed rate, resized and cropped to what the VAE takes, 4n+1 of them.

Size rules: `width_px` and `height_px` together fill exactly that frame; else the short side becomes `short_px` and the long side at most `long_px`, both
multiples of `multiple_px`, the rest is cut off around the centre. Defaults are those of HY-Video-PRFL's preprocessing (480P; 704 and 1280 are its 720P).
Only wanted frames are kept, each resized at once, so memory does not grow with the length or size of the source.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import av
import numpy as np
import torch
from torch.nn import functional

VAE_MULTIPLE_PX = 16  # 8 of the VAE times 2 of the transformer's patches
LEAST_FRAMES = 5
# A latent's worth of frames, after the first one
FRAMES_PER_BLOCK = 4


@dataclass(frozen=True, kw_only=True)
class ClipSettings:
    """How videos become frames. `frames`: at most so many, 4n+1; a shorter video is cut to the next lower 4n+1. `start_s`: of the first frame."""

    frame_rate: float = 16.0
    frames: int = 81
    short_px: int = 480
    long_px: int = 832
    width_px: int = 0
    height_px: int = 0
    multiple_px: int = 32
    start_s: float = 0.0

    def __post_init__(self) -> None:
        if not (self.frame_rate > 0 and math.isfinite(self.frame_rate)):
            raise ValueError(f"frame_rate is {self.frame_rate}; it must be a positive number (Wan2.2 14B: 16)")
        if self.frames < 1 or self.frames % 4 != 1:
            low = max(1, (self.frames - 1) // 4 * 4 + 1)
            raise ValueError(f"frames is {self.frames}, but the Wan VAE takes 4n+1; use {low} or {low + 4}")
        if self.multiple_px % VAE_MULTIPLE_PX or self.multiple_px < VAE_MULTIPLE_PX:
            raise ValueError(f"multiple_px is {self.multiple_px}; it must be a multiple of {VAE_MULTIPLE_PX}")
        if bool(self.width_px) != bool(self.height_px):
            raise ValueError(f"width is {self.width_px} and height {self.height_px}; give both, or neither to go by the short side")
        sizes = {"width": self.width_px, "height": self.height_px} if self.width_px else {"short side": self.short_px, "long side": self.long_px}
        for name, value in sizes.items():
            if value < VAE_MULTIPLE_PX or value % VAE_MULTIPLE_PX:
                nearest = max(VAE_MULTIPLE_PX, round(value / VAE_MULTIPLE_PX) * VAE_MULTIPLE_PX)
                raise ValueError(f"the {name} is {value} pixels, but the VAE and the transformer take multiples of {VAE_MULTIPLE_PX}; use {nearest}")
        if not self.width_px and self.long_px < self.short_px:
            raise ValueError(f"the long side, {self.long_px}, is shorter than the short side, {self.short_px}; exchange them")

    def size(self, width_px: int, height_px: int) -> tuple[int, int]:
        """Width and height that a video of this size gets."""
        if self.width_px:
            return self.width_px, self.height_px
        long_px = max(width_px, height_px) * self.short_px / min(width_px, height_px)
        long_px = max(self.short_px, min(self.long_px, int(long_px)) // self.multiple_px * self.multiple_px)
        return (long_px, self.short_px) if width_px >= height_px else (self.short_px, long_px)


class ClipStream:
    """A video's frames as the settings want them, in blocks [T, 3, H, W], float32 in [0, 1]: one frame, then four at a time. Can be walked through again.

    Attributes:
        source_px: width and height of the source; known from the first block on.
        frames: how many were given out; known at the end.
    """

    def __init__(self, path: Path, settings: ClipSettings) -> None:
        self._path, self._settings = path, settings
        self.source_px = (0, 0)
        self.frames = 0

    def __iter__(self) -> Iterator[torch.Tensor]:
        """Walk through the video.

        Raises:
            ValueError: damaged, no video stream, or too short; the last shows at the end only.
        """
        group: list[torch.Tensor] = []
        self.frames, read = 0, 0
        try:
            with av.open(str(self._path)) as container:
                if not container.streams.video:
                    raise ValueError(f"{self._path.name} has no video stream")
                for pixels_HWC in islice(_at_rate(container, self._settings), self._settings.frames):
                    self.source_px = (pixels_HWC.shape[1], pixels_HWC.shape[0])
                    group.append(_fitted(pixels_HWC, self._settings))
                    read += 1
                    # 1, 5, 9, ... frames: what is left over at the end is cut off.
                    if read % FRAMES_PER_BLOCK == 1:
                        self.frames += len(group)
                        yield torch.stack(group)
                        group = []
        except (av.FFmpegError, OSError) as error:
            raise ValueError(f"{self._path.name} cannot be decoded ({error}); it is damaged or no video") from error
        least = min(LEAST_FRAMES, self._settings.frames)
        if self.frames < least:
            raise ValueError(f"{self._path.name} has {read} frames at {self._settings.frame_rate:g} a second; at least {least} are needed")


@dataclass(frozen=True, kw_only=True)
class VideoClip:
    """`frames_FCHW`: float32 in [0, 1]. `source_px`: width and height of the source."""

    frames_FCHW: torch.Tensor
    source_px: tuple[int, int]
    frame_rate: float


def read_clip(path: Path, settings: ClipSettings) -> VideoClip:
    """Decode a video, all of it at once.

    Raises:
        ValueError: damaged, no video stream, or too short.
    """
    stream = ClipStream(path, settings)
    frames = torch.cat(list(stream))
    return VideoClip(frames_FCHW=frames, source_px=stream.source_px, frame_rate=settings.frame_rate)


def _at_rate(container, settings: ClipSettings) -> Iterator[np.ndarray]:
    """The picture that a player shows at each instant of the wanted rate."""
    stream = container.streams.video[0]
    stream.thread_type = "AUTO"
    own_rate = float(stream.average_rate or settings.frame_rate)
    begin_s: float | None = None
    due, shown = 0, None
    slack_s = 1e-3
    for number, frame in enumerate(container.decode(stream)):
        time_s = frame.time if frame.time is not None else number / own_rate
        begin_s = time_s if begin_s is None else begin_s
        while shown is not None and settings.start_s + due / settings.frame_rate < time_s - begin_s - slack_s:
            yield shown.to_ndarray(format="rgb24")
            due += 1
        shown = frame
        last_s = time_s - begin_s
    # The last picture stays for its own length.
    while shown is not None and settings.start_s + due / settings.frame_rate < last_s + 1 / own_rate - slack_s:
        yield shown.to_ndarray(format="rgb24")
        due += 1


def _fitted(pixels_HWC: np.ndarray, settings: ClipSettings) -> torch.Tensor:
    """Scale until the target is covered, then cut the centre; float [3, H, W] in [0, 1]."""
    height, width = pixels_HWC.shape[:2]
    target_w, target_h = settings.size(width, height)
    image_1CHW = torch.from_numpy(pixels_HWC).permute(2, 0, 1)[None].float() / 255
    if (width, height) != (target_w, target_h):
        scale = max(target_w / width, target_h / height)
        size = (max(target_h, round(height * scale)), max(target_w, round(width * scale)))
        image_1CHW = functional.interpolate(image_1CHW, size=size, mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
    top, left = (image_1CHW.shape[2] - target_h) // 2, (image_1CHW.shape[3] - target_w) // 2
    return image_1CHW[0, :, top : top + target_h, left : left + target_w].contiguous()

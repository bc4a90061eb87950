"""Writes the sample videos of a run: a strip of frames as PNG and a video of all prompts side by side as MP4."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
from PIL import Image

FOLDER = "samples"
_FRAMES_IN_STRIP = 8


class SampleFiles:
    """See `lora_train.protocols.SampleWriter`."""

    def __init__(self, run_folder: Path, frame_rate: float) -> None:
        self._folder = run_folder / FOLDER
        self._rate = Fraction(frame_rate).limit_denominator(1001)
        self._run_folder = run_folder

    def write(self, videos_BTHWC: torch.Tensor, prompts: Sequence[str], step: int) -> list[str]:
        """Write `samples/step-000050.png` (one row a prompt) and `.mp4`; returns their names relative to the run folder.

        Args:
            videos_BTHWC: uint8.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        strip = self._folder / f"step-{step:06d}.png"
        video = self._folder / f"step-{step:06d}.mp4"
        videos = videos_BTHWC.numpy()
        Image.fromarray(_strip(videos)).save(strip, pnginfo=None)
        self._encode(video, np.concatenate(list(videos), axis=2))
        return [path.relative_to(self._run_folder).as_posix() for path in (strip, video)]

    def _encode(self, path: Path, frames_THWC: np.ndarray) -> None:
        height, width = frames_THWC.shape[1:3]
        with av.open(str(path), "w") as container:
            stream = container.add_stream("libx264", rate=self._rate)
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            stream.options = {"crf": "18", "threads": "1"}
            for frame_HWC in frames_THWC:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame_HWC), format="rgb24")))
            container.mux(stream.encode())


def _strip(videos_BTHWC: np.ndarray) -> np.ndarray:
    total = videos_BTHWC.shape[1]
    count = min(_FRAMES_IN_STRIP, total)
    chosen = [index * (total - 1) // max(1, count - 1) for index in range(count)]
    return np.concatenate([np.concatenate(list(video[chosen]), axis=1) for video in videos_BTHWC], axis=0)

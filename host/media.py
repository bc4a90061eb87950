"""Frames from pictures, videos, folders and tensor files, for scoring outside of a workflow.

Does: list what a path holds, read one clip at a time. Does not: resize, score, or guess value ranges.

Shape letters: B videos, F frames, C H W.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import av
import numpy as np
import torch
from PIL import Image, ImageSequence, UnidentifiedImageError
from safetensors import SafetensorError, safe_open

logger = logging.getLogger("reward_lab")

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
VIDEOS = (".mp4", ".mkv", ".webm", ".mov", ".avi", ".m4v")
TENSORS = (".safetensors", ".npy")


class NoFrames(ValueError):
    """A tensor file is whole, but what it holds are no frames."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Clip:
    """One video to be scored.

    Attributes:
        name: for the output; unique in a run.
        path: its file, or the folder whose pictures are its frames.
        key: name of the tensor in a safetensors file; empty elsewhere.
        index: which video of a tensor with a batch axis.
    """

    name: str
    path: Path
    key: str = ""
    index: int = 0

    def stamp(self) -> list:
        """What changes when the file changes; a file that cannot be looked at has nothing."""
        files = _pictures(self.path) if self.path.is_dir() else [self.path]
        status = [file.stat() for file in files if file.exists()]
        return [str(self.path.resolve()), self.key, self.index, [[entry.st_size, entry.st_mtime_ns] for entry in status]]

    def read(self) -> torch.Tensor:
        """Frames [F, 3, H, W]: uint8 from pictures and videos, the file's own type from tensor files.

        Raises:
            ValueError: the file is damaged, has no frames, or holds something else.
        """
        if self.path.is_dir():
            return _stack([frame for file in _pictures(self.path) for frame in _picture(file)], self.path)
        ending = self.path.suffix.lower()
        if ending in TENSORS:
            return _videos(_tensor(self.path, self.key), f"{self.path}{f' ({self.key})' if self.key else ''}")[self.index]
        return _stack(_picture(self.path) if ending in PICTURES else _video(self.path), self.path)


def find_clips(paths: Sequence[str | Path], *, is_one_video: bool = False) -> list[Clip]:
    """What there is to score.

    Args:
        paths: files and folders; folders are searched to any depth, in natural order of names. Tensor files without frames, such as a LoRA beside the
            pictures, are left out with a warning there.
        is_one_video: the pictures of each folder are the frames of one video, in natural order; else every picture is a video of one frame.

    Raises:
        ValueError: a path does not exist or is of no known kind, a tensor file that is named holds no frames, or there is nothing to score.
    """
    files: list[tuple[Path, str]] = []
    for path in map(Path, paths):
        if path.is_dir() and is_one_video:
            files += [(path, path.name)] if _pictures(path) else []
        elif path.is_dir():
            found = [file for file in path.rglob("*") if file.suffix.lower() in (*PICTURES, *VIDEOS, *TENSORS) and not file.name.startswith(".")]
            files += [(file, file.relative_to(path).as_posix()) for file in sorted(found, key=natural)]
        elif path.is_file():
            files.append((path, path.name))
        else:
            raise ValueError(f"There is no file or folder {path}; check the name.")
    named = set(map(Path, paths))
    clips = [clip for file, name in _named_apart(files) for clip in (_clips_of(file, name) if file in named else _walked(file, name))]
    if not clips:
        raise ValueError(f"There is nothing to score in {', '.join(map(str, paths))}; it takes {' '.join((*PICTURES, *VIDEOS, *TENSORS))}.")
    return clips


def _named_apart(files: list[tuple[Path, str]]) -> Iterator[tuple[Path, str]]:
    """Files of one name are called by their paths, and one that is given twice has a number as well: results are kept by name."""
    counts, taken = Counter(name for _, name in files), Counter()
    for file, name in files:
        name = name if counts[name] == 1 else str(file)
        taken[name] += 1
        yield file, name if taken[name] == 1 else f"{name}#{taken[name]}"


def _walked(file: Path, name: str) -> list[Clip]:
    """Clips of a file that nobody named; one that is damaged is told when its turn comes."""
    try:
        return list(_clips_of(file, name))
    except NoFrames as error:
        logger.warning("%s It is left out.", error)
        return []
    except ValueError:
        return [Clip(name=name, path=file)]


def natural(path: Path) -> list:
    """Sorting key that puts frame_10 after frame_9."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part.lower()) for part in re.split(r"(\d+)", path.as_posix())]


def _clips_of(file: Path, name: str) -> Iterator[Clip]:
    ending = file.suffix.lower()
    if file.is_dir():
        yield Clip(name=name, path=file)
        return
    if ending not in (*PICTURES, *VIDEOS, *TENSORS):
        raise ValueError(f"{file} ends in {ending or 'nothing'!r}; pictures, videos, .safetensors and .npy are scored.")
    if ending not in TENSORS:
        yield Clip(name=name, path=file)
        return
    for key in _keys(file) if ending == ".safetensors" else [""]:
        count = len(_videos(_tensor(file, key), f"{file}{f' ({key})' if key else ''}"))
        for index in range(count):
            yield Clip(name=f"{name}{f':{key}' if key else ''}{f'[{index}]' if count > 1 else ''}", path=file, key=key, index=index)


def _pictures(folder: Path) -> list[Path]:
    return sorted((file for file in folder.iterdir() if file.suffix.lower() in PICTURES and not file.name.startswith(".")), key=natural)


def _stack(frames: list[np.ndarray], path: Path) -> torch.Tensor:
    if not frames:
        raise ValueError(f"{path} has no frames; it is empty or its download stopped.")
    sizes = {frame.shape for frame in frames}
    if len(sizes) > 1:
        raise ValueError(f"The frames of {path} have different sizes ({', '.join(f'{w} x {h}' for h, w, _ in sorted(sizes))}); score them one by one.")
    return torch.from_numpy(np.stack(frames)).movedim(-1, 1)


def _picture(path: Path) -> list[np.ndarray]:
    """Frames of a picture (more than one in animated ones) as 8-bit RGB; transparency is dropped with a warning, grey is repeated."""
    frames, is_seen_through = [], False
    try:
        with Image.open(path) as picture:
            for frame in ImageSequence.Iterator(picture):
                if frame.mode in ("I", "F") or frame.mode.startswith("I;"):
                    raise ValueError(f"{path} has {frame.mode} pixels (more than 8 bits); save it with 8 bits a channel.")
                if "A" in frame.getbands() or "transparency" in frame.info:
                    # Animated WEBP files have an alpha channel always; mostly it is opaque.
                    is_seen_through = is_seen_through or frame.convert("RGBA").getextrema()[3][0] < 255
                frames.append(np.array(frame.convert("RGB")))
    except Image.DecompressionBombError as error:
        raise ValueError(f"{path} is too large a picture ({error}); an 8K frame has 33 million pixels. Score a smaller copy.") from error
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise ValueError(f"{path} cannot be read as a picture ({error}); it is damaged or something else.") from error
    if is_seen_through:
        logger.warning("%s has transparency, which is dropped: the colours under it are scored.", path)
    return frames


def _video(path: Path) -> list[np.ndarray]:
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise ValueError(f"{path} has no video stream.")
            return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    except av.FFmpegError as error:
        raise ValueError(f"{path} cannot be read as a video ({error}); it is damaged or something else.") from error


def _keys(path: Path) -> list[str]:
    """Tensors of a safetensors file that look like frames; all three-to-five-dimensional ones when none is called so, but no network's weights."""
    with _opened(path) as file:
        keys = [key for key in file.keys() if not key.endswith((".weight", ".bias"))]  # noqa: SIM118
        shaped = [key for key in keys if 3 <= len(file.get_slice(key).get_shape()) <= 5]
    named = [key for key in shaped if re.search(r"(^|[._/])(frames?|images?|videos?|pictures?|pixels?)\d*$", key)]
    if not shaped:
        raise NoFrames(f"{path} holds no tensor that could be frames; give one of [F, 3, H, W], called frames.")
    return sorted(named or shaped, key=lambda key: natural(Path(key)))


def _tensor(path: Path, key: str) -> torch.Tensor:
    if path.suffix.lower() == ".npy":
        try:
            return torch.from_numpy(np.load(path, allow_pickle=False))
        except (ValueError, OSError, EOFError, TypeError, MemoryError) as error:
            raise ValueError(f"{path} cannot be read as an array ({error}); it is damaged or something else.") from error
    with _opened(path) as file:
        return file.get_tensor(key)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[safe_open]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} cannot be read as safetensors ({error}); it is damaged or something else.") from error


def _videos(tensor: torch.Tensor, what: str) -> torch.Tensor:
    """Any layout of frames as [B, F, C, H, W]; channels may stand before or after the picture.

    Raises:
        NoFrames: not 3 to 5 axes, or not three channels in either place.
    """
    if not 3 <= tensor.ndim <= 5 or tensor.numel() == 0:
        raise NoFrames(f"{what} has shape {tuple(tensor.shape)}; frames are [F, 3, H, W] or [F, H, W, 3], with at least one frame.")
    shape, dtype = tuple(tensor.shape), tensor.dtype
    if shape[-3] == 3:
        pass
    elif shape[-1] == 3:
        tensor = tensor.movedim(-1, -3)
    else:
        channels = next((count for count in (shape[-3], shape[-1]) if count in (1, 2, 4)), shape[-3])
        hint = {1: "repeat the grey channel three times", 4: "drop the alpha channel"}
        if tensor.ndim == 5 and shape[1] in (16, 48):
            raise NoFrames(f"{what} has shape {shape}: these are latents, not frames; use `lab.py score-latent`, or decode them.")
        raise NoFrames(f"{what} has shape {shape}, that is {channels} channels; 3 (RGB) are needed; {hint.get(channels, 'give RGB')}.")
    if dtype != torch.uint8 and not dtype.is_floating_point:
        raise NoFrames(f"{what} holds {dtype}; frames are floats in [0,1] or 8-bit values.")
    if dtype.is_floating_point and dtype.itemsize == 1:
        tensor = tensor.float()
    while tensor.ndim < 5:
        tensor = tensor[None]
    return tensor

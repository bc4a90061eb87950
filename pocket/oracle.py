"""Exact measures of a clip from its pixels alone. No model, no prompt and no random number is involved.

`read` reports what a clip shows; `judge` compares a reading with the scene that was asked for. No reward model sees
these measures, so they tell whether a trained LoRA made the videos better or merely pleased its reward.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from . import world

_MIN_AREA_PX = 24
_FOREGROUND_DISTANCE = 0.22  # RGB distance from the background, in [0, sqrt(3)]
_STILL_PX_PER_FRAME = 0.35
_FAST_PX_PER_FRAME = 1.45
FLICKER_LIMIT = 0.02  # mean absolute second difference of the brightness of a frame


@dataclass(frozen=True, kw_only=True)
class ThingReading:
    shape: str
    colour: str
    motion: str
    speed_px: float  # pixels per frame
    area_px: float


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What a clip shows. `dynamic_degree` is the largest speed of any thing in pixels per frame."""

    things: tuple[ThingReading, ...]
    background: str
    flicker: float
    dynamic_degree: float


def _nearest(rgb: np.ndarray, palette: dict[str, tuple[int, int, int]]) -> str:
    names = list(palette)
    table = np.asarray([palette[name] for name in names], np.float32) / 255
    return names[int(np.argmin(((table - rgb) ** 2).sum(1)))]


def _background_rgb(clip: np.ndarray) -> np.ndarray:
    edge = np.concatenate([clip[:, :2].reshape(-1, 3), clip[:, -2:].reshape(-1, 3), clip[:, :, :2].reshape(-1, 3), clip[:, :, -2:].reshape(-1, 3)])
    return np.median(edge, axis=0)


def _form(frame: np.ndarray, window: tuple[slice, slice], region: np.ndarray, background: np.ndarray) -> np.ndarray:
    """Two numbers that tell the shapes apart, from moments of the blob's soft coverage: [lean, corners].

    `lean` is large for a triangle (wide below, narrow above), near zero for the others; `corners` is larger for a square than for a circle
    (-0.8 and -1.33 for ideal ones). Moments of soft coverage survive the blur of a VAE, which the outline does not.
    """
    rows, columns = (slice(max(0, part.start - 3), part.stop + 3) for part in window)
    pixels = frame[rows, columns] - background
    strength = np.linalg.norm(frame[window] - background, axis=-1)
    core = np.median(frame[window][region & (strength >= np.median(strength[region]))], axis=0) - background
    cover = np.clip(pixels @ core / (core @ core), 0.0, 1.0)
    cover[cover < 0.15] = 0.0
    y, x = np.mgrid[0 : cover.shape[0], 0 : cover.shape[1]].astype(np.float32)
    area = cover.sum()
    x, y = x - (cover * x).sum() / area, y - (cover * y).sum() / area
    x, y = x / np.sqrt((cover * x * x).sum() / area), y / np.sqrt((cover * y * y).sum() / area)
    lean = (cover * (y * np.abs(x) - y**3)).sum() / area
    corners = (cover * (x * x * y * y - 0.5 * (x**4 + y**4))).sum() / area
    return np.array([lean, corners])


def _shape_of(form: np.ndarray) -> str:
    lean, corners = form
    return "triangle" if lean > 0.135 else "square" if corners > -1.25 else "circle"


def _blobs(frame: np.ndarray, background: np.ndarray) -> list[dict]:
    """Connected foreground regions of one frame, largest first."""
    mask = np.sqrt(((frame - background) ** 2).sum(-1)) > _FOREGROUND_DISTANCE
    labels, count = ndimage.label(mask)
    blobs = []
    for index, window in enumerate(ndimage.find_objects(labels), start=1):
        region = labels[window] == index
        area = int(region.sum())
        if area < _MIN_AREA_PX:
            continue
        rows, columns = np.nonzero(region)
        blobs.append({
            "area": area,
            "centre": np.array([columns.mean() + window[1].start, rows.mean() + window[0].start]),
            "form": _form(frame, window, region, background),
            "rgb": np.median(frame[window][region], axis=0),
        })
    return sorted(blobs, key=lambda blob: -blob["area"])


def _follow(per_frame: list[list[dict]], start: dict) -> list[tuple[int, dict]]:
    track, last = [], start["centre"]
    for index, blobs in enumerate(per_frame):
        if not blobs:
            continue
        nearest = min(blobs, key=lambda blob: float(((blob["centre"] - last) ** 2).sum()))
        if np.abs(nearest["centre"] - last).max() > 14:
            continue
        last = nearest["centre"]
        track.append((index, nearest))
    return track


def _direction(step: np.ndarray) -> str:
    if np.hypot(*step) < _STILL_PX_PER_FRAME:
        return "still"
    if abs(step[0]) >= abs(step[1]):
        return "right" if step[0] > 0 else "left"
    return "down" if step[1] > 0 else "up"


def _read_track(track: list[tuple[int, dict]]) -> ThingReading:
    times = np.array([index for index, _ in track], np.float64)
    centres = np.stack([blob["centre"] for _, blob in track])
    step = np.polyfit(times, centres, 1)[0] if len(track) > 2 else np.zeros(2)
    return ThingReading(
        shape=_shape_of(np.median([blob["form"] for _, blob in track], axis=0)),
        colour=_nearest(np.median([blob["rgb"] for _, blob in track], axis=0), world.COLOURS),
        motion=_direction(step),
        speed_px=float(np.hypot(*step)),
        area_px=float(np.median([blob["area"] for _, blob in track])),
    )


def read(clip: np.ndarray) -> Reading:
    """Measure a clip.

    Args:
        clip: float [T, H, W, 3] in [0, 1], T >= 3.
    """
    clip = np.asarray(clip, np.float32)
    background = _background_rgb(clip)
    per_frame = [_blobs(frame, background) for frame in clip]
    typical = int(np.median([min(len(blobs), 2) for blobs in per_frame]))
    first = next((blobs for blobs in per_frame if len(blobs) >= max(typical, 1)), [])
    tracks = [_follow(per_frame, start) for start in first[:typical]]
    things = tuple(_read_track(track) for track in tracks if len(track) > len(clip) // 2)
    brightness = clip.mean(axis=(1, 2, 3))
    return Reading(
        things=things,
        background=_nearest(background, world.BACKGROUNDS),
        flicker=float(np.abs(np.diff(brightness, 2)).mean()),
        dynamic_degree=max((thing.speed_px for thing in things), default=0.0),
    )


def _is_motion_right(reading: ThingReading, wanted: world.Thing) -> bool:
    if reading.motion != wanted.motion:
        return False
    return wanted.motion == "still" or (reading.speed_px >= _FAST_PX_PER_FRAME) == (wanted.speed == "fast")


def judge(reading: Reading, scene: world.Scene) -> dict[str, float]:
    """Compare a reading with what was asked for.

    Returns:
        `colour`, `shape`, `motion` (direction and speed class), `direction`, `background`: share right in [0, 1];
        `dynamic_degree` in pixels per frame and `flicker` as in `Reading`.
    """
    parts = {"colour": 0.0, "shape": 0.0, "motion": 0.0, "direction": 0.0}
    left = list(reading.things)
    for wanted in scene.things:
        if not left:
            break
        found = max(left, key=lambda thing: 2 * (thing.colour == wanted.colour) + (thing.shape == wanted.shape) + (thing.motion == wanted.motion))
        left.remove(found)
        parts["colour"] += found.colour == wanted.colour
        parts["shape"] += found.shape == wanted.shape
        parts["direction"] += found.motion == wanted.motion
        parts["motion"] += _is_motion_right(found, wanted)
    count = max(len(scene.things), len(reading.things))
    scores = {name: float(value) / count for name, value in parts.items()}
    scores["background"] = float(reading.background == scene.background)
    return {**scores, "dynamic_degree": reading.dynamic_degree, "flicker": reading.flicker}

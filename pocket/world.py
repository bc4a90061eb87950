"""The procedural world that the pocket models live in: coloured shapes that move over a plain background.

A `Scene` is the ground truth, `render` draws it, `caption` puts it into words and `parse` reads the words back.
The world is small enough that every property of a clip can be measured from its pixels (see `pocket.oracle`).

Shapes of tensors: `T` frames, `H W` pixels. Pixels are float32 RGB in [0, 1].
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

SIZE_PX = 64
FRAMES = 17

SHAPES = ("circle", "square", "triangle")
COLOURS = {
    "red": (222, 40, 44),
    "green": (40, 180, 60),
    "blue": (48, 84, 232),
    "yellow": (242, 218, 48),
    "purple": (168, 56, 208),
    "cyan": (52, 208, 220),
}
BACKGROUNDS = {
    "black": (18, 18, 22),
    "gray": (128, 128, 128),
    "white": (236, 236, 236),
    "brown": (112, 72, 40),
    "pink": (250, 182, 202),
}
MOTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1), "still": (0, 0)}
SPEEDS = {"slowly": 1.0, "fast": 2.0}  # pixels per frame
HELD_OUT_SHARE = 0.22
_JITTER_PX = 5.0  # of the middle of a path around the middle of the frame; small, so that a tiny model can learn motion in minutes

_VERBS = ("moves", "slides", "drifts")


@dataclass(frozen=True, kw_only=True)
class Thing:
    """One moving shape. `x0_px`, `y0_px` are the centre in the middle of the clip; `radius_px` is half its width."""

    shape: str
    colour: str
    motion: str
    speed: str
    x0_px: float = 32.0
    y0_px: float = 32.0
    radius_px: float = 11.0


@dataclass(frozen=True, kw_only=True)
class Scene:
    things: tuple[Thing, ...]
    background: str


def scene_from(values: dict) -> Scene:
    """The inverse of `dataclasses.asdict`."""
    return Scene(things=tuple(Thing(**thing) for thing in values["things"]), background=values["background"])


def is_held_out(thing: Thing) -> bool:
    """True when this (colour, shape, motion) never appears in training; decided by a hash, so it is the same everywhere."""
    digest = hashlib.sha256(f"{thing.colour} {thing.shape} {thing.motion}".encode()).digest()
    return digest[0] < 256 * HELD_OUT_SHARE


def held_out_combinations() -> list[tuple[str, str, str]]:
    """Every (colour, shape, motion) that is kept out of training, in a fixed order."""
    every = [(colour, shape, motion) for colour in COLOURS for shape in SHAPES for motion in MOTIONS]
    return [combo for combo in every if is_held_out(Thing(colour=combo[0], shape=combo[1], motion=combo[2], speed="fast"))]


def _place(rng: random.Random, motion: str, speed: str, lane_px: float | None, across: bool) -> tuple[float, float, float]:
    """Choose a centre and a radius such that the whole path stays inside the frame."""
    radius = rng.uniform(10.0, 12.0) if lane_px is None else rng.uniform(8.5, 10.0)
    reach = radius + 3.0
    dx, dy = MOTIONS[motion]
    half_path = SPEEDS[speed] * (FRAMES - 1) / 2
    middle_px = []
    for unit in (dx, dy):
        margin = reach + half_path * abs(unit)
        middle_px.append(min(max(SIZE_PX / 2 + rng.uniform(-_JITTER_PX, _JITTER_PX), margin), SIZE_PX - margin))
    x, y = middle_px
    if lane_px is not None and across:
        y = lane_px + rng.uniform(-2.0, 2.0)
    elif lane_px is not None:
        x = lane_px + rng.uniform(-2.0, 2.0)
    return x, y, radius


def sample_scene(rng: random.Random, *, held_out: bool, two_share: float = 0.3) -> Scene:
    """Draw a scene. Two shapes move in lanes of their own, so that they never hide each other.

    Args:
        rng: source of all randomness.
        held_out: True draws scenes whose every shape is a held-out combination, False draws training scenes.
        two_share: probability of a second shape, in [0, 1].
    """
    is_pair = rng.random() < two_share
    across = rng.random() < 0.5
    motions = list(MOTIONS) if not is_pair else ["left", "right", "still"] if across else ["up", "down", "still"]
    lanes: list[float | None] = [17.0, 47.0] if is_pair else [None]
    things: list[Thing] = []
    while len(things) < len(lanes):
        motion, speed = rng.choice(motions), rng.choice(list(SPEEDS))
        thing = Thing(shape=rng.choice(SHAPES), colour=rng.choice(list(COLOURS)), motion=motion, speed=speed)
        is_repeat = any(thing.colour == other.colour for other in things)
        if is_held_out(thing) != held_out or is_repeat:
            continue
        x, y, radius = _place(rng, motion, speed, lanes[len(things)], across)
        things.append(Thing(**{**thing.__dict__, "x0_px": x, "y0_px": y, "radius_px": radius}))
    return Scene(things=tuple(things), background=rng.choice(list(BACKGROUNDS)))


def coverage(shape: str, dx: np.ndarray, dy: np.ndarray, radius: float) -> np.ndarray:
    """Anti-aliased coverage in [0, 1] from the signed distance (in pixels) to the outline."""
    if shape == "circle":
        distance = np.sqrt(dx * dx + dy * dy) - radius
    elif shape == "square":
        distance = np.maximum(np.abs(dx), np.abs(dy)) - 0.9 * radius
    else:  # an isosceles triangle, point up, 2 radius wide and 2 radius high
        slant = (2 * np.abs(dx) - dy - radius) / np.sqrt(5.0)
        distance = np.maximum(slant, dy - radius)
    return np.clip(0.5 - distance, 0.0, 1.0)


def render(scene: Scene, frames: int = FRAMES, only: Sequence[int] | None = None) -> np.ndarray:
    """Draw a scene.

    Args:
        frames: length of the whole clip.
        only: draw these frames of it; None draws all.

    Returns:
        float32 [T, H, W, 3] in [0, 1].
    """
    wanted = range(frames) if only is None else only
    y, x = np.mgrid[0:SIZE_PX, 0:SIZE_PX].astype(np.float32)
    clip = np.empty((len(wanted), SIZE_PX, SIZE_PX, 3), np.float32)
    clip[:] = np.asarray(BACKGROUNDS[scene.background], np.float32) / 255
    for thing in scene.things:
        step_x, step_y = (SPEEDS[thing.speed] * unit for unit in MOTIONS[thing.motion])
        colour = np.asarray(COLOURS[thing.colour], np.float32) / 255
        for index, frame in enumerate(wanted):
            time = frame - (frames - 1) / 2
            cover = coverage(thing.shape, x - (thing.x0_px + step_x * time), y - (thing.y0_px + step_y * time), thing.radius_px)
            clip[index] += cover[..., None] * (colour - clip[index])
    return clip


def _phrase(thing: Thing, verb: str) -> str:
    action = "stays still" if thing.motion == "still" else f"{verb} {thing.motion} {thing.speed}"
    return f"a {thing.colour} {thing.shape} {action}"


def caption(scene: Scene, rng: random.Random | None = None) -> str:
    """Describe a scene; with `rng` the wording varies, without it the wording is the canonical one."""
    verb = rng.choice(_VERBS) if rng else _VERBS[0]
    things = list(scene.things)
    if rng and rng.random() < 0.5:
        things.reverse()
    return " and ".join(_phrase(thing, verb) for thing in things) + f" over a {scene.background} background"


def parse(text: str) -> Scene:
    """Read a caption back into a scene (positions are the defaults).

    Raises:
        ValueError: the text is not a sentence of the world's grammar.
    """
    words = text.lower().strip(" .")
    body, _, tail = words.partition(" over a ")
    background = tail.removesuffix(" background")
    things = []
    for part in body.split(" and "):
        match part.split():
            case ["a", colour, shape, "stays", "still"]:
                thing = Thing(shape=shape, colour=colour, motion="still", speed="slowly")
            case ["a", colour, shape, verb, motion, speed] if verb in _VERBS and motion in MOTIONS and speed in SPEEDS:
                thing = Thing(shape=shape, colour=colour, motion=motion, speed=speed)
            case _:
                raise ValueError(f"not a caption of the pocket world: {part!r}; write for example 'a red square moves left fast over a gray background'")
        if thing.colour not in COLOURS or thing.shape not in SHAPES:
            raise ValueError(f"unknown colour or shape in {part!r}; colours are {', '.join(COLOURS)}; shapes are {', '.join(SHAPES)}")
        things.append(thing)
    if background not in BACKGROUNDS:
        raise ValueError(f"unknown background {background!r} in {text!r}; choose one of {', '.join(BACKGROUNDS)}")
    return Scene(things=tuple(things), background=background)

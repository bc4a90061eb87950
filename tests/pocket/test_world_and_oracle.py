"""The oracle reads what the world draws, and notices every way in which a clip can be wrong."""

from __future__ import annotations

import random

import numpy as np
import pytest

from reward_lab.pocket import oracle, world

PARTS = ("colour", "shape", "motion", "background")


@pytest.fixture(scope="module")
def scenes() -> list[world.Scene]:
    rng = random.Random(1)
    return [world.sample_scene(rng, held_out=index % 2 == 0) for index in range(120)]


def one(shape="square", colour="red", motion="left", speed="fast", background="gray") -> world.Scene:
    thing = world.Thing(shape=shape, colour=colour, motion=motion, speed=speed, radius_px=11.0)
    return world.Scene(things=(thing,), background=background)


def scores(clip: np.ndarray, scene: world.Scene) -> dict[str, float]:
    return oracle.judge(oracle.read(clip), scene)


def test_at_least_a_fifth_of_the_combinations_is_held_out() -> None:
    every = len(world.COLOURS) * len(world.SHAPES) * len(world.MOTIONS)
    assert len(world.held_out_combinations()) / every >= 0.20
    assert len(world.SHAPES) >= 3 and len(world.COLOURS) >= 6 and len(world.MOTIONS) == 5


def test_training_scenes_hold_no_held_out_combination(scenes) -> None:
    for index, scene in enumerate(scenes):
        assert all(world.is_held_out(thing) == (index % 2 == 0) for thing in scene.things)


def test_ground_truth_is_read_right(scenes) -> None:
    rows = [scores(world.render(scene), scene) for scene in scenes]
    for part in PARTS:
        assert np.mean([row[part] for row in rows]) >= 0.99, part


def test_captions_can_be_read_back(scenes) -> None:
    rng = random.Random(2)
    for scene in scenes:
        again = world.parse(world.caption(scene, rng))
        wanted = {(thing.colour, thing.shape, thing.motion, thing.speed if thing.motion != "still" else "") for thing in scene.things}
        assert {(t.colour, t.shape, t.motion, t.speed if t.motion != "still" else "") for t in again.things} == wanted
        assert again.background == scene.background


NOT_CAPTIONS = ("", "a red dog moves left fast over a gray background", "a red square moves left fast", "a red square hops over a gray background")


@pytest.mark.parametrize("text", NOT_CAPTIONS)
def test_text_outside_of_the_grammar_is_refused(text) -> None:
    with pytest.raises(ValueError):
        world.parse(text)


@pytest.mark.parametrize(
    ("part", "shown"),
    [
        ("colour", one(colour="blue")),
        ("shape", one(shape="circle")),
        ("motion", one(motion="right")),
        ("motion", one(motion="up")),
        ("motion", one(motion="still")),
        ("motion", one(speed="slowly")),
        ("background", one(background="pink")),
    ],
)
def test_a_wrong_property_is_noticed(part, shown) -> None:
    row = scores(world.render(shown), one())
    assert row[part] == 0.0
    assert all(row[other] == 1.0 for other in PARTS if other != part)


def test_a_reversed_and_a_frozen_clip_are_noticed() -> None:
    clip = world.render(one())
    assert scores(clip[::-1], one())["motion"] == 0.0
    still = scores(np.repeat(clip[:1], len(clip), 0), one())
    assert still["motion"] == 0.0 and still["dynamic_degree"] < 0.05 < scores(clip, one())["dynamic_degree"]


def test_flicker_is_noticed() -> None:
    clip = world.render(one())
    flickering = np.clip(clip + 0.15 * (np.arange(len(clip)) % 2)[:, None, None, None], 0, 1)
    assert scores(clip, one())["flicker"] < oracle.FLICKER_LIMIT < scores(flickering, one())["flicker"]


def test_a_missing_and_a_surplus_thing_are_noticed() -> None:
    empty = np.full_like(world.render(one()), 0.5)
    assert scores(empty, one())["colour"] == 0.0
    both = world.render(one(motion="still"))
    both[:, 2:14, 2:14] = (0.05, 0.7, 0.2)
    assert scores(both, one(motion="still"))["colour"] == 0.5

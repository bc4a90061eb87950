"""Labels per quality, annotation files, and how samples become a training set."""

from __future__ import annotations

import json
import math
import random

import pytest

from reward_lab.lora_train import annotations
from reward_lab.lora_train.labels import QUALITIES, label_of
from reward_lab.lora_train.pavrm_config import SigmaDraw
from reward_lab.lora_train.run_config import read as read_run_config


def test_recorded_labels(shared_fixtures):
    """What HY-Video-PRFL's reader returned for its two labelled samples; it takes a missing label for bad."""
    folder = shared_fixtures / "pavrm" / "labels"
    expected = json.loads((folder / "expected_labels.json").read_text())
    for name, labels in expected.items():
        meta = json.loads((folder / "temp_data" / "480" / "meta_v1" / f"{name}_meta_v1.json").read_text())
        assert {quality: label_of(meta, quality, missing="bad") for quality in QUALITIES} == labels
    strict = {quality: label_of(meta, quality) for quality in QUALITIES}
    assert strict == {"physics_quality": 1, "human_quality": 0, "text_alignment": None, "blur_quality": None, "motion_quality": 0}


@pytest.mark.parametrize(
    ("values", "options", "expected"),
    [
        ({"physics_quality": 1, "human_quality": "good"}, {}, 1),
        ({"physics_quality": 1}, {}, None),
        ({"physics_quality": "poor"}, {}, 0),
        ({"physics_quality": 1}, {"missing": "bad"}, 0),
        ({"physics_quality": 1, "human_quality": 0}, {"mixed": "skip"}, None),
        ({"physics_quality": 0, "human_quality": 0}, {"mixed": "skip"}, 0),
        ({"motion_quality": "good", "human_quality": 0}, {}, 1),
        ({"motion_quality": "skip"}, {}, None),
        ({"motion_quality": 1.0}, {}, 1),
        ({"motion_quality": 0.0}, {}, 0),
        ({"physics_quality": "1.0", "human_quality": 1.0}, {}, 1),
        ({}, {}, None),
    ],
)
def test_motion_quality(values, options, expected):
    assert label_of(values, "motion_quality", **options) == expected


@pytest.mark.parametrize("arguments", [*(({"blur_quality": value}, "blur_quality") for value in ("so so", 2, 0.5)), ({}, "beauty")])
def test_what_is_no_label_is_refused(arguments):
    with pytest.raises(ValueError, match="must be one of|a label is 1"):
        label_of(*arguments)


def test_annotations_are_appended_and_the_last_counts(tmp_path):
    path = tmp_path / annotations.FILE_NAME
    for video, quality, label in [
        ("a", "motion_quality", "good"), ("a", "blur_quality", "bad"), ("a", "motion_quality", "bad"), ("b", "motion_quality", "skip"),
        ("c", "motion_quality", "good"), ("c", "motion_quality", None),
    ]:  # fmt: skip
        annotations.append(path, video, quality, label)
    expected = {"a": {"motion_quality": "bad", "blur_quality": "bad"}, "b": {"motion_quality": "skip"}}
    assert annotations.read(path) == expected
    with path.open("a") as file:
        file.write('{"id": "d", "qual')  # a crash in the middle of a line
    assert annotations.read(path) == expected
    annotations.append(path, "e", "human_quality", "good")
    assert annotations.read(path) == {**expected, "e": {"human_quality": "good"}}
    path.write_text('{"source_id": "x", "quality": "physics_quality", "label": "poor"}\n{"id": 1}\n')
    with pytest.raises(ValueError, match="line 2"):
        annotations.read(path)
    with pytest.raises(ValueError, match="label is 'nice'"):
        annotations.append(path, "a", "motion_quality", "nice")


WHOLE = '{"id": "a", "quality": "motion_quality", "label": "good", "time": 1763740800.25}'


@pytest.mark.parametrize(
    "bad", [WHOLE + ",", "[", "]", "not json at all", WHOLE.replace('"', "'"), WHOLE + WHOLE, WHOLE[:30] + WHOLE, '"id": "a",']
)
@pytest.mark.parametrize("place", ["first", "middle", "last"])
def test_a_bad_line_is_named_wherever_it_stands(tmp_path, bad, place):
    """Commas, lists and what is no JSON would lose labels without a word."""
    lines = {"first": [bad, WHOLE, WHOLE], "middle": [WHOLE, bad, WHOLE], "last": [WHOLE, WHOLE, bad]}[place]
    (tmp_path / annotations.FILE_NAME).write_text("\n".join(lines))
    with pytest.raises(ValueError, match=rf"line {lines.index(bad) + 1} is not JSON .*write one object a line, without commas"):
        annotations.read(tmp_path / annotations.FILE_NAME)


def test_a_line_cut_off_anywhere_costs_only_itself(tmp_path):
    path = tmp_path / annotations.FILE_NAME
    longest = WHOLE.replace('"a"', r'"a\u00e9\"}{\\"')
    for end in range(1, len(longest)):
        if longest[:end].endswith("}"):
            continue  # inside of an id, which preprocess never gives
        path.write_text(f"{WHOLE}\n{longest[:end]}")
        annotations.append(path, "b", "motion_quality", "bad")
        assert annotations.read(path) == {"a": {"motion_quality": "good"}, "b": {"motion_quality": "bad"}}, longest[:end]


@pytest.mark.parametrize(("mean", "sigma"), [(1e308, 0.0), (800.0, 0.0), (-1e308, 1.0)])
def test_a_mean_far_out_draws_the_end_of_the_range(mean, sigma):
    draw = SigmaDraw(kind="logit_normal", mean=mean, std=1e308 if abs(mean) > 1e6 else 1.0, low=0.0, high=1.0)
    assert min(abs(draw.draw(random.Random(seed), 0) - sigma) for seed in range(9)) < 1e-6


@pytest.mark.parametrize(("mean", "shift"), [(1.0, 5.0), (-1.5, 5.0), (0.0, 1.0)])
def test_logit_normal_falls_from_noise_to_video(mean, shift):
    """The median is that of upstream's table: entry floor(1000 sigmoid(mean)) of sigmas that fall from 1."""
    draw = SigmaDraw(kind="logit_normal", shift=shift, mean=mean)
    rng = random.Random(0)
    found = sorted(draw.draw(rng, 0) for _ in range(4001))
    table = [shift * (1 - index / 1000) / (1 + (shift - 1) * (1 - index / 1000)) for index in range(1001)]
    assert found[2000] == pytest.approx(table[int(1000 / (1 + math.exp(-mean)))], abs=0.02)


def test_a_config_is_read_by_its_kind():
    values = {"kind": "pavrm", "models": {"trunk": "t"}, "data": {"source": "d"}}
    config = read_run_config(values)
    assert (config.data.quality, config.optimiser.block_lr, config.optimiser.head_lr) == ("motion_quality", 1e-6, 1e-5)
    assert read_run_config(config.to_dict()) == config
    for broken, message in (
        ({**values, "kind": "dpo"}, "kind is 'dpo'"),
        ({**values, "stepps": 3}, "nearest known one is 'steps'"),
        ({**values, "sigma": {"kind": "list"}}, "sigmas goes with kind 'list'"),
        ({**values, "sigma": {"low": 0.5, "high": 0.5}}, "must be below"),
        ({**values, "data": {"source": "d", "pairs": "x"}}, "need loss 'bt'"),
        ({**values, "shape": {"blocks": 2, "taps": [3]}}, "lie above"),
        ({**values, "models": {"trunk": "t", "query": "q"}}, "belong together"),
    ):
        with pytest.raises(ValueError, match=message):
            read_run_config(broken)

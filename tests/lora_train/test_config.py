"""Settings: round trip, presets, and clear refusals."""

from __future__ import annotations

import json

import pytest

from reward_lab.lora_train.config import TrainConfig
from reward_lab.lora_train.presets import PRESETS

LOOKS = {"every": 2, "prompts": ["y"]}


def test_round_trip(toy):
    config = toy.config(expert="both", objective={"strategy": "random", "grad_steps": 2}, held_out={"every": 2, "prompts": ["y"]})
    again = TrainConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config and again.digest() == config.digest()


def test_digest_changes_with_what_is_trained_only(toy):
    config = toy.config()
    assert toy.config(steps=9, sample_every=3).digest() == config.digest()
    assert toy.config(seed=1).digest() != config.digest()


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_presets_are_valid_and_yield_to_the_user(toy, name):
    values = {key: value for key, value in toy.settings().items() if key in ("models", "reward", "prompts")}
    config = TrainConfig.from_dict({**values, "preset": name, "lora": {"rank": 7}, "real": {"path": "real.safetensors"}})
    assert config.lora.rank == 7
    if name == "hy-video-prfl":
        with pytest.raises(ValueError, match="real.path is empty"):
            TrainConfig.from_dict({**values, "preset": name})
    if name == "videox-fun":
        assert config.sampling.steps == 40 and config.optimiser.clip_norm == 0.3 and config.lora.effective_alpha == 64


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"preset": ["x"]}, r"unknown preset \['x'\]; known: videox-fun"),
        ({"preset": {}}, "unknown preset {}"),
        ({"card": [1]}, r"unknown card \[1\]; known: 24GB"),
        ({"models": {"low": ""}, "sampling": 5}, "sampling must be an object with named values, not int '5'"),
        ({"models": {"low": ""}, "sampling": None}, "sampling must be an object with named values"),
        ({"frame_rate": int("1" + 400 * "0")}, "frame_rate has 401 digits, .* give a smaller one"),
        ({"stepz": 3}, "unknown setting 'stepz'; the nearest known one is 'steps'"),
        ({"objective": {"stratgy": "last"}}, "'objective.stratgy'.*'objective.strategy'"),
        ({"preset": "videoxfun"}, "nearest is 'videox-fun'"),
        ({"video": {"width_px": 250}}, "multiple of 16 with the wan2.1 VAE; use 256"),
        ({"video": {"frames": 16}}, "4n.1 frames; use 13 or 17"),
        ({"optimiser": {"lr": float("nan")}}, "optimiser.lr is nan"),
        ({"optimiser": {"lr": 0}}, "greater than 0"),
        ({"expert": "middle"}, "one of: high, low, both"),
        ({"lora": {"rank": 0}}, "lora.rank is 0"),
        ({"prompts": []}, "prompts is empty"),
        ({"prompts": [{"text": " "}]}, "a prompt is empty"),
        ({"batch": True}, "batch must be a whole number"),
        ({"steps": "ten"}, "steps must be a whole number, not str 'ten'"),
        ({"name": "../x"}, "file names are made of it"),
        ({"objective": {"strategy": "list"}}, "step_list goes with strategy 'list'"),
        ({"objective": {"strategy": "list", "step_list": [5]}}, "the high-noise expert makes steps 0 to 2"),
        ({"objective": {"strategy": "tail", "grad_steps": 5}}, "the high-noise expert makes 3 steps"),
        ({"sampling": {"boundary": 1.0, "steps": 1}, "expert": "low"}, "makes no step"),
        ({"models": {"high": ""}}, "models.high is empty"),
        ({"held_out": {"every": 2}}, "held_out.prompts is empty"),
        ({"held_out": {**LOOKS, "latents": 1}, "guards": {"motion_floor": 0.9}}, "guards.motion_floor: frames are compared, but .*latents 1 and video.frames"),
        ({"held_out": {**LOOKS, "latents": 1, "judge": {"kind": "drift"}}}, "the judge drift: .* set held_out.latents 0, or at least 2"),
        ({"held_out": LOOKS, "video": {"frames": 1}, "guards": {"motion_floor": 0.9}}, "guards.motion_floor: frames are compared"),
        ({"held_out": {**LOOKS, "latents": 1}, "reward": {"kind": "flicker"}, "objective": {"decode": "all"}}, "the reward flicker: frames are compared"),
        ({"reward": {"kind": "flicker"}}, "flicker compares frames, but only one may be scored"),
        ({"reward": {"kind": "drift"}, "objective": {"decode": "random"}}, "drift compares frames"),
        ({"reward": {"kind": "drift"}, "objective": {"decode": "last", "score_frames": 1}}, "drift compares frames"),
    ],
)
def test_refusals(toy, changes, message):
    with pytest.raises(ValueError, match=message):
        toy.config(**changes)


def test_missing_setting_is_named(toy):
    values = toy.settings()
    del values["video"]["frames"]
    with pytest.raises(ValueError, match="lacks 'video.frames'"):
        TrainConfig.from_dict(values)

"""The loop with reward backpropagation: it learns; stop, resume and failure. Its gradients: test_gradients.py."""

from __future__ import annotations

import pytest

from reward_lab.lora_train import checkpoint, objectives, run
from reward_lab.lora_train.run import NonFiniteError


def train(config, parts, folder, **options):
    return run.train(config, parts, objectives.create(config, parts), folder, **options)


@pytest.mark.parametrize("mode", ["chain", "x0"])
def test_reward_rises(toy, tmp_path, mode):
    objective = {"mode": mode, "strategy": "random", "decode": "all"}
    held_out = {"every": 40, "prompts": ["x", "a red square"], "seeds": 4}
    config = toy.config(objective=objective, expert="low", steps=40, optimiser={"lr": 3e-2}, held_out=held_out)
    train(config, toy.parts(config), tmp_path)
    last = [event for event in toy.events if event.name == "step"][-1]
    assert last.held_out > last.held_out_base + 0.5


@pytest.mark.parametrize("changes", [{"expert": "high"}, {"expert": "both", "optimiser": {"lr": 1e-2, "ema_decay": 0.9, "accumulate": 2, "warmup": 3}}])
def test_stopped_and_resumed_run_gives_the_same_bytes(toy, tmp_path, changes):
    config = toy.config(steps=6, **changes)
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    train(config, toy.parts(config), whole)
    full = [event for event in toy.events if event.name == "step"]
    toy.events.clear()
    stopped = train(config, toy.parts(config, stop_after=3), halves)
    assert stopped.reason == "stopped" and stopped.step == 3
    finished = train(config, toy.parts(config), halves, resume=True)
    assert finished.reason == "completed" and finished.step == 6

    def timeless(event):
        return {**vars(event), "seconds": 0}

    assert [timeless(event) for event in toy.events if event.name == "step"] == [timeless(event) for event in full]
    names = sorted(path.name for path in whole.iterdir() if path.is_file())
    assert len(names) == len(config.trained_experts)
    for name in [*names, "checkpoints/step-000006.state.safetensors"]:
        assert (whole / name).read_bytes() == (halves / name).read_bytes()


def test_stop_before_the_first_step_leaves_a_usable_lora(toy, tmp_path):
    config = toy.config()
    finished = train(config, toy.parts(config, stop_after=0), tmp_path)
    assert finished.reason == "stopped" and finished.step == 0
    assert (tmp_path / "toy-high-noise-toy.safetensors").is_file()
    assert len(checkpoint.states(tmp_path)) == 1


def test_nan_stops_with_step_sigma_and_last_rewards_and_keeps_the_checkpoint(toy, tmp_path):
    config = toy.config(steps=6)
    parts = toy.parts(config)
    plain, calls = parts.reward.score, []

    def score(frames, prompts):
        calls.append(1)
        output = plain(frames, prompts)
        if len(calls) == 4:
            output.per_frame = output.per_frame * float("nan")
            output.per_video = output.per_video * float("nan")
        return output

    parts.reward.score = score
    with pytest.raises(NonFiniteError, match=r"step 4 at sigma 0\.\d+ .*last three rewards: -?\d\S+, -?\d\S+, nan"):
        train(config, parts, tmp_path)
    assert [path.name for path in checkpoint.states(tmp_path)] == ["step-000002.state.safetensors"]


def test_other_settings_do_not_resume(toy, tmp_path):
    config = toy.config(steps=2)
    train(config, toy.parts(config), tmp_path)
    other = toy.config(steps=4, seed=1)
    with pytest.raises(ValueError, match="other settings"):
        train(other, toy.parts(other), tmp_path, resume=True)


def test_old_checkpoints_go(toy, tmp_path):
    config = toy.config(steps=5, checkpoint_every=1, keep_checkpoints=2)
    train(config, toy.parts(config), tmp_path)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        "step-000004.state.safetensors",
        "step-000005.state.safetensors",
        "toy-high-noise-toy-step000004.safetensors",
        "toy-high-noise-toy-step000005.safetensors",
    ]

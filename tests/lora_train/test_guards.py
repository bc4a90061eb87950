"""Guards against reward hacking: each ends a run for its reason, the LoRA is that of the best look, and a resumed run ends the same way."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open

from reward_lab.lora_train import checkpoint, guards, objectives, run
from reward_lab.lora_train.evaluation import Evaluation

LOOKS = {"every": 2, "prompts": ["x", "a red square"], "seeds": 2}


class Falling:
    """A judge or motion measure that falls with the redness that training raises."""

    mixes_prompts = False

    def score(self, frames_BFCHW, prompts):
        per_frame = 1.5 - frames_BFCHW[:, :, 0].mean((-1, -2))
        return SimpleNamespace(per_frame=per_frame, per_video=per_frame.mean(1), parts={})


def _run(toy, folder, stop_after=None, resume=False, parts=None, **changes):
    values = {"expert": "low", "objective": {"mode": "x0", "strategy": "random", "decode": "all"}, "optimiser": {"lr": 3e-2}, "held_out": LOOKS, "steps": 40}
    config = toy.config(**{**values, **changes})
    wired = toy.parts(config, stop_after=stop_after, **(parts or {}))
    return config, run.train(config, wired, objectives.create(config, wired), folder, resume=resume)


def test_kl_budget_ends_the_run_and_says_so(toy, tmp_path):
    _, finished = _run(toy, tmp_path, guards={"kl_budget": 0.05, "kl_window": 3}, held_out={"every": 0})
    steps = [event for event in toy.events if event.name == "step"]
    assert finished.reason == "kl_budget" and finished.step == len(steps) < 40
    means = [sum(event.kl for event in steps[index - 2 : index + 1]) / 3 for index in range(2, len(steps))]
    assert means[-1] > 0.05 and all(mean <= 0.05 for mean in means[:-1])
    assert "above guards.kl_budget 0.05" in finished.detail and "last 3 updates" in finished.detail


def test_motion_guard_goes_back_to_the_last_look_with_motion(toy, tmp_path):
    config, finished = _run(toy, tmp_path, parts={"motion": Falling()}, guards={"motion_floor": 0.97})
    looked = [event for event in toy.events if event.name == "step" and event.held_out_motion is not None]
    assert finished.reason == "motion" and "guards.motion_floor 0.97" in finished.detail
    moving = [event for event in looked[:-1] if event.held_out > looked[0].held_out_base]
    best = max(moving, key=lambda event: event.held_out).step if moving else 0
    assert f"that of update {best}" in finished.detail
    with safe_open(finished.files[0], "pt") as file:
        assert file.metadata()["steps"] == str(best)
        saved = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no dictionary)
    assert best < finished.step
    # The weights are those of that update, not the last ones.
    again, _ = _run(toy, tmp_path / "short", steps=best, held_out={"every": 0})
    with safe_open(tmp_path / "short" / checkpoint.lora_file_name(again, "low"), "pt") as file:
        assert all(torch.equal(saved[key], file.get_tensor(key)) for key in saved)


def test_early_stop_watches_the_judge_that_training_never_sees(toy, tmp_path):
    _, finished = _run(
        toy, tmp_path, parts={"judge": Falling()}, held_out={**LOOKS, "judge": {"kind": "toy", "path": "judge"}}, guards={"patience": 2}
    )
    looked = [event for event in toy.events if event.name == "step" and event.held_out_judge is not None]
    assert finished.reason == "no_gain" and "judge's held-out curve" in finished.detail
    assert looked[-1].held_out > looked[0].held_out_base, "the reward itself still rises"
    assert "The LoRA is that of update 0" in finished.detail


def test_a_guarded_run_resumes_to_the_same_end(toy, tmp_path):
    options = {"parts": {"judge": Falling()}, "held_out": {**LOOKS, "judge": {"kind": "toy", "path": "judge"}}, "guards": {"patience": 3}}
    _, whole = _run(toy, tmp_path / "whole", **options)
    toy.events.clear()
    _run(toy, tmp_path / "halves", stop_after=3, **options)
    toy.events.clear()
    _, resumed = _run(toy, tmp_path / "halves", resume=True, **options)
    assert (resumed.reason, resumed.step, resumed.detail) == (whole.reason, whole.step, whole.detail)
    for name in (f"checkpoints/step-{whole.step:06d}.state.safetensors", "toy-low-noise-toy.safetensors"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "halves" / name).read_bytes()


def test_a_look_without_enough_motion_is_never_the_best(toy):
    config = toy.config(held_out=LOOKS, guards={"motion_floor": 0.9, "patience": 5})
    watch = guards.first_look(guards.Watch(), Evaluation(mean=1.0, standard_error=0.1, motion=2.0))
    same, stop, is_best = guards.after_look(config, watch, Evaluation(mean=9.0, standard_error=0.1, motion=1.7), 2)
    assert stop.reason == "motion" and not is_best and same == replace(watch, looks=1)
    better, stop, is_best = guards.after_look(config, watch, Evaluation(mean=1.5, standard_error=0.1, motion=1.9), 2)
    assert stop is None and is_best and better == replace(watch, looks=1, best=1.5, best_step=2)


def test_a_base_without_motion_has_no_floor():
    with pytest.raises(ValueError, match="videos do not move, so guards.motion_floor could never act"):
        guards.first_look(guards.Watch(), Evaluation(mean=1.0, standard_error=0.1, motion=0.0))


def test_guards_without_looks_are_refused(toy):
    with pytest.raises(ValueError, match="set held_out.every"):
        toy.config(guards={"patience": 2})
    with pytest.raises(ValueError, match="held_out.every is 41, but there are 40 steps, .* set it to 40 or less"):
        toy.config(guards={"patience": 2}, held_out={**LOOKS, "every": 41}, steps=40)


def _steps_of(file):
    with safe_open(file, "pt") as lora:
        return lora.metadata()["steps"], max(float(lora.get_tensor(key).abs().max()) for key in lora.keys() if "lora_up" in key)  # noqa: SIM118


def test_before_the_first_look_there_is_no_best_one(toy, tmp_path):
    """The base was looked at, nothing since: what was learned is not thrown away for a LoRA that changes nothing."""
    _, finished = _run(toy, tmp_path, stop_after=3, guards={"keep_best": True}, held_out={**LOOKS, "every": 10})
    steps, largest = _steps_of(finished.files[0])
    assert finished.reason == "stopped" and steps == "3" and largest > 0 and "The LoRA is that of update 3, the last one" in finished.detail


def test_a_look_at_the_very_end_may_be_the_best(toy, tmp_path):
    _, finished = _run(toy, tmp_path, guards={"keep_best": True}, held_out={**LOOKS, "every": 4}, steps=7)
    looked = {event.step: event.held_out for event in toy.events if event.name == "step" and event.held_out is not None}
    assert set(looked) == {4, 7} and looked[7] > looked[4], "the toy's reward rises"
    assert _steps_of(finished.files[0])[0] == "7" and "update 7, the last one" in finished.detail
    # And where it is not, the remembered one is taken.
    toy.events.clear()
    judge = {"parts": {"judge": Falling()}, "held_out": {**LOOKS, "every": 4, "judge": {"kind": "toy", "path": "judge"}}}
    _, finished = _run(toy, tmp_path / "falling", guards={"keep_best": True}, steps=7, **judge)
    assert _steps_of(finished.files[0])[1] == 0 and "update 0, the base model: no look was better, so it changes nothing" in finished.detail


def test_a_kl_budget_goes_back_to_the_best_look(toy, tmp_path):
    _, finished = _run(toy, tmp_path, guards={"kl_budget": 0.05, "kl_window": 3})
    looked = {event.step: event.held_out for event in toy.events if event.name == "step" and event.held_out is not None}
    best = max((step for step in looked if step % 2 == 0), key=looked.get)
    assert finished.reason == "kl_budget" and best > 0
    if finished.step % 2 and looked[finished.step] > looked[best]:
        best = finished.step
    assert _steps_of(finished.files[0])[0] == str(best) and f"The LoRA is that of update {best}" in finished.detail


def test_other_looks_do_not_resume_a_guarded_run(toy):
    plain = {"held_out": LOOKS}
    assert toy.config(**plain).digest() == toy.config(held_out={**LOOKS, "every": 3}).digest()
    guarded = {"guards": {"patience": 2}}
    assert toy.config(**plain, **guarded).digest() != toy.config(held_out={**LOOKS, "every": 3}, **guarded).digest()


@pytest.mark.parametrize(
    "ends",
    [{"guards": {"kl_budget": 0.05, "kl_window": 3}}, {"guards": {"keep_best": True}, "held_out": {**LOOKS, "every": 4}, "steps": 7}],
)
def test_files_that_were_not_written_at_the_end_are_those_of_the_run(toy, tmp_path, ends):
    """The disk was full, or the process killed: a run that a guard ended trains no further, and the look at the very end still counts."""
    _, finished = _run(toy, tmp_path, **ends)
    lora = tmp_path / "toy-low-noise-toy.safetensors"
    wanted = lora.read_bytes()
    lora.unlink()
    toy.events.clear()
    _, again = _run(toy, tmp_path, resume=True, **ends)
    assert (again.reason, again.step, again.detail) == (finished.reason, finished.step, finished.detail) and lora.read_bytes() == wanted
    assert not [event for event in toy.events if event.name == "step"]

"""The rehearsal of the largest step: what it reports, that it leaves no trace in the run, that too large a step does not get to train."""

from __future__ import annotations

import pytest
import torch

from reward_lab.lora_train import objectives, recovery, rehearsal
from reward_lab.lora_train.protocols import Shrunk
from reward_lab.lora_train.run import train


class Meter:
    """Counts 100 bytes a call of `peak_bytes`."""

    limit_bytes = 1000

    def __init__(self) -> None:
        self.calls = []

    def predicted_bytes(self, when):
        return 80

    def start(self):
        self.calls.append("start")

    def peak_bytes(self):
        self.calls.append("peak")
        return 100


METHODS = {
    "x0": {"objective": {"mode": "x0", "strategy": "random", "decode": "random", "kl_weight": 0.1}},
    "chain": {"objective": {"mode": "chain", "strategy": "tail", "grad_steps": 2, "decode": "all"}, "expert": "both"},
    "flow": {"method": "reward_flow", "expert": "low", "reward_flow": {"measure_videos": 0}},
}


@pytest.mark.parametrize("method", METHODS)
def test_a_run_with_it_has_the_same_bytes(toy, tmp_path, method):
    found = []
    for meter in (None, Meter()):
        toy.events.clear()
        config = toy.config(**METHODS[method])
        parts = toy.parts(config, meter=meter)
        folder = tmp_path / str(meter is None)
        train(config, parts, objectives.create(config, parts), folder)
        files = {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}
        found.append((files, [(event.step, event.loss, event.forwards) for event in toy.events if event.name == "step"], list(toy.events)))
    assert found[0][0] and found[0][:2] == found[1][:2]
    memory = [event for event in found[1][2] if event.name == "memory"]
    assert [event.when for event in memory] == ["rehearsal", "run"] and all(event.error == pytest.approx(0.25) for event in memory)
    assert not any(event.name == "memory" for event in found[0][2])


def test_the_largest_step_has_all_the_history_and_a_short_rollout(toy):
    config = rehearsal.largest(toy.config(objective={"decode": "random", "decode_count": 1, "rollout_steps": 0}))
    assert (config.objective.decode, config.objective.rollout_steps) == ("last", 1)
    assert rehearsal.largest(toy.config(objective={"decode": "first"})).objective.decode == "first"


def test_a_step_that_takes_too_much_does_not_get_to_train(toy, tmp_path):
    meter = Meter()
    meter.limit_bytes = 99
    config = toy.config()
    parts = toy.parts(config, meter=meter)
    with pytest.raises(recovery.CardFullError, match="the run may use"):
        train(config, parts, objectives.create(config, parts), tmp_path)
    assert [event.name for event in toy.events] == ["started", "memory"] and toy.events[-1].measured_bytes == 100


def test_the_next_smaller_plan_is_rehearsed_in_its_place(toy, tmp_path):
    meter = Meter()
    meter.limit_bytes = 99

    def shrink():
        meter.limit_bytes = 1000
        return Shrunk(changes="head_groups 1 -> 4", masters_on=torch.device("cpu"))

    config = toy.config()
    parts = toy.parts(config, meter=meter, shrink=shrink)
    train(config, parts, objectives.create(config, parts), tmp_path)
    assert [event.name for event in toy.events][:5] == ["started", "memory", "replanned", "memory", "step"]
    assert "head_groups 1 -> 4" in toy.events[2].detail and toy.events[-1].name == "finished"

"""Every optimiser learns, and resumes to the same bytes; learning-rate schedules; what is missing is named."""

from __future__ import annotations

import importlib.util
import math
import sys

import pytest
import torch

from reward_lab.lora_train import objectives, optimisers, run
from reward_lab.lora_train.method_config import Optimiser

# bitsandbytes is no requirement; where it is installed, the real one is tested as well.
KINDS = ("adamw", "adafactor", "muon", *(["adamw8bit"] if importlib.util.find_spec("bitsandbytes") else []))


def _needs(kind):
    if kind == "muon" and not hasattr(torch.optim, "Muon"):
        pytest.skip("torch < 2.9 has no Muon")


def _train(toy, folder, config, stop_after=None):
    toy.events.clear()
    parts = toy.parts(config, stop_after=stop_after)
    return run.train(config, parts, objectives.create(config, parts), folder, resume=folder.exists())


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
@pytest.mark.parametrize("kind", KINDS)
def test_resumes_to_the_same_bytes(toy, tmp_path, kind, schedule):
    _needs(kind)
    settings = {"kind": kind, "schedule": schedule, "warmup": 2, "ema_decay": 0.9, "final_lr": 0.1}
    config = toy.config(steps=6, checkpoint_every=6, optimiser=settings)
    _train(toy, tmp_path / "whole", config)
    _train(toy, tmp_path / "halves", config, stop_after=3)
    _train(toy, tmp_path / "halves", config)
    for name in ("checkpoints/step-000006.state.safetensors", "toy-high-noise-toy.safetensors"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "halves" / name).read_bytes()


@pytest.mark.parametrize("kind", KINDS)
def test_learns(toy, tmp_path, kind):
    _needs(kind)
    # Muon's update has the size of its rate in every direction, AdamW's in every entry.
    config = toy.config(
        objective={"mode": "x0", "strategy": "random", "decode": "all"},
        expert="low",
        steps=30,
        optimiser={"kind": kind, "lr": {"muon": 0.1}.get(kind, 3e-2)},
        held_out={"every": 30, "prompts": ["x", "a red square"], "seeds": 4},
    )
    _train(toy, tmp_path, config)
    last = [event for event in toy.events if event.name == "step"][-1]
    assert last.held_out > last.held_out_base + 0.3


def test_schedules():
    def rates(**values):
        settings = Optimiser(lr=1.0, **values)
        return [optimisers.learning_rate(settings, 1.0, step, 10) for step in range(1, 11)]

    assert rates() == [1.0] * 10
    assert rates(warmup=4)[:4] == [0.25, 0.5, 0.75, 1.0] and rates(warmup=4)[4:] == [1.0] * 6
    assert rates(schedule="linear") == pytest.approx([1 - step / 10 for step in range(1, 11)])
    cosine = rates(schedule="cosine", warmup=2, final_lr=0.2)
    assert cosine[:2] == [0.5, 1.0] and cosine[-1] == pytest.approx(0.2)
    assert cosine[5] == pytest.approx(0.2 + 0.8 * (1 + math.cos(math.pi / 2)) / 2)


def test_steps_matter_to_a_falling_rate_only(toy):
    assert toy.config(steps=5).digest() == toy.config(steps=6).digest()
    falling = {"optimiser": {"schedule": "linear"}}
    assert toy.config(steps=5, **falling).digest() != toy.config(steps=6, **falling).digest()


def test_missing_packages_are_named(monkeypatch):
    parameters = [torch.nn.Parameter(torch.zeros(2, 2))]
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(ValueError, match="needs the package bitsandbytes"):
        optimisers.make(Optimiser(kind="adamw8bit"), [(1e-4, parameters)])
    monkeypatch.delattr(torch.optim, "Muon", raising=False)
    with pytest.raises(ValueError, match="'muon', which torch .* does not have"):
        optimisers.make(Optimiser(kind="muon"), [(1e-4, parameters)])


def test_state_of_an_eight_bit_kind_survives():
    """bitsandbytes keeps bytes, tables and a plain step number; none may be lost or change its type."""
    parameter = torch.nn.Parameter(torch.zeros(2, 2))
    optimiser = torch.optim.SGD([parameter])
    state = {"state1": torch.arange(4, dtype=torch.uint8), "qmap1": torch.linspace(-1, 1, 8), "step": 3}
    optimiser.state[parameter] = dict(state)
    saved = optimisers.state_tensors(optimiser, {"a.down": parameter})
    other = torch.optim.SGD([parameter])
    optimisers.load_state(other, {"a.down": parameter}, saved)
    loaded = other.state[parameter]
    assert loaded["step"] == 3 and isinstance(loaded["step"], int) and loaded["state1"].dtype == torch.uint8
    assert all(torch.equal(loaded[key], state[key]) for key in ("state1", "qmap1"))

"""Two experts, with every method: one trained with the other frozen, and both in one run, in turn."""

from __future__ import annotations

from contextlib import ExitStack

import pytest
import torch

from reward_lab.lora_train import objectives, run
from reward_lab.lora_train.real import RealLatents, write_real

from .gradients import trainee_of
from .test_prfl import ToyLatentReward

METHODS = {
    "reward_backprop": {"objective": {"mode": "chain", "strategy": "random", "grad_steps": 2, "truncate": False, "kl_weight": 0.1}},
    "prfl": {"method": "prfl", "reward": {"kind": "pavrm", "path": "x"}, "prfl": {"real_weight": 1.0, "null_rate": 0.3}},
    "reward_flow": {"method": "reward_flow", "reward_flow": {"measure_videos": 4}, "objective": {"decode": "all", "kl_weight": 0.1}},
}


@pytest.fixture(params=METHODS)
def make(request, toy, tmp_path):
    """`make(dtype, stop_after, **changes)` -> config and parts of a run of one method."""
    path, names = tmp_path / "real.safetensors", [f"clip {index}" for index in range(5)]
    write_real(path, torch.randn(5, 16, 2, 2, 4, generator=torch.Generator().manual_seed(6)), names)

    def build(dtype=torch.float32, stop_after=None, **changes):
        config = toy.config(**{**METHODS[request.param], "real": {"path": str(path)}, **changes})
        wiring = {"latent_reward": ToyLatentReward(dtype), "real": RealLatents(path), "more_prompts": [*names, ""]}
        return config, toy.parts(config, dtype, stop_after=stop_after, **wiring)

    return build


@pytest.mark.parametrize("expert", ["high", "low"])
def test_an_update_moves_its_own_expert_only(make, expert):
    config, parts = make(torch.float64, expert="both")
    objective = objectives.create(config, parts)
    weights = {name: {path: linear.weight.clone() for path, linear in backbone.linears().items()} for name, backbone in parts.experts.backbones.items()}
    with ExitStack() as stack:
        trainees = {name: trainee_of(config, parts, name, stack) for name in ("high", "low")}
        objective.add_gradient(trainees[expert], 1, 0)
        assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in trainees[expert].adapter.parameters())
        other = trainees["low" if expert == "high" else "high"]
        assert all(parameter.grad is None for parameter in other.adapter.parameters())
    for name, backbone in parts.experts.backbones.items():
        assert all(torch.equal(weights[name][path], linear.weight) and linear.weight.grad is None for path, linear in backbone.linears().items())


@pytest.mark.parametrize("expert", ["high", "low"])
def test_the_other_expert_stays_frozen(make, toy, tmp_path, expert):
    config, parts = make(expert=expert)
    finished = run.train(config, parts, objectives.create(config, parts), tmp_path / "run")
    assert len(finished.files) == 1 and f"-{expert}-noise-" in finished.files[0]
    steps = [event for event in toy.events if event.name == "step"]
    border = config.sampling.boundary
    assert all(event.expert == expert and (event.sigma >= border) == (expert == "high") and event.grad_norm > 0 for event in steps)


def test_both_in_one_run_resume_to_the_same_bytes(make, toy, tmp_path):
    """Stopped after every possible update, the experts' turns included."""
    config, parts = make(expert="both", steps=5, optimiser={"lr": 1e-2, "accumulate": 2, "ema_decay": 0.9}, checkpoint_every=5)
    finished = run.train(config, parts, objectives.create(config, parts), tmp_path / "whole")
    assert [event.expert for event in toy.events if event.name == "step"] == ["high", "low", "high", "low", "high"] and len(finished.files) == 2
    names = [path.relative_to(tmp_path / "whole") for path in (tmp_path / "whole").rglob("*.safetensors")]
    for stop_after in range(1, 5):
        folder = tmp_path / f"halves-{stop_after}"
        for stop in (stop_after, None):
            toy.events.clear()
            _, parts = make(stop_after=stop, expert="both", steps=5, optimiser={"lr": 1e-2, "accumulate": 2, "ema_decay": 0.9}, checkpoint_every=5)
            run.train(config, parts, objectives.create(config, parts), folder, resume=folder.exists())
        assert all((tmp_path / "whole" / name).read_bytes() == (folder / name).read_bytes() for name in names)

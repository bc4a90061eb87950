"""The plan from headers alone, and the check of the disk."""

from __future__ import annotations

import math
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from reward_lab.lora_train import plan, safetensors_file


@pytest.fixture
def config(toy, tmp_path):
    tensors = {
        "blocks.0.self_attn.q.weight": torch.zeros(8, 8),
        "blocks.0.ffn.0.weight": torch.zeros(16, 8),
        "head.head.weight": torch.zeros(64, 8),
        "head.head.bias": torch.zeros(64),
        "text_embedding.0.weight": torch.zeros(8, 6),
        "patch_embedding.weight": torch.zeros(8, 16, 1, 2, 2),
    }
    for expert in ("high", "low"):
        safetensors_file.write(tmp_path / f"{expert}.safetensors", tensors, {})
    files = {expert: str(tmp_path / f"{expert}.safetensors") for expert in ("high", "low")}
    return toy.config(models=files, objective={"mode": "x0", "strategy": "last", "kl_weight": 1.0}, lora={"rank": 3})


def test_counts(config):
    found = plan.plan(config)
    high, low = found["experts"]["high"], found["experts"]["low"]
    assert high["parameters"] == 64 + 128 + 512 + 64 + 48 + 512 and high["file_bytes"] == 4 * high["parameters"]
    assert (high["lora_modules"], high["lora_parameters"]) == (3, 3 * 16 + 3 * 14 + 3 * 72) and low["lora_modules"] == 0
    # Six steps, three of them high: two rolled, one with gradient (3 passes) and a reference; guidance doubles all.
    assert high["passes_per_update_and_video"] == {"rollout": 4, "gradient": 6.0, "reference": 2.0, "real": 0.0, "total": 12.0}
    assert found["lora_file_bytes"] == 4 * high["lora_parameters"] and found["tokens_per_video"] == 2 * 1 * 2


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"objective": {"mode": "chain", "strategy": "tail", "grad_steps": 2}},
        {"objective": {"strategy": "list", "step_list": [2], "rollout_steps": 1}},
        {"method": "reward_flow", "expert": "low", "reward_flow": {"measure_videos": 0}},
        {"method": "reward_flow", "expert": "low", "reward_flow": {"measure_videos": 0, "recompute": False, "guidance": 1.0}},
        {"method": "prfl", "prfl": {"first_step": 2, "last_step": 2, "real_weight": 1.0}, "optimiser": {"accumulate": 2}},
        {"method": "prfl", "prfl": {"first_step": 1, "last_step": 2, "points": 2, "guidance": 2.0}, "guards": {"kl_budget": 9.0}},
        {"method": "prfl", "expert": "low", "prfl": {"first_step": 4, "last_step": 4}, "objective": {"start": "real"}},
        {"method": "one_pass", "expert": "low", "objective": {"kl_weight": 0.0}},
        {"method": "one_pass", "expert": "low", "objective": {"kl_weight": 0.0, "grad_steps": 3, "strategy": "tail"}},
    ],
)
def test_passes_agree_with_what_the_trainer_counts(toy, config, tmp_path, changes):
    from reward_lab.lora_train import objectives
    from reward_lab.lora_train.real import RealLatents, write_real
    from reward_lab.lora_train.run import train

    from .test_prfl import ToyLatentReward

    write_real(tmp_path / "real.safetensors", torch.randn(3, 16, 2, 2, 4), ["one", "two", "three"])
    values = config.to_dict() | {"real": {"path": str(tmp_path / "real.safetensors")}}
    config = toy.config(**{key: {**values[key], **value} if isinstance(value, dict) else value for key, value in {**values, **changes}.items()})
    real = RealLatents(config.real.path)
    parts = toy.parts(config, more_prompts=[*real.prompts, ""], real=real, latent_reward=ToyLatentReward(torch.float32))
    train(config, parts, objectives.create(config, parts), tmp_path / "run")
    steps = [event for event in toy.events if event.name == "step"]
    wanted = plan.passes_per_update(config, config.expert)["total"] * config.batch
    assert [event.forwards for event in steps] == [wanted * event.step for event in steps]


def test_full_disk_is_refused_before_the_start(config, tmp_path, monkeypatch):
    plan.check_disk(config, tmp_path / "not" / "yet" / "there")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10))
    with pytest.raises(ValueError, match="0.00 GB free; make room"):
        plan.check_disk(config, tmp_path)
    elsewhere = replace(config, output_folder=str(tmp_path / "loras" / "mine"))
    (tmp_path / "loras").mkdir()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10 if path.name == "loras" else 10**12))
    plan.check_disk(config, tmp_path)
    with pytest.raises(ValueError, match="this run's LoRAs need .*loras has 0.00 GB free; make room, or choose another output_folder"):
        plan.check_disk(elsewhere, tmp_path)


def test_clips_that_are_made_need_a_place_too(config, tmp_path, monkeypatch):
    """Every try lies on the disk until the kept ones are a file."""
    made = replace(config, method="one_pass", real=replace(config.real, replay=32, tries=2))
    clips = 4 * math.prod(config.video.latent_shape(1)) * 32 * 3
    for spare, words in ((-1, "checkpoints and clips of this run need .* lower real.replay or real.tries"), (0, "")):
        free = plan.plan(made)["disk_bytes"] + clips + spare
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: SimpleNamespace(free=free))
        plan.check_disk(config, tmp_path)
        if words:
            with pytest.raises(ValueError, match=words):
                plan.check_disk(made, tmp_path)
        else:
            plan.check_disk(made, tmp_path)


def test_short_memory_is_refused_before_the_start(config, monkeypatch):
    plan.check_memory(config)
    monkeypatch.setattr(plan, "free_memory_bytes", lambda: 100)
    with pytest.raises(ValueError, match=r"this run needs at least 0.00 GB of memory, most of it for .*, but 0.00 GB are free; close other programs"):
        plan.check_memory(config)
    plan.check_memory(replace(config, engine=replace(config.engine, ram_gb=1.0)))


def test_memory_of_a_container(tmp_path):
    assert plan._container_bytes(tmp_path) == plan._ANY_CARD
    for name, text in (("memory.max", "1000\n"), ("memory.current", "700\n"), ("memory.stat", "anon 500\ninactive_file 150\n")):
        (tmp_path / name).write_text(text)
    assert plan._container_bytes(tmp_path) == 450
    (tmp_path / "memory.max").write_text("max\n")
    assert plan._container_bytes(tmp_path) == plan._ANY_CARD > 0 and plan.free_memory_bytes() > 1e6


def test_command(config, tmp_path, capsys):
    import json

    path = tmp_path / "config.json"
    path.write_text(json.dumps(config.to_dict()))
    assert plan.main([str(path), "--json", "--ram-gb", "64"]) == 0 and '"disk_bytes"' in capsys.readouterr().out
    assert plan.main([str(path), "--ram-gb", "64"]) == 0
    shown = capsys.readouterr().out
    assert "\nFits: " in shown and "on the card" in shown and "optimiser_place" in shown
    path.write_text(json.dumps({"kind": "lora", **config.to_dict()}))
    assert plan.main([str(path), "--json", "--ram-gb", "64"]) == 0 and '"disk_bytes"' in capsys.readouterr().out
    path.write_text(json.dumps({"kind": "pavrm", "models": {"trunk": "x"}, "data": {"source": "y"}}))
    assert plan.main([str(path)]) == 2 and "plans are made for LoRAs only" in capsys.readouterr().err
    path.write_text('{"stepz": 1}')
    assert plan.main([str(path)]) == 2 and "nearest known one is 'steps'" in capsys.readouterr().err

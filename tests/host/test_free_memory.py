"""What a run may use is what was free before its models were loaded: the plan counts their bytes itself."""

from __future__ import annotations

from dataclasses import replace

import pytest

from reward_lab.lora_train.config import TrainConfig
from reward_lab.lora_train.planning.choose import USABLE
from reward_lab.lora_train.planning.speed import CARDS, GIB

pytestmark = pytest.mark.host
BEFORE, AFTER = 64 * 10**9, 10**6


class TrainedError(Exception):
    """Stands for the training, which is not wanted here."""


@pytest.fixture
def config(comfyui, tiny_models, repo):
    return TrainConfig.from_dict(
        {
            "models": tiny_models, "reward": {"kind": "hpsv2.1", "path": str(repo / "pocket" / "weights" / "pocket_HPS_v2.1.safetensors")},
            "prompts": [{"text": "a red square moves left over white"}], "video": {"width_px": 32, "height_px": 32, "frames": 5},
            "sampling": {"steps": 3}, "lora": {"rank": 2}, "name": "tiny", "steps": 1, "batch": 1, "engine": {"rehearse": "yes"},
        }
    )  # fmt: skip


def test_the_plan_of_a_run_gets_what_was_free_before_anything_was_loaded(config, monkeypatch, tmp_path):
    import torch

    from reward_lab.host import engine, text, wan, worker
    from reward_lab.lora_train import run

    loaded, planned = [], []

    def remember(module, name, made, value):
        own = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args, **options: made.append(value(args)) or own(*args, **options))

    remember(text, "load_text_encoder", loaded, lambda args: "text encoder")
    remember(wan, "load_backbone", loaded, lambda args: "expert")
    remember(engine, "memory_plan", planned, lambda args: (args[2].memory_bytes, args[3]))
    remember(engine, "smaller", planned, lambda args: (args[3], args[3]))
    monkeypatch.setattr(engine, "free_memory_bytes", lambda: AFTER if loaded else BEFORE)

    def train(config, parts, *rest, **options):
        parts.shrink()
        raise TrainedError

    monkeypatch.setattr(run, "train", train)
    with pytest.raises(TrainedError):
        worker._train_with_models(config, tmp_path, lambda: False, False, torch.device("cpu"), torch.float32)
    assert loaded == ["text encoder", "expert", "expert"] and planned == 2 * [(BEFORE, BEFORE)]


def test_knobs_are_chosen_for_the_memory_that_is_given_and_refused_for_less(config, monkeypatch):
    import torch

    from reward_lab.host import engine

    monkeypatch.setattr(engine, "free_memory_bytes", lambda: AFTER)
    card, device = replace(CARDS["rtx 4090"], memory_bytes=24 * GIB), torch.device("cuda")
    assert engine.choose_knobs(config, device, engine.FreeMemory(card=card, host_bytes=BEFORE)).resident_blocks == 2
    with pytest.raises(ValueError, match=r"GB of memory .* but 0.0 GB are free"):
        engine.choose_knobs(config, device, engine.FreeMemory(card=card, host_bytes=AFTER))


def test_the_rehearsals_limit_on_a_card_holds_the_weights_and_that_of_a_process_does_not(config, monkeypatch):
    import torch

    from reward_lab.host import engine, memory_meter

    monkeypatch.setattr(engine, "free_memory_bytes", lambda: AFTER)
    free = engine.FreeMemory(card=replace(CARDS["rtx 4090"], memory_bytes=24 * GIB), host_bytes=BEFORE)
    assert memory_meter.meter_of(config, torch.device("cuda"), free, lambda: None).limit_bytes == int(USABLE * 24 * GIB)
    assert memory_meter.meter_of(config, torch.device("cpu"), free, lambda: None).limit_bytes == AFTER

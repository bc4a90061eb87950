"""Bad input to training, by the node's way and by that of `lab.py train`: an error that names it, before any model is loaded."""

from __future__ import annotations

import json
import re
import shutil
import sys
from types import SimpleNamespace

import pytest

pytest.importorskip("torch")
pytest.importorskip("comfy.sd", reason="needs ComfyUI on the path")

import folder_paths  # noqa: E402
import numpy as np  # noqa: E402

from reward_lab.host import datasets, pavrm_nodes, pavrm_training, preflight, preprocess, training, worker  # noqa: E402
from reward_lab.labtools import training as lab_training  # noqa: E402
from reward_lab.lora_train.run_config import read  # noqa: E402
from reward_lab.reward_models.spec import RewardModelSpec  # noqa: E402
from reward_lab.runs.store import RunStore  # noqa: E402

pytestmark = pytest.mark.host
WIDGETS = {
    "name": "mine", "expert": "low", "preset": "reward-lab", "steps": 7, "rank": 4, "alpha": 2.0, "learning_rate": 1e-3, "batch": 1, "width": 64, "height": 64,
    "frames": 17, "sampling_steps": 12, "guidance": 3.0, "seed": 5, "advanced": "{}",
}  # fmt: skip


@pytest.fixture(autouse=True)
def no_work(monkeypatch, tmp_path):
    """Nothing may be loaded or started; what is written lies in a folder of the test's own."""

    def reached(*_arguments, **_options):
        raise AssertionError("work has begun")

    monkeypatch.setattr(folder_paths, "get_output_directory", lambda: str(tmp_path / "output"))
    monkeypatch.setattr(training.process, "start", reached)
    monkeypatch.setattr(lab_training.run_process, "start", reached)
    monkeypatch.setattr(worker, "_train_with_models", reached)
    monkeypatch.setattr(pavrm_training, "load", reached)
    monkeypatch.setattr(worker.signal, "signal", lambda *_arguments: None)


@pytest.fixture
def refused(tmp_path, capsys):
    """`refused(settings)`: what `lab.py train` says: the command itself, or its worker."""

    def run(settings) -> str:
        config = tmp_path / "config.json"
        config.write_text(json.dumps(settings))
        try:
            read(settings)
        except ValueError:
            assert lab_training.main([str(config), "--output", str(tmp_path / "lab")]) == 2
            return capsys.readouterr().err
        store = RunStore(tmp_path / "lab")
        run_id = store.create(read(settings))
        assert worker.run(store.folder(run_id)) == 2
        assert store.get(run_id).state == "failed"
        return store.get(run_id).error

    return run


@pytest.fixture
def settings(tiny_models):
    """A run that could begin."""
    return {
        "preset": "reward-lab", "models": dict(tiny_models), "reward": {"kind": "flicker"}, "prompts": [{"text": "a cat"}], "name": "mine", "expert": "low",
        "objective": {"decode": "all"}, "video": {"width_px": 64, "height_px": 64, "frames": 17},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("widgets", "changes", "prompts", "message"),
    [
        ({"width": 250}, {"video": {"width_px": 250, "height_px": 64, "frames": 17}}, ["a cat"], "width_px is 250.*multiple of 16.*use 256"),
        ({"frames": 16}, {"video": {"width_px": 64, "height_px": 64, "frames": 16}}, ["a cat"], "frames is 16, but Wan needs 4n.1 frames; use 13 or 17"),
        ({}, {"prompts": []}, [], "prompts is empty; training needs at least one prompt"),
        ({}, {"prompts": [{"text": "  "}]}, ["  "], "a prompt is empty; remove it or write something"),
        ({"expert": "middle"}, {"expert": "middle"}, ["a cat"], "expert is 'middle', but it must be one of: high, low, both"),
    ],
)
def test_settings(tiny_models, settings, refused, widgets, changes, prompts, message):
    files = {**tiny_models, "weight_dtype": "default"}
    with pytest.raises(ValueError, match=message):
        training.start_run(files, [{"text": text} for text in prompts], RewardModelSpec(kind="hpsv2.1", path="x.pt"), {**WIDGETS, **widgets})
    said = refused({**settings, **changes})
    assert re.search(message, said), said


def _both_ways(settings, refused, message):
    reward = settings["reward"]
    spec = RewardModelSpec(kind=reward["kind"], path=reward.get("path", ""), options=reward.get("options", {}))
    advanced = json.dumps({key: settings[key] for key in ("method", "objective", "held_out", "optimiser", "output_folder") if key in settings})
    with pytest.raises(ValueError, match=message):
        training.start_run({**settings["models"], "weight_dtype": "default"}, settings["prompts"], spec, {**WIDGETS, "advanced": advanced})
    said = refused(settings)
    assert re.search(message, said), said


def test_an_expert_in_the_others_place(settings, refused):
    models = settings["models"]
    models["high"], models["low"] = models["low"], models["high"]
    _both_ways(settings, refused, "is given as the high-noise expert, but its file name says that it is the low-noise one; swap")


def test_a_vae_of_another_model(settings, refused, tmp_path):
    import torch
    from safetensors.torch import save_file

    save_file({"decoder.conv1.weight": torch.zeros(8, 48, 3, 3, 3)}, tmp_path / "vae22.safetensors")
    settings["models"]["vae"] = str(tmp_path / "vae22.safetensors")
    _both_ways(settings, refused, "the VAE has latents of 48 channels, but video.vae is 'wan2.1', which has 16")


@pytest.mark.parametrize("form", ["checkpoints/checkpoint-100", "trunk_comfyui.safetensors"])
def test_a_pavrm_of_another_width(settings, refused, shared_fixtures, form):
    folder = shared_fixtures / "pavrm"
    heads = {"query": str(folder / "mlp" / "query_attention_step_100.ckpt"), "head": str(folder / "mlp" / "mlp_step_100.ckpt")}
    settings |= {"method": "prfl", "reward": {"kind": "pavrm", "path": str(folder / form), "options": heads}}
    _both_ways(settings, refused, "the PAVRM reads text of width 48, but the experts read 32; it belongs to another model")


def test_a_disk_without_room(settings, refused, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    _both_ways(settings, refused, "checkpoints of this run need .* GB, but .* has 0.00 GB free; make room, or lower keep_checkpoints or lora.rank")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reward": {"kind": "hps3", "path": "vae"}}, "reward: Reward model kind 'hps3' is unknown; choose one of hpsv2.1, mps"),
        ({"held_out": {"judge": {"kind": "hps9", "path": "vae"}}}, "held_out.judge: Reward model kind 'hps9' is unknown"),
        ({"held_out": {"judge": {"kind": "pavrm", "path": "vae"}}}, "held_out.judge is a pavrm, which scores latents, but a judge looks at finished videos"),
        ({"held_out": {"judge": {"kind": "mix", "options": {"rows": [{"reward": {"kind": "hps3", "path": "vae"}}]}}}}, "held_out.judge: Row 1 .*'hps3'"),
        ({"held_out": {"judge": {"kind": "mix"}}}, "held_out.judge: The rows of a mix are None"),
        ({"held_out": {"judge": {"kind": "hpsv2", "path": "vae", "options": {"treshold": 1}}}}, "'treshold' is unknown"),
        ({"reward": {"kind": "hpsv2", "path": "vae", "options": {"threshold": 1}}}, "reward: The options of hpsv2: 'threshold' is unknown"),
        ({"optimiser": {"kind": "adamw8bit"}}, "optimiser.kind is 'adamw8bit', which needs the package bitsandbytes: pip install it"),
        ({"held_out": {"prompts": ["a dog", " a cat"]}}, "1 of 2 held-out prompts are trained on too, the first is ' a cat': take them out"),
        ({"held_out": {"judge": {"kind": "flicker"}}}, "held_out.judge is flicker with the file and options that training raises"),
        ({"output_folder": "/dev/null/loras"}, "output_folder /dev/null/loras cannot be written to .*; choose another one"),
    ],
)
def test_what_would_fail_after_hours_of_work(settings, refused, monkeypatch, changes, message):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    vae = settings["models"]["vae"]
    changes = json.loads(json.dumps(changes).replace('"vae"', json.dumps(vae)))
    if "held_out" in changes:
        changes["held_out"] = {"every": 1, "prompts": ["a dog"], **changes["held_out"]}
    _both_ways({**settings, **changes}, refused, message)


def test_a_judge_may_be_another_of_its_kind_but_no_row_of_the_mix(settings, tmp_path):
    row = {"reward": {"kind": "drift"}, "weight": 2}
    looks = {"every": 1, "prompts": ["a dog"]}
    mixed = {**settings, "reward": {"kind": "mix", "options": {"rows": [row, {"reward": {"kind": "flicker"}}]}}, "real": {"replay": 2}}
    with pytest.raises(ValueError, match="held_out.judge is drift with the file and options that training raises"):
        preflight.check(read({**mixed, "held_out": {**looks, "judge": {"kind": "drift"}}}), tmp_path)
    preflight.check(read({**mixed, "held_out": {**looks, "judge": {"kind": "dynamic_degree"}}}), tmp_path)


def test_clips_with_held_out_captions_are_not_trained_on(settings, caplog):
    clips = SimpleNamespace(prompts=["a cat", "a dog ", "a fish"], names=["0", "1", "2"], shape=(16, 5, 8, 8))
    config = read({**settings, "real": {"replay": 2}, "held_out": {"every": 1, "prompts": ["a dog"]}})
    with caplog.at_level("WARNING", "reward_lab"):
        assert worker._not_held_out(config, clips).prompts == ["a cat", "a fish"]
    assert "1 of 3 clips have captions that are held-out prompts" in caplog.text
    without = read({**settings, "real": {"replay": 2}})
    assert worker._not_held_out(without, clips) is clips
    with pytest.raises(ValueError, match="all 1 clips of .* have captions that are held out"):
        worker._not_held_out(config, SimpleNamespace(prompts=["a dog"], names=["0"], shape=clips.shape))


def test_what_would_fail_after_a_pavrm_was_trained(tiny_models, refused, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    values = {"kind": "pavrm", "models": {"trunk": tiny_models["low"]}, "data": {"source": str(tmp_path)}}
    assert "output_folder /dev/null/x cannot be written to" in refused({**values, "output_folder": "/dev/null/x"})
    assert "needs the package bitsandbytes" in refused({**values, "optimiser": {"kind": "adamw8bit"}})


def test_labels_of_one_class(tiny_models, refused, tmp_path):
    import torch

    from reward_lab.lora_train import safetensors_file

    folder, videos = tmp_path / "data", []
    for name in ("latents", "texts"):
        (folder / name).mkdir(parents=True)
    safetensors_file.write(folder / "texts" / "a.safetensors", {"text": torch.zeros(3, 32)}, {})
    for index in range(4):
        safetensors_file.write(folder / "latents" / f"{index}.safetensors", {"latent": torch.zeros(16, 2, 4, 4)}, {})
        labels = {"motion_quality": 1}
        videos.append({"id": f"video{index}", "latent": f"latents/{index}.safetensors", "latent_shape": [16, 2, 4, 4], "text": "texts/a.safetensors",
                       "caption": "a cat", "labels": labels})  # fmt: skip
    preprocess.write_index(folder, {"version": datasets.VERSION, "videos": videos, "skipped": []})
    widgets = {
        "name": "mine", "trunk": pavrm_nodes.TRUNKS[0], "pavrm_file": pavrm_nodes.NO_FILE, "quality": "motion_quality", "loss": "ce", "votes": "",
        "noise": "shifted", "blocks": 1, "pooling": "query", "steps": 2, "batch": 1, "block_lr": 1e-6, "head_lr": 1e-5, "seed": 0, "advanced": "{}",
    }  # fmt: skip
    message = r"holds \d good and 0 bad videos for motion_quality; PAVRM learns the difference, so both are needed"
    with pytest.raises(ValueError, match=message):
        pavrm_nodes.start_run({**tiny_models, "weight_dtype": "default"}, str(folder), widgets)
    config = pavrm_nodes.make_config({**tiny_models, "weight_dtype": "default"}, str(folder), widgets)
    said = refused(config.to_dict())
    assert re.search(message, said), said


def test_a_dataset_with_a_broken_video_lists_it_and_goes_on(tiny_models, tmp_path):
    """Through the node's way; `lab.py preprocess` has the same list (test_preprocess.py)."""
    from fractions import Fraction

    from reward_lab.testlab import cells

    videos = tmp_path / "videos"
    videos.mkdir()
    frames = np.random.default_rng(0).integers(0, 255, (5, 64, 64, 3), dtype=np.uint8)
    cells.write_video(videos / "good.mp4", iter(frames), Fraction(16))
    (videos / "broken.mp4").write_bytes((videos / "good.mp4").read_bytes()[:200])

    size = {"short_px": 64, "long_px": 64, "width_px": 64, "height_px": 64}
    options = {"prompt": "a cat", "prompts_file": "", "frame_rate": 16.0, "frames": 5, "dtype": "fp32", **size}
    _, report = pavrm_nodes.make_dataset({**tiny_models, "weight_dtype": "default"}, "mine", str(videos), options)
    assert "1 videos in" in report and "skipped" in report and "broken.mp4" in report

"""The training process: a whole run with the host's own models, stop, resume, crash, and what it refuses."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest
from safetensors import safe_open

from reward_lab.lora_train.config import TrainConfig
from reward_lab.runs import lock, process
from reward_lab.runs.store import RunStore

pytestmark = pytest.mark.host
TIMEOUT_S = 600


@pytest.fixture
def settings(tiny_models, pocket_models, repo):
    """Settings of a run of seconds, with the pocket reward model."""
    return {
        "models": tiny_models,
        "reward": {"kind": "hpsv2.1", "path": str(repo / "pocket" / "weights" / "pocket_HPS_v2.1.safetensors")},
        "prompts": [{"text": "a red square moves left over white"}, {"text": "a blue circle moves right over black"}],
        "video": {"width_px": 32, "height_px": 32, "frames": 5},
        "sampling": {"steps": 4, "guidance": 2.0},
        "objective": {"mode": "x0", "strategy": "random", "decode": "first"},
        "lora": {"rank": 2},
        "expert": "both",
        "name": "tiny",
        "steps": 2,
        "batch": 1,
        "checkpoint_every": 1,
        "sample_every": 2,
        "frame_rate": 8.0,
    }


@pytest.fixture
def launch(comfyui, tmp_path):
    """`launch(settings)` -> (store, run id, process); workers still alive at the end are ended."""
    store, started = RunStore(tmp_path / "runs"), []

    def start(settings, run_id=None, **options):
        run_id = run_id or store.create(TrainConfig.from_dict(settings))
        worker = process.start(store.folder(run_id), comfyui, sys.executable, niceness=0, environment={"CUDA_VISIBLE_DEVICES": ""}, **options)
        started.append(worker)
        return store, run_id, worker

    yield start
    for worker in started:
        if worker.poll() is None:
            worker.kill()
        worker.wait()


def _wait(condition, worker):
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert worker.poll() is None and time.monotonic() < deadline, "the worker ended or took too long"
        time.sleep(0.1)


def test_memory_is_measured_beside_the_plan(launch, settings):
    settings |= {"engine": {"rehearse": "yes"}, "sample_every": 0}
    store, run_id, worker = launch(settings)
    assert worker.wait(TIMEOUT_S) == 0
    seen = store.events(run_id)
    rehearsal, run = (event for event in seen if event["event"] == "memory")
    assert [event["event"] for event in seen][:2] == ["started", "memory"] and (rehearsal["when"], run["when"]) == ("rehearsal", "run")
    # Tiny models: what torch and the allocator take for themselves is most of it.
    assert 0 < rehearsal["predicted_bytes"] <= 200e6 and 0 < rehearsal["measured_bytes"] <= 300e6 and rehearsal["limit_bytes"] > 1e8
    assert "GB planned" in (store.folder(run_id) / "log.txt").read_text()


def test_run_reports_and_leaves_loras_that_say_what_they_are(launch, settings, tmp_path):
    settings["output_folder"] = str(tmp_path / "loras")
    store, run_id, worker = launch(settings)
    seen = []
    watcher = process.watch(store.folder(run_id), worker, seen.append)
    assert worker.wait(TIMEOUT_S) == 0, store.log_tail(run_id, 40)
    watcher.join(10)
    names = [event["event"] for event in seen]
    assert names == [event["event"] for event in store.events(run_id)]
    assert names[0] == "started" and names[-1] == "finished" and names.count("step") == 2 and names.count("checkpoint") == 2
    info = store.get(run_id)
    assert (info.state, info.step, info.steps, len(info.files)) == ("finished", 2, 2, 4)
    assert [event["expert"] for event in seen if event["event"] == "step"] == ["high", "low"]
    for expert in ("high", "low"):
        with safe_open(tmp_path / "loras" / f"tiny-{expert}-noise-HPS2.1.safetensors", "pt") as file:
            metadata, keys = file.metadata(), list(file.keys())
        assert len(keys) == 3 * (2 * 8 + 6)
        assert metadata["expert"] == expert and metadata["rank"] == "2" and metadata["alpha"] == "1.0" and len(metadata["base_sha256"]) == 64
    for event in seen:
        for name in event["files"] if event["event"] == "sample" else ():
            assert (store.folder(run_id) / name).stat().st_size > 0


def test_killed_run_shows_its_log_and_resumes_to_the_same_bytes(launch, settings):
    settings |= {"steps": 3, "expert": "low", "sample_every": 0}
    store, whole, worker = launch(settings)
    assert worker.wait(TIMEOUT_S) == 0, store.log_tail(whole, 40)

    store, run_id, worker = launch(settings | {"steps": 1000, "keep_checkpoints": 1000})
    _wait(lambda: any(event["event"] == "checkpoint" for event in store.events(run_id)), worker)
    with pytest.raises(lock.RunInUseError, match="in use by process"):
        launch(settings, run_id)
    worker.send_signal(signal.SIGKILL)
    seen = []
    process.watch(store.folder(run_id), worker, seen.append).join(30)
    assert seen[-1]["event"] == "failed" and seen[-1]["log_tail"] and store.get(run_id).state == "failed"

    # Continue from step 1 as a run of three steps.
    folder = store.folder(run_id)
    for state in sorted((folder / "checkpoints").glob("step-*.state.safetensors"))[1:]:
        state.unlink()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"steps": 3, "keep_checkpoints": 3}))
    _, _, worker = launch(settings, run_id, resume=True)
    assert worker.wait(TIMEOUT_S) == 0, store.log_tail(run_id, 40)
    assert [event["step"] for event in store.events(run_id) if event["event"] == "step"] == [1, 2, 3]
    for name in ("tiny-low-noise-HPS2.1.safetensors", "checkpoints/step-000003.state.safetensors"):
        assert (folder / name).read_bytes() == (store.folder(whole) / name).read_bytes()


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGTERM that a process can answer")
def test_stop_file_and_sigterm_end_in_order(launch, settings):
    for ask in (lambda store, run_id, worker: store.request_stop(run_id), lambda store, run_id, worker: worker.terminate()):
        store, run_id, worker = launch(settings | {"steps": 1000, "expert": "low"})
        _wait(lambda: any(event["event"] == "step" for event in store.events(run_id)), worker)  # noqa: B023 (called at once)
        ask(store, run_id, worker)
        assert worker.wait(TIMEOUT_S) == 0
        info = store.get(run_id)
        assert info.state == "stopped" and len(info.files) == 1 and info.checkpoint_step == info.step


def test_refuses_before_any_work(launch, settings, tmp_path):
    truncated = tmp_path / "truncated_high_noise.safetensors"
    truncated.write_bytes(Path(settings["models"]["high"]).read_bytes()[:-100])
    models = settings["models"]
    cases = [
        (models | {"high": str(truncated)}, "truncated.*download it again"),
        (models | {"high": models["low"], "low": models["high"]}, "is given as the high-noise expert.*swap"),
        (models | {"vae": str(tmp_path / "none.safetensors")}, "VAE.*does not exist"),
    ]
    from reward_lab.host import preflight

    for files, message in cases:
        with pytest.raises(ValueError, match=message):
            preflight.check(TrainConfig.from_dict(settings | {"models": files}), tmp_path)
    store, run_id, worker = launch(settings | {"models": cases[0][0]})
    assert worker.wait(TIMEOUT_S) == 2
    assert "truncated" in store.get(run_id).error and store.get(run_id).state == "failed"


def test_a_mix_of_rewards_trains(launch, settings, tmp_path):
    """A frame reward and a measure of the whole video, centred, scaled and weighted, through the real worker."""
    settings["reward"] = {
        "kind": "mix",
        "options": {
            "rows": [
                {"name": "looks", "reward": settings["reward"], "weight": 1.0, "centre": 0.1, "scale": 0.05},
                {"name": "steady", "reward": {"kind": "flicker", "path": "", "options": {}}, "weight": 0.5},
            ]
        },
    }
    settings.update(expert="high", steps=1, sample_every=0, objective={"mode": "x0", "strategy": "random", "decode": "all"})
    store, run_id, worker = launch(settings)
    assert worker.wait(TIMEOUT_S) == 0, store.log_tail(run_id, 40)
    (step,) = [event for event in store.events(run_id) if event["event"] == "step"]
    assert step["grad_norm"] > 0 and step["reward"] == step["reward"]
    assert any("mix" in Path(file).name for file in store.get(run_id).files)


@pytest.fixture
def tiny_pavrm(comfyui, tmp_path):
    """A random PAVRM in our single-file form that fits the tiny models' text encoder."""
    import comfy.ldm.wan.model
    import comfy.ops
    import torch
    from safetensors.torch import save_file

    from reward_lab.reward_models.pavrm import build_head

    from .conftest import TRANSFORMER, _randomise

    sizes = {**TRANSFORMER, "num_layers": 1}
    trunk = _randomise(comfy.ldm.wan.model.WanModel(**sizes, device="cpu", dtype=torch.float32, operations=comfy.ops.disable_weight_init), 8)
    tensors = {f"trunk.{key}": value for key, value in trunk.items() if not key.startswith("head.")} | build_head(sizes["dim"], 8).state_dict()
    path = tmp_path / "tiny_PAVRM.safetensors"
    save_file(tensors, path, metadata={"config": json.dumps({"transformer": sizes, "feature_layers": [1], "num_heads": 8})})
    return {"kind": "pavrm", "path": str(path)}


def test_high_noise_prfl_loads_neither_the_other_expert_nor_a_vae(launch, settings, tiny_pavrm, tmp_path):
    import torch

    from reward_lab.lora_train.real import write_real

    captions = ["a red square moves left over white", "a blue circle moves right over black"]
    write_real(tmp_path / "real.safetensors", torch.randn(2, 16, 2, 4, 4), captions)
    settings["models"] = settings["models"] | {"low": str(tmp_path / "absent_low.safetensors"), "vae": str(tmp_path / "absent_vae.safetensors")}
    settings |= {"method": "prfl", "expert": "high", "reward": tiny_pavrm, "objective": {}, "sampling": {"steps": 8}, "sample_every": 0}
    settings |= {"prfl": {"real_weight": 1.0, "null_rate": 0.5}, "real": {"path": str(tmp_path / "real.safetensors")}}
    settings["held_out"] = {"every": 1, "prompts": ["a red circle moves left over black"]}
    store, run_id, worker = launch(settings)
    assert worker.wait(TIMEOUT_S) == 0, store.log_tail(run_id, 40)
    steps = [event for event in store.events(run_id) if event["event"] == "step"]
    assert len(steps) == 2 and all(step["grad_norm"] > 0 and 0 < step["held_out"] < 1 for step in steps)
    assert [Path(file).name for file in store.get(run_id).files] == ["tiny-high-noise-PAVRM.safetensors"]
    assert "loaded the high-noise expert, latent_reward" in "\n".join(store.log_tail(run_id, 100))


def test_one_pass_makes_clips_where_there_are_none_and_asks_a_pavrm_beside_the_reward(launch, settings, tiny_pavrm):
    settings |= {"method": "one_pass", "expert": "low", "objective": {}, "sampling": {"steps": 4, "guidance": 2.0}, "sample_every": 0}
    settings |= {"real": {"replay": 2, "tries": 2}, "one_pass": {"pavrm": tiny_pavrm}}
    store, run_id, worker = launch(settings)
    assert worker.wait(TIMEOUT_S) == 0, store.log_tail(run_id, 40)
    steps = [event for event in store.events(run_id) if event["event"] == "step"]
    batch, clips = TrainConfig.from_dict(settings).batch, 2 * 2 * 4 * 2
    assert [step["forwards"] for step in steps] == [clips + 3 * batch * step["step"] for step in steps] and all(step["grad_norm"] > 0 for step in steps)
    assert (store.folder(run_id) / "replayed.safetensors").exists()
    assert "decoder, reward, latent_reward" in "\n".join(store.log_tail(run_id, 100))


def test_reward_flow_measures_its_reward_and_a_guard_ends_the_run(launch, settings):
    settings |= {"method": "reward_flow", "expert": "low", "steps": 50, "sample_every": 0, "objective": {"decode": "all", "kl_weight": 0.1}}
    settings |= {"reward_flow": {"measure_videos": 4}, "optimiser": {"lr": 5e-2}, "guards": {"kl_budget": 1e-3, "kl_window": 2}}
    store, run_id, worker = launch(settings)
    assert worker.wait(TIMEOUT_S) == 0, store.log_tail(run_id, 40)
    finished, info = store.events(run_id)[-1], store.get(run_id)
    assert finished["reason"] == "kl_budget" and info.state == "finished" and info.step < 50
    assert info.ended == finished["detail"] and "above guards.kl_budget 0.001" in info.ended
    assert info.ended in "\n".join(store.log_tail(run_id, 100))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "prfl"}, "hpsv2.1, which scores frames; the method prfl scores latents: give a PAVRM"),
        ({"reward": {"kind": "pavrm", "path": "x.safetensors"}}, "pavrm, which scores latents; the method reward_backprop scores frames"),
        ({"method": "prfl", "reward": "tiny", "prfl": {"real_weight": 1.0}, "real": {"path": "none.safetensors"}}, "real latents .* do not exist"),
    ],
)
def test_methods_and_rewards_that_do_not_fit_are_told(settings, tiny_pavrm, tmp_path, changes, message):
    from reward_lab.host import preflight

    values = {**settings, "objective": {}, "expert": "high", **changes}
    values["reward"] = tiny_pavrm if values["reward"] == "tiny" else values["reward"]
    with pytest.raises(ValueError, match=message):
        preflight.check(TrainConfig.from_dict(values), tmp_path)


def test_pavrm_of_another_text_width_is_told(settings, tiny_pavrm, pocket_models, repo, tmp_path):
    from reward_lab.host import preflight

    other = {"kind": "pavrm", "path": str(repo / "pocket" / "weights" / "pocket_PAVRM.safetensors")}
    values = {**settings, "objective": {}, "expert": "high", "method": "prfl", "reward": other}
    with pytest.raises(ValueError, match="the PAVRM reads text of width 128, but the experts read 32"):
        preflight.check(TrainConfig.from_dict(values), tmp_path)

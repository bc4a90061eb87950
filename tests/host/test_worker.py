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

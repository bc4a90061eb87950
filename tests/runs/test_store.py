"""Run folders: states derived from files, ids, stop requests, locks and courtesy."""

from __future__ import annotations

import errno
import os
import subprocess
import sys

import pytest

from reward_lab.lora_train import events
from reward_lab.lora_train.config import TrainConfig
from reward_lab.runs import lease, lock, process
from reward_lab.runs.store import RunStore, append_event, cut_after

CONFIG = {
    "models": {"high": "h.safetensors", "low": "l.safetensors", "text_encoder": "t.safetensors", "vae": "v.safetensors"},
    "reward": {"kind": "hpsv2.1", "path": "r.safetensors"},
    "prompts": [{"text": "a cat"}],
    "video": {"width_px": 64, "height_px": 64, "frames": 17},
    "steps": 7,
}
STEP = {"time": 1.0, "step": 3, "steps": 7, "reward": 0.25, "loss": -0.25, "grad_norm": 1.0, "sigma": 0.5, "seconds": 2.0, "expert": "high"}


@pytest.fixture
def store(tmp_path):
    return RunStore(tmp_path / "runs")


@pytest.fixture
def run_id(store):
    return store.create(TrainConfig.from_dict(CONFIG))


def test_a_new_run(store, run_id):
    info = store.get(run_id)
    assert (info.state, info.steps, info.reward_kind, info.expert) == ("created", 7, "hpsv2.1", "high")
    assert [entry.id for entry in store.list()] == [run_id] and store.events(run_id) == [] and store.log_tail(run_id) == []


def test_states_follow_the_events(store, run_id):
    folder = store.folder(run_id)
    with lock.hold(folder):
        append_event(folder, events.Step(**STEP, held_out=0.3, held_out_base=0.2))
        info = store.get(run_id)
        assert (info.state, info.step, info.reward, info.held_out, info.held_out_base) == ("running", 3, 0.25, 0.3, 0.2)
        store.request_stop(run_id)
        assert store.get(run_id).state == "stopping"
    assert store.get(run_id).state == "failed" and "without a word" in store.get(run_id).error
    append_event(folder, events.Finished(time=2.0, step=4, files=["/x.safetensors"], reason="stopped"))
    assert store.get(run_id).state == "stopped" and store.get(run_id).files == ["/x.safetensors"]
    append_event(folder, events.Failed(time=2.0, error="refused", log_tail=["a", "b"]))
    info = store.get(run_id)
    assert (info.state, info.files, info.error) == ("stopped", ["/x.safetensors"], "refused"), "its files stand"
    cut_after(folder, 3)
    assert [event["event"] for event in store.events(run_id)] == ["step"] and store.get(run_id).state == "failed"
    append_event(folder, events.Failed(time=2.0, error="broke", log_tail=["a", "b"]))
    assert store.get(run_id).state == "failed" and store.get(run_id).error == "broke"


def test_preparation_is_shown(store, run_id):
    assert store.get(run_id).preparing == ""
    append_event(store.folder(run_id), events.Preparing(time=1.0, what="making clips", done=3, total=64))
    assert store.get(run_id).preparing == "making clips, 3 of 64"


def test_events_are_read_from_any_number_and_half_lines_wait(store, run_id):
    folder = store.folder(run_id)
    for step in range(3):
        append_event(folder, events.Step(**{**STEP, "step": step}))
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"event":"st')
    assert [event["step"] for event in store.events(run_id, 1)] == [1, 2]


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("config.json", '{"name": ', "config.json is not JSON"),
        ("config.json", "[]", "holds a list"),
        ("config.json", b"\xff\xfe{", "config.json is not JSON"),
        ("config.json", '{"steps": null}', "NoneType"),
        ("metrics.jsonl", '{"event": "step"}\n', "lacks 'step'"),
        ("metrics.jsonl", "nonsense\n", "line 1 is not JSON"),
        ("metrics.jsonl", '{"step": 1}\n', "line 1 is no event"),
    ],
)
def test_a_broken_folder_is_shown_and_hides_no_other_run(store, run_id, name, content, reason):
    other = store.create(TrainConfig.from_dict(CONFIG))
    (store.folder(run_id) / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    listed = {info.id: info for info in store.list()}
    assert listed[other].state == "created" and listed[run_id].state == "broken"
    assert reason in listed[run_id].error and "repair the file, or delete" in listed[run_id].error
    assert store.get(run_id) == listed[run_id]


def test_a_run_that_never_began_has_failed(store, run_id):
    config = store.folder(run_id) / "config.json"
    long_ago_s = config.stat().st_mtime - 3600
    os.utime(config, (long_ago_s, long_ago_s))
    assert store.get(run_id).state == "failed" and "never began" in store.get(run_id).error


def test_half_a_line_of_a_killed_process_does_not_spoil_the_next_event(store, run_id):
    folder = store.folder(run_id)
    append_event(folder, events.Step(**STEP))
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"event":"st')
    append_event(folder, events.Failed(time=2.0, error="killed"))
    assert [event["event"] for event in store.events(run_id)] == ["step", "failed"]


def test_numbers_that_are_not_finite_are_null(store, run_id):
    append_event(store.folder(run_id), events.Step(**{**STEP, "loss": float("nan")}))
    assert store.events(run_id)[0]["loss"] is None


@pytest.mark.parametrize("name", ["../x", "a/b", "", ".hidden", "x" * 200, "..", "a\\b", None])
def test_ids_do_not_leave_the_folder(store, name):
    with pytest.raises(ValueError, match="is no run id"):
        store.get(name)


def test_folder_in_use_and_unknown_run(store, run_id):
    with pytest.raises(ValueError, match="already in use"):
        store.create(TrainConfig.from_dict(CONFIG), run_id)
    with pytest.raises(ValueError, match="there is no run"):
        store.get("other")


def test_lock_holds_one_owner_and_goes_with_it(store, run_id):
    folder = store.folder(run_id)
    root = process.WORKER.parent.parent
    code = (
        f"import sys, time, pathlib; sys.path.insert(0, {str(root)!r}); from runs import lock\n"
        f"with lock.hold(pathlib.Path({str(folder)!r})):\n print('held', flush=True); time.sleep(60)"
    )
    # The lock itself needs nothing of the pack, so a bare process can take it.
    owner = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert owner.stdout.readline().strip() == "held"
    assert lock.is_held(folder) and lock.owner(folder) == owner.pid
    with pytest.raises(lock.RunInUseError, match=f"in use by process {owner.pid}"), lock.hold(folder):
        pass
    owner.kill()
    owner.wait()
    assert not lock.is_held(folder)


def test_courtesy_ends_with_its_process(tmp_path):
    assert not lease.is_busy(tmp_path)
    lease.mark_busy(tmp_path)
    assert lease.is_busy(tmp_path) and lease.wait_until_free(tmp_path, lambda: True) < 1
    lease.mark_free(tmp_path)
    assert not lease.is_busy(tmp_path)
    gone = subprocess.Popen([sys.executable, "-c", "pass"])
    gone.wait()
    (tmp_path / "busy").write_text(str(gone.pid))
    assert not lease.is_busy(tmp_path)


class TestProcess:
    """The watching of a worker, played by a short script."""

    def _start(self, store, run_id, monkeypatch, tmp_path, script):
        worker = tmp_path / "worker.py"
        worker.write_text(script)
        monkeypatch.setattr(process, "WORKER", worker)
        (tmp_path / "host" / "comfy").mkdir(parents=True)
        return process.start(store.folder(run_id), tmp_path / "host")

    def test_crash_gives_a_failed_event_with_the_log(self, store, run_id, monkeypatch, tmp_path):
        line = '{"event":"started","time":1,"steps":7}'
        script = (
            f"import sys, pathlib\n(pathlib.Path(sys.argv[1]) / 'metrics.jsonl').write_text('{line}' + chr(10))\n"
            "print('first line')\nraise SystemError('broken card')"
        )
        worker = self._start(store, run_id, monkeypatch, tmp_path, script)
        seen = []
        process.watch(store.folder(run_id), worker, seen.append).join(30)
        assert [event["event"] for event in seen] == ["started", "failed"]
        assert "code 1" in seen[1]["error"] and seen[1]["log_tail"][0] == "first line" and "broken card" in seen[1]["log_tail"][-1]
        assert store.get(run_id).state == "failed" and store.events(run_id)[-1]["event"] == "failed"

    def test_what_a_resumed_run_keeps_is_not_told_again_and_what_is_new_is_not_lost(self, store, run_id):
        folder, seen = store.folder(run_id), process._Tail(store.folder(run_id) / "metrics.jsonl", 0)
        for step in (1, 2):
            append_event(folder, events.Step(**{**STEP, "step": step, "time": float(step)}))
        assert [event["step"] for event in seen.new()] == [1, 2]
        cut_after(folder, 1)
        append_event(folder, events.Step(**{**STEP, "step": 2, "time": 5.0}))
        assert [(event["step"], event["time"]) for event in seen.new()] == [(2, 5.0)] and seen.new() == []

    def test_a_listener_that_fails_does_not_end_the_watching(self, store, run_id, monkeypatch, tmp_path):
        worker = self._start(store, run_id, monkeypatch, tmp_path, "pass")

        def listener(event):
            raise KeyError("page is gone")

        process.watch(store.folder(run_id), worker, listener).join(30)
        assert store.get(run_id).state == "failed"

    def test_a_line_that_is_no_event_does_not_end_the_watching(self, store, run_id, monkeypatch, tmp_path):
        line = '{"event":"finished","time":1,"step":7,"files":[],"reason":"completed"}'
        script = f"import sys, pathlib\n(pathlib.Path(sys.argv[1]) / 'metrics.jsonl').write_text('nonsense' + chr(10) + '{line}' + chr(10))"
        worker = self._start(store, run_id, monkeypatch, tmp_path, script)
        seen = []
        process.watch(store.folder(run_id), worker, seen.append).join(30)
        assert [event["event"] for event in seen] == ["finished"]

    def test_a_failure_is_told_although_the_disk_is_full(self, store, run_id, monkeypatch, tmp_path):
        def append(folder, event):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(process, "append_event", append)
        worker = self._start(store, run_id, monkeypatch, tmp_path, "raise SystemExit(1)")
        seen = []
        process.watch(store.folder(run_id), worker, seen.append).join(30)
        assert [event["event"] for event in seen] == ["failed"] and "code 1" in seen[0]["error"]

    @pytest.mark.skipif(os.name == "nt", reason="sessions are POSIX")
    def test_worker_has_a_session_of_its_own_and_stop_ends_a_deaf_one(self, store, run_id, monkeypatch, tmp_path):
        script = "import signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_DFL)\ntime.sleep(60)"
        worker = self._start(store, run_id, monkeypatch, tmp_path, script)
        assert os.getsid(worker.pid) == worker.pid
        process.stop(store.folder(run_id), worker, grace_s=0.2)
        assert worker.returncode == -15 and (store.folder(run_id) / "stop").exists()

    def test_refusals(self, store, run_id, tmp_path):
        with pytest.raises(ValueError, match="not a ComfyUI folder"):
            process.start(store.folder(run_id), tmp_path)
        with pytest.raises(ValueError, match="holds no config.json"):
            process.start(tmp_path, tmp_path)

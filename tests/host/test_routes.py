"""The routes on a real server: what they give, and that no id or path leads out of its folder."""

from __future__ import annotations

import json
import urllib.error
from pathlib import Path

import pytest

from reward_lab.runs.store import cut_after

pytestmark = pytest.mark.host

OUTSIDE = ["..", "../..", "%2e%2e", "..%2f..%2fmanifest.json", "a%2f..%2f..%2fx", "%2fetc%2fpasswd", "x%00", "con:x", ".hidden", "a" * 300, "%5c..%5cx"]


def status(client, path: str, **kwargs) -> int:
    """Return the status of a request."""
    try:
        client.fetch(path, **kwargs)
    except urllib.error.HTTPError as error:
        return error.code
    return 200


@pytest.fixture
def finished_run(server) -> str:
    """A run folder as a worker leaves it."""
    folder = Path(server.base) / "output" / "reward_lab" / "runs" / "finished-run"
    (folder / "samples").mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"name": "finished", "steps": 2, "expert": "low", "reward": {"kind": "hpsv2.1"}}))
    step = {"event": "step", "time": 1.0, "steps": 2, "reward": 0.25, "loss": -0.25, "grad_norm": 1.0, "sigma": 0.5, "seconds": 1.0, "expert": "low"}
    events = [{**step, "step": 1}, {**step, "step": 2}, {"event": "finished", "time": 2.0, "step": 2, "files": [], "reason": "completed"}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    (folder / "log.txt").write_text("first line\nlast line\n")
    (folder / "samples" / "step2.png").write_bytes(b"\x89PNG")
    return folder.name


def test_runs(client, finished_run: str) -> None:
    assert finished_run in [entry["id"] for entry in client.get("/reward_lab/runs")]
    run = client.get(f"/reward_lab/runs/{finished_run}")
    assert (run["state"], run["step"], run["steps"], run["name"]) == ("finished", 2, 2, "finished")
    new = client.get(f"/reward_lab/runs/{finished_run}/events?start=1")
    assert (new["start"], [event["event"] for event in new["events"]]) == (1, ["step", "finished"])
    assert client.fetch(f"/reward_lab/runs/{finished_run}/log").decode().splitlines()[-1] == "last line"
    assert client.fetch(f"/reward_lab/runs/{finished_run}/files/samples/step2.png") == b"\x89PNG"
    assert client.get("/api/reward_lab/runs"), "the host serves every route under /api too"


def test_a_page_hears_that_a_run_goes_on_from_a_checkpoint(server, client, finished_run: str) -> None:
    path = f"/reward_lab/runs/{finished_run}/events"
    first = client.get(f"{path}?start=0&file=")
    assert client.get(f"{path}?start=3&file={first['file']}") == {**first, "start": 3, "events": []}
    folder = Path(server.base) / "output" / "reward_lab" / "runs" / finished_run
    cut_after(folder, 1)
    for start in (3, 1):  # the shorter file is another one also for a reader that had no more than is left
        again = client.get(f"{path}?start={start}&file={first['file']}")
        assert (again["start"], [event["step"] for event in again["events"]]) == (0, [1]) and again["file"] != first["file"]
    assert client.get(f"{path}?start=1&file={again['file']}")["events"] == []


def test_a_broken_run_folder_hides_no_other_run(server, client, finished_run: str) -> None:
    folder = Path(server.base) / "output" / "reward_lab" / "runs" / "broken-run"
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text('{"name": ')
    states = {entry["id"]: entry["state"] for entry in client.get("/reward_lab/runs")}
    assert states[finished_run] == "finished" and states[folder.name] == "broken"
    assert "is not JSON" in client.get(f"/reward_lab/runs/{folder.name}")["error"]


def test_reward_models(client) -> None:
    answer = client.get("/reward_lab/reward_models")
    assert set(answer["kinds"]["mps"]["widgets"]) == {"file", "resize", "antialias", "download", "condition", "threshold", "stability"}
    assert answer["no_file"] == "(none)"


def test_nothing_outside_is_reached(client, finished_run: str) -> None:
    for name in OUTSIDE:
        for path in (
            f"/reward_lab/runs/{name}",
            f"/reward_lab/runs/{name}/events",
            f"/reward_lab/runs/{name}/log",
            f"/reward_lab/runs/{finished_run}/files/{name}",
            f"/reward_lab/runs/{finished_run}/files/samples/{name}",
            f"/reward_lab/sweeps/{name}/manifest.json",
            f"/reward_lab/sweeps/x/{name}",
        ):
            assert status(client, path) in (400, 403, 404), path
    assert status(client, f"/reward_lab/runs/{finished_run}/files/config.json") == 404
    assert status(client, f"/reward_lab/runs/{finished_run}/events?start=-1") == 404
    assert status(client, f"/reward_lab/runs/{finished_run}/events?start=9999999999999999999") == 404
    assert status(client, "/reward_lab/runs/absent/stop", data=b"{}", method="POST") == 404


def test_links_out_of_a_run_are_not_followed(server, client, finished_run: str) -> None:
    link = Path(server.base) / "output" / "reward_lab" / "runs" / finished_run / "samples" / "link.txt"
    if not link.is_symlink():
        link.symlink_to("/etc/hostname")
    assert status(client, f"/reward_lab/runs/{finished_run}/files/samples/link.txt") == 404


def test_loras_are_listed(client) -> None:
    assert isinstance(client.get("/reward_lab/loras"), list)

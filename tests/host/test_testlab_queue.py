"""Sweeps through a real server's queue: cells, resume, extension, failures, and never an endless queue."""

from __future__ import annotations

import csv
import json
import uuid

import pytest

pytestmark = pytest.mark.host


@pytest.fixture
def sweep_name() -> str:
    """A sweep that no other test uses."""
    return f"test-{uuid.uuid4().hex[:8]}"


def workflow(name: str, axes: str) -> dict:
    """A coloured still as the video, so that a cell takes no time."""
    return {
        "1": {"class_type": "EmptyImage", "inputs": {"width": 64, "height": 64, "batch_size": 5, "color": 255}, "_meta": {"title": "Colour"}},
        "2": {"class_type": "RewardLabTestLabCell", "inputs": {"images": ["1", 0], "sweep": name, "prompt": "", "frame_rate": 8.0, "applied": ""}},
        "3": {"class_type": "RewardLabTestLabGrid", "inputs": {"sweep": name, "axes": axes}},
        "4": {"class_type": "PreviewImage", "inputs": {"images": ["3", 0]}},
    }


def run(client, prompt: dict) -> dict:
    """Press Run, wait until the queue is empty, and return the grid's newest ui data."""
    client.run(prompt)
    client.wait_idle()
    outputs = [entry["outputs"]["3"] for entry in client.get("/history").values() if "3" in entry["outputs"]]
    shown = [output for output in outputs if output.get("reward_lab_sweep") and output["reward_lab_sweep"][0]["name"] == prompt["3"]["inputs"]["sweep"]]
    return shown[-1] if shown else {}


def table(client, name: str) -> list[list[str]]:
    """Return cells.csv."""
    return list(csv.reader(client.fetch(f"/reward_lab/sweeps/{name}/cells.csv").decode().splitlines()))


def runs_of_cells(client, name: str) -> int:
    """Count the prompts that a sweep has queued for cells."""
    manifest = json.loads(client.fetch(f"/reward_lab/sweeps/{name}/manifest.json"))
    return sum(entry["attempts"] for entry in manifest["queued"].values())


def test_sweep_resume_and_extension(client, sweep_name: str) -> None:
    shown = run(client, workflow(sweep_name, "Colour.color = 255, 65280\n1.height = 64, 32"))
    assert "4 of 4 cells" in shown["text"][0]
    assert [line[1:3] for line in table(client, sweep_name)[1:]] == [["255", "64"], ["65280", "64"], ["255", "32"], ["65280", "32"]]
    page = client.fetch(f"/reward_lab/sweeps/{sweep_name}/report.html").decode()
    assert page.count("<video") == 4 and "color = 65280" in page
    assert runs_of_cells(client, sweep_name) == 4
    shown = run(client, workflow(sweep_name, "Colour.color = 255, 65280, 16711680\n1.height = 64, 32"))
    assert "6 of 6 cells" in shown["text"][0]
    assert runs_of_cells(client, sweep_name) == 6, "an extended sweep makes only the cells that are missing"
    run(client, workflow(sweep_name, "Colour.color = 255, 65280, 16711680\n1.height = 64, 32"))
    assert runs_of_cells(client, sweep_name) == 6, "a complete sweep makes none"
    assert client.output_file(shown["images"][0])[8:12] == b"WEBP"
    previews = [entry["outputs"]["4"] for entry in client.get("/history").values() if "4" in entry["outputs"] and sweep_name in str(entry["prompt"])]
    assert len(previews) == 3, "output nodes behind the grid run with it"


def test_failing_cells_are_reported_and_not_queued_for_ever(client, sweep_name: str) -> None:
    prompt = workflow(sweep_name, 'Prompts.text = "", a, a b')
    prompt["5"] = {"class_type": "RewardLabPrompts", "inputs": {"text": "x", "file": ""}, "_meta": {"title": "Prompts"}}
    prompt["1"]["inputs"]["batch_size"] = ["5", 1]
    shown = run(client, prompt)
    assert "2 of 3 cells" in shown["text"][0] and "1 failed" in shown["text"][0] and "There are no prompts" in shown["text"][0]
    assert "There are no prompts" in table(client, sweep_name)[1][-1]
    assert runs_of_cells(client, sweep_name) == 3
    run(client, prompt)
    assert runs_of_cells(client, sweep_name) == 4, "pressing Run again tries the failed cell once more"


def test_a_sweep_that_fails_altogether_is_an_error(client, sweep_name: str) -> None:
    prompt = workflow(sweep_name, "1.height = 64, 32")
    prompt["5"] = {"class_type": "RewardLabPrompts", "inputs": {"text": "", "file": ""}}
    prompt["1"]["inputs"]["batch_size"] = ["5", 1]
    client.run(prompt)
    client.wait_idle()
    last = [entry for entry in client.get("/history").values() if entry["prompt"][2].get("3", {}).get("inputs", {}).get("sweep") == sweep_name][-1]
    messages = [content["exception_message"] for kind, content in last["status"]["messages"] if kind == "execution_error"]
    assert "All 2 cells" in messages[0] and "There are no prompts" in messages[0]
    assert runs_of_cells(client, sweep_name) == 2


def test_running_the_workflow_does_not_make_a_video_too_many(client, sweep_name: str) -> None:
    outputs = client.run(workflow(sweep_name, "Colour.color = 1, 2"))
    client.wait_idle()
    assert outputs["2"]["text"] == ["Recorded by TestLab Grid, cell by cell."]
    assert "4" not in outputs, "nothing behind an unfinished grid runs"


def test_cell_without_grid_passes_frames_on(client, sweep_name: str) -> None:
    prompt = workflow(sweep_name, "")
    del prompt["3"]
    prompt["4"]["inputs"]["images"] = ["2", 0]
    outputs = client.run(prompt)
    assert len(outputs["4"]["images"]) == 5 and "pass through" in outputs["2"]["text"][0]


@pytest.mark.parametrize(("axes", "message"), [("", "no axes"), ("Colour.size = 1", "has no widget"), ("1.width = 0, 64", "Value 0 smaller than min")])
def test_bad_axes_queue_nothing(client, sweep_name: str, axes: str, message: str) -> None:
    with pytest.raises(Exception, match=message):
        client.run(workflow(sweep_name, axes))
    client.wait_idle()
    with pytest.raises(Exception, match="404"):
        client.fetch(f"/reward_lab/sweeps/{sweep_name}/manifest.json")

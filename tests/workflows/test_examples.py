"""The shipped example workflows, run as they are through the real server's API, and the 14B ones checked against its nodes."""

from __future__ import annotations

import json
import time

import pytest

from reward_lab.labtools.workflow import to_prompt

pytestmark = [pytest.mark.host, pytest.mark.workflow]

POCKET = ("1 load and sample", "2 testlab strengths", "3 train a reward lora")


@pytest.fixture(scope="module")
def object_info(pocket_server) -> dict:
    return pocket_server.client().get("/object_info", limit_s=120)


@pytest.fixture
def prompt_of(repo, object_info):
    def read(name: str) -> dict:
        return to_prompt(json.loads((repo / "example_workflows" / f"{name}.json").read_text(encoding="utf-8")), object_info)

    return read


def outputs_of(prompt: dict, outputs: dict, kind: str) -> dict:
    return next(outputs[key] for key, node in prompt.items() if node["class_type"] == kind)


def test_load_and_sample(pocket_server, prompt_of) -> None:
    prompt = prompt_of(POCKET[0])
    outputs = pocket_server.client().run(prompt, limit_s=300)
    rows = outputs_of(prompt, outputs, "RewardLabLoadLoRAs")["reward_lab_rows"]
    assert rows and all((row["applied_high"] or 0) + (row["applied_low"] or 0) > 0 for row in rows)
    assert outputs_of(prompt, outputs, "RewardLabScoreVideo")["text"]


def test_sweep_of_strengths(pocket_server, prompt_of) -> None:
    prompt = prompt_of(POCKET[1])
    client = pocket_server.client()
    client.run(prompt, limit_s=300)
    client.wait_idle(limit_s=400)
    name = next(node["inputs"]["sweep"] for node in prompt.values() if node["class_type"] == "RewardLabTestLabGrid")
    folder = pocket_server.base / "output" / "reward_lab" / "sweeps" / name
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    assert len(manifest["cells"]) >= 4
    for file in ("grid.png", "grid.mp4", "report.html", "cells.csv"):
        assert (folder / file).stat().st_size > 0, file


def test_training_leaves_the_queue_free_and_ends_with_a_lora(pocket_server, prompt_of) -> None:
    prompt = prompt_of(POCKET[2])
    client = pocket_server.client()
    for key, node in list(prompt.items()):
        if node["class_type"] == "RewardLabTrainLoRA":
            node["inputs"].update(steps=6, name="from_the_example")
        elif node["class_type"] in ("RewardLabRunResult", "PreviewImage", "SaveLoRA"):
            del prompt[key]
    client.run(prompt, limit_s=120)
    run_id = client.get("/reward_lab/runs")[0]["id"]
    assert client.get(f"/reward_lab/runs/{run_id}")["state"] in ("created", "running")
    client.run(prompt_of(POCKET[0]), limit_s=300)  # the queue answers while the run goes on
    deadline = time.monotonic() + 240
    while (info := client.get(f"/reward_lab/runs/{run_id}"))["state"] in ("created", "running", "stopping"):
        assert time.monotonic() < deadline, info
        time.sleep(0.5)
    assert info["state"] == "finished", info
    assert any(file.endswith(".safetensors") for file in info["files"])


@pytest.mark.parametrize("name", POCKET)
def test_the_14b_variant_has_the_same_nodes_and_a_picture(repo, object_info, prompt_of, name) -> None:
    folder = repo / "example_workflows"
    for stem in (name, f"{name} (Wan2.2 14B)"):
        assert (folder / f"{stem}.jpg").stat().st_size > 0, stem
    graph = json.loads((folder / f"{name} (Wan2.2 14B).json").read_text(encoding="utf-8"))
    prompt = to_prompt(graph, object_info)
    models = next(node["inputs"] for node in prompt.values() if node["class_type"] == "RewardLabWanModels")
    assert "high_noise_14B" in models["high_noise_model"] and "low_noise_14B" in models["low_noise_model"]
    pocket = prompt_of(name)
    assert {node["class_type"] for node in prompt.values()} >= {node["class_type"] for node in pocket.values() if node["class_type"].startswith("RewardLab")}

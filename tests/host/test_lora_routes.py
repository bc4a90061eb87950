"""The routes about LoRA files, and the Inspect LoRA node, on a real server."""

from __future__ import annotations

import json
import shutil
import urllib.error
from pathlib import Path

import pytest

pytestmark = pytest.mark.host

NAME = "Wan2.2-Fun-A14B-InP-high-noise-HPS2.1.safetensors"


@pytest.fixture
def lora(server, shared_fixtures: Path) -> str:
    """A LoRA among the server's files, in a folder of its own."""
    folder = Path(server.base) / "models" / "loras" / "routes"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    shutil.copy(shared_fixtures / "videoxfun_lora" / NAME, folder / "x-high-noise.safetensors")
    return "routes/x-high-noise.safetensors"


def refusal(client, path: str, **kwargs) -> str:
    """Return the error text of a refused request."""
    with pytest.raises(urllib.error.HTTPError) as caught:
        client.post(path, **kwargs) if kwargs else client.get(path)
    return json.loads(caught.value.read())["error"]


def test_report_layouts_and_conversion(client, lora: str) -> None:
    report = client.get(f"/reward_lab/lora_report?file={lora}")
    assert (report["verdict"], report["modules_applied"], report["layout"]) == ("ok", 30, "videox-fun") and "rank 8" in report["text"]
    names = [layout["name"] for layout in client.get("/reward_lab/lora_layouts")]
    assert names[0] == "videox-fun" and "diffusers" in names
    done = client.post("/reward_lab/loras/convert", content={"file": lora, "layout": "diffusers"})
    assert (done["file"], done["keys"], done["source_layout"]) == ("routes/x-high-noise.diffusers.safetensors", 60, "videox-fun")
    assert client.get(f"/reward_lab/lora_report?file={done['file']}")["layout"] == "diffusers"
    assert "is there already" in refusal(client, "/reward_lab/loras/convert", content={"file": lora, "layout": "diffusers"})


def test_only_listed_files_and_known_names(client, lora: str) -> None:
    assert "not among the loras files" in refusal(client, "/reward_lab/lora_report?file=..%2F..%2Fmain.py")
    assert "not among the loras files" in refusal(client, "/reward_lab/loras/convert", content={"file": "../x.safetensors", "layout": "peft"})
    assert "There is no layout" in refusal(client, "/reward_lab/loras/convert", content={"file": lora, "layout": "../x"})
    assert "no official reward LoRA" in refusal(client, "/reward_lab/official_loras/download", content={"name": "http://example.com/x"})
    assert "must be a JSON object" in refusal(client, "/reward_lab/official_loras/download", content=["x"])


def test_official_files_are_told_apart_from_installed_ones(client, server, shared_fixtures: Path) -> None:
    states = {entry["name"]: entry for entry in client.get("/reward_lab/official_loras")}
    assert len(states) == 4 and {entry["strength"] for entry in states.values()} == {0.5}
    assert all("not tuned" in entry["strength_note"] and entry["sha256"] is None for entry in states.values())
    assert states[NAME]["state"] == "absent"
    target = Path(server.base) / "models" / "loras" / NAME
    shutil.copy(shared_fixtures / "videoxfun_lora" / NAME, target)
    try:
        states = {entry["name"]: entry for entry in client.get("/reward_lab/official_loras")}
        assert (states[NAME]["state"], states[NAME]["file"]) == ("present", NAME)
    finally:
        target.unlink()


def test_inspect_node(client, lora: str) -> None:
    prompt = {
        "1": {"class_type": "RewardLabInspectLoRA", "inputs": {"lora": lora, "compare_with": "none"}},
    }
    outputs = client.run(prompt)
    assert "layers: 30 of 30 applied" in outputs["1"]["text"][0] and outputs["1"]["images"]

"""The way from videos to a PAVRM in the real server: Video Dataset, labels, Train PAVRM, Run Result, Score Latent's loader; and a sweep's votes as pairs."""

from __future__ import annotations

import json

import pytest

from reward_lab.lora_train import annotations
from reward_lab.testlab import cells, votes
from reward_lab.tests.browser import label_scene

pytestmark = [pytest.mark.host, pytest.mark.workflow]
MODELS = {
    "high_noise_model": "pocket_wan2.2_t2v_high_noise_14B.safetensors", "low_noise_model": "pocket_wan2.2_t2v_low_noise_14B.safetensors",
    "text_encoder": "pocket_umt5.safetensors", "vae": "pocket_wan_2.1_vae.safetensors", "weight_dtype": "default",
}  # fmt: skip
CLIP = {"frame_rate": 8.0, "frames": 17, "short_px": 64, "long_px": 64, "width_px": 64, "height_px": 64, "dtype": "bf16"}


def graph(folder: str, dataset: str, **training) -> dict:
    """API prompt; with `training` the PAVRM is trained too."""
    nodes = {
        "1": {"class_type": "RewardLabWanModels", "inputs": MODELS},
        "2": {"class_type": "RewardLabDataset", "inputs": {"wan_files": ["1", 4], "name": dataset, "folder": folder, "prompt": "", "prompts_file": "", **CLIP}},
    }
    if not training:
        return nodes
    settings = {
        "wan_files": ["1", 4], "dataset": ["2", 0], "trunk": "low noise expert", "pavrm_file": "none", "quality": "motion_quality", "loss": "ce", "votes": "",
        "noise": "uniform", "blocks": 2, "pooling": "query", "steps": 3, "batch": 2, "block_lr": 1e-4, "head_lr": 1e-3, "seed": 0,
        "advanced": '{"validate_every": 3, "data": {"validation_share": 0.3}}',
    }  # fmt: skip
    nodes["3"] = {"class_type": "RewardLabTrainPAVRM", "inputs": {**settings, **training}}
    nodes["4"] = {"class_type": "RewardLabRunResult", "inputs": {"run": ["3", 0], "wait": True}}
    nodes["5"] = {"class_type": "PreviewAny", "inputs": {"source": ["4", 3]}}
    return nodes


def test_from_videos_to_a_pavrm(pocket_server):
    client, base = pocket_server.client(), pocket_server.base
    folder = base / "input" / "clips"
    folder.mkdir(parents=True)
    for number in range(8):
        frames, caption = label_scene.clip(number)
        cells.write_video(folder / f"{number}.mp4", iter(frames), 8)
        (folder / f"{number}.txt").write_text(caption)
    (folder / "broken.mp4").write_bytes(b"broken")
    report = "\n".join(client.run(graph("clips", "clips"), limit_s=300)["2"]["text"])
    assert "8 videos" in report and "(8 encoded now" in report and "skipped" in report and "0 of 8 videos are labelled" in report
    source = "/reward_lab/label/dataset/clips"
    for number, item in enumerate(client.get(source)["items"]):
        client.post(source, {"id": item["id"], "quality": "motion_quality", "label": "good" if number % 2 else "bad"})
    assert len(annotations.read(base / "output" / "reward_lab" / "datasets" / "clips" / annotations.FILE_NAME)) == 8
    outputs = client.run(graph("clips", "clips", name="from_labels"), limit_s=600)
    assert "8 encoded now" not in "\n".join(outputs["2"]["text"]) and "4 good, 4 bad" in "\n".join(outputs["3"]["text"])
    assert "from_labels.safetensors" in "\n".join(outputs["4"]["text"])
    assert (base / "output" / "reward_models" / "from_labels.safetensors").is_file()
    files = client.get("/object_info/RewardLabRewardModel")["RewardLabRewardModel"]["input"]["required"]["file"][1]["options"]
    assert "from_labels.safetensors" in files
    # The pocket's captions of two things are longer than its text length; that is said, once.
    run = next(entry for entry in client.get("/reward_lab/runs") if entry["name"] == "from_labels")
    assert run["state"] == "finished" and run["samples"] and client.fetch(f"/reward_lab/runs/{run['id']}/files/{run['samples'][0]}")[:4] == b"\x89PNG"
    assert client.fetch(f"/reward_lab/runs/{run['id']}/log").decode().count("the end of such captions is cut off") == 1


def test_from_votes_to_a_pavrm(pocket_server):
    client, base = pocket_server.client(), pocket_server.base
    swept = base / "output" / "reward_lab" / "sweeps" / "voted"
    keys = [f"{number:08x}" for number in range(4)]
    for number, key in enumerate(keys):
        frames, caption = label_scene.clip(0)
        applied = [{"label": "rows[0].high", "widget": "high", "value": number}]
        cells.record(swept, key, frames // (number + 1), applied=applied, prompt=caption, frame_rate=8.0, scores={})
    for left in range(4):
        for right in range(left):
            client.post("/reward_lab/vote/voted", {"left": keys[left], "right": keys[right], "result": "right"})
    ranking = client.get("/reward_lab/vote/voted/ranking")["standings"]
    assert [row["name"] for row in ranking] == ["0", "1", "2", "3"] and all(row["low"] < row["strength"] < row["high"] for row in ranking)
    assert len(votes.read(swept / votes.FILE_NAME).rows) == 6
    advanced = json.dumps({"data": {"validation_share": 0.0}, "validate_every": 0})
    outputs = client.run(graph("sweep:voted", "voted", name="from_votes", loss="bt", votes="voted", advanced=advanced), limit_s=600)
    assert "6 pairs to train on" in "\n".join(outputs["3"]["text"])
    assert (base / "output" / "reward_models" / "from_votes.safetensors").is_file()

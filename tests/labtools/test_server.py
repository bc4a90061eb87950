"""Starting the real server, and the base directory it works in."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from reward_lab.labtools import base as base_module
from reward_lab.labtools import comfy_server
from reward_lab.labtools.cache import file_hash
from reward_lab.labtools.client import PromptFailed
from reward_lab.labtools.errors import LabError


def make_repo(folder: Path, *, content: bytes = b"weights") -> Path:
    (folder / "pocket" / "weights").mkdir(parents=True)
    weights = folder / "pocket" / "weights" / "pocket_vae.safetensors"
    weights.write_bytes(content)
    entry = {"name": weights.name, "folder": "vae", "bytes": len(content), "sha256": file_hash(weights)}
    (folder / "pocket" / "MANIFEST.json").write_text(json.dumps({"files": [entry]}), encoding="utf-8")
    return folder


@pytest.mark.parametrize("links", ["symbolic", "hard", "none"])
def test_base_shows_pack_and_models_with_and_without_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: str) -> None:
    def refuse(*arguments, **options):
        raise OSError("links are not allowed here")

    if links != "symbolic":
        monkeypatch.setattr(Path, "symlink_to", refuse)
    if links == "none":
        monkeypatch.setattr(base_module.os, "link", refuse)
    repo = make_repo(tmp_path / "a-repo")
    for _ in range(2):
        base = base_module.make_base(tmp_path / "base", repo)
        assert (base / "models" / "vae" / "pocket_vae.safetensors").read_bytes() == b"weights"
        assert (base / "custom_nodes" / "reward_lab" / "pocket" / "MANIFEST.json").is_file()
    assert (repo / "pocket" / "MANIFEST.json").is_file(), "refreshing must not remove what a link points to"


@pytest.mark.parametrize(("damage", "message"), [("size", "damaged"), ("bytes", "damaged"), ("missing", "missing"), ("manifest", "has no pocket models")])
def test_damaged_pocket_models_are_told(tmp_path: Path, damage: str, message: str) -> None:
    repo = make_repo(tmp_path / "repo")
    weights = repo / "pocket" / "weights" / "pocket_vae.safetensors"
    if damage == "missing":
        weights.unlink()
    elif damage == "manifest":
        (repo / "pocket" / "MANIFEST.json").unlink()
    else:
        weights.write_bytes(b"short" if damage == "size" else b"WEIGHTS")
    with pytest.raises(LabError, match=message):
        base_module.make_base(tmp_path / "base", repo)


def test_a_server_that_ends_while_starting_shows_its_last_lines(tmp_path: Path) -> None:
    comfyui = tmp_path / "ComfyUI"
    comfyui.mkdir()
    (comfyui / "main.py").write_text("raise SystemExit('no such device')\n", encoding="utf-8")
    (tmp_path / "base").mkdir()
    with pytest.raises(LabError, match=r"exit status 1(.|\n)*no such device"):
        comfy_server.start_server(Path(sys.executable), comfyui, tmp_path / "base")


def test_a_server_that_never_answers_is_stopped(tmp_path: Path) -> None:
    comfyui = tmp_path / "ComfyUI"
    comfyui.mkdir()
    (comfyui / "main.py").write_text("import time; print('thinking', flush=True); time.sleep(600)\n", encoding="utf-8")
    (tmp_path / "base").mkdir()
    with pytest.raises(LabError, match=r"did not answer within 1 s(.|\n)*thinking"):
        comfy_server.start_server(Path(sys.executable), comfyui, tmp_path / "base", limit_s=1)


@pytest.mark.host
def test_client_tells_refused_and_failed_prompts(client) -> None:
    with pytest.raises(PromptFailed, match="refused"):
        client.run({"1": {"class_type": "NoSuchNode", "inputs": {}}})
    image = {"class_type": "EmptyImage", "inputs": {"width": 16, "height": 16, "batch_size": 1, "color": 255}}
    outputs = client.run({"1": image, "2": {"class_type": "PreviewImage", "inputs": {"images": ["1", 0]}}})
    picture = client.output_file(outputs["2"]["images"][0])
    assert picture.startswith(b"\x89PNG")
    client.wait_idle(limit_s=5)
    crop = {"class_type": "LatentUpscale", "inputs": {"samples": ["1", 0], "upscale_method": "area", "width": 16, "height": 16, "crop": "disabled"}}
    with pytest.raises(PromptFailed):
        client.run({"1": image, "2": crop, "3": {"class_type": "SaveLatent", "inputs": {"samples": ["2", 0], "filename_prefix": "x"}}})

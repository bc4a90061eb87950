"""Training configs on the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from reward_lab.labtools.configs import read_config
from reward_lab.labtools.errors import LabError


def write(path: Path, content: object) -> Path:
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(content).replace("\n", "\r\n").encode())
    return path


def test_relative_names_are_looked_up_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repo, beside, current = tmp_path / "repo", tmp_path / "beside", tmp_path / "current"
    for path in (repo / "pocket" / "weights" / "vae.safetensors", beside / "high.safetensors", current / "low.safetensors", current / "high.safetensors"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    monkeypatch.chdir(current)
    config = write(
        beside / "config.json", {"models": {"high": "high.safetensors", "low": "low.safetensors", "vae": "vae.safetensors"}, "reward": {"path": "/a/b.pt"}}
    )
    values = read_config(config, repo)
    assert values["models"] == {
        "high": str(beside / "high.safetensors"),
        "low": str(current / "low.safetensors"),
        "vae": str(repo / "pocket" / "weights" / "vae.safetensors"),
    }
    assert values["reward"] == {"path": "/a/b.pt"}


def test_every_path_of_a_config_is_looked_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "current").mkdir()
    monkeypatch.chdir(tmp_path / "current")
    for name in ("ds", "mps.pth", "pavrm.st", "wan.st", "a.png", "b.png", "c.png", "sizes.json"):
        (tmp_path / name).touch()
    reward = {"kind": "hps", "path": "mps.pth", "options": {"config": "sizes.json"}}
    values = {
        "reward": {"kind": "mix", "options": {"rows": [{"reward": {"kind": "pavrm", "path": "pavrm.st", "options": {"generator": "wan.st", "config": "{}"}}}]}},
        "real": {"path": "ds"},
        "held_out": {"judge": reward, "prompts": [{"text": "x", "image": "b.png"}, "plain"]},
        "one_pass": {"pavrm": {"kind": "pavrm", "path": "pavrm.st"}},
        "prompts": [{"text": "mps.pth", "image": "a.png"}],
        "sample_prompts": [{"text": "y", "image": "c.png"}],
        "output_folder": "loras",
    }
    found = read_config(write(tmp_path / "config.json", values), tmp_path / "repo")
    (row,) = found["reward"]["options"]["rows"]
    assert row["reward"] == {"kind": "pavrm", "path": str(tmp_path / "pavrm.st"), "options": {"generator": str(tmp_path / "wan.st"), "config": "{}"}}
    assert found["real"]["path"] == str(tmp_path / "ds") and found["one_pass"]["pavrm"]["path"] == str(tmp_path / "pavrm.st")
    assert found["held_out"]["judge"] == {"kind": "hps", "path": str(tmp_path / "mps.pth"), "options": {"config": str(tmp_path / "sizes.json")}}
    assert found["held_out"]["prompts"] == [{"text": "x", "image": str(tmp_path / "b.png")}, "plain"]
    assert found["prompts"] == [{"text": "mps.pth", "image": str(tmp_path / "a.png")}] and found["sample_prompts"][0]["image"] == str(tmp_path / "c.png")
    assert found["output_folder"] == str(tmp_path / "current" / "loras"), "what is written lies where the command was given"
    values["held_out"]["judge"]["path"] = "absent.pth"
    with pytest.raises(LabError, match=r"held_out\.judge\.path is 'absent\.pth', and no such file"):
        read_config(write(tmp_path / "config.json", values), tmp_path / "repo")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[1]", "holds a list"),
        ("{", "is not JSON"),
        ('{"models": {"high": "no.safetensors"}}', r"models\.high is 'no\.safetensors', and no such file"),
        (None, "cannot be read"),
    ],
)
def test_faults_are_told(tmp_path: Path, content: str | None, message: str) -> None:
    path = tmp_path / "config.json"
    if content is not None:
        path.write_text(content, encoding="utf-8")
    with pytest.raises(LabError, match=message):
        read_config(path)


def test_wrong_types_are_left_to_the_reader_of_the_settings(tmp_path: Path) -> None:
    assert read_config(write(tmp_path / "config.json", {"models": 3, "reward": {"path": 4}})) == {"models": 3, "reward": {"path": 4}}

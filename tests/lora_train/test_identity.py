"""When a run may be resumed: its files may lie elsewhere, they may not be others, and what is another is named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from reward_lab.lora_train import checkpoint, identity
from reward_lab.lora_train.pavrm_config import PavrmConfig


def files(folder: Path) -> dict:
    """Model files of a folder."""
    return {"models": {name: str(folder / f"{name}.safetensors") for name in ("high", "low", "text_encoder", "vae")}}


@pytest.fixture
def trained(toy, tmp_path):
    """Folder with a state of a run that was trained on files in `models`, and its settings."""
    (tmp_path / "models").mkdir()
    for path in files(tmp_path / "models")["models"].values():
        Path(path).write_bytes(b"weights")
    config = toy.config(steps=2, **files(tmp_path / "models"), prompts=["a", {"text": "b", "image": str(tmp_path / "models" / "b.png")}])
    checkpoint.save_state(tmp_path / "run", config, [], checkpoint.Progress(step=2))
    return tmp_path / "run", config


def changed(toy, config, **changes):
    return toy.config(**{**config.to_dict(), **changes})


def test_moved_files_are_resumed_and_others_of_their_names_are_not(toy, trained, tmp_path):
    folder, config = trained
    shutil.copytree(tmp_path / "models", tmp_path / "elsewhere")
    moved = changed(toy, config, **files(tmp_path / "elsewhere"), prompts=["a", {"text": "b", "image": str(tmp_path / "elsewhere" / "b.png")}])
    assert moved.digest() == config.digest() and checkpoint.load_latest(folder, moved, []).step == 2
    (tmp_path / "elsewhere" / "high.safetensors").write_bytes(b"other weights")
    with pytest.raises(ValueError, match="the file of models.high had 7 bytes and has 13. Set them back"):
        checkpoint.check_settings(folder, moved)
    renamed = changed(toy, config, models={**config.to_dict()["models"], "vae": str(tmp_path / "elsewhere" / "other.safetensors")})
    with pytest.raises(ValueError, match='models.vae was "vae.safetensors" and is "other.safetensors"'):
        checkpoint.check_settings(folder, renamed)


def test_what_is_another_is_named_with_both_values(toy, trained):
    folder, config = trained
    others = changed(toy, config, name="mine", optimiser={"lr": 0.5}, lora={"skip": []})
    with pytest.raises(ValueError, match="with other settings") as refusal:
        checkpoint.check_settings(folder, others)
    for told in ('name was "toy" and is "mine"', "optimiser.lr was 0.01 and is 0.5", 'lora.skip was ["ffn"] and is []', "config.json, or start a new run"):
        assert told in str(refusal.value)
    with pytest.raises(ValueError, match="prompts had 2 entries and has 1"):
        checkpoint.check_settings(folder, changed(toy, config, prompts=["a"]))
    many = {"seed": 9, "batch": 1, "dtype": "fp32", "save_dtype": "bf16", "name": "m", "lora": {"rank": 2}, "expert": "both"}
    with pytest.raises(ValueError, match="; and 2 more. Set them back"):
        checkpoint.check_settings(folder, changed(toy, config, **many))
    checkpoint.check_settings(folder, changed(toy, config, steps=9, sample_every=1, engine={"slots": 2}))


def test_settings_that_came_later_count_as_left_alone(toy, trained):
    folder, config = trained
    path = checkpoint.states(folder)[-1]
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    settings = json.loads(metadata["settings"])
    del settings["optimiser"]["schedule"], settings["save_dtype"], settings["guards"]
    save_file(load_file(path), path, metadata={**metadata, "settings": json.dumps(settings)})
    with pytest.raises(ValueError, match='save_dtype was "bf16" and is "fp32"'):
        checkpoint.check_settings(folder, config)
    checkpoint.check_settings(folder, changed(toy, config, save_dtype="bf16"))


def test_a_state_without_settings_goes_by_its_hash_over_whole_paths(toy, trained, tmp_path):
    folder, config = trained
    path = checkpoint.states(folder)[-1]
    with safe_open(path, framework="pt") as file:
        progress = file.metadata()["progress"]
    save_file(load_file(path), path, metadata={"progress": progress, "digest": identity.digest(config.deciding())})
    assert checkpoint.load_latest(folder, config, []).step == 2
    for other in (changed(toy, config, seed=1), changed(toy, config, **files(tmp_path / "elsewhere"))):
        with pytest.raises(ValueError, match="an older version wrote it, which kept a hash of them alone"):
            checkpoint.check_settings(folder, other)


def test_a_pavrm_run_counts_its_files_by_name_and_not_the_size_of_its_labels(tmp_path):
    labels = tmp_path / "labels.jsonl"
    labels.write_text("{}\n")
    values = {"models": {"trunk": str(tmp_path / "trunk")}, "data": {"source": str(tmp_path / "data"), "annotations": str(labels)}}
    config = PavrmConfig.from_dict(values)
    moved = json.loads(json.dumps(values).replace(str(tmp_path), "/elsewhere"))
    assert PavrmConfig.from_dict(moved).digest() == config.digest() and identity.file_bytes(config.deciding()) == {}
    assert identity.portable(config.deciding())["data"]["annotations"] == "labels.jsonl" and config.deciding()["data"]["annotations"] == str(labels)


def test_only_paths_are_cut():
    options = {"config": '{"a": "b/c"}', "clip": "/m/clip.pt", "resize": "crop"}
    rows = {"rows": [{"name": "a/b", "reward": {"kind": "mps", "path": "/m/mps.pt", "options": {"clip": "/m/c.pt"}}}]}
    values = {"prompts": [{"text": "/a/b"}], "reward": {"path": "", "options": options}, "mix": rows, "steps": 3}
    assert identity.portable(values) == {
        "prompts": [{"text": "/a/b"}],
        "reward": {"path": "", "options": {**options, "clip": "clip.pt"}},
        "mix": {"rows": [{"name": "a/b", "reward": {"kind": "mps", "path": "mps.pt", "options": {"clip": "c.pt"}}}]},
        "steps": 3,
    }

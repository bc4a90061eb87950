"""What a PAVRM run makes of its data: videos of another kind are refused before training, data that are others when it goes on are told."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("torch")
pytest.importorskip("comfy.ldm.wan.model", reason="needs ComfyUI on the path")

import numpy as np  # noqa: E402
import torch  # noqa: E402

from reward_lab.host import pavrm_training, pavrm_worker  # noqa: E402
from reward_lab.host.training_mode import training_mode  # noqa: E402

from .test_pavrm_training import CPU, _pocket, pocket_data  # noqa: E402, F401

pytestmark = pytest.mark.host


def _save(name, shape):
    return lambda folder: np.save(folder / name, np.zeros(shape, np.float32))


def _with_long_caption_only(folder):
    path = folder / "video09_meta_v1.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "textshort_path": "", "textlong_path": "video09_text.npy"}))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_save("video09_text.npy", (1, 5, 64)), r"The text has shape \(5, 64\); this PAVRM reads .* of width 128"),
        (_save("video09.npy", (1, 48, 2, 4, 4)), "48"),
        (_with_long_caption_only, "a video has the captions long, but data.caption asks for 'short'"),
    ],
)
def test_one_video_of_another_kind_is_refused_before_training(repo, pocket_data, change, words):  # noqa: F811
    config = _pocket(repo, pocket_data)
    model = pavrm_training.load(config, device=CPU, autocast=torch.float32)
    with training_mode():
        pavrm_worker.check_fit(config, model, pavrm_worker.learnable_of(config))
        change(pocket_data.parent)
        with pytest.raises(ValueError, match=f"video09, and 0 like it of 16 videos: .*{words}"):
            pavrm_worker.check_fit(config, model, pavrm_worker.learnable_of(config))


def _relabel(pocket_data, change):  # noqa: F811
    for path in sorted(pocket_data.parent.glob("*_meta_v1.json")):
        path.write_text(json.dumps(change(json.loads(path.read_text()))))


def test_labels_that_changed_between_start_and_resume_are_told(repo, pocket_data, tmp_path, monkeypatch, caplog):  # noqa: F811
    """The page invites to label while a run trains; the run goes on, and says what is different, at every later start too."""
    config = _pocket(repo, pocket_data, steps=1, validate_every=0, save_upstream=False, data={"validation_share": 0.0})
    events, folder = [], tmp_path / "run"
    folder.mkdir()
    monkeypatch.setattr("reward_lab.runs.store.append_event", lambda _, event: events.append(event))

    def go_on():
        pavrm_worker.train(config, folder, lambda: False, bool(events), CPU, torch.float32)
        return next(event for event in reversed(events) if event.name == "started").data_changed

    assert go_on() == "" and go_on() == ""
    _relabel(pocket_data, lambda meta: {**meta, "motion_quality": 1 - meta["motion_quality"] if meta["source_id"] == "video04" else meta["motion_quality"]})
    pocket_data.write_text("\n".join(pocket_data.read_text().splitlines()[1:]))
    told = go_on()
    assert told.endswith("uninterrupted one would: 1 gone (video00); 1 changed (video04: label good -> bad)") and told in caplog.text
    assert go_on() == told


def test_facts_tell_sides_and_pairs(repo, pocket_data, tmp_path):  # noqa: F811
    pairs = tmp_path / "pairs.jsonl"
    rows = [("video00", "video01", 1.0), ("video00", "video01", 0.5), ("video02", "video03", 0.75)]
    pairs.write_text("".join(json.dumps({"winner": winner, "loser": loser, "share": share}) + "\n" for winner, loser, share in rows))
    config = _pocket(repo, pocket_data, loss="bt", data={"pairs": str(pairs), "validation_share": 0.0})
    facts = pavrm_worker.learnable_of(config).facts()
    assert facts == {"video00 over video01": {"shares": [1.0, 0.5]}, "video02 over video03": {"shares": [0.75]}}
    labels = pavrm_worker.learnable_of(_pocket(repo, pocket_data)).facts()
    assert len(labels) == 16 and {name.split()[0] for name in labels if " " in name} == {"held-out"}
    assert labels.get("video00", labels.get("held-out video00")) == {"label": "good", "latent": [16, 2, 4, 4], "caption": "a thing"}


def test_validation_on_what_is_learned_is_refused_and_shared_ids_are_told(repo, pocket_data):  # noqa: F811
    folder = pocket_data.parent
    with pytest.raises(ValueError, match="data.validation is data.source, .*: validation_share holds videos out"):
        pavrm_worker.learnable_of(_pocket(repo, pocket_data, data={"validation": str(folder / "." / pocket_data.name)}))
    (folder / "some.list").write_text("video03_meta_v1.json\nvideo04_meta_v1.json")
    notes = pavrm_worker.learnable_of(_pocket(repo, pocket_data, data={"validation": str(folder / "some.list")})).notes
    assert any("2 of 2 videos of data.validation have ids of data.source (video03, video04)" in note for note in notes)

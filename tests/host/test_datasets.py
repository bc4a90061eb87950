"""Datasets as PAVRM training takes them in: a second list of losers, and files that are broken, with random small latents and no models."""

from __future__ import annotations

import json
import os
from types import SimpleNamespace

import pytest

pytest.importorskip("torch")
pytest.importorskip("comfy.sd", reason="needs ComfyUI on the path")

import numpy as np  # noqa: E402
import torch  # noqa: E402

from reward_lab.host import datasets, pavrm_worker, preprocess, worker  # noqa: E402
from reward_lab.lora_train import safetensors_file  # noqa: E402
from reward_lab.lora_train.objectives.pavrm import PavrmObjective  # noqa: E402
from reward_lab.lora_train.pavrm_config import PavrmConfig  # noqa: E402
from reward_lab.lora_train.pavrm_data import Draws  # noqa: E402
from reward_lab.lora_train.pavrm_validation import validate  # noqa: E402

pytestmark = pytest.mark.host


def metas(folder, names, value=0.0, **labels):
    """HY-Video-PRFL's files for videos whose latents are `value` throughout; returns the list file."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        np.save(folder / f"{name}.npy", np.full((1, 16, 2, 4, 4), value, np.float32))
        np.save(folder / f"{name}_text.npy", np.zeros((1, 3, 8), np.float32))
        meta = {"source_id": name, "vae_latent_path": f"{name}.npy", "textshort_path": f"{name}_text.npy", "short_caption": "a thing", **labels}
        (folder / f"{name}_meta_v1.json").write_text(json.dumps(meta))
    (folder / "all.list").write_text("".join(f"{name}_meta_v1.json\n" for name in names))
    return folder / "all.list"


def bt_config(source, losers, share):
    data = {"source": str(source), "losers": str(losers), "validation_share": share}
    return PavrmConfig.from_dict({"kind": "pavrm", "models": {"trunk": "x"}, "data": data, "loss": "bt"})


class Brightness:
    """A perfect scorer: winners are bright."""

    device = torch.device("cpu")

    def logits(self, latent_BCFHW, timestep_B, videos, captions):
        return torch.tensor([float(video.latent_CFHW.mean()) * 10 for video in videos])


def test_winners_and_losers_of_the_same_ids(tmp_path):
    """A real and a generated video of one caption share a source_id; the report must not take one for the other."""
    names = [f"v{index}" for index in range(12)]
    config = bt_config(metas(tmp_path / "good", names, 1.0), metas(tmp_path / "bad", names, -1.0), 0.5)
    learnable = pavrm_worker.learnable_of(config)
    held = {example.sample.id: example.label for example in learnable.held_out}
    assert len(held) == len(learnable.held_out) and {name for name, label in held.items() if not label} == {f"loser/{n}" for n, label in held.items() if label}
    assert "12 losers have the id of a winner" in " ".join(learnable.notes)
    report = validate(config, PavrmObjective(config, Brightness(), Draws(learnable, config.data, 0)), learnable)
    assert (report["all"]["accuracy"], report["all"]["auc"], len(report["videos"])) == (1.0, 1.0, len(learnable.held_out))
    assert all((video["logit"][0] > 0) == (video["label"] == 1) for video in report["videos"])


def test_the_same_list_twice(tmp_path):
    """As HY-Video-PRFL's shipped config for pairs has it: nothing can be learned, and the figures must say so."""
    source = metas(tmp_path / "one", [f"v{index}" for index in range(12)], 1.0)
    config = bt_config(source, source, 0.5)
    learnable = pavrm_worker.learnable_of(config)
    report = validate(config, PavrmObjective(config, Brightness(), Draws(learnable, config.data, 0)), learnable)
    assert report["all"]["auc"] == 0.5 and len(report["videos"]) == len(learnable.held_out)


def test_losers_are_held_out_by_caption_where_that_is_asked_for(tmp_path):
    names = [f"v{index:02d}" for index in range(24)]
    lists = [metas(tmp_path / side, names, value) for side, value in (("good", 1.0), ("bad", -1.0))]
    for folder, shift in ((tmp_path / "good", 0), (tmp_path / "bad", 1)):
        for index, name in enumerate(names):
            path = folder / f"{name}_meta_v1.json"
            path.write_text(json.dumps({**json.loads(path.read_text()), "short_caption": f"caption {(index + shift) % 6}"}))
    values = bt_config(*lists, 0.5).to_dict()
    learnable = pavrm_worker.learnable_of(PavrmConfig.from_dict({**values, "data": {**values["data"], "split_by_caption": True}}))
    held, trained = ({example.sample.caption for example in part} for part in (learnable.held_out, learnable.train))
    assert held and trained and not held & trained and {example.label for example in learnable.held_out} == {0, 1}


def test_losers_are_validated_on_another_dataset_where_there_is_one(tmp_path):
    good, bad = metas(tmp_path / "good", ["a", "b"], 1.0), metas(tmp_path / "bad", ["a", "b", "c"], -1.0)
    metas(tmp_path / "check", ["x"], 1.0, motion_quality=1)
    metas(tmp_path / "check", ["y"], -1.0, motion_quality=0)
    values = bt_config(good, bad, 0.9).to_dict()
    config = PavrmConfig.from_dict({**values, "data": {**values["data"], "validation": str(tmp_path / "check")}})
    learnable = pavrm_worker.learnable_of(config)
    assert [example.sample.id for example in learnable.train] == ["a", "b", "loser/a", "loser/b", "loser/c"]
    assert {example.sample.id: example.label for example in learnable.held_out} == {"x": 1, "y": 0}
    plain = str(metas(tmp_path / "plain", ["z"], 1.0))
    none = pavrm_worker.learnable_of(PavrmConfig.from_dict({**config.to_dict(), "data": {**config.to_dict()["data"], "validation": plain}}))
    assert not none.held_out and none.notes[-1].startswith("no labelled video is held out")


def own_form(folder, names):
    """A dataset folder of our own form; every video has a latent and a text of its own."""
    videos = []
    for name in names:
        files = {"latent": f"latents/{name}.safetensors", "text": f"texts/{name}.safetensors"}
        for key, shape in (("latent", (16, 2, 4, 4)), ("text", (3, 8))):
            (folder / files[key]).parent.mkdir(parents=True, exist_ok=True)
            safetensors_file.write(folder / files[key], {key: torch.zeros(shape)}, {})
        videos.append({"id": name, "caption": "a thing", "latent_shape": [16, 2, 4, 4], **files})
    preprocess.write_index(folder, {"version": datasets.VERSION, "videos": videos, "skipped": []})
    return folder


def cut(path):
    path.write_bytes(path.read_bytes()[:150])


def grow(path):
    path.write_bytes(path.read_bytes() + b"more")


META_FAULTS = {
    "latent cut": lambda folder: cut(folder / "b.npy"),
    "latent gone": lambda folder: (folder / "b.npy").unlink(),
    "latent of another VAE": lambda folder: np.save(folder / "b.npy", np.zeros((1, 12, 2, 4, 4), np.float32)),
    "latent of objects": lambda folder: np.save(folder / "b.npy", np.array([{}]), allow_pickle=True),
    "latent an archive": lambda folder: (folder / "b.npy").write_bytes(b"PK\x03\x04" + bytes(200)),
    "text cut": lambda folder: cut(folder / "b_text.npy"),
    "text of other axes": lambda folder: np.save(folder / "b_text.npy", np.zeros((2, 3, 8), np.float32)),
    "text empty": lambda folder: (folder / "b_text.npy").write_bytes(b""),
    "meta cut": lambda folder: (folder / "b_meta_v1.json").write_text('{"source_id": "b", '),
    "meta a list": lambda folder: (folder / "b_meta_v1.json").write_text("[]"),
    "meta without latent": lambda folder: (folder / "b_meta_v1.json").write_text('{"textshort_path": "b_text.npy"}'),
    "meta gone": lambda folder: (folder / "b_meta_v1.json").unlink(),
    "condition of another length": lambda folder: with_condition(folder, (16, 1, 4, 4)),
    "condition of another VAE": lambda folder: with_condition(folder, (48, 2, 4, 4)),
}


def with_condition(folder, shape):
    np.save(folder / "b_black.npy", np.zeros((1, *shape), np.float32))
    path = folder / "b_meta_v1.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "f1_black_path": "b_black.npy"}))


@pytest.mark.parametrize("fault", META_FAULTS)
def test_a_broken_meta_is_left_out_and_listed(tmp_path, fault):
    source = metas(tmp_path, ["a", "b", "c"])
    META_FAULTS[fault](tmp_path)
    read = datasets.read(source)
    assert [sample.id for sample in read.samples] == ["a", "c"] and [tuple(sample.read().latent_CFHW.shape) for sample in read.samples] == [(16, 2, 4, 4)] * 2
    assert read.notes[0].startswith("1 of 3 metas are left out") and ("b.npy" in read.notes[1] or "b_" in read.notes[1])
    assert [sample.id for sample in datasets.read(tmp_path).samples] == ["a", "c"]
    words = "cannot be read|does not exist|no latent|axes are needed|latents of Wan|not an object|no dataset|does not fit its latent"
    with pytest.raises(ValueError, match=words):
        datasets.read(tmp_path / "b_meta_v1.json")


def test_when_every_meta_is_broken_it_is_an_error(tmp_path):
    source = metas(tmp_path, [f"v{index:02d}" for index in range(30)])
    for path in tmp_path.glob("*_text.npy"):
        cut(path)
    with pytest.raises(ValueError, match="holds no video that can be used: 30 of 30 metas are left out.*v00_text.npy cannot be read.*and 10 more$"):
        datasets.read(source)


@pytest.mark.parametrize("part", ["latents", "texts"])
@pytest.mark.parametrize("fault", [cut, grow, lambda path: path.write_bytes(b"")])
def test_a_corrupt_cache_is_noticed_when_the_dataset_is_listed(tmp_path, part, fault):
    folder = own_form(tmp_path, ["a", "b", "c"])
    fault(folder / part / "b.safetensors")
    read = datasets.read(folder)
    assert [sample.id for sample in read.samples] == ["a", "c"]
    assert read.notes[0].startswith("1 videos have broken cache files") and read.notes[1].startswith("b: ") and f"{part}/b.safetensors" in read.notes[1]
    for name in ("a", "c"):
        fault(folder / part / f"{name}.safetensors")
    with pytest.raises(ValueError, match="holds no video that can be used: 3 videos have broken cache files"):
        datasets.read(folder)


def spoil(path):
    """NaN in the last number of an array or cache file."""
    path.write_bytes(path.read_bytes()[:-4] + np.float32(np.nan).tobytes())


@pytest.mark.parametrize(("form", "part"), [("metas", "latent"), ("metas", "text"), ("own", "latents"), ("own", "texts")])
def test_nan_is_found_before_a_run_and_costs_its_video_only(tmp_path, form, part):
    source = metas(tmp_path, ["a", "b", "c"]) if form == "metas" else own_form(tmp_path, ["a", "b", "c"])
    file = {"latent": "b.npy", "text": "b_text.npy"}.get(part, f"{part}/b.safetensors")
    spoil(tmp_path / file)
    assert len(datasets.read(source).samples) == 3
    read = datasets.read(source, with_numbers=True)
    assert [sample.id for sample in read.samples] == ["a", "c"]
    assert read.notes[0].startswith("1 of 3 videos are left out") and read.notes[1].startswith("b: ") and f"{file} holds NaN" in read.notes[1]


def test_a_run_looks_at_the_numbers_of_all_its_lists(tmp_path):
    good, bad, check = (metas(tmp_path / name, [f"{name}{index}" for index in range(3)], motion_quality=1) for name in ("good", "bad", "check"))
    for name in ("good", "bad", "check"):
        spoil(tmp_path / name / f"{name}0.npy")
    values = bt_config(good, bad, 0.0).to_dict()
    config = PavrmConfig.from_dict({**values, "data": {**values["data"], "validation": str(check)}})
    learnable = pavrm_worker.learnable_of(config, with_numbers=True)
    used = {example.sample.id for example in (*learnable.train, *learnable.held_out)}
    assert used == {"good1", "good2", "loser/bad1", "loser/bad2", "check1", "check2"}
    assert all(f"{name}0.npy holds NaN" in " ".join(learnable.notes) for name in ("good", "bad", "check"))


@pytest.mark.parametrize("with_losers", [False, True])
def test_a_good_video_without_a_partner_is_in_no_pair(tmp_path, with_losers):
    good = metas(tmp_path / "good", ["a", "b", "long"], 1.0, motion_quality=1)
    bad = metas(tmp_path / "bad", ["x", "y"], -1.0, motion_quality=0)
    np.save(tmp_path / "good" / "long.npy", np.ones((1, 16, 3, 4, 4), np.float32))
    values = bt_config(good, bad, 0.0).to_dict()
    config = PavrmConfig.from_dict(values if with_losers else {**values, "data": {"source": str(tmp_path), "validation_share": 0.0}})
    learnable = pavrm_worker.learnable_of(config)
    assert any(note.startswith("1 good videos are in no pair") and "long [16, 3, 4, 4]" in note for note in learnable.notes)
    assert {pair.winner.id for pair in Draws(learnable, config.data, 0).pairs(0, 20)} == {"a", "b"}
    for name in ("a", "b"):
        np.save(tmp_path / "good" / f"{name}.npy", np.ones((1, 16, 3, 4, 4), np.float32))
    with pytest.raises(ValueError, match=r"no good video has a latent of the shape of a bad one \(a \[16, 3, 4, 4\].*use loss 'ce'"):
        pavrm_worker.learnable_of(config)


def test_what_is_left_out_of_every_list_reaches_the_log(tmp_path):
    good, bad, check = (metas(tmp_path / name, [f"{name}{index}" for index in range(4)], motion_quality=1) for name in ("good", "bad", "check"))
    for name in ("good", "bad", "check"):
        cut(tmp_path / name / f"{name}0.npy")
    told = " ".join(pavrm_worker.learnable_of(bt_config(good, bad, 0.0)).notes)
    assert "good0.npy" in told and "bad0.npy" in told
    cut(tmp_path / "bad" / "bad1.npy")
    values = {"kind": "pavrm", "models": {"trunk": "x"}, "data": {"source": str(tmp_path), "validation": str(check), "validation_share": 0.0}}
    for name in ("bad2", "bad3"):
        path = tmp_path / "bad" / f"{name}_meta_v1.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "motion_quality": 0}))
    notes = pavrm_worker.learnable_of(PavrmConfig.from_dict(values)).notes
    assert "1 of 4 metas are left out, for they or their files are broken or missing" in notes and "bad1.npy" in " ".join(notes)


def test_what_is_left_out_of_real_videos_reaches_the_log(tmp_path, caplog):
    source = metas(tmp_path, ["a", "b", "c"])
    cut(tmp_path / "b.npy")
    spoil(tmp_path / "c.npy")
    video = SimpleNamespace(latent_channels=16, vae="wan2.1", latent_shape=lambda count: (count, 16, 2, 4, 4))
    with caplog.at_level("INFO", "reward_lab"):
        real = worker._open_real(SimpleNamespace(real=SimpleNamespace(path=str(source)), video=video, starts_from_clips=True))
    assert real.prompts == ["a thing"] and real.shape == (16, 2, 4, 4) and "1 of 3 metas are left out" in caplog.text
    assert "c.npy holds NaN" in caplog.text


def test_an_index_that_says_the_same_stays_as_old_as_it_is(tmp_path):
    index = {"version": datasets.VERSION, "videos": [{"id": "\u00e9"}]}
    for videos, is_new in ((index["videos"], True), (index["videos"], False), ([], True)):
        path = tmp_path / datasets.INDEX
        preprocess.write_index(tmp_path, {**index, "videos": videos})
        assert (path.stat().st_mtime != 1) is is_new and datasets.read_index(tmp_path)["videos"] == videos
        os.utime(path, (1, 1))

"""Datasets: decoding and sizes, caches, broken videos, sweeps, HY-Video-PRFL's layout there and back; with the pocket VAE and text encoder."""

from __future__ import annotations

import json
from pathlib import Path

import av
import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("comfy.sd", reason="needs ComfyUI on the path")

import torch  # noqa: E402
from PIL import Image  # noqa: E402

from reward_lab.host import datasets, preprocess_command, prfl_layout  # noqa: E402
from reward_lab.host.video_clips import ClipSettings, read_clip  # noqa: E402
from reward_lab.lora_train import annotations  # noqa: E402
from reward_lab.testlab import cells  # noqa: E402

pytestmark = pytest.mark.host
TEXT = "a red square moves left fast over a gray background"


def video(path, frames=20, rate=8, size=(96, 64)):
    """A brightness ramp: frame i has the grey value 10 i, so that a decoded frame tells its number."""
    shot = (np.full((size[1], size[0], 3), 10 * index, np.uint8) for index in range(frames))
    cells.write_video(path, shot, rate)
    return path


def numbers(clip):
    """Which source frames a clip shows."""
    return [round(float(frame.mean()) * 25.5) for frame in clip.frames_FCHW]


def test_frames_at_another_rate(tmp_path):
    source = video(tmp_path / "a.mp4")
    small = {"width_px": 32, "height_px": 32}
    assert numbers(read_clip(source, ClipSettings(frame_rate=8, frames=17, **small))) == list(range(17))
    assert numbers(read_clip(source, ClipSettings(frame_rate=16, frames=9, **small))) == [0, 0, 1, 1, 2, 2, 3, 3, 4]
    assert numbers(read_clip(source, ClipSettings(frame_rate=4, frames=81, **small))) == list(range(0, 18, 2))  # 10 frames, floored to 9
    assert numbers(read_clip(source, ClipSettings(frame_rate=8, frames=5, start_s=1.0, **small))) == [8, 9, 10, 11, 12]


@pytest.mark.parametrize(
    ("source", "expected"),
    [((1920, 1080), (832, 480)), ((1080, 1920), (480, 832)), ((640, 640), (480, 480)), ((3840, 1080), (832, 480)), ((320, 240), (640, 480))],
)
def test_short_side_long_side(source, expected):
    assert ClipSettings().size(*source) == expected


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"frames": 80}, r"takes 4n\+1; use 77 or 81"),
        ({"width_px": 100, "height_px": 64}, "the width is 100 pixels.*multiples of 16; use 96"),
        ({"short_px": 470}, "short side is 470 pixels.*use 464"),
        ({"width_px": 64}, "give both"),
        ({"frame_rate": 0}, "positive"),
        ({"short_px": 832, "long_px": 480}, "exchange"),
    ],
)
def test_what_the_vae_cannot_take_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        ClipSettings(**settings)


@pytest.fixture
def options(tmp_path, repo, pocket_models):
    """`options(source, **changes)` for a small dataset with the pocket models."""
    weights = repo / "pocket" / "weights"

    def make(source, **changes):
        values = {
            "source": str(source), "out": str(tmp_path / "set"), "vae": str(weights / "pocket_wan_2.1_vae.safetensors"), "prompt": TEXT,
            "text_encoder": str(weights / "pocket_umt5.safetensors"), "width_px": 64, "height_px": 64, "frames": 9, "frame_rate": 8, "dtype": "fp32",
        }  # fmt: skip
        return {**values, **changes}

    return make


def run(values):
    return preprocess_command.run(values, torch.device("cpu"), lambda done, total: None)


def test_a_folder_with_broken_videos(tmp_path, options):
    folder = tmp_path / "videos"
    (folder / "deep").mkdir(parents=True)
    video(folder / "b.mp4", frames=12)
    video(folder / "deep" / "a.mp4", frames=7)
    (folder / "b.txt").write_text("a blue circle stays still over a white background")
    whole = video(folder / "c.mp4", frames=9, rate=9).read_bytes()
    (folder / "cut.mp4").write_bytes(whole[: len(whole) // 3])
    (folder / "text.mp4").write_text("no video")
    (folder / "twin.mp4").write_bytes(whole)
    video(folder / "short.mp4", frames=3)
    made = run(options(folder, hy=str(tmp_path / "hy")))
    reasons = {entry["file"].rsplit("/", 1)[1]: entry["reason"] for entry in made.skipped}
    assert set(reasons) == {"cut.mp4", "text.mp4", "twin.mp4", "short.mp4"} and made.videos == 3 == made.encoded
    assert "cannot be decoded" in reasons["text.mp4"] and "same video as c.mp4" in reasons["twin.mp4"] and "3 frames" in reasons["short.mp4"]
    index = datasets.read_index(tmp_path / "set")
    assert [(entry["frames"], entry["latent_shape"]) for entry in index["videos"]] == [(9, [16, 3, 8, 8]), (5, [16, 2, 8, 8]), (5, [16, 2, 8, 8])]
    assert [entry["caption"] for entry in index["videos"]] == ["a blue circle stays still over a white background", TEXT, TEXT]
    with av.open(str(tmp_path / "set" / index["videos"][0]["preview"])) as container:
        assert container.streams.video[0].frames == 9

    # Cached: nothing is encoded again, also when a video gets another name; another setting makes another cache.
    (folder / "b.mp4").rename(folder / "z.mp4")
    assert run(options(folder)).encoded == 0
    assert run(options(folder, dtype="bf16")).encoded == 3
    run(options(folder))

    # The same samples come back from both layouts.
    for video_id, label in zip([entry["id"] for entry in index["videos"]], ("good", "bad", "skip"), strict=True):
        annotations.append(tmp_path / "set" / annotations.FILE_NAME, video_id, "motion_quality", label)
    prfl_layout.export(tmp_path / "set", tmp_path / "hy", preprocess_encoder(options(folder)))
    own, theirs = datasets.read(tmp_path / "set"), datasets.read(tmp_path / "hy" / prfl_layout.LIST)
    assert sorted(sample.labels["motion_quality"] for sample in own.samples) == ["bad", "good", "skip"]
    by_id = {sample.id: sample for sample in theirs.samples}
    for sample in own.samples:
        mine, other = sample.read(), by_id[sample.id].read()
        assert torch.equal(mine.latent_CFHW, other.latent_CFHW) and torch.equal(mine.texts_PD["short"], other.texts_PD["short"])
        assert other.condition_CFHW.shape == mine.latent_CFHW.shape and sample.shape == tuple(mine.latent_CFHW.shape)
        assert len(mine.texts_PD["short"]) < 32  # no padding is stored
    labels = {sample.id: sample.labels.get("motion_quality") for sample in theirs.samples}
    assert sorted(map(str, labels.values())) == ["None", "good", "poor"]


def preprocess_encoder(values):
    return preprocess_command._Encoders(Path(values["text_encoder"]), Path(values["vae"]), torch.device("cpu")).video


def test_latents_decode_to_the_video(tmp_path, options, repo):
    """Encoding in model space: the decoder gives a clip of the pocket world back, up to the pocket VAE's own error and H.264's."""
    import random

    from reward_lab.host.vae import load_decoder
    from reward_lab.pocket import world

    folder = tmp_path / "videos"
    folder.mkdir()
    pixels = world.render(world.sample_scene(random.Random(1), held_out=False))
    cells.write_video(folder / "a.mp4", iter((pixels * 255).round().astype(np.uint8)), 8)
    run(options(folder))
    latent = datasets.read(tmp_path / "set").samples[0].read().latent_CFHW[None]
    decoder = load_decoder(repo / "pocket" / "weights" / "pocket_wan_2.1_vae.safetensors", dtype=torch.float32, device=torch.device("cpu"))
    clip = read_clip(folder / "a.mp4", ClipSettings(width_px=64, height_px=64, frames=9, frame_rate=8))
    with torch.no_grad():
        assert float((decoder.decode(latent)[0] - clip.frames_FCHW).abs().mean()) < 0.04


def test_cells_of_a_sweep_keep_their_own_size(tmp_path, options):
    key = "ab" * 20
    frames = np.zeros((9, 32, 48, 3), np.uint8)
    cells.record(tmp_path / "sweep", key, frames, applied=[], prompt=TEXT, frame_rate=8.0, scores={})
    made = run(options(tmp_path / "sweep", prompt=None))
    (entry,) = datasets.read_index(tmp_path / "set")["videos"]
    assert made.videos == 1 and entry["id"] == key and (entry["width_px"], entry["height_px"], entry["caption"]) == (48, 32, TEXT)


def test_an_interrupted_run_goes_on(tmp_path, options):
    folder = tmp_path / "videos"
    folder.mkdir()
    for index in range(3):
        video(folder / f"{index}.mp4", frames=9 + index, size=(64, 64))

    def stop(done, total):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        preprocess_command.run(options(folder), torch.device("cpu"), stop)
    assert run(options(folder)).encoded == 1


def test_an_input_list_and_what_is_refused(tmp_path, options, capsys):
    video(tmp_path / "a.mp4", frames=9)
    rows = [{"source_id": "one", "video_path": "a.mp4", "short_caption": TEXT, "long_caption": f"{TEXT} slowly", "physics_quality": 1}]
    rows += [{"source_id": "gone", "video_path": "none.mp4", "short_caption": TEXT}, {"source_id": "../x", "video_path": "a.mp4", "short_caption": TEXT}]
    (tmp_path / "in.json").write_text(json.dumps(rows))
    made = run(options(tmp_path / "in.json", prompt=None))
    assert [entry["reason"] for entry in made.skipped] == ["the file does not exist", "its id '../x' cannot be a file name"]
    (sample,) = datasets.read(tmp_path / "set").samples
    assert sample.id == "one" and sample.labels == {"physics_quality": 1} and set(sample.read().texts_PD) == {"short", "long"}
    empty = tmp_path / "empty"
    empty.mkdir()
    video(empty / "a.mp4")
    for values, message in (
        (options(tmp_path / "none"), "no folder or list"),
        (options(empty, prompt=None), "none of 1 videos could be used. The first reason: it has no caption"),
        (options(empty, vae=str(tmp_path / "x")), "the VAE .* does not exist"),
    ):
        with pytest.raises(ValueError, match=message):
            run(values)
    assert preprocess_command.main([json.dumps(options(tmp_path / "none"))]) == 1 and "no folder or list" in capsys.readouterr().err


def test_a_run_that_can_use_no_video_leaves_the_index_as_it_was(tmp_path, options):
    (tmp_path / "videos").mkdir()
    video(tmp_path / "videos" / "a.mp4", frames=9)
    run(options(tmp_path / "videos"))
    before = (tmp_path / "set" / datasets.INDEX).read_bytes()
    with pytest.raises(ValueError, match=r"none of 1 videos could be used.* it has no caption.*dataset\.json is as it was"):
        run(options(tmp_path / "videos", prompt=None))
    assert (tmp_path / "set" / datasets.INDEX).read_bytes() == before


CACHE_FAULTS = {
    "note empty": ("latents/*.json", lambda path: path.write_bytes(b"")),
    "note of another latent": ("latents/*.json", lambda path: path.write_text(json.dumps({**json.loads(path.read_text()), "latent_shape": [16, 9, 8, 8]}))),
    "note half": ("latents/*.json", lambda path: path.write_text('{"frames": 9}')),
    "latent cut": ("latents/*.safetensors", lambda path: path.write_bytes(path.read_bytes()[:-100])),
    "latent empty": ("latents/*.safetensors", lambda path: path.write_bytes(b"")),
    "latent of NaN": ("latents/*.safetensors", lambda path: path.write_bytes(path.read_bytes()[:-8] + b"\xff" * 8)),
    "text cut": ("texts/*.safetensors", lambda path: path.write_bytes(path.read_bytes()[:-1])),
    "preview cut": ("previews/*.mp4", lambda path: path.write_bytes(path.read_bytes()[:40])),
}


@pytest.mark.parametrize("fault", CACHE_FAULTS)
def test_a_broken_cache_is_made_again(tmp_path, options, fault):
    (tmp_path / "videos").mkdir()
    video(tmp_path / "videos" / "a.mp4", frames=9)
    run(options(tmp_path / "videos"))
    files = {path: path.read_bytes() for path in (tmp_path / "set").rglob("*") if path.is_file()}
    (broken,) = (tmp_path / "set").glob(CACHE_FAULTS[fault][0])
    CACHE_FAULTS[fault][1](broken)
    made = run(options(tmp_path / "videos"))
    assert not made.skipped and made.encoded == (0 if fault == "text cut" else 1) and broken.read_bytes() == files[broken]
    assert {path: path.read_bytes() for path in (tmp_path / "set").rglob("*") if path.is_file()} == files


def test_a_full_disk_is_told_and_costs_nothing_that_is_encoded(tmp_path, options, monkeypatch, capsys):
    """While the latent, the note, or the exported arrays are written."""
    (tmp_path / "videos").mkdir()
    for index in range(2):
        video(tmp_path / "videos" / f"{index}.mp4", frames=9 + index)
    values, own, written = options(tmp_path / "videos", json=True, hy=str(tmp_path / "hy")), Path.write_text, []

    def full(path, *given, **options_):
        written.append(path)
        if len(written) == 2:
            own(path, "")
            raise OSError(28, "No space left on device")
        return own(path, *given, **options_)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full)
        patch.setattr(preprocess_command.preprocess, "model_sha256", lambda path, folder: path.name)
        assert preprocess_command.main([json.dumps(values)]) == 1
        told = capsys.readouterr()
        reason = json.loads(told.out)["reason"]
        assert "no room to write more ([Errno 28]" in reason and f"{tmp_path / 'set'} has" in reason and "run the same again" in reason
        assert "Traceback" not in told.err
        assert run({**values, "hy": None}).encoded == 1 and not list((tmp_path / "set").rglob("*.partial"))
        patch.setattr(np, "save", lambda *given: (_ for _ in ()).throw(OSError("4096 requested and 0 written")))
        with pytest.raises(ValueError, match=r"no room to write more \(4096 requested and 0 written\)"):
            run(values)


def test_a_caption_that_is_not_utf8_costs_its_video_only(tmp_path, options):
    (tmp_path / "videos").mkdir()
    for name in ("a", "b"):
        video(tmp_path / "videos" / f"{name}.mp4", frames=9 + (name == "b"))
    (tmp_path / "videos" / "a.txt").write_bytes("un café".encode("latin-1"))
    made = run(options(tmp_path / "videos"))
    assert made.videos == 1 and len(made.skipped) == 1
    assert made.skipped[0]["reason"].startswith("its caption a.txt cannot be read") and "save it as UTF-8" in made.skipped[0]["reason"]


def test_ids_of_an_input_list(tmp_path, options):
    """No id is the video's own; one id of two videos is not "the same video"."""
    for name, frames in (("a", 9), ("b", 13), ("c", 17)):
        video(tmp_path / f"{name}.mp4", frames=frames)
    rows = [{"video_path": f"{name}.mp4", "short_caption": TEXT, "source_id": own} for name, own in (("a", None), ("b", None), ("b", "x"), ("c", "x"))]
    rows.append({"video_path": "a.mp4", "short_caption": TEXT})
    (tmp_path / "in.json").write_text(json.dumps(rows))
    made = run(options(tmp_path / "in.json", prompt=None))
    assert made.videos == 3
    assert [entry["reason"] for entry in made.skipped] == ["it has the id 'x' of b.mp4, which is another video; give it its own", "the same video as a.mp4"]
    for bad, message in (({"video_path": 5}, "entry 2 of the list .* has the video_path 5"), ("a.mp4", "has the video_path 'a.mp4'"), ({}, "video_path None")):
        (tmp_path / "in.json").write_text(json.dumps([rows[0], bad]))
        with pytest.raises(ValueError, match=message):
            run(options(tmp_path / "in.json", prompt=None))


def test_the_exported_first_frame_is_that_of_the_latent(tmp_path, options):
    """With the beginning of the source left out, too; the ramp tells which frame it is."""
    (tmp_path / "videos").mkdir()
    video(tmp_path / "videos" / "a.mp4", size=(64, 64))
    run(options(tmp_path / "videos", start_s=1.0, hy=str(tmp_path / "hy")))
    (picture,) = (tmp_path / "hy" / "first_frame").glob("*.jpg")
    with Image.open(picture) as image:
        assert round(float(np.asarray(image).mean()) / 10) == 8


def test_exporting_a_broken_cache_names_the_file(tmp_path, options):
    (tmp_path / "videos").mkdir()
    video(tmp_path / "videos" / "a.mp4", frames=9)
    run(options(tmp_path / "videos"))
    (latent,) = (tmp_path / "set" / "latents").glob("*.safetensors")
    latent.write_bytes(latent.read_bytes()[:-100])
    with pytest.raises(ValueError, match=f"{latent.name} cannot be read"):
        prfl_layout.export(tmp_path / "set", tmp_path / "hy", preprocess_encoder(options(tmp_path / "videos")))


# What each reader takes out of a meta where it finds none of its other names.
# Source: Tencent-Hunyuan/HY-Video-PRFL@59ab9d7:diffusers_lite/datasets/image2video_dataset.py, get_batch_lrm_ce, get_batch_lrm_bt_online, get_batch_lrm_refl.
BT_KEYS = {"vae_latent_path", "textshort_path", "imgclip_path", "f1_black_path"}
UPSTREAM_KEYS = {"lrm_ce": {"source_id", *BT_KEYS}, "lrm_bt_online": BT_KEYS, "refl": {"textlong_path", "short_caption", "long_caption", *BT_KEYS}}


@pytest.mark.parametrize("is_absolute", [True, False])
def test_upstream_finds_what_its_readers_ask_for(tmp_path, options, monkeypatch, is_absolute):
    """From the root of its repository with whole paths, else from the folder itself; labels in the two qualities that it makes motion's label of."""
    video(tmp_path / "a.mp4", frames=9)
    given = {"g": 1.0, "b": 0, "n": "skip"}
    rows = [{"source_id": name, "video_path": "a.mp4", "short_caption": "bad", "motion_quality": label} for name, label in given.items()]
    (tmp_path / "in.json").write_text(json.dumps(rows))
    run(options(tmp_path / "in.json", prompt=None, hy=str(tmp_path / "hy"), hy_absolute=is_absolute))
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere if is_absolute else tmp_path / "hy")
    metas = [json.loads(Path(line).read_text(encoding="utf-8")) for line in (tmp_path / "hy" / prfl_layout.LIST).read_text().splitlines()]
    for meta in metas:
        for keys in UPSTREAM_KEYS.values():
            assert keys <= set(meta)
        arrays = {key: np.load(meta[key]) for key in UPSTREAM_KEYS["refl"] if key.endswith("_path")}
        assert all(array.dtype == np.float32 and len(array) == 1 for array in arrays.values())
        assert arrays["vae_latent_path"].shape == arrays["f1_black_path"].shape == (1, 16, 3, 8, 8) and arrays["textlong_path"].ndim == 3
        assert arrays["imgclip_path"].shape == (1, 257, 1280) and not arrays["imgclip_path"].any()
        assert meta["short_caption"] == "bad"
    labels = {meta["source_id"]: [meta.get(name) for name in ("physics_quality", "human_quality", "motion_quality")] for meta in metas}
    assert labels == {"g": ["good"] * 3, "b": [None, None, "poor"], "n": [None] * 3}
    # Zeros stand for no embedding here: an image-to-video PAVRM asks for one instead of taking these.
    assert [sample.read().clip_PD for sample in datasets.read(tmp_path / "hy" / prfl_layout.LIST).samples] == [None] * 3
    np.save(metas[0]["imgclip_path"], np.ones((1, 257, 1280), np.float32))
    assert tuple(datasets.read(tmp_path / "hy" / prfl_layout.LIST).samples[0].read().clip_PD.shape) == (257, 1280)


def test_recorded_folder_is_read(shared_fixtures):
    """HY-Video-PRFL's own files, with every alias."""
    folder = shared_fixtures / "pavrm" / "labels" / "temp_data"
    samples = datasets.read(folder / "temp_data_480.list").samples
    assert [sample.shape for sample in samples] == [(16, 3, 8, 8)] * 2
    video_ = samples[0].read()
    assert [tuple(text.shape) for text in video_.texts_PD.values()] == [(6, 48), (14, 48)] and tuple(video_.clip_PD.shape) == (257, 16)
    assert datasets.read(folder).samples[0].id == samples[0].id

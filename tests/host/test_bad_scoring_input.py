"""What users hand to `lab.py score` by mistake: each ends with a sentence that says what was given and what to do, or is scored as it should be."""

from __future__ import annotations

import json
import pickle
import re
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from reward_lab.host import media, reward_loading, score_command, score_store, video_prompts


@pytest.fixture
def hps(shared_fixtures: Path) -> Path:
    """Folder of the tiny HPS."""
    return shared_fixtures / "scorers" / "hps"


@pytest.fixture
def run(hps, capsys):
    """Run `score`; returns exit status, document (None when it was refused) and the reason."""

    def call(*paths, **options):
        job = {"kind": "hpsv2", "weights": str(hps / "hps_tiny.safetensors"), "config": str(hps / "config.json"), "prompt": "a cat", "json": True}
        status = score_command.main(["score", json.dumps({"paths": [str(path) for path in paths], **job, **options})])
        printed = capsys.readouterr()
        document = json.loads(printed.out)
        verdicts = {0: "ok", score_command.INCOMPLETE: "incomplete", score_command.REFUSED: "refused"}
        assert "Traceback" not in printed.err and document["verdict"] == verdicts[status]
        reason = document.get("reason", "")
        assert f"Error: {reason}" in printed.err or status != score_command.REFUSED
        assert all(f"Error: {error['name']}: {error['reason']}" in printed.err for error in document.get("errors", ()))
        return status, None if status == score_command.REFUSED else document, reason

    return call


def npy_header(shape: str) -> bytes:
    """An array file that declares a shape and has no data."""
    header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}}}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode()


def frames(*shape: int, low: float = 0.0, high: float = 1.0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(0)) * (high - low) + low


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (frames(0, 3, 8, 8), "holds no tensor that could be frames|at least one frame"),
        (frames(2, 1, 8, 9), "1 channels; 3 .RGB. are needed; repeat the grey channel"),
        (frames(2, 4, 8, 9), "4 channels; 3 .RGB. are needed; drop the alpha channel"),
        (frames(2, 8, 9, 4), "4 channels"),
        (frames(1, 16, 5, 8, 8), "these are latents"),
        (frames(2, 3, 8, 9, high=255.0), r"\[0,1\] is needed; rescale"),
        (frames(2, 3, 8, 9, low=-1.0), r"\[0,1\] is needed; rescale"),
        (frames(2, 3, 8, 9) * float("nan"), "NaN"),
        (torch.zeros(2, 3, 8, 9, dtype=torch.int64), "floats in .0,1. or 8-bit"),
        (frames(8, 9), "no tensor that could be frames"),
    ],
)
def test_tensors_that_are_no_frames(run, tmp_path, tensor, message):
    save_file({"frames": tensor}, tmp_path / "x.safetensors")
    status, _, error = run(tmp_path / "x.safetensors")
    assert status == score_command.REFUSED and re.search(message, error), error


def test_frames_in_either_layout_and_any_dtype_score_the_same(run, tmp_path):
    pixels = (frames(3, 3, 20, 31) * 255).round().to(torch.uint8)
    forms = {"a": pixels, "b": pixels.movedim(1, -1).contiguous(), "c": pixels.float() / 255, "d": (pixels.double() / 255)[None]}
    rewards = []
    for name, tensor in forms.items():
        save_file({"frames": tensor}, tmp_path / f"{name}.safetensors")
        rewards.append(run(tmp_path / f"{name}.safetensors")[1]["videos"][0]["per_frame"])
    for other in rewards[1:]:
        assert other == pytest.approx(rewards[0], abs=1e-5)


def test_pictures_that_are_not_plain_rgb(run, tmp_path):
    colour = Image.fromarray((frames(20, 31, 3).numpy() * 255).astype(np.uint8))
    colour.save(tmp_path / "plain.png")
    opaque = colour.copy()
    opaque.putalpha(128)
    opaque.save(tmp_path / "alpha.png")
    colour.convert("L").save(tmp_path / "grey.png")
    plain, alpha, grey = (run(tmp_path / f"{name}.png")[1] for name in ("plain", "alpha", "grey"))
    assert alpha["videos"][0]["per_video"] == plain["videos"][0]["per_video"]
    assert any("transparency, which is dropped" in warning for warning in alpha["warnings"]) and not plain["warnings"]
    assert grey["videos"][0]["frames"] == 1
    colour.save(tmp_path / "moving.webp", save_all=True, append_images=[opaque, opaque.rotate(180)], lossless=True)
    moving = run(tmp_path / "moving.webp")[1]
    assert moving["videos"][0]["frames"] == 3 and sum("moving.webp has transparency" in warning for warning in moving["warnings"]) == 1
    colour.save(tmp_path / "solid.webp", save_all=True, append_images=[colour.rotate(180)], lossless=True)
    assert not run(tmp_path / "solid.webp")[1]["warnings"], "an alpha channel that hides nothing is no transparency"
    Image.fromarray((frames(20, 31).numpy() * 60000).astype(np.uint16)).save(tmp_path / "deep.png")
    status, _, error = run(tmp_path / "deep.png")
    assert status == score_command.REFUSED and "more than 8 bits" in error


def test_an_8k_frame_is_scored(run, tmp_path):
    Image.new("RGB", (7680, 4320), (90, 120, 30)).save(tmp_path / "8k.png")
    Image.new("RGB", (768, 432), (90, 120, 30)).save(tmp_path / "small.png")
    large, small = (run(tmp_path / name)[1]["videos"][0] for name in ("8k.png", "small.png"))
    assert large["size_px"] == [7680, 4320] and large["per_video"] == pytest.approx(small["per_video"], abs=1e-3)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.png", b"not a picture at all", "cannot be read as a picture"),
        ("x.mp4", b"not a video at all", "cannot be read as a video"),
        ("x.npy", b"not an array at all", "cannot be read as an array"),
        ("x.npy", npy_header("(1000000000000, 3, 8, 8)"), "cannot be read as an array"),
        ("x.bmp", b"BM" + struct.pack("<IHHIIiiHHIIiiII", 54, 0, 0, 54, 40, 60000, 60000, 1, 24, 0, 0, 0, 0, 0, 0), "too large a picture"),
        ("x.safetensors", b"not a file of tensors", "cannot be read as safetensors"),
        ("x.txt", b"a cat", "ends in '.txt'"),
    ],
)
def test_damaged_and_foreign_files(run, tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    status, _, error = run(tmp_path / name)
    assert status == score_command.REFUSED and message in error


def test_paths_that_hold_nothing(run, tmp_path):
    assert "There is no file or folder" in run(tmp_path / "absent.png")[2]
    assert "nothing to score" in run(tmp_path)[2]


def test_prompts_and_videos_of_different_number(run, tmp_path, shared_fixtures):
    images = shared_fixtures / "scorers" / "images"
    (tmp_path / "two.txt").write_text("a cat\na dog\n")
    status, _, error = run(images, prompt=None, prompts=str(tmp_path / "two.txt"))
    assert status == score_command.REFUSED and "holds 2 prompts, but there are 6 videos" in error
    (tmp_path / "one.txt").write_text("a cat\n")
    assert run(images, prompt=None, prompts=str(tmp_path / "one.txt"))[1]["videos"][5]["prompt"] == "a cat"
    assert "give --prompt TEXT or --prompts FILE" in run(images, prompt=None)[2]


def test_long_and_empty_prompts_are_scored_and_told(run, shared_fixtures):
    image = next((shared_fixtures / "scorers" / "images").glob("*.png"))
    warnings = run(image, prompt="word " * 80)[1]["warnings"]
    assert len(warnings) == 1 and "80 tokens, 75 fit: it is cut after" in warnings[0]
    assert "prompt is empty" in run(image, prompt="")[1]["warnings"][0]


def test_weights_that_cannot_be_used(run, hps, shared_fixtures, tmp_path):
    image = next((shared_fixtures / "scorers" / "images").glob("*.png"))
    state = load_file(hps / "hps_tiny.safetensors")
    broken = {**state, "ln_final.weight": state["ln_final.weight"] * float("nan")}
    save_file(broken, tmp_path / "nan.safetensors")
    assert "NaN or infinity in ln_final.weight" in run(image, weights=str(tmp_path / "nan.safetensors"))[2]
    save_file({key: value for key, value in state.items() if key != "ln_final.bias"}, tmp_path / "gap.safetensors")
    assert "missing: ln_final.bias" in run(image, weights=str(tmp_path / "gap.safetensors"))[2]
    mps = shared_fixtures / "scorers" / "mps"
    save_file({**state, "ln_final.bias": state["ln_final.bias"].to(torch.int32)}, tmp_path / "whole.safetensors")
    assert "not floating-point: ln_final.bias int32" in run(image, weights=str(tmp_path / "whole.safetensors"))[2]
    assert "an MPS model" in run(image, weights=str(mps / "mps_tiny_whole.pth"))[2]
    assert "cannot be set for hpsv2.1" in run(image, threshold=0.3)[2]
    assert "is unknown; choose one of" in run(image, kind="hpsv3")[2]


def test_a_hostile_pickle_runs_nothing(run, tmp_path, shared_fixtures):
    image = next((shared_fixtures / "scorers" / "images").glob("*.png"))
    proof = tmp_path / "proof"

    class Hostile:
        def __reduce__(self):
            return Path.touch, (proof,)

    (tmp_path / "hostile.pt").write_bytes(pickle.dumps({"state_dict": Hostile()}))
    torch.save({"state_dict": Hostile()}, tmp_path / "hostile_zip.pt")
    for name in ("hostile.pt", "hostile_zip.pt"):
        assert run(image, weights=str(tmp_path / name))[0] == score_command.REFUSED
    assert not proof.exists()


def test_scores_survive_a_cut_off_line(tmp_path):
    path = tmp_path / "scores.jsonl"
    store = score_store.ScoreStore(path)
    store.put("a", {"x": 1})
    with path.open("a") as file:
        file.write('{"key": "b", "sco')
    store = score_store.ScoreStore(path)
    assert store.get("a") == {"x": 1} and store.get("b") is None
    store.put("b", {"x": 2})
    assert score_store.ScoreStore(path).get("b") == {"x": 2} and score_store.ScoreStore(path).get("a") == {"x": 1}


def test_folder_order_is_natural_and_hidden_files_stay_out(tmp_path):
    for name in ("frame_10.png", "frame_9.png", ".hidden.png"):
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("x")
    assert [clip.name for clip in media.find_clips([tmp_path])] == ["frame_9.png", "frame_10.png"]
    (one,) = media.find_clips([tmp_path], is_one_video=True)
    assert one.read().shape == (2, 3, 4, 4)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("p.txt", "a cat\n\na dog\n"),
        ("p.json", '["a cat", "a dog"]'),
        ("p.json", '{"prompts": [{"prompt": "a cat"}, {"text": "a dog"}]}'),
        ("p.json", '{"b.mp4": "a dog", "a.mp4": "a cat"}'),
        ("p.jsonl", '{"file": "x/b.mp4", "caption": "a dog"}\n{"file": "a", "prompt": "a cat"}\n'),
        ("p.csv", "Prompt,File\na dog,b.mp4\na cat,a.mp4\n"),
    ],
)
def test_prompt_files(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    assert video_prompts.read(tmp_path / name, ["a.mp4", "b.mp4"]) == ["a cat", "a dog"]


def pictures(folder: Path, *names: str) -> list[Path]:
    """Small pictures of different colours; returns their paths."""
    paths = [folder / name for name in names]
    for index, path in enumerate(paths):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (24, 24), (80 * index % 256, 200, 90)).save(path)
    return paths


@pytest.mark.parametrize("form", ["files", "folder"])
def test_a_prompt_with_a_folder_goes_to_the_video_in_that_folder(run, tmp_path, form):
    files = pictures(tmp_path / "clips", "a/p.png", "b/p.png")
    given = files if form == "files" else [tmp_path / "clips"]
    (tmp_path / "p.csv").write_text("file,prompt\n" + "".join(f"{name},{prompt}\n" for name, prompt in (("a/p.png", "red"), ("b/p.png", "blue"))))
    options = {"prompt": None, "prompts": str(tmp_path / "p.csv")}
    assert [video["prompt"] for video in run(*given, **options)[1]["videos"]] == ["red", "blue"]
    (third,) = pictures(tmp_path / "clips", "c/p.png")
    assert "2 prompts by file name, none for" in run(*given, third, **options)[2]
    assert "none for p.png" in run(third, **options)[2], "its folder is none that the file names"


@pytest.mark.parametrize(
    ("entries", "names", "expected"),
    [
        ({"a/p.png": "red", "b/p.png": "blue"}, ["p.png"], r"2 prompts for p.png \(a/p.png, b/p.png\)"),
        ({"p.png": "red", "p.jpg": "blue"}, ["p.webp"], "2 prompts for p.webp"),
        ({"p.png": "red"}, ["p.png", "p.jpg"], "none for p.jpg"),
        ({"p.png": "any", "a/p.png": "red"}, ["/x/a/p.png", "/x/b/p.png"], ["red", "any"]),
        ({"a/p": "red", "../b/p.png": "blue"}, ["/x/a/p.png", "/x/b/p.png"], ["red", "blue"]),
        ({"x/a/p.png": "red", "y/a/p.png": "blue"}, ["/y/a/p.png", "/x/a/p.png"], ["blue", "red"]),
        ({"c/p.png": "red"}, ["/x/a/p.png"], "none for /x/a/p.png"),
    ],
)
def test_names_of_several_videos_are_told_apart(tmp_path, entries, names, expected):
    (tmp_path / "p.json").write_text(json.dumps(entries))
    if isinstance(expected, list):
        assert video_prompts.read(tmp_path / "p.json", names) == expected
        return
    with pytest.raises(ValueError, match=expected):
        video_prompts.read(tmp_path / "p.json", names)


def test_an_empty_line_is_a_prompt_only_where_it_fits(tmp_path):
    (tmp_path / "p.txt").write_text("a cat\n\na dog\n")
    assert video_prompts.read(tmp_path / "p.txt", ["1", "2", "3"]) == ["a cat", "", "a dog"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vision_cfg": {"layers": 10_000_000}}, "vision_cfg.layers is 10000000; it must be a whole number from 1 to 1000"),
        ({"vision_cfg": {"head_width": 0}}, "vision_cfg.head_width is 0"),
        ({"vision_cfg": {"width": "forty"}}, "vision_cfg.width is 'forty'"),
        ({"vision_cfg": {"mlp_ratio": float("nan")}}, "vision_cfg.mlp_ratio is nan"),
        ({"text_cfg": {"context_length": 70}}, "text_cfg.context_length is 70"),
        ({"text_cfg": {"heads": 5}}, "text width 12 a multiple of heads 5"),
        ({"text_cfg": []}, "text_cfg is \\[\\]; it must be an object"),
        ({"embed_dim": None}, "embed_dim is None"),
    ],
)
def test_configs_of_models_that_cannot_be(run, hps, tmp_path, shared_fixtures, change, message):
    image = next((shared_fixtures / "scorers" / "images").glob("*.png"))
    config = json.loads((hps / "config.json").read_text())
    for key, value in change.items():
        config[key] = {**config[key], **value} if isinstance(value, dict) else value
    (tmp_path / "c.json").write_text(json.dumps(config))
    status, _, reason = run(image, config=str(tmp_path / "c.json"))
    assert status == score_command.REFUSED and re.search(message, reason), reason


def test_a_place_that_cannot_be_written_to_is_told_before_anything_is_scored(run, tmp_path, shared_fixtures, monkeypatch):
    image = next((shared_fixtures / "scorers" / "images").glob("*.png"))
    monkeypatch.setattr(score_command, "_score", lambda options: pytest.fail("scored first"))
    (tmp_path / "file").write_text("x")
    for option in ("csv", "gradients", "results", "baseline"):
        for place in (tmp_path, tmp_path / "file" / "x"):
            assert f"--{option} {place} cannot be written" in run(image, **{option: str(place)})[2]


@pytest.mark.parametrize("place", ["config", "beside"])
def test_stored_scores_are_made_anew_when_the_sizes_change(run, hps, tmp_path, place):
    """Another activation gives other numbers from the same weights."""
    (image,) = pictures(tmp_path, "p.png")
    weights, sizes = tmp_path / "w.safetensors", tmp_path / ("sizes.json" if place == "config" else "w.json")
    weights.write_bytes((hps / "hps_tiny.safetensors").read_bytes())
    config = json.loads((hps / "config.json").read_text())
    options = {"weights": str(weights), "config": str(sizes) if place == "config" else None, "results": str(tmp_path / "kept.jsonl")}
    rewards = []
    for is_quick in (False, True, True):
        sizes.write_text(json.dumps({**config, "quick_gelu": is_quick}))
        rewards.append(run(image, **options)[1]["videos"][0]["per_video"])
    assert rewards[0] != rewards[1] == rewards[2]


def test_every_video_has_a_name_and_a_gradient_of_its_own(run, tmp_path):
    """Tensor files of one name, several videos in one file, and a file given twice."""
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        save_file({"frames": frames(1, 3, 8, 9)}, tmp_path / folder / "x.safetensors")
        np.save(tmp_path / folder / "y.npy", frames(2, 1, 3, 8, 9).numpy())
    paths = [tmp_path / folder / name for folder in ("a", "b", "b") for name in ("x.safetensors", "y.npy")]
    videos = run(*paths, gradients=str(tmp_path / "g.safetensors"))[1]["videos"]
    assert len({video["name"] for video in videos}) == 9
    assert {video["name"]: (1, 3, 8, 9) for video in videos} == {name: tuple(value.shape) for name, value in load_file(tmp_path / "g.safetensors").items()}
    assert f"{tmp_path}/b/y.npy#2[1]" in {video["name"] for video in videos}
    assert [video["name"] for video in run(*paths[:2])[1]["videos"]] == ["x.safetensors:frames", "y.npy[0]", "y.npy[1]"]


def test_a_broken_file_keeps_no_other_from_its_score(run, tmp_path, hps):
    pictures(tmp_path / "clips", "a.png", "z.png")
    for name in ("m.png", "n.npy", "o.safetensors"):
        (tmp_path / "clips" / name).write_bytes(b"not that at all")
    (tmp_path / "clips" / "link.png").symlink_to(tmp_path / "absent.png")
    options = {"results": str(tmp_path / "kept.jsonl"), "csv": str(tmp_path / "s.csv")}
    for _ in range(2):
        status, document, _ = run(tmp_path / "clips", **options)
        assert status == score_command.INCOMPLETE and [video["name"] for video in document["videos"]] == ["a.png", "z.png"]
        assert [error["name"] for error in document["errors"]] == ["link.png", "m.png", "n.npy", "o.safetensors"]
        assert all(str(tmp_path / "clips" / error["name"]) in error["reason"] for error in document["errors"])
    assert len(Path(options["results"]).read_text().splitlines()) == 2 and "z.png" in Path(options["csv"]).read_text()
    for name in ("a.png", "z.png"):
        (tmp_path / "clips" / name).unlink()
    status, _, reason = run(tmp_path / "clips")
    assert status == score_command.REFUSED and reason.startswith("4 of 4 videos cannot be scored") and "m.png cannot be read as a picture" in reason


def test_tensor_files_without_frames_are_left_out_of_a_folder_and_refused_by_name(run, tmp_path):
    pictures(tmp_path, "a.png")
    # A convolution's weights have the shape of frames.
    weights = {"blocks.0.self_attn.q.lora_down.weight": torch.zeros(4, 8), "visual.conv1.weight": torch.zeros(8, 3, 4, 4)}
    save_file(weights, tmp_path / "lora.safetensors")
    np.save(tmp_path / "grey.npy", frames(2, 1, 8, 9).numpy())
    status, document, _ = run(tmp_path)
    assert status == 0 and [video["name"] for video in document["videos"]] == ["a.png"]
    assert all(any(f"{tmp_path / name} " in text and "left out" in text for text in document["warnings"]) for name in ("lora.safetensors", "grey.npy"))
    assert "no tensor that could be frames" in run(tmp_path / "a.png", tmp_path / "lora.safetensors")[2]


@pytest.mark.parametrize("kind", ["hpsv2", "mps"])
def test_every_clip_whose_prompt_is_cut_says_so(run, shared_fixtures, tmp_path, kind):
    """The text is encoded for the first of them only; in a batch of prompts, all of them for the first clip."""
    files, long, other = pictures(tmp_path, "a.png", "b.png", "c.png", "d.png"), "word " * 80, "thing " * 90
    (tmp_path / "p.json").write_text(json.dumps(["short", long, long, other]))
    mps = shared_fixtures / "scorers" / "mps"
    own = {"weights": str(mps / "mps_tiny.safetensors"), "config": str(mps / "config.json"), "normalise": "batch"} if kind == "mps" else {}
    options = {"prompt": None, "prompts": str(tmp_path / "p.json"), "results": str(tmp_path / "kept.jsonl"), "kind": kind, **own}
    for _ in range(2):
        document = run(*files, **options)[1]
        found = [" ".join(video["warnings"]) for video in document["videos"]]
        assert found[0] == "" and found[1] == found[2] and "80 tokens, 75 fit" in found[1] and "word" not in found[3] and "90 tokens, 75 fit" in found[3]
        assert len(document["warnings"]) == 2


def test_a_baseline_that_cannot_be_measured_costs_no_score(run, tmp_path, monkeypatch):
    files = pictures(tmp_path, "a.png", "b.png")
    files[1].write_bytes(files[0].read_bytes())
    baseline = str(tmp_path / "base.json")
    status, document, _ = run(*files, baseline=baseline)
    assert status == score_command.INCOMPLETE and len(document["videos"]) == 2 and not Path(baseline).exists()
    assert [error["name"] for error in document["errors"]] == ["--baseline"] and "have the same reward" in document["errors"][0]["reason"]
    pictures(tmp_path, "c.png", "b.png")
    assert run(*files, baseline=baseline)[1]["baseline"] == json.loads(Path(baseline).read_text())
    monkeypatch.setattr(reward_loading, "load", lambda *_: pytest.fail("the model was loaded first"))
    assert "--baseline measures how far rewards spread and needs at least 2 videos" in run(files[0], baseline=baseline)[2]


def test_no_resume_takes_nothing_from_the_results_and_still_writes_them(run, tmp_path):
    (image,) = pictures(tmp_path, "a.png")
    kept = tmp_path / "kept.jsonl"
    true = run(image, results=str(kept))[1]["videos"][0]["per_video"]
    entry = json.loads(kept.read_text())
    kept.write_text(json.dumps({**entry, "score": {**entry["score"], "per_video": 7.0}}) + "\n")
    assert run(image, results=str(kept))[1]["videos"][0]["per_video"] == 7.0
    assert run(image, results=str(kept), no_resume=True)[1]["videos"][0]["per_video"] == true
    assert run(image, results=str(kept))[1]["videos"][0]["per_video"] == true

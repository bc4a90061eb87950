"""`lab.py score` against every recorded score: the command's own entry is called, and once the whole command line.

Tolerances are those of the fixtures' README.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from safetensors.torch import load_file, save_file

from reward_lab.host import score_command
from reward_lab.labtools import scoring

COSINE, RAW = 1e-5, 2e-4
HPS_FILES = ("hps_tiny.pt", "hps_tiny.safetensors")
MPS_FILES = ("mps_tiny_whole.pth", "mps_tiny_state_dict.pth", "mps_tiny.safetensors", "mps_tiny_imscore.safetensors")


@pytest.fixture
def scorers(shared_fixtures: Path) -> Path:
    """Folder of the recorded scorers."""
    return shared_fixtures / "scorers"


@pytest.fixture
def score(scorers: Path, capsys):
    """Run the command with options; returns its JSON document."""

    def run(kind: str, file: str, paths, **options) -> dict:
        folder = scorers / {"hpsv2": "hps", "mps": "mps"}[kind]
        job = {"paths": [str(path) for path in paths], "kind": kind, "weights": str(folder / file), "config": str(folder / "config.json"), "json": True}
        assert score_command.main(["score", json.dumps({**job, **options})]) == 0, capsys.readouterr().err
        return json.loads(capsys.readouterr().out)

    return run


def rewards(document: dict) -> list[float]:
    return [video["per_video"] for video in document["videos"]]


def recorded(scorers: Path, name: str) -> dict:
    return json.loads((scorers / name / "expected.json").read_text())


@pytest.mark.parametrize("file", HPS_FILES)
@pytest.mark.parametrize(
    ("options", "field"),
    [({}, "score_antialias_on"), ({"antialias": "off"}, "score_antialias_off"), ({"resize": "squash", "antialias": "on"}, "score_squash_antialias_on")],
)
def test_hps_scores_of_a_folder(scorers, score, file, options, field):
    expected = recorded(scorers, "hps")
    for column, prompt in enumerate(expected["prompts"]):
        document = score("hpsv2", file, [scorers / "images"], prompt=prompt, **options)
        assert rewards(document) == pytest.approx([row[column] for row in expected[field]], abs=COSINE)
        assert document["options"]["resize"] == options.get("resize", "letterbox")
        assert (document["warnings"] == []) == (0 < len(prompt) < 300)


def test_hps_cleans_text(scorers, score):
    cleaning = recorded(scorers, "hps")["text_cleaning"]
    for column, prompt in enumerate(cleaning["prompts"]):
        got = rewards(score("hpsv2", HPS_FILES[0], [scorers / "images"], prompt=prompt))
        assert got == pytest.approx([row[column] for row in cleaning["score_antialias_on"]], abs=COSINE)


@pytest.mark.parametrize("form", ["safetensors", "npy", "folder", "webp", "mkv"])
def test_hps_video_in_every_form(scorers, score, tmp_path, form):
    video = recorded(scorers, "hps")["video"]
    first = Image.open(scorers / "images" / video["file"]).convert("RGB")
    pictures = [first, ImageOps.mirror(first), ImageOps.flip(first)]
    path, options = make_video(tmp_path, form, pictures)
    prompt = recorded(scorers, "hps")["prompts"][video["prompt_index"]]
    for resize, per_frame, mean in (("squash", video["per_frame"], video["reward_mean"]), ("letterbox", video["letterbox_per_frame"], video["letterbox_mean"])):
        document = score("hpsv2", HPS_FILES[1], [path], prompt=prompt, resize=resize, **options)
        (found,) = document["videos"]
        assert found["per_frame"] == pytest.approx(per_frame, abs=COSINE)
        assert found["per_video"] == pytest.approx(mean, abs=COSINE)
        assert found["parts"][f"hps_{resize}"]["per_frame"] == found["per_frame"]
        assert found["per_frame"][found["best_frame"]] == max(found["per_frame"])


def make_video(folder: Path, form: str, pictures: list[Image.Image]) -> tuple[Path, dict]:
    """The pictures in a lossless form."""
    pixels = torch.from_numpy(np.stack([np.array(picture) for picture in pictures]))
    path = folder / f"video.{form}"
    if form == "safetensors":
        save_file({"frames": pixels.movedim(-1, 1).float().contiguous() / 255}, path)
    elif form == "npy":
        np.save(path, pixels.numpy())
    elif form == "webp":
        pictures[0].save(path, save_all=True, append_images=pictures[1:], lossless=True, exact=True)
    elif form == "mkv":
        import av

        with av.open(str(path), "w") as container:
            stream = container.add_stream("ffv1", rate=8, options={"level": "3"})
            stream.width, stream.height, stream.pix_fmt = *pictures[0].size, "bgr0"
            for picture in pictures:
                container.mux(stream.encode(av.VideoFrame.from_image(picture)))
            container.mux(stream.encode())
    else:
        path = folder / "frames"
        path.mkdir()
        for index, picture in zip((1, 2, 10), pictures, strict=True):
            picture.save(path / f"{index}.png")
        return path, {"as_video": True}
    return path, {}


@pytest.mark.parametrize("use_antialias", [True, False])
def test_hps_gradient_file(scorers, score, tmp_path, gradient_check, use_antialias):
    (expected,) = (entry for entry in recorded(scorers, "hps")["gradient"] if entry["antialias"] == use_antialias)
    prompt = recorded(scorers, "hps")["prompts"][expected["prompt_index"]]
    options = {"prompt": prompt, "antialias": "on" if use_antialias else "off", "gradients": str(tmp_path / "g.safetensors")}
    assert rewards(score("hpsv2", HPS_FILES[0], [scorers / "images" / expected["file"]], **options)) == pytest.approx([expected["score"]], abs=COSINE)
    gradient_check(load_file(tmp_path / "g.safetensors")[expected["file"]][0], expected)


@pytest.mark.parametrize("file", MPS_FILES)
def test_mps_raw_scores(scorers, score, file):
    expected = recorded(scorers, "mps")
    for condition, tables in expected["raw_score"].items():
        for threshold, table in tables.items():
            for column, prompt in enumerate(expected["prompts"]):
                document = score("mps", file, [scorers / "images"], prompt=prompt, condition=condition, threshold=float(threshold))
                assert rewards(document) == pytest.approx([row[column] for row in table], abs=RAW)
    assert document["options"]["condition_is_experimental"] is (condition != "overall")
    assert set(document["videos"][0]["parts"]) == {"mps_raw", "mps_cosine"}


@pytest.mark.parametrize("normalise", ["sample", "batch"])
def test_mps_batch_of_prompts(scorers, score, tmp_path, normalise):
    expected = recorded(scorers, "mps")
    field = {"sample": "own_normalised", "batch": "batch_normalised"}[normalise]
    (tmp_path / "prompts.json").write_text(json.dumps(expected["prompts"]))
    for condition in ("overall", "aesthetics"):
        for threshold in ("0.01", "0.3"):
            options = {"condition": condition, "threshold": float(threshold), "normalise": normalise, "prompts": str(tmp_path / "prompts.json")}
            got = rewards(score("mps", MPS_FILES[2], [scorers / "images"], **options))
            assert got == pytest.approx(expected["batch"][condition][threshold][field], abs=RAW)


def test_mps_batch_with_pictures_the_other_way_round(scorers, score, tmp_path):
    expected = recorded(scorers, "mps")
    (tmp_path / "prompts.txt").write_text("".join(f"{prompt}\n" for prompt in expected["prompts"]))
    paths = sorted((scorers / "images").glob("*.png"), reverse=True)
    got = rewards(score("mps", MPS_FILES[2], paths, normalise="batch", prompts=str(tmp_path / "prompts.txt")))
    assert got == pytest.approx(expected["batch"]["overall"]["0.01"]["batch_normalised_second_set"], abs=RAW)


def test_mps_the_videox_way(scorers, score, tmp_path, gradient_check):
    expected = recorded(scorers, "mps")
    style, options = expected["videox_style"], {"resize": "squash", "scale": "cosine"}
    for condition, table in style["cosine"].items():
        for column, prompt in enumerate(expected["prompts"]):
            got = rewards(score("mps", MPS_FILES[1], [scorers / "images"], prompt=prompt, condition=condition, **options))
            assert got == pytest.approx([row[column] for row in table], abs=COSINE)
    gradient = style["gradient"]
    prompt = expected["prompts"][gradient["prompt_index"]]
    file = tmp_path / "g.safetensors"
    score("mps", MPS_FILES[1], [scorers / "images" / gradient["file"]], prompt=prompt, gradients=str(file), **options)
    gradient_check(load_file(file)[gradient["file"]][0], gradient)


@pytest.mark.parametrize("normalise", ["sample", "batch"])
def test_mps_batch_of_clips_the_videox_way(scorers, score, tmp_path, normalise):
    expected = recorded(scorers, "mps")
    batch = expected["videox_style"]["batch"]
    picture = Image.open(scorers / "images" / batch["file"]).convert("RGB")
    clip = torch.from_numpy(np.stack([np.array(picture), np.array(ImageOps.mirror(picture))])).movedim(-1, 1).float() / 255
    save_file({"frames": clip.expand(len(expected["prompts"]), -1, -1, -1, -1).contiguous()}, tmp_path / "clips.safetensors")
    (tmp_path / "prompts.json").write_text(json.dumps(expected["prompts"]))
    options = {"resize": "squash", "scale": "cosine", "normalise": normalise, "prompts": str(tmp_path / "prompts.json")}
    got = rewards(score("mps", MPS_FILES[2], [tmp_path / "clips.safetensors"], **options))
    field = {"sample": "cosine_own_normalised", "batch": "cosine_batch_normalised"}[normalise]
    assert got == pytest.approx(batch[field], abs=COSINE)


def test_the_whole_command_line(scorers, repo, comfyui, tmp_path):
    """`lab.py score` as a user types it: one JSON document on standard output and nothing else, also when a bad call ends with a sentence."""
    expected = recorded(scorers, "hps")
    base = [sys.executable, str(repo / "lab.py"), "score", str(scorers / "images" / "02_portrait_208x368.png"), "--comfyui", str(comfyui), "--cpu"]
    base += ["--kind", "hpsv2", "--weights", str(scorers / "hps" / "hps_tiny.pt"), "--config", str(scorers / "hps" / "config.json"), "--json"]
    environ = {**os.environ, "REWARD_LAB_CACHE": str(tmp_path / "cache")}
    done = subprocess.run([*base, "--prompt", expected["prompts"][1]], capture_output=True, text=True, env=environ, check=False)
    assert done.returncode == 0, done.stderr
    assert rewards(json.loads(done.stdout)) == pytest.approx([expected["score_antialias_on"][1][1]], abs=COSINE)
    done = subprocess.run(base, capture_output=True, text=True, env=environ, check=False)
    assert done.returncode == score_command.REFUSED and "give --prompt TEXT or --prompts FILE" in done.stderr and "Traceback" not in done.stderr
    assert json.loads(done.stdout)["reason"] in done.stderr
    done = subprocess.run([*base, "--prompt", "x", "--resize", "round"], capture_output=True, text=True, env=environ, check=False)
    assert done.returncode == score_command.REFUSED and "invalid choice: 'round'" in json.loads(done.stdout)["reason"]


def test_every_kind_is_told_by_the_help():
    from reward_lab.reward_models.spec import KINDS

    assert [kind.strip() for kind in scoring.KINDS.split("|")] == [kind.replace("hpsv2.1", "hpsv2") for kind in KINDS]

"""`lab.py score --kind mix`, and options that would have no effect: what the description may say, and that each row and option is read or refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from reward_lab.host import score_command
from reward_lab.reward_models import arcface
from reward_lab.reward_models.spec import RewardModelSpec, read_rows

FLICKER = {"reward": {"kind": "flicker"}}


@pytest.fixture
def clip(tmp_path) -> Path:
    """A video of random frames."""
    frames = torch.rand(5, 3, 20, 30, generator=torch.Generator().manual_seed(0))
    save_file({"frames": frames}, tmp_path / "x.safetensors")
    return tmp_path / "x.safetensors"


@pytest.fixture
def run(clip, capsys):
    """Score the clip with a kind; returns the document of the scores or of the refusal."""

    def call(kind: str, **options) -> dict:
        status = score_command.main(["score", json.dumps({"paths": [str(clip)], "kind": kind, "json": True, **options})])
        printed = capsys.readouterr()
        document = json.loads(printed.out)
        assert document["verdict"] == {0: "ok", score_command.REFUSED: "refused"}[status]
        return document

    return call


@pytest.fixture
def mix(run, tmp_path):
    """Score the clip with a mix of these rows, or with this description."""

    def call(rows, **options) -> dict:
        path = tmp_path / "mixes" / "mix.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(rows if isinstance(rows, dict) else {"rows": rows}))
        return run("mix", config=str(path), **options)

    return call


def test_files_of_a_mix_are_looked_for_beside_it(mix, run, shared_fixtures, tmp_path, monkeypatch):
    """Weights and sizes; nothing of them is in the current folder. A name of sizes and sizes written out are no files."""
    hps = shared_fixtures / "scorers" / "hps"
    (tmp_path / "mixes").mkdir()
    (tmp_path / "elsewhere").mkdir()
    for name in ("hps_tiny.safetensors", "config.json"):
        (tmp_path / "mixes" / name).write_bytes((hps / name).read_bytes())
    monkeypatch.chdir(tmp_path / "elsewhere")
    single = run("hpsv2", weights=str(hps / "hps_tiny.safetensors"), config=str(hps / "config.json"), prompt="a cat")["videos"][0]["per_video"]
    for config in ("config.json", (hps / "config.json").read_text()):
        reward = {"kind": "hpsv2", "path": "hps_tiny.safetensors", "options": {"config": config}}
        document = mix([{"reward": reward, "weight": 2, "centre": 0.5}], prompt="a cat")
        assert document["videos"][0]["per_video"] == pytest.approx(2 * (single - 0.5), abs=1e-6)
    spec = RewardModelSpec(kind="aesthetic", path="a.pth", options={"clip": "c.pt", "config": "ViT-L-14"}).beside(Path("/m"))
    assert (spec.path, dict(spec.options)) == ("/m/a.pth", {"clip": "/m/c.pt", "config": "ViT-L-14"})
    face = {"detector": "d.pth", "reference": "faces", "landmarks": "/abs/l.safetensors"}
    spec = RewardModelSpec(kind="face", path="r.onnx", options=face).beside(Path("/m"))
    assert dict(spec.options) == {"detector": "/m/d.pth", "reference": "/m/faces", "landmarks": "/abs/l.safetensors"}


def test_a_face_in_a_mix_takes_pictures_as_its_reference(mix, run, clip, tmp_path):
    backbone = arcface.IResNet((1, 1, 1, 1), 32).eval()
    torch.save(backbone.state_dict(), tmp_path / "face.pth")
    frames = load_file(clip)["frames"][:1]
    save_file({"frames": frames}, clip)
    save_file({"landmarks": torch.tensor([[[9.0, 6.0], [19.0, 6.0], [14.0, 10.0], [10.0, 15.0], [18.0, 15.0]]])}, tmp_path / "l.safetensors")
    (tmp_path / "faces").mkdir()
    pixels = (frames[0].movedim(0, -1) * 255).round().byte().numpy()
    Image.fromarray(pixels).save(tmp_path / "faces" / "a.png")
    options = {"landmarks": str(tmp_path / "l.safetensors"), "reference": str(tmp_path / "faces")}
    single = run("face", weights=str(tmp_path / "face.pth"), **options)["videos"][0]["per_video"]
    document = mix([{"reward": {"kind": "face", "path": "../face.pth", "options": {"landmarks": "../l.safetensors", "reference": "../faces"}}, "weight": 2}])
    assert document["videos"][0]["per_video"] == pytest.approx(2 * single, abs=1e-6) and single > 0.9, "the reference is the frame itself"


def test_a_mix_that_reads_no_text_needs_no_prompt(mix, run):
    document = mix([FLICKER, {"reward": {"kind": "dynamic_degree"}, "weight": 0.5, "scale": 2}])
    flicker, degree = (run(kind)["videos"][0]["per_video"] for kind in ("flicker", "dynamic_degree"))
    assert document["videos"][0]["per_video"] == pytest.approx(flicker + 0.25 * degree, abs=1e-5)
    assert "give --prompt" in mix([FLICKER, {"reward": {"kind": "pickscore", "path": "absent.pt"}}])["reason"]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([FLICKER, {"reward": {"kind": "drift"}, "wieght": 3}], "Row 2 of the mix: 'wieght' is unknown; the nearest known name is 'weight'"),
        ([{**FLICKER, "weight": None}], "Row 1 of the mix: weight is None; give a finite number"),
        ([{**FLICKER, "weight": "heavy"}], "Row 1 of the mix: weight is 'heavy'; give a finite number"),
        ([{**FLICKER, "centre": float("nan")}], "Row 1 of the mix: centre is nan"),
        ([{**FLICKER, "scale": 0}], "Row 1 of the mix: scale is 0; it must be above 0"),
        ([{"weight": 1}], "Row 1 of the mix lacks reward"),
        (["flicker"], "Row 1 of the mix: 'flicker' is not an object"),
        ([{"reward": "flicker"}], "Row 1 of the mix: The reward model entry: 'flicker' is not an object"),
        ([{"reward": {"kind": "fliker"}}], "Row 1 of the mix: The reward model entry lacks path"),
        ([{"reward": {"kind": "fliker", "path": "x"}}], "Row 1 of the mix: Reward model kind 'fliker' is unknown"),
        ([{"reward": {"kind": "flicker", "path": "x.pt"}}], "Row 1 of the mix: flicker has no weights, but path is x.pt"),
        ([{"reward": {"kind": "flicker", "options": {"resize": "crop"}}}], "Row 1 of the mix: The options of flicker: 'resize' is unknown"),
        ([{"reward": {"kind": "mps", "path": "x", "options": {"treshold": 1}}}], "'treshold' is unknown; the nearest known name is 'threshold'"),
        ([{"reward": {"kind": "mps", "path": "x", "options": ["threshold"]}}], "Row 1 of the mix: The reward model entry has kind 'mps' and options"),
        ([{"reward": {"kind": "mix"}}], "A mix cannot be part of a mix"),
        ([{"reward": {"kind": "pavrm", "path": "x"}}], "A pavrm cannot be part of a mix: it scores latents"),
        ([FLICKER, FLICKER], "must have different names, got flicker, flicker"),
        ([], "give a list with at least one reward"),
        ({"rows": [FLICKER], "weights": 1}, "'weights' is unknown; the nearest known name is 'rows'"),
        ({}, "The rows of a mix are None"),
    ],
)
def test_descriptions_that_would_not_be_read_as_they_stand(mix, rows, message):
    reason = mix(rows)["reason"]
    assert "mix.json is not the description of a reward mix" in reason and message in reason, reason


@pytest.mark.parametrize(
    ("name", "value"), [("resize", "crop"), ("antialias", "off"), ("stability", True), ("threshold", 0.0), ("weights", "/does/not/exist.pt"), ("clip", "c.pt")]
)
def test_options_without_effect_are_refused(mix, run, name, value):
    assert f"--{name} cannot be set for mix; each row of the mix has files and options of its own" in mix([FLICKER], **{name: value})["reason"]
    assert f"--{name} cannot be set for flicker; its options are none" in run("flicker", **{name: value})["reason"]


def test_two_results_in_one_file_are_refused_before_any_work(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    reason = run("flicker", csv=str(tmp_path / "x.jsonl"), results="x.jsonl")["reason"]
    assert "--csv and --results are both x.jsonl, and the second would replace the first" in reason and not (tmp_path / "x.jsonl").exists()


def test_dtypes_that_would_change_nothing_are_refused_and_a_mix_gives_its_own_to_its_rewards(mix, run):
    assert "--dtype cannot be set for flicker" in run("flicker", dtype="bf16")["reason"]
    assert "--dtype bf16 cannot be set for face, whose recogniser runs in fp32" in run("face", dtype="bf16", weights="/none.pt")["reason"]
    assert "recogniser runs in fp32" not in run("face", dtype="fp32", weights="/none.pt")["reason"]
    assert mix([FLICKER], dtype="bf16")["videos"]
    assert run("flicker", stability=False)["videos"], "a switch that was left alone is no option"


def test_rows_travel_as_json():
    rows = read_rows([{**FLICKER, "weight": 2}, {"name": "looks", "reward": {"kind": "hpsv2", "path": "h.pt", "options": {"resize": "crop"}}, "scale": 0.1}])
    assert [(row.name, row.reward.kind, row.weight, row.scale) for row in rows] == [("flicker", "flicker", 2.0, 1.0), ("looks", "hpsv2.1", 1.0, 0.1)]
    assert read_rows(json.loads(json.dumps([row.to_dict() for row in rows]))) == rows

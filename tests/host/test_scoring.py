"""The scoring nodes: the reward model's own numbers, the curve, and input that cannot be scored."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("comfy.model_management", reason="needs ComfyUI on the path")

import folder_paths  # noqa: E402
import torch  # noqa: E402

from reward_lab.host import paths, score_pictures, scoring  # noqa: E402
from reward_lab.labtools import configs  # noqa: E402
from reward_lab.lora_train import identity  # noqa: E402
from reward_lab.lora_train.input_config import PATHLESS_REWARDS  # noqa: E402
from reward_lab.nodes.rewards import RewardModelNode, ScoreVideo  # noqa: E402
from reward_lab.reward_models.base import reward_and_frame_gradient  # noqa: E402
from reward_lab.reward_models.spec import FILE_OPTIONS, KINDS, PATHLESS  # noqa: E402

pytestmark = pytest.mark.host


@pytest.fixture
def spec(pocket_models: list[dict], repo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The pocket HPS model, chosen through the node."""
    shutil.copy(repo / "pocket" / "weights" / "pocket_HPS_v2.1.safetensors", tmp_path / "tiny.safetensors")
    monkeypatch.setitem(folder_paths.folder_names_and_paths, paths.REWARD_MODEL_FOLDER, ([str(tmp_path)], {".safetensors"}))
    for name in ("temp", "output", "input"):
        monkeypatch.setattr(folder_paths, f"get_{name}_directory", lambda name=name: str(tmp_path / name))
    return RewardModelNode.execute("hpsv2.1", "tiny.safetensors", "default", True).args[0]


def plot_height_without_pictures(output) -> int:
    """Height of the bare chart; the best and the worst frame stand below it."""
    score = json.loads(output.args[2])
    return score_pictures.plot_scores(scoring.VideoScore(model_name="x", prompt="", reward=0.0, per_frame=tuple(score["per_frame"]))).shape[1]


def test_kinds_are_those_of_the_loader() -> None:
    # A mix is made by its own node; a PAVRM is loaded by host/pavrm.py.
    assert {*scoring.REWARD_KINDS, "mix"} == {*KINDS, "pavrm"}
    assert PATHLESS_REWARDS == PATHLESS


def test_files_of_settings_are_known_by_the_same_names_everywhere() -> None:
    """Each layer may import so much; a file that one of them forgot would not be found, or not be compared when a run goes on."""
    # Names and sizes of a CLIP may stand in `config` too.
    assert {*FILE_OPTIONS, "config"} == identity.REWARD_OPTIONS and set(configs.REWARD_FILES) == set(FILE_OPTIONS)
    assert set(configs.DATA_PATHS) == identity.DATA


@pytest.mark.parametrize("in_inference_mode", [False, True])
def test_scores_are_the_models_own(spec, in_inference_mode: bool) -> None:
    images = torch.rand(5, 48, 64, 3, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode(in_inference_mode):
        output = ScoreVideo.execute(spec, "a red square", images)
        # Nothing of the mode is left in what is kept: the same model gives gradients at once, with the text from its cache.
        model = scoring._loaded(spec, torch.device("cpu"))
        _, gradient = reward_and_frame_gradient(model, images.movedim(-1, 1)[None].clone(), ["a red square"], 2)
    assert gradient.abs().sum() > 0 and not any(parameter.is_inference() for parameter in model.network.parameters())
    reward, plot, text, table = output.args
    expected = spec.load().score(images.movedim(-1, 1)[None], ["a red square"])
    values = json.loads(text)
    assert values["per_frame"] == pytest.approx(expected.per_frame[0].tolist(), abs=1e-5)
    assert reward == pytest.approx(float(expected.per_video[0]), abs=1e-5)
    assert values["per_frame"][values["best_frame"]] == max(values["per_frame"]) and plot.shape[-1] == 3
    assert len(output.ui["images"]) == 1 and "best frame" in output.ui["text"][0]
    rows = list(csv.DictReader(Path(table).read_text(encoding="utf-8").splitlines()))
    assert [float(row["hps_letterbox"]) for row in rows if row["frame"]] == values["parts"]["hps_letterbox"]["per_frame"] == values["per_frame"]
    assert plot.shape[1] > plot_height_without_pictures(output)


def test_model_is_loaded_once_until_its_file_changes(spec) -> None:
    device = torch.device("cpu")
    first = scoring._loaded(spec, device)
    assert scoring._loaded(spec, device) is first
    path = Path(spec.path)
    path.write_bytes(path.read_bytes() + b"")
    path.touch()
    assert scoring._loaded(spec, device) is not first


def test_what_cannot_be_scored_is_refused(spec) -> None:
    with pytest.raises(ValueError, match="no frames"):
        ScoreVideo.execute(spec, "a cat", torch.zeros(0, 8, 8, 3))
    with pytest.raises(ValueError, match="prompt is empty"):
        ScoreVideo.execute(spec, " ", torch.zeros(1, 8, 8, 3))
    with pytest.raises(ValueError, match="got nothing to score"):
        ScoreVideo.execute(spec, "a cat")
    with pytest.raises(ValueError, match="got images, path"):
        ScoreVideo.execute(spec, "a cat", torch.zeros(1, 8, 8, 3), path="x.mp4")
    with pytest.raises(ValueError, match="not among the reward_models files"):
        RewardModelNode.execute("hpsv2.1", "absent.pt", "default", True)
    with pytest.raises(ValueError, match="resize is 'round'"):
        RewardModelNode.execute("hpsv2.1", "tiny.safetensors", "round", True)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.rand(2, 8, 8), r"shape \(2, 8, 8\), as a MASK has"),
        (torch.rand(2, 8, 8, 1), "1 channels; 3 .RGB. are needed; repeat the grey"),
        (torch.rand(2, 8, 8, 5), "5 channels"),
        (torch.rand(2, 8, 0, 3), "has no frames"),
        (torch.rand(2, 8, 8, 3) * 255, r"range from .* to 25\d.*x / 255 for 8-bit"),
        (torch.rand(2, 8, 8, 3) * 2 - 1, r"range from -.*rescale \(x \+ 1\) / 2"),
        (torch.full((2, 8, 8, 3), float("nan")), "hold NaN; the decoder or sampler"),
        (torch.full((2, 8, 8, 3), float("inf")), "range from inf to inf"),
    ],
)
def test_images_that_are_no_frames_are_named(spec, images, message) -> None:
    with pytest.raises(ValueError, match=message):
        ScoreVideo.execute(spec, "a cat", images)


def test_what_was_done_to_frames_and_text_is_told_at_every_score(spec) -> None:
    images = torch.rand(2, 20, 20, 4, generator=torch.Generator().manual_seed(1)) * 1.1 - 0.05
    for _ in range(2):
        output = ScoreVideo.execute(spec, "word " * 80, images)
        text, warnings = output.ui["text"][0], json.loads(output.args[2])["warnings"]
        assert len(warnings) == 3 and all(warning in text for warning in warnings)
        assert "transparency, which is dropped" in text and "clipped, as on saving" in text and "80 tokens, 75 fit: it is cut after '...word" in text
    plain = ScoreVideo.execute(spec, "a cat", images[..., :3].clamp(0, 1))
    assert plain.args[0] == pytest.approx(ScoreVideo.execute(spec, "a cat", images).args[0], abs=1e-6)
    assert json.loads(plain.args[2])["warnings"] == []

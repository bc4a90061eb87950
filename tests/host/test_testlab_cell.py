"""What TestLab Cell refuses before it scores or records anything."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("comfy.model_management", reason="needs ComfyUI on the path")

import folder_paths  # noqa: E402
import torch  # noqa: E402

from reward_lab.host import testlab_nodes  # noqa: E402

pytestmark = pytest.mark.host
GOOD = torch.zeros(2, 8, 8, 3)


@pytest.mark.parametrize(
    ("images", "applied", "message"),
    [
        (torch.zeros(0, 8, 8, 3), "", r"no frames \(shape \(0, 8, 8, 3\)\)"),
        (torch.zeros(8, 8, 3), "", "no frames"),
        (torch.full((1, 8, 8, 3), float("nan")), "", "NaN or infinity"),
        (GOOD, "{", "not from it"),
        (GOOD, '{"sweep": 5}', "not from it"),
        (GOOD, '{"sweep": "../x", "key": "a", "axes": []}', "sweep"),
    ],
)
def test_what_cannot_be_recorded_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, images: torch.Tensor, applied: str, message: str) -> None:
    monkeypatch.setattr(folder_paths, "get_output_directory", lambda: str(tmp_path))
    with pytest.raises(ValueError, match=message):
        testlab_nodes.record(images, "x", "a cat", None, 8.0, applied, {})
    assert list(tmp_path.rglob("*")) == []


def test_outside_of_a_sweep_frames_pass_through(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder_paths, "get_output_directory", lambda: str(tmp_path))
    result = testlab_nodes.record(GOOD, "x", "", None, 8.0, "", {})
    assert result.scores_json == "{}" and "pass through" in result.message
    assert list(tmp_path.rglob("*")) == []

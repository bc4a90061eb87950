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

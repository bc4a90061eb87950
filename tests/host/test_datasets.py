"""Datasets as PAVRM training takes them in: a second list of losers, and files that are broken, with random small latents and no models."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("torch")
pytest.importorskip("comfy.sd", reason="needs ComfyUI on the path")

import numpy as np  # noqa: E402
import torch  # noqa: E402

from reward_lab.host import pavrm_worker  # noqa: E402
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

"""The shipped pocket models: what the manifest claims is what lies there, and the claims reach the goals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors import safe_open


@pytest.fixture(scope="module")
def manifest(repo: Path) -> dict:
    return json.loads((repo / "pocket" / "MANIFEST.json").read_text(encoding="utf-8"))


def test_files_are_whole_and_small(pocket_models, manifest) -> None:
    assert len(pocket_models) == 11
    assert sum(entry["bytes"] for entry in manifest["files"]) <= 32 * 10**6


def test_measured_quality_reaches_the_goals(manifest) -> None:
    quality = manifest["quality"]
    assert min(quality["oracle on ground truth"].values()) >= 0.99
    assert quality["vae"]["psnr_db"] >= 28 and quality["vae"]["oracle_right"] >= 0.97
    assert quality["hpsv2.1"]["right_caption"] >= 0.90 and quality["mps"]["right_caption"] >= 0.90
    accuracy = {float(name.split()[1]): value for name, value in quality["pavrm"].items()}
    assert min(value for sigma, value in accuracy.items() if sigma <= 0.8) >= 0.85
    base = quality["base generator on held-out prompts"]
    assert 0.60 <= base["colour"] <= 0.85 and 0.50 <= base["motion"] <= 0.80


def test_experts_are_better_on_their_own_noise(manifest) -> None:
    loss = manifest["quality"]["flow-matching loss"]
    for own, other in (("high", "low"), ("low", "high")):
        assert loss[f"{own} expert on {own} noise"] < loss[f"{other} expert on {own} noise"]


def test_reward_loras_have_the_official_layout(repo, pocket_models) -> None:
    names = [entry["name"] for entry in pocket_models if entry["folder"] == "loras"]
    assert sorted(name.split("A14B-")[1] for name in names) == [
        "high-noise-HPS2.1.safetensors", "high-noise-MPS.safetensors", "low-noise-HPS2.1.safetensors", "low-noise-MPS.safetensors",
    ]  # fmt: skip
    for name in names:
        with safe_open(repo / "pocket" / "weights" / name, "pt") as file:
            keys = set(file.keys())
            down = file.get_tensor("lora_unet__blocks_0_self_attn_q.lora_down.weight")
            assert float(file.get_tensor("lora_unet__blocks_0_self_attn_q.alpha")) == down.shape[0] / 2
            assert file.metadata()["expert"] in name
            # 6 blocks of 8 attention layers, two text, two time, the time projection and the head; feed-forward left out.
            assert len(keys) == 3 * (6 * 8 + 6) and not any("ffn" in key for key in keys)

"""A frame attacked by gradient ascent on one reward: the attack works, and another judge notices."""

from __future__ import annotations

import json

import pytest

pytestmark = pytest.mark.host


@pytest.fixture(scope="module")
def weights(repo, comfyui, pocket_models):
    return repo / "pocket" / "weights"


def test_an_attacked_reward_is_noticed(weights) -> None:
    from reward_lab.pocket import adversarial

    measured = adversarial.measure(weights, count=6, steps=20)
    clean, attacked, prompt, rewards, is_shown = measured.pop("_pictures")
    assert measured["hpsv2.1"]["after"] > measured["hpsv2.1"]["before"] and measured["fooled"] > 0.3, "else there is no attack to notice"
    assert (attacked - clean).abs().max() <= adversarial.REACH + 1e-6
    assert measured["noticed"] > 0.8
    picture = adversarial.picture(clean, attacked, prompt, rewards, is_shown)
    assert picture.width > 700 and len(set(picture.getdata())) > 50


def test_the_page_tells_what_the_command_measured(repo) -> None:
    attacks = json.loads((repo / "benchmarks" / "results" / "adversarial.json").read_text(encoding="utf-8"))["attacks"]
    page = " ".join((repo / "web" / "docs" / "RewardLabRewardModel.md").read_text(encoding="utf-8").split())
    for attack, name, other in zip(attacks, ("HPS", "MPS"), ("MPS", "HPS"), strict=True):
        fooled = round(attack["fooled"] * attack["frames"])
        together, alone = (round(attack[part] * fooled) for part in ("noticed", "noticed_by_other_reward"))
        assert f"{name} on {fooled} of {attack['frames']}" in page or f"{name} was fooled on {fooled} of {attack['frames']}" in page
        assert f"together noticed {together} of {fooled}" in page
        assert f"{other} alone noticed {alone} of {fooled}" in page or f"{other} alone {alone} of {fooled}" in page


def test_pavrm_as_a_lora_of_full_rank_judges_as_the_pavrm(weights) -> None:
    from reward_lab.pocket import pavrm_lora

    whole, lora = pavrm_lora.measure(weights, 16, ranks=(160,))
    assert lora["relative_error"] < 1e-3
    assert lora["accuracy"] == pytest.approx(whole["accuracy"], abs=0.02)


def test_pavrm_trained_as_a_lora_is_judged_from_its_file(weights, tmp_path) -> None:
    """The comparison of `bench pavrm-lora`, with a few updates on random latents: every way runs and is read back."""
    import torch

    from reward_lab.lora_train.pavrm_data import Learnable
    from reward_lab.pocket import pavrm_bench, pavrm_lora
    from reward_lab.pocket.stages import dit

    generator = torch.Generator().manual_seed(1)
    part = {"latents": torch.randn(8, 16, 2, 4, 4, generator=generator), "texts": torch.randn(8, 6, 128, generator=generator), "labels": [0, 1] * 4}
    examples = pavrm_bench.examples({**part, "captions": ["x"] * 8}, "v")
    learnable = Learnable(train=examples, held_out=examples)
    rows = [pavrm_lora.trained(way, learnable, weights / dit.FILE_NAMES["low"], tmp_path / way.name, updates=2) for way in pavrm_lora.WAYS]
    sizes = [row["bytes"] for row in rows]
    assert sizes[1] < sizes[2] < sizes[0] and rows[3]["trained_in_blocks"] == 0 < rows[1]["trained_in_blocks"] < rows[2]["trained_in_blocks"]
    assert all(0 <= row["accuracy"] <= 1 and len([key for key in row if key.startswith("sigma")]) == len(pavrm_lora.SIGMAS) for row in rows)

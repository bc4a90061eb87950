"""A frame attacked by gradient ascent on one reward: the attack works, and another judge notices."""

from __future__ import annotations

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


def test_pavrm_as_a_lora_of_full_rank_judges_as_the_pavrm(weights) -> None:
    from reward_lab.pocket import pavrm_lora

    whole, lora = pavrm_lora.measure(weights, 16, ranks=(160,))
    assert lora["relative_error"] < 1e-3
    assert lora["accuracy"] == pytest.approx(whole["accuracy"], abs=0.02)

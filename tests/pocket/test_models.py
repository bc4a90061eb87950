"""Small samples of what `lab.py bench pocket` measures in full, through the pack's loaders, so that a broken model or loader shows at once."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.host


@pytest.fixture(scope="module")
def weights(repo, comfyui, pocket_models):
    return repo / "pocket" / "weights"


def test_vae_keeps_what_the_oracle_reads(weights) -> None:
    from reward_lab.pocket import quality

    measured = quality.vae_quality(weights, count=12)
    assert measured["psnr_db"] > 27.5 and measured["oracle_right"] > 0.95


@pytest.mark.parametrize("kind", ["hpsv2.1", "mps"])
def test_reward_models_prefer_the_right_caption(weights, kind) -> None:
    from reward_lab.pocket import quality

    assert quality.preference_accuracy(weights, kind, count=60)["right_caption"] > 0.85


def test_pavrm_tells_good_motion_from_bad(weights) -> None:
    from reward_lab.pocket import quality

    assert quality.pavrm_accuracy(weights, count=40)["sigma 0.2"] > 0.8


def test_the_same_seed_gives_the_same_video_and_a_lora_changes_it(weights) -> None:
    import torch

    from reward_lab.pocket.generate import Generator
    from reward_lab.pocket.stages import loras

    generator, prompts = Generator(weights), ["a red square moves left fast over a gray background"]
    base = generator.latents(prompts, [3])
    rows = [(weights / f"{loras.NAME}-high-noise-HPS2.1.safetensors", "high", 1.0)]
    assert not torch.allclose(base, generator.latents(prompts, [3], rows))
    assert torch.equal(base, generator.latents(prompts, [3]))
    # Steps of the high-noise expert that were kept from the calls before are those that a new generator makes.
    rows = [(weights / f"{loras.NAME}-low-noise-HPS2.1.safetensors", "low", 1.0)]
    assert torch.equal(generator.latents(prompts, [3], rows), Generator(weights).latents(prompts, [3], rows))

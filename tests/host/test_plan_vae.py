"""The plan's figures of decoding against the decoder itself, on fake tensors of the published width."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.host
WIDTH, HEIGHT = 832, 480
OPERATIONS, PEAK = 0.01, 0.06


def scored(latents, **changes):
    from reward_lab.lora_train.planning.scoring import Scored

    return Scored(**{"pixels": WIDTH * HEIGHT, "latents": latents, "frames": 0, "total_frames": 4 * latents - 3, "batch": 1, "element_bytes": 2, **changes})


@pytest.mark.parametrize("keep_place", ["device", "host"])
@pytest.mark.parametrize("latents", [1, 2, 3, 7])
def test_peaks_and_operations(comfyui, latents, keep_place):
    from reward_lab.host.dry_run import dry_decode
    from reward_lab.lora_train.planning.scoring import decode_bytes, decode_flops, look_bytes

    seen = dry_decode(latents, WIDTH, HEIGHT, keep_place)
    card, host = decode_bytes(scored(latents), keep_place)
    print(latents, keep_place, seen["gradient"].card_bytes / 1e9, card / 1e9, seen["gradient"].host_bytes / 1e9, host / 1e9)
    assert seen["gradient"].card_bytes == pytest.approx(card, rel=PEAK)
    assert seen["gradient"].host_bytes == pytest.approx(host, rel=PEAK)
    assert seen["gradient"].flops == pytest.approx(decode_flops(scored(latents)), rel=OPERATIONS)
    if latents > 2:
        assert seen["stream"].card_bytes == pytest.approx(look_bytes(scored(latents), False), rel=PEAK)


def test_a_longer_video_takes_no_more_of_the_card(comfyui):
    """Caches on the host: what still grows are the frames themselves. Without gradient nothing does but the latent."""
    from reward_lab.host.dry_run import dry_decode

    short, long = (dry_decode(latents, 256, 256, "host") for latents in (5, 9))
    frames = 16 * 3 * 256 * 256 * (4 + 4 + 2 + 2 + 4)
    assert long["gradient"].card_bytes - short["gradient"].card_bytes <= 1.1 * frames
    assert long["stream"].card_bytes <= 1.01 * short["stream"].card_bytes

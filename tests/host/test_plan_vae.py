"""The plan's figures of decoding against the decoder itself, on fake tensors of the published width."""

from __future__ import annotations

from functools import cache

import pytest

pytestmark = pytest.mark.host
WIDTH, HEIGHT = 832, 480
LAYOUTS = ("wan2.1", "wan2.2")
OPERATIONS, PEAK = 0.01, 0.06


def scored(latents, **changes):
    from reward_lab.lora_train.planning.scoring import Scored

    values = {"pixels": WIDTH * HEIGHT, "latents": latents, "frames": 0, "tower": 0.0, "batch": 1, "element_bytes": 2}
    return Scored(**{**values, **changes})


@cache
def seen(latents, keep_place, vae):
    from reward_lab.host.dry_run import dry_decode

    return dry_decode(latents, WIDTH, HEIGHT, keep_place, vae=vae)


@pytest.mark.parametrize("vae", LAYOUTS)
@pytest.mark.parametrize(("latents", "keep_place"), [(1, "host"), (2, "host"), (3, "host"), (5, "host"), (7, "host"), (2, "device"), (5, "device")])
def test_peaks_and_operations(comfyui, latents, keep_place, vae):
    from reward_lab.lora_train.planning.scoring import decode_bytes, decode_flops, shown_bytes, shown_flops

    found, here = seen(latents, keep_place, vae), scored(latents, vae=vae)
    card, host = decode_bytes(here, keep_place)
    print(latents, keep_place, found["gradient"].card_bytes / 1e9, card / 1e9, found["gradient"].host_bytes / 1e9, host / 1e9)
    assert found["gradient"].card_bytes == pytest.approx(card, rel=PEAK)
    assert found["gradient"].host_bytes == pytest.approx(host, rel=PEAK)
    assert found["gradient"].flops == pytest.approx(decode_flops(here), rel=OPERATIONS)
    assert found["stream"].flops == pytest.approx(shown_flops(here, 4 * latents - 3), rel=OPERATIONS)
    if latents > 2:
        assert found["stream"].card_bytes == pytest.approx(shown_bytes(here, 1, 4 * latents - 3, 0), rel=PEAK)


def test_a_longer_video_takes_no_more_of_the_card(comfyui):
    """Caches on the host: what still grows are the frames themselves. Without gradient nothing does but the latent."""
    short, long = seen(3, "host", "wan2.1"), seen(5, "host", "wan2.1")
    frames = 8 * 3 * WIDTH * HEIGHT * (4 + 4 + 2 + 2 + 4)
    assert long["gradient"].card_bytes - short["gradient"].card_bytes <= 1.1 * frames
    assert long["stream"].card_bytes <= 1.01 * short["stream"].card_bytes

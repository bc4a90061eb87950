"""Bytes and operations of decoding and scoring a video: the VAE's decoder, and a CLIP-sized reward model on its frames.

The decoder's figures are counted on fake tensors of the published architecture (Wan2.1 VAE, width 96, bf16) running through `host/vae_gradient.py`; all of it
grows with the pixels of a frame. tests/host/test_plan_vae.py holds them to that count.
"""

from __future__ import annotations

from dataclasses import dataclass

# Bytes per pixel of a frame at the height of decoding one latent (no feature caches), two, three (a whole chunk) and five; then per further chunk of two.
_CARD = {"device": ((3170, 25590, 34840, 49280), 4980), "host": ((3170, 8310, 9260, 9510), 250)}
# The same of feature caches that wait in host memory.
_HOST = {"device": ((0, 0, 0, 0), 0), "host": ((0, 12300, 22520, 31970), 4740)}
# Without gradient (samples, looks): the pieces in work, and the frames themselves, fp32.
_STREAM, _FRAME = 6850, 12
# Operations per pixel of a frame with all that runs again and backward (counted): a lone first frame, the first of several, each later one.
_FLOPS_ALONE, _FLOPS_FIRST, _FLOPS_LATER = 12.9e6, 17.2e6, 40.3e6
# Without gradient (counted): the first frame, each later one.
_FLOPS_SHOWN_FIRST, _FLOPS_SHOWN_LATER = 4.25e6, 8.48e6
_COUNTED_IN_BYTES = 2
# Pictures that a reward model sees at once with gradient on a card (`objectives/common.py`): there, each of a CLIP's takes 0.6 GB.
FRAMES_ON_CARD = 8
# Activations of a CLIP ViT-H/14 picture tower in fp32 with gradient, a frame (counted).
_TOWER_BYTES = 602_000_000
# Its weights in fp32 (both towers), and the VAE's elements.
CLIP_BYTES, VAE_ELEMENTS = 3_944_000_000, 126_900_000


@dataclass(frozen=True, kw_only=True)
class Scored:
    """What of a video is decoded and scored with gradient.

    Attributes:
        pixels: of one frame.
        latents: decoded together, with their history; 0: nothing is decoded.
        frames: scored by the reward model in one piece.
        tower: size of the reward's largest CLIP as a share of ViT-H/14; 0 without one.
        batch: videos at once.
        element_bytes: of the decoder's type.
        width: of the decoder, as a share of the published one.
    """

    pixels: int
    latents: int
    frames: int
    tower: float
    batch: int
    element_bytes: int
    width: float = 1.0


def decode_bytes(scored: Scored, keep_place: str) -> tuple[int, int]:
    """Bytes on card and host at the height of a decode with gradient; `keep_place`: where feature caches wait, `device` or `host`."""
    size = scored.pixels * scored.batch * scored.element_bytes / _COUNTED_IN_BYTES * scored.width
    return int(_per_pixel(_CARD[keep_place], scored.latents) * size), int(_per_pixel(_HOST[keep_place], scored.latents) * size)


def _per_pixel(table: tuple[tuple[int, ...], int], latents: int) -> int:
    known, more = table
    if latents <= 3:
        return 0 if latents == 0 else known[latents - 1]
    return known[3] + more * max(0, latents // 2 - 2)


def tower_bytes(scored: Scored) -> int:
    """Activations of the reward model for the frames that it scores in one piece, beside the frames and their gradient."""
    return scored.batch * scored.frames * int(_TOWER_BYTES * scored.tower + 2 * _FRAME * scored.pixels) if scored.latents else 0


def shown_bytes(scored: Scored, videos: int, held_frames: int) -> int:
    """Decoding without gradient. `held_frames`: of each video, kept for a reward model; 0 where frames are let go piece by piece."""
    return scored.pixels * videos * (int(_STREAM * scored.width) * scored.element_bytes // _COUNTED_IN_BYTES + _FRAME * held_frames)


def shown_flops(scored: Scored, frames: int) -> float:
    """Operations of decoding so many frames of one video, from its first one, without gradient."""
    return scored.pixels * (_FLOPS_SHOWN_FIRST + (frames - 1) * _FLOPS_SHOWN_LATER) * scored.width**2


def decode_flops(scored: Scored) -> float:
    """Operations of a decode with gradient, forward and backward."""
    if scored.latents == 0:
        return 0.0
    first = _FLOPS_ALONE if scored.latents == 1 else _FLOPS_FIRST
    return scored.batch * scored.pixels * (first + 4 * (scored.latents - 1) * _FLOPS_LATER) * scored.width**2

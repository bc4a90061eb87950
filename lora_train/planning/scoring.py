"""Bytes and operations of decoding and scoring a video: the VAE's decoder, and a CLIP-sized reward model on its frames.

The decoders' figures are counted on fake tensors of the published architectures (Wan2.1 VAE, width 96; Wan2.2 VAE, width 256; bf16) running through
`host/vae_gradient.py` and `host/vae22_gradient.py`; all of it grows with the pixels of a frame. tests/host/test_plan_vae.py holds them to that count.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

_FRAME = 12  # fp32
_COUNTED_IN_BYTES = 2
# Pictures that a reward model sees at once with gradient on a card (`objectives/common.py`): there, each of a CLIP's takes 0.6 GB.
FRAMES_ON_CARD = 8
# Activations of a CLIP ViT-H/14 picture tower in fp32 with gradient, a frame (counted).
_TOWER_BYTES = 602_000_000
# Its weights in fp32 (both towers).
CLIP_BYTES = 3_944_000_000


@dataclass(frozen=True)
class _Growth:
    """Bytes per pixel of a frame by latents: of the first few numbers of them, then `more` for every further `step`."""

    known: tuple[int, ...]
    more: float = 0
    step: int = 1

    def at(self, latents: int) -> float:
        if latents <= len(self.known):
            return self.known[latents - 1] if latents else 0
        return self.known[-1] + self.more * ceil((latents - len(self.known)) / self.step)


@dataclass(frozen=True, kw_only=True)
class Vae:
    """A published VAE, with its decoder's costs per pixel of a frame.

    Attributes:
        width: channels of the decoder's widest picture.
        card, host: bytes of a decode with gradient, by the place where feature caches wait.
        shown: bytes on the card of a decode without gradient.
        has_pieces: frames that are kept come beside `shown`; else a video is made as a whole, and counted in it.
        flops: operations with all that runs again and backward: of a lone first frame, of the first of several, of each later one.
        shown_flops: the same without gradient: of the first frame, of each later one.
    """

    elements: int
    width: int
    card: dict[str, _Growth]
    host: dict[str, _Growth]
    shown: _Growth
    has_pieces: bool
    flops: tuple[float, float, float]
    shown_flops: tuple[float, float]


VAES = {
    # Latents go through two at a time.
    "wan2.1": Vae(
        elements=126_900_000,
        width=96,
        card={"device": _Growth((3170, 25590, 34840, 49280, 49280), 4980, 2), "host": _Growth((3170, 8310, 9260, 9510, 9510), 250, 2)},
        host={"device": _Growth((0,)), "host": _Growth((0, 12300, 22520, 31970, 31970), 4740, 2)},
        shown=_Growth((6850,)),
        has_pieces=True,
        flops=(12.9e6, 17.2e6, 40.3e6),
        shown_flops=(4.25e6, 8.48e6),
    ),
    # One at a time; without gradient the host's decoder gives the video as a whole.
    "wan2.2": Vae(
        elements=704_700_000,
        width=256,
        card={"device": _Growth((3020, 17850, 32310), 3690), "host": _Growth((2610, 12270, 12390), 122)},
        host={"device": _Growth((0,)), "host": _Growth((1740, 5310, 10740, 16050), 3570)},
        shown=_Growth((2270, 7160, 7720), 25.5),
        has_pieces=False,
        flops=(28.5e6, 38.0e6, 73.6e6),
        shown_flops=(9.5e6, 18.4e6),
    ),
}


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
        vae: a key of `VAES`.
    """

    pixels: int
    latents: int
    frames: int
    tower: float
    batch: int
    element_bytes: int
    width: float = 1.0
    vae: str = "wan2.1"


def decode_bytes(scored: Scored, keep_place: str) -> tuple[int, int]:
    """Bytes on card and host at the height of a decode with gradient; `keep_place`: where feature caches wait, `device` or `host`."""
    vae, size = VAES[scored.vae], scored.pixels * scored.batch * scored.element_bytes / _COUNTED_IN_BYTES * scored.width
    return int(vae.card[keep_place].at(scored.latents) * size), int(vae.host[keep_place].at(scored.latents) * size)


def tower_bytes(scored: Scored) -> int:
    """Activations of the reward model for the frames that it scores in one piece, beside the frames and their gradient."""
    return scored.batch * scored.frames * int(_TOWER_BYTES * scored.tower + 2 * _FRAME * scored.pixels) if scored.latents else 0


def shown_bytes(scored: Scored, videos: int, frames: int, held_frames: int) -> int:
    """Decoding so many frames of each video, from its first one, without gradient. `held_frames`: of each, kept together for a reward model."""
    vae = VAES[scored.vae]
    decoder = int(vae.shown.at((frames + 3) // 4) * scored.width) * scored.element_bytes // _COUNTED_IN_BYTES
    return scored.pixels * videos * (decoder + (_FRAME * held_frames if vae.has_pieces else 0))


def shown_flops(scored: Scored, frames: int) -> float:
    """Operations of decoding so many frames of one video, from its first one, without gradient."""
    first, later = VAES[scored.vae].shown_flops
    return scored.pixels * (first + (frames - 1) * later) * scored.width**2


def decode_flops(scored: Scored) -> float:
    """Operations of a decode with gradient, forward and backward."""
    if scored.latents == 0:
        return 0.0
    alone, first, later = VAES[scored.vae].flops
    return scored.batch * scored.pixels * ((alone if scored.latents == 1 else first) + 4 * (scored.latents - 1) * later) * scored.width**2

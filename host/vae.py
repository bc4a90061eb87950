"""The Wan2.1 VAE as a differentiable decoder.

It calls the network itself, not the host's `VAE.decode`: that one falls back to tiles in inference mode when memory is short, and the gradient
vanishes without a word. It decodes only as much as the asked frames need: the decoder is causal, so frames up to the last asked latent suffice, and a
lone first latent is decoded without the feature cache. With gradient, layers run again in backward (`vae_gradient.py`). Without one, and in encoding, a
video goes through piece by piece: besides what goes in and comes out, memory does not grow with its length.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import comfy.latent_formats
import comfy.ldm.wan.vae
import comfy.sd
import comfy.utils
import torch
from comfy.ldm.wan.vae import count_cache_layers

from ..lora_train.safetensors_file import read_header
from . import vae22_gradient, vae_gradient
from .wan import freeze

FRAMES_PER_LATENT = 4
# The host's step through a video after its first frame: latents in decoding, pixel frames in encoding.
_STEP = 2


class WanDecoder:
    """See `lora_train.protocols.Decoder`."""

    def __init__(self, network: torch.nn.Module, *, dtype: torch.dtype, device: torch.device) -> None:
        """Args:
        network: the host's WanVAE.
        """
        freeze(network)
        self.network = _laid_out(network.to(device, dtype), device)
        self.dtype = dtype
        self.device = device
        # Where feature caches of a decode with gradient wait for backward; the plan may put them on the host.
        self.keep_device = device
        # The host's network for Wan2.1 walks through a video in pieces that can be had one by one; others run whole.
        self._has_pieces = isinstance(network, comfy.ldm.wan.vae.WanVAE)
        self._format = comfy.latent_formats.Wan21()

    def decode(self, latent_BCFHW: torch.Tensor, selection: range | None = None) -> torch.Tensor:
        """Pixels of consecutive latent frames.

        Args:
            latent_BCFHW: [B, 16, F, H, W] in model space.
            selection: which latent frames, a range with step 1 inside 0..F; None takes all.

        Returns:
            frames_BFCHW, [B, T, 3, 8H, 8W] fp32 in [0, 1], as reward models take them. Latent frame 0 gives one pixel frame, every later one
            four. Pixels outside of the range are clamped, as the host and VideoX-Fun do, so they get no gradient. Differentiable where the latent
            wants gradient.

        Raises:
            ValueError: `selection` is empty or outside of the latent.
        """
        total = latent_BCFHW.shape[2]
        selection = range(total) if selection is None else selection
        if len(selection) == 0 or selection.step != 1 or not 0 <= selection.start < selection.stop <= total:
            raise ValueError(f"selection is {selection}, but the latent has {total} frames; ask for consecutive ones from 0 to {total - 1}")
        latent = self._format.process_out(latent_BCFHW[:, :, : selection.stop].float()).to(self.dtype)
        first = pixel_frames(selection).start
        if torch.is_grad_enabled() and latent.requires_grad:
            again = vae_gradient if self._has_pieces else vae22_gradient
            return _shown(again.decode(self.network, latent, self.keep_device)[:, :, first:])
        frames, done = None, 0
        for piece in self._pieces(latent, first):
            if frames is None:
                frames = piece.new_empty(piece.shape[0], len(pixel_frames(selection)), *piece.shape[2:])
            frames[:, done : done + piece.shape[1]] = piece
            done += piece.shape[1]
        return frames

    @torch.no_grad()
    def stream(self, latent_BCFHW: torch.Tensor) -> Iterator[torch.Tensor]:
        """The frames of `decode` in pieces of at most two latents' worth, for who does not want a whole video in memory."""
        yield from self._pieces(self._format.process_out(latent_BCFHW.float()).to(self.dtype))

    def _pieces(self, latent_BCFHW: torch.Tensor, first: int = 0) -> Iterator[torch.Tensor]:
        """Pieces [B, T, 3, H, W] of the video from frame `first` on, by the host's decoder."""
        if not self._has_pieces:
            yield _shown(self.network.decode(latent_BCFHW)[:, :, first:])
            return
        x, done = self.network.conv2(latent_BCFHW), 0
        caches = [None] * count_cache_layers(self.network.decoder) if x.shape[2] > 1 else None
        for start, stop in _steps(x.shape[2]):
            for piece in self.network.decoder(x[:, :, start:stop], feat_cache=caches, feat_idx=[0]):
                wanted = piece[:, :, max(0, first - done) :]
                done += piece.shape[2]
                if wanted.shape[2]:
                    yield _shown(wanted)

    def encode(self, frames_BFCHW: torch.Tensor) -> torch.Tensor:
        """Latents in model space [B, 16, F, H/8, W/8] fp32 of pixels in [0, 1] [B, T, 3, H, W], T = 4n+1; frames go to the device piece by piece."""
        total = 1 + (frames_BFCHW.shape[1] - 1) // FRAMES_PER_LATENT * FRAMES_PER_LATENT
        return self.encode_pieces(frames_BFCHW[:, start:stop] for start, stop in _steps(total))

    @torch.no_grad()
    def encode_pieces(self, pieces: Iterable[torch.Tensor]) -> torch.Tensor:
        """As `encode`, of a video that comes in pieces [B, T, 3, H, W]: one frame, then two at a time, 4n+1 in all."""
        if not self._has_pieces:
            frames = torch.cat(list(pieces), dim=1)
            return self._format.process_in(self.network.encode(self._pixels(frames)).float())
        encoder, made, caches = self.network.encoder, [], None
        for piece, is_last in _with_last(pieces):
            if not made and not is_last:
                caches = [None] * count_cache_layers(encoder)
            out = encoder(self._pixels(piece), feat_cache=caches, feat_idx=[0], final=is_last)
            made += [] if out is None else [out]
        mean, _ = self.network.conv1(torch.cat(made, dim=2)).chunk(2, dim=1)
        return self._format.process_in(mean.float())

    def _pixels(self, frames_BFCHW: torch.Tensor) -> torch.Tensor:
        """Frames as the network takes them."""
        return (frames_BFCHW.transpose(1, 2).to(self.device) * 2 - 1).to(self.dtype)


def _with_last(pieces: Iterable[torch.Tensor]) -> Iterator[tuple[torch.Tensor, bool]]:
    """Each piece, and whether it is the last one."""
    waiting = None
    for piece in pieces:
        if waiting is not None:
            yield waiting, False
        waiting = piece
    if waiting is not None:
        yield waiting, True


def _steps(total: int) -> Iterator[tuple[int, int]]:
    """The host's walk over latents or frames: the first alone, then two at a time."""
    yield 0, 1
    for start in range(1, total, _STEP):
        yield start, min(start + _STEP, total)


def _shown(pixels_BCFHW: torch.Tensor) -> torch.Tensor:
    """The network's pixels in [-1, 1] as frames [B, T, 3, H, W] fp32 in [0, 1]."""
    return ((pixels_BCFHW.float() + 1) / 2).clamp(0, 1).transpose(1, 2)


def _laid_out(network: torch.nn.Module, device: torch.device) -> torch.nn.Module:
    """On a CPU, weights with the channels last: a decode takes two thirds of the time, one with gradient three quarters."""
    formats = {torch.nn.Conv2d: torch.channels_last, torch.nn.Conv3d: torch.channels_last_3d}
    for module in network.modules() if device.type == "cpu" else ():
        for kind, memory_format in formats.items():
            if isinstance(module, kind):
                module.weight.data = module.weight.data.contiguous(memory_format=memory_format)
    return network


def pixel_frames(selection: range) -> range:
    """Pixel frames that the latent frames in `selection` stand for."""
    start = 0 if selection.start == 0 else 1 + FRAMES_PER_LATENT * (selection.start - 1)
    return range(start, 1 + FRAMES_PER_LATENT * (selection.stop - 1))


def load_decoder(path: str | Path, *, dtype: torch.dtype, device: torch.device) -> WanDecoder:
    """Load a Wan2.1-architecture VAE file by the host's loader.

    Raises:
        ValueError: missing or truncated file, or another VAE.
    """
    if str(path).endswith(".safetensors"):
        read_header(path, "VAE")
    elif not Path(path).is_file():
        raise ValueError(f"the VAE {path} does not exist; check the path or download the file")
    with torch.inference_mode(False):
        tensors, metadata = comfy.utils.load_torch_file(str(path), return_metadata=True)
        vae = comfy.sd.VAE(sd=tensors, metadata=metadata, device=device)
    network = vae.first_stage_model
    if type(network).__name__ != "WanVAE" or vae.latent_channels != 16:
        raise ValueError(f"the VAE {path} is a {type(network).__name__} with {vae.latent_channels} latent channels; Wan2.2 14B needs wan_2.1_vae.safetensors")
    return WanDecoder(network, dtype=dtype, device=device)

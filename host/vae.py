"""The Wan2.1 and Wan2.2 VAEs as differentiable decoders.

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
import comfy.ldm.wan.vae2_2
import comfy.sd
import comfy.utils
import torch
from comfy.ldm.wan.vae import count_cache_layers

from ..lora_train.safetensors_file import read_header
from ..reward_models.weights import load_into
from . import vae22_gradient, vae_gradient
from .wan import freeze

FRAMES_PER_LATENT = 4
FORMATS = {16: comfy.latent_formats.Wan21, 48: comfy.latent_formats.Wan22}
# The host's step through a video after its first frame: latents in decoding, pixel frames in encoding.
_STEP = 2
# What autograd keeps of a decode, for each pixel and each channel of the widest picture: 485 GB for 81 frames of 720p in bf16 (computed).
_GRAPH_NUMBERS = 34
# Only the Wan2.2 VAE has it; the host tells them apart by it as well.
_WAN22_MARK = "decoder.upsamples.0.upsamples.0.residual.2.weight"
_WAN22_CHANNELS = 48


class WanDecoder:
    """See `lora_train.protocols.Decoder`."""

    def __init__(self, network: torch.nn.Module, *, dtype: torch.dtype, device: torch.device) -> None:
        """Args:
        network: the host's WanVAE, of either kind.
        """
        freeze(network)
        self.network = _laid_out(network.to(device, dtype), device)
        self.dtype = dtype
        self.device = device
        # Where feature caches of a decode with gradient wait for backward; the plan may put them on the host.
        self.keep_device = device
        # A decode with gradient whose graph is smaller than this keeps it instead of running layers again.
        self.graph_limit_bytes = 0
        # The host's network for Wan2.1 walks through a video in pieces that can be had one by one; others run whole.
        self._has_pieces = isinstance(network, comfy.ldm.wan.vae.WanVAE)
        self.latent_channels = network.z_dim
        self._format = FORMATS[network.z_dim]()

    def decode(self, latent_BCFHW: torch.Tensor, selection: range | None = None) -> torch.Tensor:
        """Pixels of consecutive latent frames.

        Args:
            latent_BCFHW: [B, C, F, H, W] in model space.
            selection: which latent frames, a range with step 1 inside 0..F; None takes all.

        Returns:
            frames_BFCHW, [B, T, 3, 8H, 8W] (Wan2.2: 16H, 16W) fp32 in [0, 1], as reward models take them. Latent frame 0 gives one pixel frame, every later one
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
            return _shown(self._with_gradient(latent)[:, :, first:])
        frames, done = None, 0
        for piece in self._pieces(latent, first):
            if frames is None:
                frames = piece.new_empty(piece.shape[0], len(pixel_frames(selection)), *piece.shape[2:])
            frames[:, done : done + piece.shape[1]] = piece
            done += piece.shape[1]
        return frames

    def _with_gradient(self, latent_BCFHW: torch.Tensor) -> torch.Tensor:
        batch, _, latents, height, width = latent_BCFHW.shape
        frames = 1 + FRAMES_PER_LATENT * (latents - 1)
        # The Wan2.2 VAE folds 2 x 2 pixels into channels around its layers, so its widest picture has the same 64 pixels for one of the latent.
        numbers = batch * frames * height * width * 64 * self.network.decoder.head[0].gamma.numel()
        if numbers * _GRAPH_NUMBERS * latent_BCFHW.element_size() <= self.graph_limit_bytes:
            return self.network.decode(latent_BCFHW)
        again = vae_gradient if self._has_pieces else vae22_gradient
        return again.decode(self.network, latent_BCFHW, self.keep_device)

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
        """Latents in model space [B, C, F, H/8, W/8] (Wan2.2: H/16, W/16) fp32 of pixels in [0, 1] [B, T, 3, H, W], T = 4n+1.

        Frames go to the device piece by piece.
        """
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
    """Load a Wan2.1 or Wan2.2 VAE file into the host's network.

    Raises:
        ValueError: missing or truncated file, or another VAE.
    """
    if str(path).endswith(".safetensors"):
        read_header(path, "VAE")
    elif not Path(path).is_file():
        raise ValueError(f"the VAE {path} does not exist; check the path or download the file")
    with torch.inference_mode(False):
        tensors, metadata = comfy.utils.load_torch_file(str(path), return_metadata=True)
        if _WAN22_MARK in tensors:
            return WanDecoder(_wan22(tensors, path), dtype=dtype, device=device)
        vae = comfy.sd.VAE(sd=tensors, metadata=metadata, device=device)
    network = vae.first_stage_model
    if type(network).__name__ != "WanVAE" or vae.latent_channels not in FORMATS:
        raise ValueError(
            f"the VAE {path} is a {type(network).__name__} with {vae.latent_channels} latent channels; Wan2.2 14B needs wan_2.1_vae.safetensors, 5B "
            "wan2.2_vae.safetensors"
        )
    return WanDecoder(network, dtype=dtype, device=device)


def _wan22(tensors: dict[str, torch.Tensor], path: str | Path) -> torch.nn.Module:
    """The host's Wan2.2 VAE with the widths that the tensors have; the host's own loader knows the published widths only."""
    widths = {"dim": tensors["encoder.conv1.weight"].shape[0], "dec_dim": tensors["decoder.head.0.gamma"].shape[0]}
    with torch.device("meta"):
        network = comfy.ldm.wan.vae2_2.WanVAE(**widths, z_dim=_WAN22_CHANNELS, temperal_downsample=[False, True, True])
    load_into(network, tensors, str(path))
    return network

"""The Wan2.1 and Wan2.2 VAEs as differentiable decoders.

It calls the network itself, not the host's `VAE.decode`: that one falls back to tiles in inference mode when memory is short, and the gradient
vanishes without a word. It decodes only as much as the asked frames need: the decoder is causal, so frames up to the last asked latent suffice, and a
lone first latent is decoded without the feature cache.
"""

from __future__ import annotations

from pathlib import Path

import comfy.latent_formats
import comfy.ldm.wan.vae2_2
import comfy.sd
import comfy.utils
import torch

from ..lora_train.safetensors_file import read_header
from ..reward_models.weights import load_into
from .wan import freeze

FRAMES_PER_LATENT = 4
FORMATS = {16: comfy.latent_formats.Wan21, 48: comfy.latent_formats.Wan22}
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
        self.network = network.to(device, dtype)
        self.dtype = dtype
        self.device = device
        self.latent_channels = network.z_dim
        self._format = FORMATS[network.z_dim]()

    def decode(self, latent_BCFHW: torch.Tensor, selection: range | None = None) -> torch.Tensor:
        """Pixels of consecutive latent frames.

        Args:
            latent_BCFHW: [B, C, F, H, W] in model space.
            selection: which latent frames, a range with step 1 inside 0..F; None takes all.

        Returns:
            frames_BFCHW, [B, T, 3, 8H, 8W] (Wan2.2: 16H, 16W) fp32 in [0, 1], as reward models take them. Latent frame 0 gives one pixel frame, every later one
            four. Pixels outside of the range are clamped, as the host and VideoX-Fun do, so they get no gradient.

        Raises:
            ValueError: `selection` is empty or outside of the latent.
        """
        total = latent_BCFHW.shape[2]
        selection = range(total) if selection is None else selection
        if len(selection) == 0 or selection.step != 1 or not 0 <= selection.start < selection.stop <= total:
            raise ValueError(f"selection is {selection}, but the latent has {total} frames; ask for consecutive ones from 0 to {total - 1}")
        latent = self._format.process_out(latent_BCFHW[:, :, : selection.stop].float())
        pixels = self.network.decode(latent.to(self.dtype)).float()
        chosen = pixels[:, :, pixel_frames(selection).start :]
        return ((chosen + 1) / 2).clamp(0, 1).transpose(1, 2)

    @torch.no_grad()
    def encode(self, frames_BFCHW: torch.Tensor) -> torch.Tensor:
        """Latents in model space [B, C, F, H/8, W/8] (Wan2.2: H/16, W/16) of pixels in [0, 1] [B, T, 3, H, W], T = 4n+1."""
        return self._format.process_in(self.network.encode((frames_BFCHW.transpose(1, 2) * 2 - 1).to(self.device, self.dtype)).float())


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

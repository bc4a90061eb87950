"""Samples many pocket videos at once, in this process: benchmarks and the demo's table need hundreds of them.

Everything that computes is the trainer's own: experts, LoRA linears, VAE and text encoder of `host`, the sampling of
`lora_train.rollout`. The noise of a video depends on its seed alone, so tables over the same seeds are paired.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from ..host.text import PromptEncoder, load_text_encoder
from ..host.training_mode import training_mode
from ..host.vae import load_decoder
from ..host.wan import load_backbone
from ..lora_train.config import Sampling
from ..lora_train.flow import boundary_index
from ..lora_train.lora.keys import from_file_tensors
from ..lora_train.lora.linears import install
from ..lora_train.rollout import ContextCache, Experts
from .stages import dit, text, vae

SAMPLING = Sampling(steps=12, shift=dit.SHIFT, boundary=dit.BOUNDARY, guidance=3.0)
LATENT_SHAPE = (16, 5, 8, 8)
_BATCH = 16


class Generator:
    """Both pocket experts with their text encoder and VAE, on the CPU in fp32."""

    def __init__(self, weights: Path, sampling: Sampling = SAMPLING) -> None:
        self.weights = weights
        device, dtype = torch.device("cpu"), torch.float32
        self.sampling = sampling
        self.backbones = {expert: load_backbone(weights / name, dtype=dtype, device=device) for expert, name in dit.FILE_NAMES.items()}
        self.decoder = load_decoder(weights / vae.FILE_NAME, dtype=dtype, device=device)
        self._encoder = PromptEncoder(load_text_encoder(weights / text.FILE_NAME))
        self._switched: dict[tuple, torch.Tensor] = {}

    @torch.no_grad()
    def latents(self, prompts: Sequence[str], seeds: Sequence[int], loras: Sequence[tuple[Path, str, float]] = ()) -> torch.Tensor:
        """Sampled latents in model space. Calls that differ in the low-noise expert's LoRAs only share the high-noise expert's steps.

        Args:
            prompts: one per video.
            seeds: one per video.
            loras: (file, expert, strength) rows; at most one per expert.

        Returns:
            [B, 16, 5, 8, 8] fp32.
        """
        cache = self.contexts(prompts)
        experts = Experts(backbones=self.backbones, sampling=self.sampling)
        sigmas = self.sampling.sigmas()
        switch = boundary_index(sigmas, self.sampling.boundary)
        out = []
        with ExitStack() as stack:
            for path, expert, strength in loras:
                linears = self.backbones[expert].linears()
                adapter = from_file_tensors(load_file(path), linears, strength=strength)
                stack.enter_context(stack.enter_context(install(linears, adapter)).merged())
            for start in range(0, len(prompts), _BATCH):
                chosen = slice(start, start + _BATCH)
                key = (tuple(prompts[chosen]), tuple(seeds[chosen]), tuple(row for row in loras if row[1] == "high"))
                context = cache.batch(prompts[chosen])
                with training_mode(), torch.no_grad():
                    if key not in self._switched:
                        noise = [torch.randn(LATENT_SHAPE, generator=torch.Generator().manual_seed(seed)) for seed in seeds[chosen]]
                        self._switched[key] = experts.roll(torch.stack(noise), sigmas[: switch + 1], context)
                    out.append(experts.roll(self._switched[key], sigmas[switch:], context))
        return torch.cat(out)

    def contexts(self, prompts: Sequence[str]) -> ContextCache:
        """Text embeddings of these prompts and of the negative one."""
        unique = dict.fromkeys(prompts)
        encoded = dict(zip(unique, self._encoder.encode(list(unique)), strict=True))
        return ContextCache(encoded, self._encoder.encode([self.sampling.negative_prompt])[0], torch.device("cpu"))

    @torch.no_grad()
    def frames(self, latent_BCFHW: torch.Tensor) -> torch.Tensor:
        """Decoded videos [B, T, 3, H, W] in [0, 1]."""
        return torch.cat([self.decoder.decode(batch) for batch in latent_BCFHW.split(_BATCH)])


def as_clips(frames_BFCHW: torch.Tensor) -> np.ndarray:
    """[B, T, 3, H, W] -> [B, T, H, W, 3], as the oracle reads clips."""
    return frames_BFCHW.permute(0, 1, 3, 4, 2).numpy()

"""Sampling with both experts: guided velocity, and the chain of Euler steps without gradient.

Shapes: B batch, C channels, F latent frames, H W, P prompt tokens, D text width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from .config import Sampling
from .flow import euler_step, expert_of
from .protocols import Backbone


@dataclass(kw_only=True)
class ForwardCount:
    """Passes of one latent through one DiT, with a backward counted as two; guidance makes two of each."""

    total: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Experts:
    """Both backbones and how they are sampled."""

    backbones: Mapping[str, Backbone]
    sampling: Sampling
    count: ForwardCount = field(default_factory=ForwardCount)

    def at(self, sigma: float) -> str:
        """The expert that makes the step at `sigma`."""
        return expert_of(sigma, self.sampling.boundary)

    def velocity(
        self, latent_BCFHW: torch.Tensor, sigma: float, context: PromptContext, *, guidance: float | None = None, told_sigma: float | None = None
    ) -> torch.Tensor:
        """Guided velocity, u + guidance * (c - u); both branches carry gradient when gradients are on.

        Args:
            latent_BCFHW: [B, C, F, H, W] fp32 in model space.
            sigma: decides the expert.
            guidance: None takes that of the sampling; 1 leaves the negative branch out.
            told_sigma: what the model is told, where that is not `sigma`.

        Returns:
            Same shape, fp32.
        """
        backbone = self.backbones[self.at(sigma)]
        guidance = self.sampling.guidance if guidance is None else guidance
        told = sigma if told_sigma is None else told_sigma
        passes = latent_BCFHW.shape[0] * (1 if guidance == 1.0 else 2)
        self.count.total += passes * (3 if torch.is_grad_enabled() else 1)
        seen = latent_BCFHW if context.condition_BCFHW is None else torch.cat([latent_BCFHW, context.condition_BCFHW], dim=1)
        if guidance == 1.0:
            return backbone.velocity(seen, told, context.prompt_BPD)
        doubled = torch.cat([seen, seen])
        without, given = backbone.velocity(doubled, told, torch.cat([context.negative_BPD, context.prompt_BPD])).chunk(2)
        return without + guidance * (given - without)

    @torch.no_grad()
    def roll(self, latent_BCFHW: torch.Tensor, sigmas: Sequence[float], context: PromptContext, *, guidance: float | None = None) -> torch.Tensor:
        """Euler steps from sigmas[0] to sigmas[-1] without gradient."""
        for sigma, next_sigma in zip(sigmas, sigmas[1:], strict=False):
            latent_BCFHW = euler_step(latent_BCFHW, self.velocity(latent_BCFHW, sigma, context, guidance=guidance), sigma, next_sigma)
        return latent_BCFHW


@dataclass(frozen=True, kw_only=True)
class PromptContext:
    """Text embeddings of a batch: of its prompts and of the negative prompt.

    condition_BCFHW: further input channels of an image-to-video model (4 mask channels, then the first frame's latent and zeros); None for zeros.
    """

    prompt_BPD: torch.Tensor
    negative_BPD: torch.Tensor
    condition_BCFHW: torch.Tensor | None = None


class ContextCache:
    """Embeddings of all prompts of a run, made once; the text encoder can go afterwards."""

    def __init__(self, contexts: Mapping[str, torch.Tensor], negative_PD: torch.Tensor, device: torch.device) -> None:
        """Args:
        contexts: [P, D] per prompt; lengths may differ.
        """
        self._contexts = dict(contexts)
        self._negative = negative_PD
        self._device = device

    def batch(self, prompts: Sequence[str]) -> PromptContext:
        """Embeddings of a batch; shorter ones are filled up with zero rows, as the host fills every prompt up to the text length."""
        rows = [self._contexts[prompt] for prompt in prompts]
        length = max(row.shape[0] for row in (*rows, self._negative))
        padded = [torch.nn.functional.pad(row, (0, 0, 0, length - row.shape[0])) for row in (*rows, self._negative)]
        return PromptContext(
            prompt_BPD=torch.stack(padded[:-1]).to(self._device), negative_BPD=padded[-1].expand(len(rows), -1, -1).to(self._device)
        )

"""Sampling with both experts: guided velocity, and the chain of Euler steps without gradient.

Shapes: B batch, C channels, F latent frames, H W, P prompt tokens, D text width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from .config import Sampling
from .flow import euler_step, expert_of
from .input_config import MASK_CHANNELS
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
        first = context.first
        seen = latent_BCFHW if first is None else first.placed(latent_BCFHW)
        if context.condition_BCFHW is not None:
            seen = torch.cat([seen, context.condition_BCFHW], dim=1)
        known = () if first is None else (first.known_BF(latent_BCFHW.shape[2]),)
        if guidance == 1.0:
            velocity = backbone.velocity(seen, told, context.prompt_BPD, *known)
        else:
            texts = torch.cat([context.negative_BPD, context.prompt_BPD])
            without, given = backbone.velocity(torch.cat([seen, seen]), told, texts, *(torch.cat([known_BF, known_BF]) for known_BF in known)).chunk(2)
            velocity = without + guidance * (given - without)
        return velocity if first is None else first.led(latent_BCFHW, velocity, sigma)

    @torch.no_grad()
    def roll(self, latent_BCFHW: torch.Tensor, sigmas: Sequence[float], context: PromptContext, *, guidance: float | None = None) -> torch.Tensor:
        """Euler steps from sigmas[0] to sigmas[-1] without gradient."""
        for sigma, next_sigma in zip(sigmas, sigmas[1:], strict=False):
            latent_BCFHW = euler_step(latent_BCFHW, self.velocity(latent_BCFHW, sigma, context, guidance=guidance), sigma, next_sigma)
        return latent_BCFHW


@dataclass(frozen=True, kw_only=True)
class FirstFrames:
    """First latent frames [B, C, 1, H, W] that are given, of the videos where `is_known_B`; for models that see them in place of noise (Wan2.2 5B).

    The model sees the clean frame and is told noise level 0 for it. The trajectory's own first frame goes straight to it: its velocity is
    (x - given) / sigma, so that every solver ends there and every prediction of x0 is it.
    Source: Wan-Video/Wan2.2:wan/textimage2video.py (Apache-2.0), which puts the frame in place after every step.
    """

    latent_BC1HW: torch.Tensor
    is_known_B: torch.Tensor

    def known_BF(self, frames: int) -> torch.Tensor:
        """Which latent frames are given."""
        return self.is_known_B[:, None] & (torch.arange(frames, device=self.is_known_B.device) == 0)

    def placed(self, latent_BCFHW: torch.Tensor) -> torch.Tensor:
        """The latent as the model sees it."""
        return self._instead(latent_BCFHW, self.latent_BC1HW)

    def led(self, latent_BCFHW: torch.Tensor, velocity_BCFHW: torch.Tensor, sigma: float) -> torch.Tensor:
        """The velocity, with that of given frames leading to them."""
        return self._instead(velocity_BCFHW, (latent_BCFHW[:, :, :1] - self.latent_BC1HW) / sigma)

    def _instead(self, value_BCFHW: torch.Tensor, first_BC1HW: torch.Tensor) -> torch.Tensor:
        is_known = self.is_known_B.view(-1, 1, 1, 1, 1)
        return torch.cat([torch.where(is_known, first_BC1HW.to(value_BCFHW.dtype), value_BCFHW[:, :, :1]), value_BCFHW[:, :, 1:]], dim=2)


@dataclass(frozen=True, kw_only=True)
class PromptContext:
    """Text embeddings of a batch: of its prompts and of the negative prompt.

    condition_BCFHW: further input channels of an image-to-video model (4 mask channels, then the first frame's latent and zeros); None for zeros.
    first: start images of a model that sees them in place of noise; None where no video of the batch has one.
    """

    prompt_BPD: torch.Tensor
    negative_BPD: torch.Tensor
    condition_BCFHW: torch.Tensor | None = None
    first: FirstFrames | None = None


def first_frame_known(latent_BCFHW: torch.Tensor) -> torch.Tensor:
    """An image-to-video model's further input channels [B, 4 + C, F, H, W]: mask channels, 1 on the first latent frame, then the latents of
    the first frame followed by grey ones."""
    mask = latent_BCFHW.new_zeros(len(latent_BCFHW), MASK_CHANNELS, *latent_BCFHW.shape[2:])
    mask[:, :, 0] = 1
    return torch.cat([mask, latent_BCFHW], dim=1)


class ContextCache:
    """Embeddings of all prompts of a run, made once; the text encoder can go afterwards."""

    def __init__(
        self,
        contexts: Mapping[str, torch.Tensor],
        negative_PD: torch.Tensor,
        device: torch.device,
        conditions: Mapping[str, torch.Tensor] | None = None,
        first_frames: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        """Args:
        contexts: [P, D] per prompt; lengths may differ.
        conditions: [C, F, H, W] per path of a start image, for models with input channels for it.
        first_frames: [C, 1, H, W] per path of a start image, for models that see it in place of noise.
        """
        self._contexts = dict(contexts)
        self._conditions = dict(conditions or {})
        self._first_frames = dict(first_frames or {})
        self._negative = negative_PD
        self._device = device

    def batch(self, prompts: Sequence[str], images: Sequence[str] = ()) -> PromptContext:
        """Embeddings of a batch; shorter ones are filled up with zero rows, as the host fills every prompt up to the text length.

        Args:
            images: start images, one each; an empty one stands for none, which a model with a mask is told by zeros.
        """
        rows = [self._contexts[prompt] for prompt in prompts]
        length = max(row.shape[0] for row in (*rows, self._negative))
        padded = [torch.nn.functional.pad(row, (0, 0, 0, length - row.shape[0])) for row in (*rows, self._negative)]
        return PromptContext(
            prompt_BPD=torch.stack(padded[:-1]).to(self._device), negative_BPD=padded[-1].expand(len(rows), -1, -1).to(self._device),
            condition_BCFHW=self._of_images(self._conditions, images), first=self._first(images),
        )

    @property
    def takes_conditions(self) -> bool:
        """Whether the run gives start images to models with input channels for them."""
        return bool(self._conditions)

    def of_clips(self, prompts: Sequence[str], clean_BCFHW: torch.Tensor, condition_BCFHW: torch.Tensor | None) -> PromptContext:
        """Embeddings of clips of a run with start images: their own first frames are known, as images are in its rollouts. Without images, as `batch`.

        Args:
            clean_BCFHW: the clips.
            condition_BCFHW: latents of their first frames followed by grey ones, with or without the mask channels before them; needed where
                `takes_conditions`.
        """
        context = self.batch(prompts)
        if self._first_frames:
            every = torch.ones(len(prompts), dtype=torch.bool, device=self._device)
            context = replace(context, first=FirstFrames(latent_BC1HW=clean_BCFHW[:, :, :1].to(self._device), is_known_B=every))
        if self._conditions:
            has_mask = condition_BCFHW.shape[1] > clean_BCFHW.shape[1]
            told = condition_BCFHW if has_mask else first_frame_known(condition_BCFHW)
            context = replace(context, condition_BCFHW=told.to(self._device))
        return context

    def _first(self, images: Sequence[str]) -> FirstFrames | None:
        latent = self._of_images(self._first_frames, images)
        return None if latent is None else FirstFrames(latent_BC1HW=latent, is_known_B=torch.tensor([bool(image) for image in images], device=self._device))

    def _of_images(self, table: Mapping[str, torch.Tensor], images: Sequence[str]) -> torch.Tensor | None:
        """What a table holds of start images, zeros for none; None where it holds nothing or no image is asked for."""
        known = [table[image] for image in images if image] if table else []
        if not known:
            return None
        return torch.stack([table[image] if image else torch.zeros_like(known[0]) for image in images]).to(self._device)

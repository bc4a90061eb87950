"""PAVRM's losses: cross-entropy on labelled latents and Bradley-Terry on pairs, at random noise levels.

One micro-batch, in order: draw videos, noise levels and noise; x = (1 - sigma) x0 + sigma noise; logits; loss; backward.
CE is the binary cross-entropy of sigmoid(logit) with the label, BT is -log sigmoid(logit_winner - logit_loser), both from the logit, so that neither
saturates. The two of a pair share noise and noise level. The network is told the timestep floor(1000 sigma).
Where memory is short, logits are computed without gradient, the loss gives the gradient with respect to each, and latents go through the network once more, one
by one, each with its own backward: the same sum of gradients, for one more forward.
Source: Tencent-Hunyuan/HY-Video-PRFL@59ab9d7:scripts/pavrm/train_pavrm.py (Apache-2.0). Differs in: each sample is scored on its own (upstream mixes the
samples of a batch), noise levels are drawn per sample, videos of several shapes fit into one batch.

Shape letters: B samples, C F H W latent.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch.nn import functional

from ..pavrm_config import TIMESTEPS, PavrmConfig
from ..pavrm_data import Draws, LatentVideo, Sample
from ..prompts import derived_seed
from ..protocols import Shrunk


class LatentScorer(Protocol):
    """A trainable PAVRM, as the host builds it."""

    device: torch.device

    def logits(self, latent_BCFHW: torch.Tensor, timestep_B: torch.Tensor, videos: Sequence[LatentVideo], captions: Sequence[str]) -> torch.Tensor:
        """Logits [B] fp32 of noisy latents of one shape; text and image condition are those of `videos` under the named captions."""

    def groups(self) -> dict[str, dict[str, torch.nn.Parameter]]:
        """Trained parameters by name, in the groups `blocks` and `head`."""

    def weights(self) -> dict[str, torch.Tensor]:
        """All weights by the names of the single-file form."""


@dataclass(frozen=True, kw_only=True)
class Noisy:
    """A sample at a noise level, ready to be scored."""

    video: LatentVideo
    latent_CFHW: torch.Tensor
    sigma: float
    caption: str


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Means over a micro-batch whose gradient was added. `correct`: share of labels or pairs on the right side."""

    loss: float
    correct: float
    sigma: float


def noised(latent: torch.Tensor, noise: torch.Tensor, sigma: float) -> torch.Tensor:
    """(1 - sigma) latent + sigma noise."""
    return (1 - sigma) * latent + sigma * noise


def ce_loss(logit_B: torch.Tensor, label_B: torch.Tensor) -> torch.Tensor:
    """Binary cross-entropy per sample [B]."""
    return functional.binary_cross_entropy_with_logits(logit_B, label_B, reduction="none")


def bt_loss(winner_B: torch.Tensor, loser_B: torch.Tensor, share_B: torch.Tensor | None = None) -> torch.Tensor:
    """-log sigmoid(winner - loser) per pair [B]; with `share_B` the cross-entropy with the share of wins (0.5: a tie)."""
    difference = winner_B - loser_B
    return ce_loss(difference, torch.ones_like(difference) if share_B is None else share_B)


class PavrmObjective:
    """Adds the gradient of one micro-batch.

    Args:
        config: settings.
        scorer: the network.
        draws: what is learned from.
    """

    def __init__(self, config: PavrmConfig, scorer: LatentScorer, draws: Draws) -> None:
        self._config, self._scorer, self._draws = config, scorer, draws
        self._is_alone = False
        # Latents that still have to go through the network with gradient, and their logits.
        self._waiting: list[tuple[Noisy, torch.Tensor]] = []

    def shrink(self) -> Shrunk | None:
        """From now on one latent goes through the network at a time; None where that is so already."""
        if self._is_alone or (self._config.batch == 1 and not self._config.trains_pairs):
            return None
        self._is_alone = True
        return Shrunk(changes="one latent at a time", masters_on=self._scorer.device)

    def add_gradient(self, step: int, micro: int) -> Batch:
        """Add the gradient of micro-batch `micro` of update `step` (from 1), divided by the number of micro-batches, to the parameters."""
        config = self._config
        start = ((step - 1) * config.optimiser.accumulate + micro) * config.batch
        losses, hits, sigmas = [], [], []
        self._waiting = []
        if config.trains_labels:
            self._labels(start, losses, hits, sigmas)
        if config.trains_pairs:
            self._pairs(start, losses, hits, sigmas)
        # Each term weighs the same whatever it holds: the mean over its samples.
        loss = torch.stack([torch.cat(part).mean() for part in losses]).sum()
        (loss / config.optimiser.accumulate).backward()
        for entry, logit_B in self._waiting:
            self._logits([entry]).backward(logit_B.grad)
        return Batch(loss=float(loss.detach()), correct=sum(hits) / len(hits), sigma=sum(sigmas) / len(sigmas))

    def _labels(self, start: int, losses: list, hits: list[float], sigmas: list[float]) -> None:
        examples = self._draws.examples(start, self._config.batch)
        noisy = [self._noisy([example.sample], "ce", start + index)[0] for index, example in enumerate(examples)]
        part = []
        for indices, logit_B in self.scored(noisy):
            label_B = torch.tensor([float(examples[index].label) for index in indices], device=logit_B.device)
            part.append(ce_loss(logit_B, label_B))
            hits += ((logit_B > 0) == (label_B > 0.5)).float().tolist()
        losses.append(part)
        sigmas += [entry.sigma for entry in noisy]

    def _pairs(self, start: int, losses: list, hits: list[float], sigmas: list[float]) -> None:
        pairs = self._draws.pairs(start, self._config.batch)
        noisy = [entry for index, pair in enumerate(pairs) for entry in self._noisy([pair.winner, pair.loser], "bt", start + index)]
        logits: dict[int, torch.Tensor] = {}
        for indices, logit_B in self.scored(noisy):
            logits |= dict(zip(indices, logit_B, strict=True))
        winner_B, loser_B = (torch.stack([logits[2 * index + side] for index in range(len(pairs))]) for side in (0, 1))
        share_B = torch.tensor([pair.share for pair in pairs], device=winner_B.device)
        losses.append([bt_loss(winner_B, loser_B, share_B)])
        hits += [float(won) if pair.share != 0.5 else 0.5 for won, pair in zip((winner_B > loser_B).tolist(), pairs, strict=True)]
        sigmas += [entry.sigma for entry in noisy]

    def _noisy(self, samples: Sequence[Sample], stream: str, position: int) -> list[Noisy]:
        """Samples under one noise and noise level, which depend on the position alone."""
        rng = random.Random(derived_seed(self._config.seed, stream, "sigma", position))
        sigma = self._config.sigma.draw(rng, position)
        generator = torch.Generator().manual_seed(derived_seed(self._config.seed, stream, "noise", position))
        caption = self._config.data.caption if self._config.data.caption != "either" else rng.choice(("short", "long"))
        found, noise = [], None
        for sample in samples:
            video = sample.read()
            noise = torch.randn(video.latent_CFHW.shape, generator=generator) if noise is None else noise
            if noise.shape != video.latent_CFHW.shape:
                raise ValueError(f"{samples[0].id} and {sample.id} are a pair, but their latents differ in shape ({list(noise.shape)}, {list(sample.shape)})")
            found.append(Noisy(video=video, latent_CFHW=noised(video.latent_CFHW.float(), noise, sigma), sigma=sigma, caption=caption))
        return found

    def scored(self, noisy: Sequence[Noisy]) -> list[tuple[list[int], torch.Tensor]]:
        """Indices and logits, shape by shape: latents of several shapes make no tensor."""
        if self._is_alone:
            return [([index], self._alone(entry)) for index, entry in enumerate(noisy)]
        by_shape: dict[tuple[int, ...], list[int]] = {}
        for index, entry in enumerate(noisy):
            by_shape.setdefault(tuple(entry.latent_CFHW.shape), []).append(index)
        return [(indices, self._logits([noisy[index] for index in indices])) for indices in by_shape.values()]

    def _alone(self, entry: Noisy) -> torch.Tensor:
        """The logit of one latent, whose graph is made only when its gradient is known."""
        wants_gradient = torch.is_grad_enabled()
        with torch.no_grad():
            logit_B = self._logits([entry])
        if wants_gradient:
            self._waiting.append((entry, logit_B.requires_grad_()))
        return logit_B

    def _logits(self, chosen: Sequence[Noisy]) -> torch.Tensor:
        """Logits [B] of latents of one shape."""
        latent_BCFHW = torch.stack([entry.latent_CFHW for entry in chosen]).to(self._scorer.device)
        timestep_B = torch.tensor([int(entry.sigma * TIMESTEPS) for entry in chosen], device=self._scorer.device)
        return self._scorer.logits(latent_BCFHW, timestep_B, [entry.video for entry in chosen], [entry.caption for entry in chosen])

"""What the trainer needs from the outside. The host's adapters (`host/wan.py` ...) and the toy models of the tests both fit.

Shapes: B batch, C channels, F latent frames, T pixel frames, H W height and width, P prompt tokens, D text width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch

from .events import Event

if TYPE_CHECKING:
    from .trainee import Trainee


class Backbone(Protocol):
    """One expert, frozen, with LoRA linears that can be installed on it."""

    device: torch.device
    latent_channels: int

    def velocity(
        self, latent_BCFHW: torch.Tensor, sigma: float, context_BPD: torch.Tensor, known_BF: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Predicted velocity [B, C, F, H, W], fp32, at `sigma` in [0, 1]; differentiable in the latent and in installed LoRAs.

        Args:
            known_BF: latent frames that are given as they are, so that the model is told noise level 0 for them; None: none.
        """

    def linears(self) -> Mapping[str, torch.nn.Linear]:
        """Every Linear of the model by its path (`blocks.0.self_attn.q`)."""


class Decoder(Protocol):
    """Latents in model space to pixels, differentiable."""

    def decode(self, latent_BCFHW: torch.Tensor, selection: range | None = None) -> torch.Tensor:
        """Pixels [B, T, 3, H, W], fp32 in [0, 1], of the latent frames in `selection` (consecutive; None: all)."""

    def stream(self, latent_BCFHW: torch.Tensor) -> Iterator[torch.Tensor]:
        """Those of all latent frames in pieces, without gradient."""


@dataclass(frozen=True, kw_only=True)
class LatentScores:
    """What a latent reward says; `probability_B` in [0, 1] is what is reported, the logit is what is best trained on. Both fp32 [B]."""

    logit_B: torch.Tensor
    probability_B: torch.Tensor


class LatentReward(Protocol):
    """A reward of noisy latents (PAVRM), frozen, differentiable in the latent."""

    def score(self, latent_BCFHW: torch.Tensor, sigma: float, context_BPD: torch.Tensor, condition_BCFHW: torch.Tensor | None = None) -> LatentScores:
        """Scores of latents at `sigma`; the condition is what an image-to-video backbone sees of the first frame."""


class SampleWriter(Protocol):
    """Writes shown videos; returns file names relative to the run folder."""

    def write(self, videos_BTHWC: torch.Tensor, prompts: Sequence[str], step: int) -> list[str]: ...


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Means over a micro-batch whose gradient was added to the LoRA's parameters; `kl` 0 where it was not measured."""

    reward: float
    loss: float
    kl: float
    sigma: float


class Objective(Protocol):
    """What a LoRA is trained for."""

    def add_gradient(self, trainee: Trainee, step: int, micro: int) -> Outcome:
        """Add the gradient of micro-batch `micro` of update `step` (from 1) to the trainee's parameters, divided by the number of micro-batches.

        Equal (config, step, micro) and weights give equal gradients: whatever is random is drawn from seeds derived of these.
        """

    def measure(self) -> dict[str, float]:
        """Numbers that are measured once, on the base model, before the first update; checkpoints keep them. None unless an objective says so."""
        return {}

    def use(self, measured: dict[str, float]) -> None:  # noqa: B027
        """Take what `measure` gave, now or before the run was resumed."""


class Learner(Protocol):
    """What an update changes, of a LoRA or of a PAVRM: the optimiser with its parameters, and their moving average (empty: none)."""

    optimiser: torch.optim.Optimizer
    average: dict[str, torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Shrunk:
    """What a smaller plan changed, for the log, and where the masters of what is learned live now."""

    changes: str
    masters_on: torch.device


EventSink = Callable[[Event], None]
StopRequested = Callable[[], bool]

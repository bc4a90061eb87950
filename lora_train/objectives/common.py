"""What objectives share: the reward's gradient with respect to a latent, the KL to the base, and the backward pass.

Memory: the gradient with respect to the latent is taken first and the decoder's (or PAVRM's) graph is freed before the transformer's backward begins, so
their peaks do not add. The numbers are those of one backward through everything.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from ...reward_models.base import reward_and_frame_gradient
from ..config import TrainConfig
from ..draws import Draw
from ..planning.scoring import FRAMES_ON_CARD
from ..rollout import PromptContext
from ..run import Parts
from ..selection import choose_frames
from ..trainee import Trainee

# Pictures that a reward model sees at once, off a card and without gradient; with one, on a card, `FRAMES_ON_CARD`.
FRAMES_PER_CHUNK = 64
# 1 / (2 sigma^2) without a floor would make the KL of the last, almost noiseless steps a thousand times that of the others.
_KL_SIGMA_FLOOR = 0.1

Velocity = Callable[[torch.Tensor, float], torch.Tensor]


def reward_gradient(
    config: TrainConfig, parts: Parts, latent_BCFHW: torch.Tensor, draw: Draw, weight: Callable[[torch.Tensor], torch.Tensor] | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rewards [B] of the decoded latents, and the gradient of -reward_scale * mean(reward) with respect to the latent; the decoder's graph ends here.

    Args:
        weight: further factor [B] on each video's gradient, made of the rewards.
    """
    leaf = latent_BCFHW.detach().requires_grad_()
    frames_BFCHW = decoded(config, parts, leaf, draw)
    at_once = FRAMES_PER_CHUNK if frames_BFCHW.device.type == "cpu" else FRAMES_ON_CARD
    output, frame_gradient = reward_and_frame_gradient(parts.reward, frames_BFCHW.detach(), draw.captions, at_once)
    share = -config.objective.reward_scale / len(draw.captions)
    if weight is not None:
        frame_gradient = frame_gradient * weight(output.per_video).view(-1, 1, 1, 1, 1)
    (gradient,) = torch.autograd.grad(frames_BFCHW, leaf, frame_gradient * share)
    return output.per_video, gradient


def decoded(config: TrainConfig, parts: Parts, latent_BCFHW: torch.Tensor, draw: Draw) -> torch.Tensor:
    """The frames [B, T, 3, H, W] that are scored."""
    history = config.objective.decode_history
    start = max(0, draw.latents.start - history) if history >= 0 else 0
    frames_BFCHW = parts.decoder.decode(latent_BCFHW[:, :, start:], range(draw.latents.start - start, draw.latents.stop - start))
    return frames_BFCHW[:, list(choose_frames(frames_BFCHW.shape[1], config.objective.score_frames))]


def needs_kl(config: TrainConfig) -> bool:
    """Whether the reference pass runs: for the loss, or for the guard that watches it."""
    return config.objective.kl_weight > 0 or config.guards.kl_budget > 0


def kl_to_base(config: TrainConfig, trainee: Trainee, velocity_of: Velocity, source: torch.Tensor, velocity: torch.Tensor, sigma: float) -> torch.Tensor:
    """mean((v_lora - v_base)^2) / (2 sigma^2), as ROLL's reward_fl has it (alibaba/ROLL@e98e9f89, Apache-2.0), with a floor under sigma; 0 if not needed."""
    if not needs_kl(config):
        return velocity.new_zeros(())
    with torch.no_grad(), trainee.switch.disabled():
        base = velocity_of(source.detach(), sigma)
    return (velocity - base).square().mean() / (2 * max(sigma, _KL_SIGMA_FLOOR) ** 2)


def backward(config: TrainConfig, latent: torch.Tensor, gradient: torch.Tensor, kl: torch.Tensor, share: float = 1.0) -> None:
    """Add the gradient of share * (reward's part through `latent` + kl_weight * kl), divided by the number of micro-batches."""
    share = share / config.optimiser.accumulate
    if kl.requires_grad and config.objective.kl_weight > 0:
        torch.autograd.backward([latent, kl], [gradient * share, kl.new_tensor(config.objective.kl_weight * share)])
    else:
        latent.backward(gradient * share)


def plain_velocity(parts: Parts, context: PromptContext, guidance: float | None = None) -> Velocity:
    """Guided velocity of this context as a function of latent and sigma."""
    return lambda latent, sigma: parts.experts.velocity(latent, sigma, context, guidance=guidance)

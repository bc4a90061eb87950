"""Reward backpropagation: generate videos, score them, and follow the reward's gradient back into a LoRA.

One update, in order: draw prompts and noise; sample with both experts; give gradient to the selected steps of the trained expert; decode some latent
frames; score; loss = -reward_scale * reward + kl_weight * KL to the base; backward; clip; AdamW.

Two forms (`objective.mode`):
- `chain`: x_end = x + sum of dsigma_i * v_i. Velocities of steps that are not selected are constants (straight-through), so with one
  selected step k the gradient is dsigma_k * dv_k/dtheta. DRaFT (arXiv 2309.17400), AlignProp (2310.03739) and, with `truncate`, DRTune (2405.00760) as
  VideoX-Fun runs them (aigc-apps/VideoX-Fun@804a4258:scripts/wan2.2_fun/train_reward_lora.py, Apache-2.0). Differs in: frozen steps build no
  graph, clipping works, guidance is right for any batch.
- `x0`: the selected step's clean prediction x0 = x - sigma * v is decoded. The rollout ends there, and with several selected steps one
  trajectory serves them all, each with its own backward.

Memory: the gradient with respect to the latent is taken first and the decoder's graph is freed before the transformer's backward begins, so their
peaks do not add. The numbers are those of one backward through everything.

Not here: image conditioning, several devices.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch

from ...reward_models.base import reward_and_frame_gradient
from ..config import TrainConfig
from ..flow import euler_step, steps_of_expert, x0_from_velocity
from ..prompts import PromptSampler, derived_seed
from ..protocols import Outcome
from ..rollout import PromptContext
from ..run import Parts
from ..selection import choose_frames, choose_latents, choose_steps
from ..trainee import Trainee

FRAMES_PER_CHUNK = 64
# 1 / (2 sigma^2) without a floor would make the KL of the last, almost noiseless steps a thousand times that of the others.
_KL_SIGMA_FLOOR = 0.1


@dataclass(frozen=True, kw_only=True)
class Draw:
    """Everything random of one micro-batch; equal for equal (seed, step, micro)."""

    prompts: list[str]
    noise_BCFHW: torch.Tensor
    steps: list[int]
    latents: range


class RewardBackprop:
    """Objective `reward_backprop`; see the module's docstring."""

    def __init__(self, config: TrainConfig, parts: Parts) -> None:
        self._config, self._parts = config, parts
        self._sampler = PromptSampler(config.prompts, config.seed)
        self._sigmas = config.sampling.sigmas()

    def add_gradient(self, trainee: Trainee, step: int, micro: int) -> Outcome:
        """Add one micro-batch's share of the update's gradient to the trainee's parameters."""
        draw = draw_batch(self._config, self._sampler, trainee.expert, step, micro)
        context = self._parts.contexts.batch(draw.prompts)
        gradient_of = _through_chain if self._config.objective.mode == "chain" else _through_x0
        return gradient_of(self._config, self._parts, trainee, draw, self._sigmas, context)


def draw_batch(config: TrainConfig, sampler: PromptSampler, expert: str, step: int, micro: int) -> Draw:
    """Prompts, noise, selected steps and decoded latents of one micro-batch."""
    draws = random.Random(derived_seed(config.seed, "draw", step, micro))
    generator = torch.Generator().manual_seed(derived_seed(config.seed, "noise", step, micro))
    shape = config.video.latent_shape(config.batch)
    eligible = steps_of_expert(config.sampling.sigmas(), config.sampling.boundary, expert)
    start = ((step - 1) * config.optimiser.accumulate + micro) * config.batch
    return Draw(
        prompts=sampler.draw(start, config.batch),
        noise_BCFHW=torch.randn(shape, generator=generator),
        steps=choose_steps(config.objective, eligible, draws),
        latents=choose_latents(config.objective, shape[2], draws),
    )


def _through_chain(config: TrainConfig, parts: Parts, trainee: Trainee, draw: Draw, sigmas: list[float], context: PromptContext) -> Outcome:
    latent = draw.noise_BCFHW.to(parts.device)
    first = draw.steps[0]
    latent = parts.experts.roll(latent, sigmas[: first + 1], context)
    kl = latent.new_zeros(())
    for index in range(first, len(sigmas) - 1):
        if index in draw.steps:
            source = latent.detach() if config.objective.truncate else latent
            velocity = parts.experts.velocity(source, sigmas[index], context)
            kl = kl + _kl(config, parts, trainee, source, velocity, sigmas[index], context) / len(draw.steps)
        else:
            with torch.no_grad():
                velocity = parts.experts.velocity(latent.detach(), sigmas[index], context)
        latent = euler_step(latent, velocity, sigmas[index], sigmas[index + 1])
    reward, gradient = reward_gradient(config, parts, latent, draw)
    _backward(config, latent, gradient, kl)
    return _outcome(config, reward, float(kl.detach()), sum(sigmas[index] for index in draw.steps) / len(draw.steps))


def _through_x0(config: TrainConfig, parts: Parts, trainee: Trainee, draw: Draw, sigmas: list[float], context: PromptContext) -> Outcome:
    latent = draw.noise_BCFHW.to(parts.device)
    at, outcomes = 0, []
    for index in draw.steps:
        latent = parts.experts.roll(latent, sigmas[at : index + 1], context)
        velocity = parts.experts.velocity(latent, sigmas[index], context)
        kl = _kl(config, parts, trainee, latent, velocity, sigmas[index], context)
        x0 = x0_from_velocity(latent, velocity, sigmas[index])
        reward, gradient = reward_gradient(config, parts, x0, draw)
        _backward(config, x0, gradient, kl, share=1 / len(draw.steps))
        outcomes.append((reward, float(kl.detach()), sigmas[index]))
        latent, at = euler_step(latent, velocity.detach(), sigmas[index], sigmas[index + 1]), index + 1
    reward, kl, sigma = (sum(values) / len(outcomes) for values in zip(*outcomes, strict=True))
    return _outcome(config, reward, kl, sigma)


def _outcome(config: TrainConfig, reward: float, kl: float, sigma: float) -> Outcome:
    return Outcome(reward=reward, loss=-config.objective.reward_scale * reward + config.objective.kl_weight * kl, kl=kl, sigma=sigma)


def reward_gradient(config: TrainConfig, parts: Parts, latent_BCFHW: torch.Tensor, draw: Draw) -> tuple[float, torch.Tensor]:
    """Mean reward of the decoded latents and d(-reward_scale * mean reward)/d(latent); the decoder's graph ends here."""
    leaf = latent_BCFHW.detach().requires_grad_()
    history = config.objective.decode_history
    start = max(0, draw.latents.start - history) if history >= 0 else 0
    frames_BFCHW = parts.decoder.decode(leaf[:, :, start:], range(draw.latents.start - start, draw.latents.stop - start))
    frames_BFCHW = frames_BFCHW[:, list(choose_frames(frames_BFCHW.shape[1], config.objective.score_frames))]
    output, frame_gradient = reward_and_frame_gradient(parts.reward, frames_BFCHW.detach(), draw.prompts, FRAMES_PER_CHUNK)
    share = -config.objective.reward_scale / len(draw.prompts)
    (gradient,) = torch.autograd.grad(frames_BFCHW, leaf, frame_gradient * share)
    return float(output.per_video.mean()), gradient


def _kl(
    config: TrainConfig, parts: Parts, trainee: Trainee, source: torch.Tensor, velocity: torch.Tensor, sigma: float, context: PromptContext
) -> torch.Tensor:
    """mean((v_lora - v_base)^2) / (2 sigma^2), as ROLL's reward_fl has it (alibaba/ROLL@e98e9f89, Apache-2.0), with a floor under sigma."""
    if config.objective.kl_weight == 0:
        return velocity.new_zeros(())
    with torch.no_grad(), trainee.switch.disabled():
        base = parts.experts.velocity(source.detach(), sigma, context)
    return (velocity - base).square().mean() / (2 * max(sigma, _KL_SIGMA_FLOOR) ** 2)


def _backward(config: TrainConfig, latent: torch.Tensor, gradient: torch.Tensor, kl: torch.Tensor, share: float = 1.0) -> None:
    share = share / config.optimiser.accumulate
    if kl.requires_grad:
        torch.autograd.backward([latent, kl], [gradient * share, kl.new_tensor(config.objective.kl_weight * share)])
    else:
        latent.backward(gradient * share)

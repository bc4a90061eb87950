"""Reward backpropagation: generate videos, score them, and follow the reward's gradient back into a LoRA.

One update, in order: draw prompts and noise; sample with both experts; give gradient to the selected steps of the trained expert; decode some latent
frames; score; loss = -reward_scale * reward + kl_weight * KL to the base; backward; clip; optimiser step.

Two forms (`objective.mode`):
- `chain`: x_end = x + sum of dsigma_i * v_i. Velocities of steps that are not selected are constants (straight-through), so with one
  selected step k the gradient is dsigma_k * dv_k/dtheta. DRaFT (arXiv 2309.17400), AlignProp (2310.03739) and, with `truncate`, DRTune (2405.00760) as
  VideoX-Fun runs them (aigc-apps/VideoX-Fun@804a4258:scripts/wan2.2_fun/train_reward_lora.py, Apache-2.0). Differs in: frozen steps build no
  graph, clipping works, guidance is right for any batch.
- `x0`: the selected step's clean prediction x0 = x - sigma * v is decoded. The rollout ends there, and with several selected steps one
  trajectory serves them all, each with its own backward.

Not here: several devices.
"""

from __future__ import annotations

import torch

from ..config import TrainConfig
from ..draws import Draw, draw_batch, prompt_sampler
from ..flow import euler_step, x0_from_velocity
from ..protocols import Objective, Outcome
from ..rollout import PromptContext
from ..run import Parts
from ..trainee import Trainee
from .common import backward, kl_to_base, plain_velocity, reward_gradient


class RewardBackprop(Objective):
    """Objective `reward_backprop`; see the module's docstring."""

    def __init__(self, config: TrainConfig, parts: Parts) -> None:
        self._config, self._parts = config, parts
        self._sampler = prompt_sampler(config)

    def add_gradient(self, trainee: Trainee, step: int, micro: int) -> Outcome:
        """Add one micro-batch's share of the update's gradient to the trainee's parameters."""
        draw = draw_batch(self._config, self._sampler, self._parts.real, trainee.expert, step, micro)
        context = self._parts.contexts.batch(draw.prompts, draw.images)
        gradient_of = _through_chain if self._config.objective.mode == "chain" else _through_x0
        return gradient_of(self._config, self._parts, trainee, draw, context)


def _through_chain(config: TrainConfig, parts: Parts, trainee: Trainee, draw: Draw, context: PromptContext) -> Outcome:
    latent, sigmas, velocity_of = draw.start_BCFHW.to(parts.device), draw.sigmas, plain_velocity(parts, context)
    first = draw.steps[0]
    latent = parts.experts.roll(latent, sigmas[: first + 1], context)
    kl = latent.new_zeros(())
    for index in range(first, len(sigmas) - 1):
        if index in draw.steps:
            source = latent.detach() if config.objective.truncate else latent
            velocity = velocity_of(source, sigmas[index])
            kl = kl + kl_to_base(config, trainee, velocity_of, source, velocity, sigmas[index]) / len(draw.steps)
        else:
            with torch.no_grad():
                velocity = velocity_of(latent.detach(), sigmas[index])
        latent = euler_step(latent, velocity, sigmas[index], sigmas[index + 1])
    rewards, gradient = reward_gradient(config, parts, latent, draw)
    backward(config, latent, gradient, kl)
    return _outcome(config, float(rewards.mean()), float(kl.detach()), sum(sigmas[index] for index in draw.steps) / len(draw.steps))


def _through_x0(config: TrainConfig, parts: Parts, trainee: Trainee, draw: Draw, context: PromptContext) -> Outcome:
    latent, sigmas, velocity_of = draw.start_BCFHW.to(parts.device), draw.sigmas, plain_velocity(parts, context)
    at, outcomes = 0, []
    for index in draw.steps:
        latent = parts.experts.roll(latent, sigmas[at : index + 1], context)
        velocity = velocity_of(latent, sigmas[index])
        kl = kl_to_base(config, trainee, velocity_of, latent, velocity, sigmas[index])
        x0 = x0_from_velocity(latent, velocity, sigmas[index])
        rewards, gradient = reward_gradient(config, parts, x0, draw)
        backward(config, x0, gradient, kl, share=1 / len(draw.steps))
        outcomes.append((float(rewards.mean()), float(kl.detach()), sigmas[index]))
        latent, at = euler_step(latent, velocity.detach(), sigmas[index], sigmas[index + 1]), index + 1
    reward, kl, sigma = (sum(values) / len(outcomes) for values in zip(*outcomes, strict=True))
    return _outcome(config, reward, kl, sigma)


def _outcome(config: TrainConfig, reward: float, kl: float, sigma: float) -> Outcome:
    return Outcome(reward=reward, loss=-config.objective.reward_scale * reward + config.objective.kl_weight * kl, kl=kl, sigma=sigma)

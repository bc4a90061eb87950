"""Reward flow: the reward's gradient through several sampling steps in a row, back-propagated through time, held near the base by a KL at each step.

One update, in order: draw prompts and noise; roll to the first step with gradient; make the steps with gradient; decode the end (where the schedule goes on,
the last step's prediction of the clean latent); score; loss = -reward_scale * (reward - centre) / scale + kl_weight * mean KL over the steps; backward.

centre and scale are the mean and deviation of the reward over videos of the base model, measured before the first update. (ROLL writes them into its code;
they belong to one face scorer.)

Backward goes step by step: the gradient with respect to a step's end is carried to its start, and each step's graph lives alone, either kept from the
forward pass or built again (`recompute`). The numbers are those of one graph through all steps.

Source: alibaba/ROLL@e98e9f89:roll/pipeline/diffusion/reward_fl (Apache-2.0). Differs in: any consecutive steps of the trained expert, the high-noise one too.
"""

from __future__ import annotations

import torch

from ...reward_models.base import score_in_chunks
from ..config import TrainConfig
from ..draws import Draw, draw_batch, prompt_sampler
from ..flow import euler_step
from ..lora.linears import exact_form
from ..protocols import Objective, Outcome
from ..rollout import PromptContext
from ..run import Parts
from ..trainee import Trainee
from .common import FRAMES_PER_CHUNK, Velocity, decoded, kl_to_base, plain_velocity, reward_gradient

_LEAST_SCALE = 1e-6


class RewardFlow(Objective):
    """Objective `reward_flow`; see the module's docstring."""

    def __init__(self, config: TrainConfig, parts: Parts) -> None:
        self._config, self._parts = config, parts
        self._sampler = prompt_sampler(config)
        self._centre, self._scale = config.reward_flow.centre, config.reward_flow.scale

    def use(self, measured: dict[str, float]) -> None:
        """Take centre and scale as they were measured."""
        self._centre, self._scale = measured.get("centre", self._centre), measured.get("scale", self._scale)

    @torch.no_grad()
    def measure(self) -> dict[str, float]:
        """Mean and deviation of the reward over videos of the base model, as training would decode them.

        Raises:
            ValueError: the reward is the same for all of them, so it cannot be scaled.
        """
        config, parts, rewards, number = self._config, self._parts, [], 0
        while len(rewards) < config.reward_flow.measure_videos:
            number += 1
            expert = config.trained_experts[(number - 1) % len(config.trained_experts)]
            draw = draw_batch(config, self._sampler, parts.real, expert, number, 0)
            context = parts.contexts.batch(draw.prompts, draw.images)
            latent, targets = self._rolled(draw, context)
            for index in draw.steps:
                velocity = self._velocity(context)(latent, draw.sigmas[index])
                latent = euler_step(latent, velocity, draw.sigmas[index], targets[index])
            rewards += score_in_chunks(parts.reward, decoded(config, parts, latent, draw), draw.prompts, FRAMES_PER_CHUNK).per_video.tolist()
        if not rewards:
            return {}
        centre = sum(rewards) / len(rewards)
        scale = (sum((reward - centre) ** 2 for reward in rewards) / (len(rewards) - 1)) ** 0.5
        if scale < _LEAST_SCALE:
            raise ValueError(f"the reward is {centre:.6g} for all {len(rewards)} measured videos; give reward_flow.scale, and measure_videos 0")
        return {"centre": centre, "scale": scale}

    def add_gradient(self, trainee: Trainee, step: int, micro: int) -> Outcome:
        """Add one micro-batch's share of the update's gradient to the trainee's parameters."""
        config = self._config
        draw = draw_batch(config, self._sampler, self._parts.real, trainee.expert, step, micro)
        context = self._parts.contexts.batch(draw.prompts, draw.images)
        velocity_of = self._velocity(context)
        latent, targets = self._rolled(draw, context)
        tape = []
        for index in draw.steps:
            # Merged weights, which are rounded, and a rollout's attention would lead elsewhere than what runs again in backward.
            with torch.set_grad_enabled(not config.reward_flow.recompute), exact_form():
                made = _one_step(config, trainee, velocity_of, latent, draw.sigmas[index], targets[index])
            tape.append((index, latent, made))
            latent = made[1].detach()
        rewards_B, gradient = reward_gradient(config, self._parts, latent, draw, weight=self._weights)
        kl_sum = 0.0
        share = 1 / config.optimiser.accumulate
        gradient = gradient * share
        for index, start, made in reversed(tape):
            if config.reward_flow.recompute:
                made = _one_step(config, trainee, velocity_of, start, draw.sigmas[index], targets[index])
            leaf, moved, kl = made
            roots, gradients = [moved], [gradient]
            if kl.requires_grad and config.objective.kl_weight > 0:
                roots, gradients = [moved, kl], [gradient, kl.new_tensor(config.objective.kl_weight * share / len(tape))]
            torch.autograd.backward(roots, gradients)
            gradient, kl_sum = leaf.grad, kl_sum + float(kl.detach())
        kl_mean = kl_sum / len(tape)
        loss = -config.objective.reward_scale * float(((rewards_B - self._centre) / self._scale).mean()) + config.objective.kl_weight * kl_mean
        sigma = sum(draw.sigmas[index] for index in draw.steps) / len(draw.steps)
        return Outcome(reward=float(rewards_B.mean()), loss=loss, kl=kl_mean, sigma=sigma)

    def _velocity(self, context: PromptContext) -> Velocity:
        return plain_velocity(self._parts, context, self._config.reward_flow.guidance or None)

    def _rolled(self, draw: Draw, context: PromptContext) -> tuple[torch.Tensor, dict[int, float]]:
        """The latent at the first step with gradient, and the sigma that each such step goes to; the last one goes all the way."""
        guidance = self._config.reward_flow.guidance or None
        latent = self._parts.experts.roll(draw.start_BCFHW.to(self._parts.device), draw.sigmas[: draw.steps[0] + 1], context, guidance=guidance)
        targets = {index: draw.sigmas[index + 1] for index in draw.steps}
        return latent, {**targets, draw.steps[-1]: 0.0}

    def _weights(self, rewards_B: torch.Tensor) -> torch.Tensor:
        """1 / scale, and 0 for videos beyond the clip."""
        clip = self._config.reward_flow.reward_clip
        is_free = (rewards_B - self._centre) / self._scale <= clip if clip > 0 else torch.ones_like(rewards_B)
        return is_free.float() / self._scale


def _one_step(
    config: TrainConfig, trainee: Trainee, velocity_of: Velocity, start: torch.Tensor, sigma: float, target: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Leaf, its Euler step, and the step's KL; with a graph where gradients are on."""
    leaf = start.detach().requires_grad_(torch.is_grad_enabled())
    velocity = velocity_of(leaf, sigma)
    kl = kl_to_base(config, trainee, velocity_of, leaf, velocity, sigma) if torch.is_grad_enabled() else velocity.new_zeros(())
    return leaf, euler_step(leaf, velocity, sigma, target), kl

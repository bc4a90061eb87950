"""One pass: a clip is noised to a sigma of the trained expert, and one velocity with gradient serves everything that is learned.

One update, in order: draw clips, noise and a step; x = (1 - sigma) x0 + sigma noise; one velocity with gradient, without guidance; then, each as a gradient
with respect to that velocity,
- flow matching: flow_weight * mean((v - (noise - x0))^2), whose target is known because the clip is;
- the reward of frames decoded from the predicted clean latent x - sigma v, weighed by 1 - sigma, the share of the clip in x: the more of it there is, the
  more a reward can say; so weighed, the gradients of all steps are of about one size;
- the logit of a PAVRM for the next latent x + (sigma_next - sigma) v, every step's gradient brought to one size;
- the KL to the base;
and one backward through the transformer with their sum; clip; optimiser step. Nothing is rolled out: a video costs three forwards (one, and a backward
that counts as two) where the published trainers pay 8 to 28 at 12 sampling steps, and more at more.

The clips are real ones, or, where there are none, videos that the base model makes once (`replay.py`).
Flow matching and PRFL's reward in one update: arXiv 2511.21541 (Tencent-Hunyuan/HY-Video-PRFL@59ab9d7, Apache-2.0), there on two passes, and the reward's
after a rollout from noise.

Shapes: B batch, C F H W latent.
"""

from __future__ import annotations

import torch

from .. import needs
from ..config import TrainConfig
from ..draws import NULL_PROMPT, Draw, draw_batch, prompt_sampler
from ..flow import euler_step, x0_from_velocity
from ..protocols import Objective, Outcome
from ..rollout import PromptContext
from ..run import Parts
from ..trainee import Trainee
from .common import backward, kl_to_base, plain_velocity, reward_gradient


class OnePass(Objective):
    """Objective `one_pass`; see the module's docstring."""

    def __init__(self, config: TrainConfig, parts: Parts) -> None:
        self._config, self._parts = config, parts
        self._sampler = prompt_sampler(config)

    def add_gradient(self, trainee: Trainee, step: int, micro: int) -> Outcome:
        """Add one micro-batch's share of the update's gradient to the trainee's parameters."""
        config, parts = self._config, self._parts
        draw = draw_batch(config, self._sampler, parts.real, trainee.expert, step, micro)
        context = parts.contexts.batch(draw.prompts)
        velocity_of = plain_velocity(parts, context, guidance=1.0)
        latent, sigma = draw.start_BCFHW.to(parts.device), draw.sigmas[0]
        velocity = velocity_of(latent, sigma)
        kl = kl_to_base(config, trainee, velocity_of, latent, velocity, sigma)

        known = velocity.detach()
        loss, gradient = _flow_matching(config, known, draw.velocity_BCFHW.to(parts.device))
        terms = []
        if needs.decodes_training_videos(config):
            terms.append(self._image_reward(draw, latent, known))
        if needs.pavrm(config) and draw.sigmas[1] > 0:
            terms.append(self._latent_reward(trainee.expert, draw, latent, known, context))
        for _, part_loss, part in terms:
            loss, gradient = loss + part_loss, gradient + part
        backward(config, velocity, gradient, kl)
        return Outcome(reward=terms[0][0], loss=loss + config.objective.kl_weight * float(kl.detach()), kl=float(kl.detach()), sigma=sigma)

    def _image_reward(self, draw: Draw, latent: torch.Tensor, velocity: torch.Tensor) -> tuple[float, float, torch.Tensor]:
        """Mean reward of the decoded prediction, its share of the loss, and that share's gradient with respect to the velocity."""
        config, sigma = self._config, draw.sigmas[0]
        share_B = (1 - sigma) * _is_told(draw, latent)
        x0 = x0_from_velocity(latent, velocity, sigma)
        rewards_B, gradient = reward_gradient(config, self._parts, x0, draw, weight=lambda _: share_B)
        return float(rewards_B.mean()), -config.objective.reward_scale * float((share_B * rewards_B).mean()), -sigma * gradient

    def _latent_reward(
        self, expert: str, draw: Draw, latent: torch.Tensor, velocity: torch.Tensor, context: PromptContext
    ) -> tuple[float, float, torch.Tensor]:
        """Mean probability of the next latent, its share of the loss, and that share's gradient with respect to the velocity."""
        config, (sigma, next_sigma) = self._config, draw.sigmas[:2]
        leaf = euler_step(latent, velocity, sigma, next_sigma).requires_grad_()
        scores = self._parts.latent_reward.score(leaf, next_sigma, context.prompt_BPD)
        even = _mean_stride(config, expert) / (sigma - next_sigma)
        scale = config.objective.reward_scale if config.reward.kind == "pavrm" else config.one_pass.pavrm_scale
        loss = -even * scale * (_is_told(draw, latent) * scores.logit_B.float()).mean()
        (gradient,) = torch.autograd.grad(loss, leaf)
        return float(scores.probability_B.detach().mean()), float(loss.detach()), (next_sigma - sigma) * gradient


def _flow_matching(config: TrainConfig, velocity: torch.Tensor, target: torch.Tensor) -> tuple[float, torch.Tensor]:
    error, weight = velocity - target, config.one_pass.flow_weight
    return weight * float(error.square().mean()), error * (2 * weight / error.numel())


def _is_told(draw: Draw, latent: torch.Tensor) -> torch.Tensor:
    """1 for videos with a prompt, 0 for those whose prompt was taken away: the network cannot follow a reward of words that it does not see."""
    return latent.new_tensor([float(prompt != NULL_PROMPT) for prompt in draw.prompts], dtype=torch.float32)


def _mean_stride(config: TrainConfig, expert: str) -> float:
    """Mean of |dx_next / dv| over the expert's steps."""
    sigmas = config.sampling.sigmas()
    strides = [sigmas[step] - sigmas[step + 1] for step in config.gradient_steps(expert)]
    return sum(strides) / len(strides)

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

Not here: image conditioning, reward mixing, several devices.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from ...reward_models.base import RewardModel, reward_and_frame_gradient
from .. import checkpoint, events
from ..config import TrainConfig
from ..evaluation import evaluate, show_samples
from ..flow import euler_step, steps_of_expert, x0_from_velocity
from ..lora.adapter import new_adapter
from ..lora.linears import install
from ..lora.targets import select_targets
from ..prompts import PromptSampler, derived_seed
from ..protocols import Decoder, EventSink, SampleWriter, StopRequested
from ..rollout import ContextCache, Experts, PromptContext
from ..selection import choose_frames, choose_latents, choose_steps
from ..trainee import Trainee, new_trainee

FRAMES_PER_CHUNK = 64
# 1 / (2 sigma^2) without a floor would make the KL of the last, almost noiseless steps a thousand times that of the others.
_KL_SIGMA_FLOOR = 0.1


class NonFiniteError(RuntimeError):
    """The loss or its gradient is not finite; the last checkpoint is good."""


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What the loop is wired with; `pause` is called between updates and may wait, to leave the card to somebody else."""

    experts: Experts
    decoder: Decoder
    reward: RewardModel
    contexts: ContextCache
    sink: EventSink
    stop_requested: StopRequested
    writer: SampleWriter | None = None
    pause: Callable[[], None] = lambda: None
    base_sha256: Callable[[str], str] = lambda expert: ""
    clock: Callable[[], float] = time.time
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))


@dataclass(frozen=True, kw_only=True)
class Draw:
    """Everything random of one micro-batch; equal for equal (seed, step, micro)."""

    prompts: list[str]
    noise_BCFHW: torch.Tensor
    steps: list[int]
    latents: range


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Means over a micro-batch; gradients were added to the LoRA's parameters."""

    reward: float
    kl: float
    sigma: float


def train(config: TrainConfig, parts: Parts, folder: Path, *, resume: bool = False) -> events.Finished:
    """Run the whole training.

    Args:
        config: checked settings.
        parts: models and connections; backbones must be in training mode (host) for the whole call.
        folder: run folder, for checkpoints and LoRAs.
        resume: go on from the newest checkpoint there; the result has the same bytes as an uninterrupted run.

    Returns:
        The last event, which was also sent to the sink.

    Raises:
        NonFiniteError: the loss or gradient became NaN or infinite; names step, sigma and the last three rewards.
    """
    with ExitStack() as installed:
        trainees = {expert: _new_trainee(config, parts, expert, installed) for expert in config.trained_experts}
        progress = checkpoint.load_latest(folder, config, list(trainees.values())) if resume else checkpoint.Progress()
        parts.experts.count.total = progress.forwards
        sampler = PromptSampler(config.prompts, config.seed)
        sigmas = config.sampling.sigmas()
        parts.sink(_started(config, parts, trainees, progress))
        if progress.held_out_base is None and config.held_out.every and progress.step == 0:
            base = evaluate(config, parts, trainees)
            progress = replace(progress, held_out_base=base.mean)
        if progress.step == 0 and config.sample_every:
            show_samples(config, parts, trainees, 0)

        reason = "completed"
        saved_at = progress.step
        for step in range(progress.step + 1, config.steps + 1):
            parts.pause()
            if parts.stop_requested():
                reason = "stopped"
                break
            begun = time.perf_counter()
            expert = config.trained_experts[(step - 1) % len(trainees)]
            trainee = trainees[expert]

            outcomes = []
            for micro in range(config.optimiser.accumulate):
                draw = draw_batch(config, sampler, expert, step, micro)
                with ExitStack() as merged:
                    for other in trainees.values():
                        merged.enter_context(other.switch.merged())
                    outcomes.append(add_gradient(config, parts, trainee, draw, sigmas))
            count = len(outcomes)
            reward, kl, sigma = (sum(getattr(outcome, name) for outcome in outcomes) / count for name in ("reward", "kl", "sigma"))
            loss = -config.objective.reward_scale * reward + config.objective.kl_weight * kl

            grad_norm = trainee.update(step) if math.isfinite(loss) else math.nan
            if not math.isfinite(grad_norm):
                recent = ", ".join(f"{value:.6g}" for value in (*progress.last_rewards[-2:], reward))
                raise NonFiniteError(
                    f"step {step} at sigma {sigma:.4f} ({expert}-noise expert): loss {loss}, gradient norm {grad_norm}; last three rewards: {recent}. "
                    "The last checkpoint is good; resume from it with a smaller learning rate (optimiser.lr) or reward_scale"
                )
            progress = replace(progress, step=step, forwards=parts.experts.count.total, last_rewards=(*progress.last_rewards[-2:], reward))

            is_last = step == config.steps
            held_out = None
            if config.held_out.every and (step % config.held_out.every == 0 or is_last):
                held_out = evaluate(config, parts, trainees)
            parts.sink(
                events.Step(
                    time=parts.clock(),
                    step=step,
                    steps=config.steps,
                    reward=reward,
                    loss=loss,
                    grad_norm=grad_norm,
                    sigma=sigma,
                    seconds=time.perf_counter() - begun,
                    expert=expert,
                    kl=kl,
                    learning_rate=trainee.learning_rate(step),
                    forwards=progress.forwards,
                    held_out=held_out.mean if held_out else None,
                    held_out_error=held_out.standard_error if held_out else None,
                    held_out_base=progress.held_out_base if held_out else None,
                )
            )
            if config.sample_every and (step % config.sample_every == 0 or is_last):
                show_samples(config, parts, trainees, step)
            if config.checkpoint_every and step % config.checkpoint_every == 0:
                _save(config, parts, folder, trainees, progress)
                saved_at = step

        if saved_at != progress.step or not checkpoint.states(folder):
            _save(config, parts, folder, trainees, progress)
        finished = _finish(config, parts, folder, trainees, progress, reason)
    parts.sink(finished)
    return finished


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


def add_gradient(config: TrainConfig, parts: Parts, trainee: Trainee, draw: Draw, sigmas: list[float]) -> Outcome:
    """Add one micro-batch's share of the update's gradient to the trainee's parameters."""
    context = parts.contexts.batch(draw.prompts)
    gradient_of = _through_chain if config.objective.mode == "chain" else _through_x0
    return gradient_of(config, parts, trainee, draw, sigmas, context)


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
    return Outcome(reward=reward, kl=float(kl.detach()), sigma=sum(sigmas[index] for index in draw.steps) / len(draw.steps))


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
        outcomes.append(Outcome(reward=reward, kl=float(kl.detach()), sigma=sigmas[index]))
        latent, at = euler_step(latent, velocity.detach(), sigmas[index], sigmas[index + 1]), index + 1
    reward, kl, sigma = (sum(getattr(outcome, name) for outcome in outcomes) / len(outcomes) for name in ("reward", "kl", "sigma"))
    return Outcome(reward=reward, kl=kl, sigma=sigma)


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


def _new_trainee(config: TrainConfig, parts: Parts, expert: str, installed: ExitStack) -> Trainee:
    linears = parts.experts.backbones[expert].linears()
    paths = select_targets(linears, config.lora.targets, config.lora.skip)
    seed = derived_seed(config.seed, "lora", expert)
    adapter = new_adapter(linears, paths, rank=config.lora.rank, alpha=config.lora.effective_alpha, seed=seed, device=parts.device)
    return new_trainee(expert, adapter, installed.enter_context(install(linears, adapter)), config.optimiser)


def _started(config: TrainConfig, parts: Parts, trainees: Mapping[str, Trainee], progress: checkpoint.Progress) -> events.Started:
    sigmas = config.sampling.sigmas()
    return events.Started(
        time=parts.clock(),
        steps=config.steps,
        first_step=progress.step,
        experts=list(trainees),
        reward=config.reward.kind,
        parameters=sum(parameter.numel() for trainee in trainees.values() for parameter in trainee.adapter.parameters()),
        device=str(parts.device),
        boundary_step=len(steps_of_expert(sigmas, config.sampling.boundary, "high")),
        sampling_steps=config.sampling.steps,
    )


def _save(config: TrainConfig, parts: Parts, folder: Path, trainees: Mapping[str, Trainee], progress: checkpoint.Progress) -> None:
    state = checkpoint.save_state(folder, config, list(trainees.values()), progress)
    files = [state]
    for expert, trainee in trainees.items():
        name = checkpoint.lora_file_name(config, expert).removesuffix(".safetensors")
        path = folder / checkpoint.FOLDER / f"{name}-step{progress.step:06d}.safetensors"
        checkpoint.save_lora(path, config, trainee, progress.step, parts.base_sha256(expert))
        files.append(path)
    checkpoint.prune(folder, config.keep_checkpoints)
    parts.sink(events.Checkpoint(time=parts.clock(), step=progress.step, files=[path.relative_to(folder).as_posix() for path in files]))


def _finish(
    config: TrainConfig, parts: Parts, folder: Path, trainees: Mapping[str, Trainee], progress: checkpoint.Progress, reason: str
) -> events.Finished:
    files = []
    for expert, trainee in trainees.items():
        for target in filter(None, (str(folder), config.output_folder)):
            Path(target).mkdir(parents=True, exist_ok=True)
            path = Path(target) / checkpoint.lora_file_name(config, expert)
            checkpoint.save_lora(path, config, trainee, progress.step, parts.base_sha256(expert))
            files.append(str(path.resolve()))
    return events.Finished(time=parts.clock(), step=progress.step, files=files, reason=reason)

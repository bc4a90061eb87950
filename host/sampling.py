"""Samples with both Wan2.2 experts through the host's own samplers.

The sigma schedule is computed once for all steps and cut where it falls below the boundary: the high-noise expert gets the steps that
start at or above it, the low-noise expert the rest, starting from the first one's leftover noise. Previews, progress and cancelling are
the host's. A sampler that remembers earlier steps (dpmpp_2m, uni_pc, …) starts anew at the switch, as with two of the host's samplers.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import comfy.model_sampling
import comfy.sample
import comfy.samplers
import comfy.utils
import latent_preview
import torch

from ..lora_train.flow import boundary_index
from .lora_patch import model_expert

logger = logging.getLogger("reward_lab")


@dataclass(frozen=True, kw_only=True)
class SampleSettings:
    """Settings of one sampling run. `boundary` is a sigma in [0, 1]; guidance 1 turns guidance off."""

    seed: int
    steps: int
    shift: float
    guidance_high: float
    guidance_low: float
    boundary: float
    sampler_name: str = "euler"
    scheduler: str = "simple"

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps is {self.steps}; it must be at least 1.")
        if not self.shift > 0:
            raise ValueError(f"shift is {self.shift}; it must be above 0. Official values: T2V 12, I2V 5.")
        if not 0.0 <= self.boundary <= 1.0:
            raise ValueError(f"boundary is {self.boundary}; it is a sigma from 0 to 1. Official values: T2V 0.875, I2V 0.9.")
        for name in ("guidance_high", "guidance_low"):
            if not 0.0 <= getattr(self, name) <= 100.0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be from 0 to 100.")


def sampler_names() -> list[str]:
    """Return the host's samplers."""
    return list(comfy.samplers.SAMPLER_NAMES)


def scheduler_names() -> list[str]:
    """Return the host's schedulers."""
    return list(comfy.samplers.SCHEDULER_NAMES)


def switch_step(sigmas: torch.Tensor, boundary: float) -> int:
    """Count the steps of the high-noise expert.

    Args:
        sigmas: Descending schedule of n + 1 values; step i goes from sigmas[i] to sigmas[i + 1].
        boundary: Sigma below which the low-noise expert takes over.

    Returns:
        The number of steps that start at or above the boundary, 0 to n. Training uses the same rule.
    """
    return boundary_index(sigmas.tolist(), boundary)


def sample_two_experts(model_high: Any, model_low: Any, positive: Any, negative: Any, latent: dict, settings: SampleSettings) -> tuple[dict, str]:
    """Sample a latent.

    Args:
        model_high: MODEL of the high-noise expert.
        model_low: MODEL of the low-noise expert.
        positive: CONDITIONING.
        negative: CONDITIONING.
        latent: LATENT; its `samples` are [B, 16, F, H/8, W/8].
        settings: See SampleSettings.

    Returns:
        The LATENT and a report that names the step and sigma of the switch.

    Raises:
        ValueError: The experts are swapped, the schedule is empty, or the latent is not one of these models.
    """
    _refuse_swapped(model_high, model_low)
    model_high, model_low = _with_shift(model_high, settings.shift), _with_shift(model_low, settings.shift)
    # The host's KSampler object is asked for its sigmas, so that its special cases (uni_pc, dpm_2) hold here as well.
    schedule = comfy.samplers.KSampler(
        model_high, steps=settings.steps, device=model_high.load_device, sampler=settings.sampler_name, scheduler=settings.scheduler
    )
    sigmas = schedule.sigmas.cpu()
    if len(sigmas) < 2:
        raise ValueError(f"Scheduler {settings.scheduler!r} gives no step for steps={settings.steps}. Choose another scheduler or more steps.")
    step_count, switch = len(sigmas) - 1, switch_step(sigmas, settings.boundary)
    samples = _video_latent(model_high, latent)
    noise = comfy.sample.prepare_noise(samples, settings.seed, latent.get("batch_index"))
    sampler = comfy.samplers.sampler_object(settings.sampler_name)
    show_step = latent_preview.prepare_callback(model_high if switch else model_low, step_count)
    stages = ((model_high, settings.guidance_high, 0, switch), (model_low, settings.guidance_low, switch, step_count))
    for model, guidance, first, last in stages:
        if first == last:
            continue
        samples = comfy.sample.sample_custom(
            model,
            noise,
            guidance,
            sampler,
            sigmas[first : last + 1].clone(),
            positive,
            negative,
            samples,
            noise_mask=latent.get("noise_mask"),
            callback=_shifted_callback(show_step, first, step_count),
            disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
            # A stochastic sampler seeds its own noise from this; the same seed twice would add the same noise twice.
            seed=settings.seed if first == 0 else (settings.seed + 1) % 2**64,
        )
        noise = torch.zeros_like(samples, device="cpu")
    out = {key: value for key, value in latent.items() if key not in ("downscale_ratio_spacial", "downscale_ratio_temporal")}
    report = _report(sigmas, switch, settings)
    logger.info("%s", report)
    return {**out, "samples": samples}, report


def _video_latent(model: Any, latent: dict) -> torch.Tensor:
    """Return a LATENT's samples with the model's channels. Raises ValueError when it is no latent of a video."""
    samples = comfy.sample.fix_empty_latent_channels(
        model, latent["samples"], latent.get("downscale_ratio_spacial"), latent.get("downscale_ratio_temporal")
    )
    channels = model.get_model_object("latent_format").latent_channels
    if samples.ndim != 5 or samples.shape[1] != channels:
        raise ValueError(
            f"The latent has shape {tuple(samples.shape)}; these models need [batch, {channels}, frames, height, width]. Use an empty Wan video latent."
        )
    return samples


def _shifted_callback(show_step: Any, first: int, step_count: int) -> Any:
    """Count the steps of a stage as steps of the whole run, for one progress bar."""

    def callback(step: int, x0: torch.Tensor, x: torch.Tensor, _stage_steps: int) -> None:
        show_step(first + step, x0, x, step_count)

    return callback


def _refuse_swapped(model_high: Any, model_low: Any) -> None:
    """Refuse experts of which at least one is known to sit in the other's slot."""
    found = {"high": model_expert(model_high), "low": model_expert(model_low)}
    if found["high"] == "low" and found["low"] == "high":
        raise ValueError("The experts are swapped: model_high is the low-noise expert and model_low the high-noise one. Exchange the two links.")
    for slot, expert in found.items():
        if expert not in (None, slot):
            raise ValueError(f"model_{slot} is the {expert}-noise expert. Connect the {slot}-noise expert there.")


def _with_shift(model: Any, shift: float) -> Any:
    """Return a clone whose flow schedule has the given shift, as the host's ModelSamplingSD3 node makes it."""

    class ShiftedFlow(comfy.model_sampling.ModelSamplingDiscreteFlow, comfy.model_sampling.CONST):
        """The host composes its sampling classes in this way."""

    model = model.clone()
    sampling = ShiftedFlow(model.model.model_config)
    sampling.set_parameters(shift=shift, multiplier=1000)
    model.add_object_patch("model_sampling", sampling)
    return model


def _report(sigmas: torch.Tensor, switch: int, settings: SampleSettings) -> str:
    """Say where the experts switched."""
    step_count = len(sigmas) - 1
    head = f"{step_count} steps, {settings.sampler_name}, {settings.scheduler}, shift {settings.shift:g}, seed {settings.seed}: "
    if switch == 0:
        return head + f"all steps by the low-noise expert; no step starts at or above sigma {settings.boundary:g}"
    if switch == step_count:
        return head + f"all steps by the high-noise expert; no step starts below sigma {settings.boundary:g}"
    return head + f"switch after step {switch} of {step_count} at sigma {float(sigmas[switch]):.4f} (boundary {settings.boundary:g})"

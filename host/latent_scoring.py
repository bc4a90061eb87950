"""The Score Latent node: a clean or noisy latent of the workflow through a PAVRM at several noise levels."""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.model_patcher
import torch

from ..reward_models.spec import RewardModelSpec
from . import pavrm, pavrm_lora, score_files
from .training_mode import training_mode
from .vae import FORMATS

_models: OrderedDict[str, Any] = OrderedDict()
_lock = threading.Lock()


@dataclass(frozen=True, kw_only=True)
class LatentScore:
    """Scores of latents over noise levels.

    Attributes:
        sigmas: noise levels.
        logits, probabilities: by latent, then by noise level.
        warnings: what was done to the input.
    """

    sigmas: tuple[float, ...]
    logits: tuple[tuple[float, ...], ...]
    probabilities: tuple[tuple[float, ...], ...]
    warnings: tuple[str, ...] = ()

    @property
    def probability(self) -> float:
        """Mean over latents and noise levels."""
        return _mean([_mean(row) for row in self.probabilities])

    def to_json(self) -> str:
        """Return everything as JSON: `levels` of the first latent, `videos` with the levels of each."""
        videos = [
            {"probability": _mean(probabilities), "levels": self._levels(logits, probabilities)}
            for logits, probabilities in zip(self.logits, self.probabilities, strict=True)
        ]
        return json.dumps({"probability": self.probability, "levels": videos[0]["levels"], "videos": videos, "warnings": list(self.warnings)})

    def _levels(self, logits: tuple[float, ...], probabilities: tuple[float, ...]) -> list[dict[str, float]]:
        rows = zip(self.sigmas, logits, probabilities, strict=True)
        return [{"sigma": sigma, "timestep": int(sigma * pavrm.TIMESTEPS), "logit": logit, "probability": value} for sigma, logit, value in rows]

    def summary(self) -> str:
        """Return a line per latent, and one for every warning."""
        lines = []
        for number, row in enumerate(self.probabilities, 1):
            levels = ", ".join(f"{sigma:g}: {value:.3f}" for sigma, value in zip(self.sigmas, row, strict=True))
            name = f"latent {number}: " if len(self.probabilities) > 1 else ""
            lines.append(f"{name}PAVRM probability {_mean(row):.4f} (by sigma {levels})")
        return "\n".join([*lines, *self.warnings])


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def parse_sigmas(text: str) -> list[float]:
    """Read noise levels.

    Raises:
        ValueError: None, not numbers, or outside 0 to 1.
    """
    try:
        sigmas = [float(part) for part in text.replace(",", " ").split()]
    except ValueError as error:
        raise ValueError(f"sigmas is {text!r}; write numbers from 0 to 1 with commas between, such as 0.2, 0.5, 0.8.") from error
    if not sigmas or not all(0 <= sigma <= 1 for sigma in sigmas):
        raise ValueError(f"sigmas is {text!r}; write at least one number, each from 0 (clean) to 1 (noise).")
    return sigmas


def score(latent: dict[str, Any], conditioning: list, spec: RewardModelSpec, sigmas_text: str, seed: int) -> LatentScore:
    """Score a LATENT.

    Args:
        latent: The host's LATENT; its samples are finished videos (no noise).
        conditioning: The host's CONDITIONING of the prompt; image-to-video conditioning brings the first frame along.
        spec: A PAVRM.
        sigmas_text: Noise levels; the latent gets so much noise before it is scored.
        seed: Of the noise, the same for all levels.

    Raises:
        ValueError: Not a PAVRM, not a latent of its VAE, or a wrong text width.
    """
    if spec.kind != "pavrm":
        raise ValueError(f"The reward model is {spec.kind}, which scores frames. Choose kind pavrm, or use Score Video.")
    sigmas = parse_sigmas(sigmas_text)
    samples = latent["samples"] if isinstance(latent, dict) and "samples" in latent else latent
    if not isinstance(samples, torch.Tensor):
        raise ValueError(f"The latent holds {type(samples).__name__}; connect the LATENT of a sampler.")
    if not conditioning:
        raise ValueError("The conditioning is empty. Connect the prompt's CONDITIONING.")
    device = comfy.model_management.get_torch_device()
    model = _loaded(spec, device)
    logits, probabilities = [], []
    with training_mode(), torch.no_grad(), score_files.collected_warnings() as warnings:
        model.check_latent(samples)
        # The workflow's latents are the VAE's own; the transformer sees them shifted and scaled channel by channel.
        into_model = FORMATS[model.latent_channels]().process_in
        clean_BCFHW = into_model(samples.clone().float())
        noise = torch.randn(clean_BCFHW[:1].shape, generator=torch.Generator().manual_seed(seed))
        texts_BPD, extras = conditioning[0][0].clone(), conditioning[0][1]
        for index, clean in enumerate(clean_BCFHW):
            # One at a time: memory does not grow with the batch.
            text_PD, image = texts_BPD[min(index, len(texts_BPD) - 1)], _image(extras, index, into_model)
            outputs = []
            for sigma in sigmas:
                comfy.model_management.throw_exception_if_processing_interrupted()
                noisy = (1 - sigma) * clean[None] + sigma * noise
                outputs.append(model.score(noisy, torch.tensor([int(sigma * pavrm.TIMESTEPS)]), [text_PD], image))
                pavrm.check_output(outputs[-1])
            logits.append(tuple(float(output.logit) for output in outputs))
            probabilities.append(tuple(float(output.probability) for output in outputs))
    told = tuple(dict.fromkeys(warnings))
    return LatentScore(sigmas=tuple(sigmas), logits=tuple(logits), probabilities=tuple(probabilities), warnings=told)


def _image(extras: dict[str, Any], index: int, into_model: Callable[[torch.Tensor], torch.Tensor]) -> pavrm.ImageCondition:
    """What the host's image-to-video conditioning carries for a latent of the batch."""
    vision, first = extras.get("clip_vision_output"), extras.get("concat_latent_image")
    clip_BPD = None if vision is None else _row(vision.penultimate_hidden_states, index).clone()
    first_BCFHW = None if first is None else into_model(_row(first, index).clone().float())
    return pavrm.ImageCondition(clip_BPD=clip_BPD, latent_BCFHW=first_BCFHW)


def _row(batch: torch.Tensor, index: int) -> torch.Tensor:
    """The entry of a latent, or the last one where there are fewer, as the host repeats conditioning."""
    return batch[min(index, len(batch) - 1)][None]


def _loaded(spec: RewardModelSpec, device: torch.device) -> pavrm.Pavrm:
    stamps = [[file, Path(file).stat().st_mtime_ns] for file in spec.files() if Path(file).exists()]
    key = json.dumps([spec.to_dict(), stamps, str(device)], sort_keys=True)
    offload = comfy.model_management.unet_offload_device() if device.type != "cpu" else device
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    with _lock, torch.inference_mode(False):
        if key not in _models:
            _models.clear()  # a trunk is large; one at a time
            options, head = spec.options, pavrm.head_options(spec.options)
            if options.get("generator"):
                model = pavrm_lora.load(spec.path, options["generator"], device=offload, dtype=dtype)
            else:
                model = pavrm.load(spec.path, **head, device=offload, dtype=dtype)
            _models[key] = model, [comfy.model_patcher.ModelPatcher(part, device, offload) for part in (model.model, model.head)]
        model, patchers = _models[key]
        comfy.model_management.load_models_gpu(patchers, force_full_load=True)
        return model

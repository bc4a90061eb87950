"""The Score Latent node: a clean or noisy latent of the workflow through a PAVRM at several noise levels."""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.model_patcher
import torch

from ..reward_models.spec import RewardModelSpec
from . import pavrm, pavrm_lora
from .training_mode import training_mode
from .vae import FORMATS

_models: OrderedDict[str, Any] = OrderedDict()
_lock = threading.Lock()


@dataclass(frozen=True, kw_only=True)
class LatentScore:
    """Scores of one latent over noise levels."""

    sigmas: tuple[float, ...]
    logits: tuple[float, ...]
    probabilities: tuple[float, ...]

    @property
    def probability(self) -> float:
        """Mean over the noise levels."""
        return sum(self.probabilities) / len(self.probabilities)

    def to_json(self) -> str:
        """Return everything as JSON."""
        rows = [
            {"sigma": sigma, "timestep": int(sigma * pavrm.TIMESTEPS), "logit": logit, "probability": probability}
            for sigma, logit, probability in zip(self.sigmas, self.logits, self.probabilities, strict=True)
        ]
        return json.dumps({"probability": self.probability, "levels": rows})

    def summary(self) -> str:
        """Return one line for the node."""
        rows = ", ".join(f"{sigma:g}: {value:.3f}" for sigma, value in zip(self.sigmas, self.probabilities, strict=True))
        return f"PAVRM probability {self.probability:.4f} (by sigma {rows})"


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
        latent: The host's LATENT; its samples are a finished video (no noise).
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
    with training_mode(), torch.no_grad():
        model.check_latent(samples)
        # The workflow's latents are the VAE's own; the transformer sees them shifted and scaled channel by channel.
        into_model = FORMATS[model.latent_channels]().process_in
        clean = into_model(samples[:1].clone().float())
        noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(seed))
        text_PD, image = conditioning[0][0][0].clone(), _image(conditioning[0][1], into_model)
        for sigma in sigmas:
            comfy.model_management.throw_exception_if_processing_interrupted()
            noisy = (1 - sigma) * clean + sigma * noise
            output = model.score(noisy, torch.tensor([int(sigma * pavrm.TIMESTEPS)]), [text_PD], image)
            logits.append(float(output.logit))
            probabilities.append(float(output.probability))
    return LatentScore(sigmas=tuple(sigmas), logits=tuple(logits), probabilities=tuple(probabilities))


def _image(extras: dict[str, Any], into_model: Callable[[torch.Tensor], torch.Tensor]) -> pavrm.ImageCondition:
    """What the host's image-to-video conditioning carries."""
    vision, first = extras.get("clip_vision_output"), extras.get("concat_latent_image")
    clip = None if vision is None else vision.penultimate_hidden_states.clone()
    return pavrm.ImageCondition(clip_BPD=clip, latent_BCFHW=None if first is None else into_model(first.clone().float()))


def _loaded(spec: RewardModelSpec, device: torch.device) -> pavrm.Pavrm:
    stamps = [[file, Path(file).stat().st_mtime_ns] for file in spec.files() if Path(file).exists()]
    key = json.dumps([spec.to_dict(), stamps, str(device)], sort_keys=True)
    offload = comfy.model_management.unet_offload_device() if device.type != "cpu" else device
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    with _lock, torch.inference_mode(False):
        if key not in _models:
            _models.clear()  # a trunk is large; one at a time
            options = spec.options
            if options.get("generator"):
                model = pavrm_lora.load(spec.path, options["generator"], device=offload, dtype=dtype)
            else:
                head = {name: options.get(name) for name in pavrm.HEAD_OPTIONS}
                model = pavrm.load(spec.path, **head, device=offload, dtype=dtype)
            _models[key] = model, [comfy.model_patcher.ModelPatcher(part, device, offload) for part in (model.model, model.head)]
        model, patchers = _models[key]
        comfy.model_management.load_models_gpu(patchers, force_full_load=True)
        return model

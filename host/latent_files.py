"""`lab.py score-latent`: latents from a safetensors file through a PAVRM.

One case: tensors `latent` [B, C, F, H, W], `text` [B, P, D] or [P, D], `timestep` [B] or [1]. Several: the same names behind `NAME.`; a timestep without a
name serves all. Image-to-video trunks also read `image_embeds` (or `img_clip`) and `condition` (or `f1_black`, `y`). `feature_layers` behind
`NAME.VARIANT.` asks for other tapped blocks on the same latent. Without a timestep, `--sigma` says how much noise the clean latent gets.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from . import pavrm, pavrm_lora
from .training_mode import training_mode

_LATENTS = ("latent", "noisy_latent", "next_latent", "latents", "samples")
_IMAGE = ("image_embeds", "img_clip", "clip_fea", "clip")
_CONDITION = ("condition", "f1_black", "y")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """A batch to score, each latent at its own noise level."""

    name: str
    latent_BCFHW: torch.Tensor
    timesteps: list[int]
    sigmas: list[float]
    texts_PD: list[torch.Tensor]
    image: pavrm.ImageCondition
    taps: tuple[int, ...] | None = None


def score(options: Mapping[str, Any], device: str, dtype: torch.dtype) -> dict[str, Any]:
    """Score every case of the file.

    Args:
        options: of the command line, see labtools/scoring.py.
        device: where to score.
        dtype: of the trunk.

    Returns:
        A JSON-ready document; `videos` has an entry per latent with name, timestep, sigma, logit, probability.

    Raises:
        ValueError: the file lacks a tensor, or something does not fit.
    """
    try:
        tensors = load_file(options["input"])
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{options['input']} cannot be read as safetensors ({error}); it is missing, damaged or something else.") from error
    cases = list(read_cases(tensors, _numbers(options.get("sigma"), float, "--sigma"), int(options.get("seed") or 0)))
    layers = _numbers(options.get("layers"), int, "--layers")
    loaders: dict[tuple[int, ...] | None, pavrm.Pavrm] = {}
    videos, out = [], {} if options.get("tensors") else None
    for sigma in _numbers(options.get("sigma"), float, "--sigma"):
        if not 0 <= sigma <= 1:
            raise ValueError(f"--sigma has {sigma}; it must be from 0 (clean) to 1 (noise).")
    for case in cases:
        taps = case.taps or (tuple(layers) if layers else None)
        if taps not in loaders:
            loaders[taps] = _load(options, taps, device, dtype)
        videos += _score_case(loaders[taps], case, out)
    if out is not None:
        save_file({name: value.cpu().contiguous() for name, value in out.items()}, options["tensors"])
    first = next(iter(loaders.values()))
    settings = {"layers": list(first.taps), "dtype": str(dtype).removeprefix("torch."), "model_type": first.model.model_type}
    return {"kind": "pavrm", "trunk": options["trunk"], "options": settings, "range": "probability 0 to 1, higher is better", "videos": videos, "warnings": []}


def _load(options: Mapping[str, Any], taps: tuple[int, ...] | None, device: str, dtype: torch.dtype) -> pavrm.Pavrm:
    if options.get("generator"):
        return pavrm_lora.load(options["trunk"], options["generator"], device=device, dtype=dtype, use_folded=not options.get("exact_pooling"))
    head = {name: options.get(name) for name in pavrm.HEAD_OPTIONS}
    return pavrm.load(options["trunk"], **head, taps=taps, use_folded=not options.get("exact_pooling"), device=device, dtype=dtype)


def _score_case(model: pavrm.Pavrm, case: Case, out: dict[str, torch.Tensor] | None) -> list[dict[str, Any]]:
    latent = case.latent_BCFHW.float().to(model.device)
    timestep_B = torch.tensor(case.timesteps, device=model.device)
    with training_mode(), torch.set_grad_enabled(out is not None):
        leaf = latent.clone().requires_grad_(out is not None)
        features = model.features(leaf, timestep_B, case.texts_PD, case.image)
        output = model.head(features)
        if out is not None:
            (gradient,) = torch.autograd.grad(output.logit.sum(), leaf)
            values = {"features": features[-1], "pooled": output.pooled, "logit": output.logit, "reward": output.probability, "logit_grad_latent": gradient}
            out.update({f"{case.name}.{name}" if case.name else name: value.detach() for name, value in values.items()})
    rows = []
    for index, (logit, probability) in enumerate(zip(output.logit.tolist(), output.probability.tolist(), strict=True)):
        name = case.name if len(latent) == 1 else f"{case.name}[{index}]"
        numbers = {"logit": logit, "probability": probability, "reward": probability, "per_video": probability, "parts": {"logit": {"per_video": logit}}}
        rows.append({"name": name or "latent", "timestep": case.timesteps[index], "sigma": case.sigmas[index], "layers": list(model.taps), **numbers})
    return rows


def read_cases(tensors: Mapping[str, torch.Tensor], sigmas: list[float], seed: int) -> Iterator[Case]:
    """The cases in a file's tensors; see the module's docstring.

    Raises:
        ValueError: no latent, or a case without text or noise level.
    """
    prefixes = sorted({key[: -len(name)] for key in tensors for name in _LATENTS if key == name or key.endswith(f".{name}")})
    if not prefixes:
        shown = ", ".join(f"{key} {tuple(value.shape)}" for key, value in sorted(tensors.items())[:6])
        raise ValueError(f"The file holds no latent (it has {shown or 'nothing'}); name it latent, or NAME.latent, beside text and timestep.")
    for prefix in prefixes:
        latent = _find(tensors, prefix, _LATENTS)
        name = prefix.removesuffix(".")
        if latent.ndim == 4:
            latent = latent[None]
        image = pavrm.ImageCondition(clip_BPD=_find(tensors, prefix, _IMAGE), latent_BCFHW=_find(tensors, prefix, _CONDITION))
        common = {"texts_PD": _texts(tensors, prefix, len(latent)), "image": image}
        for sigma in sigmas:
            shown = name if len(sigmas) == 1 else f"{name}@{sigma:g}".removeprefix("@")
            timesteps = [int(sigma * pavrm.TIMESTEPS)] * len(latent)
            case = Case(name=shown, latent_BCFHW=_noised(latent, sigma, seed), timesteps=timesteps, sigmas=[sigma] * len(latent), **common)
            yield case
        if not sigmas:
            values = _timesteps(tensors, prefix, len(latent))
            # Upstream feeds whole numbers; a fraction is cut, as its schedules do.
            levels = {"timesteps": [int(value) for value in values], "sigmas": [value / pavrm.TIMESTEPS for value in values]}
            case = Case(name=name, latent_BCFHW=latent, **levels, **common)
            yield case
        if len(sigmas) <= 1:
            for key in sorted(tensors):
                if key.startswith(prefix) and key.endswith(".feature_layers"):
                    taps = tuple(int(tap) for tap in tensors[key].flatten().tolist())
                    yield dataclasses.replace(case, name=key.removesuffix(".feature_layers"), taps=taps)


def _find(tensors: Mapping[str, torch.Tensor], prefix: str, names: tuple[str, ...]) -> torch.Tensor | None:
    """The tensor of a case; one above it (fewer dots) serves where the case has none of its own."""
    while True:
        for name in names:
            if prefix + name in tensors:
                return tensors[prefix + name]
        if not prefix:
            return None
        stem = prefix.removesuffix(".")
        prefix = stem[: stem.rfind(".") + 1]


def _texts(tensors: Mapping[str, torch.Tensor], prefix: str, count: int) -> list[torch.Tensor]:
    text = _find(tensors, prefix, ("text", "text_embeds", "context"))
    if text is None:
        raise ValueError(f"The case {prefix.removesuffix('.') or 'of this file'} has no text; give the text encoder's output as {prefix}text.")
    rows = list(text if text.ndim == 3 else text[None])
    if len(rows) not in (1, count):
        raise ValueError(f"{prefix}text holds {len(rows)} texts for {count} latents; give one, or one each.")
    return rows * (count if len(rows) == 1 else 1)


def _timesteps(tensors: Mapping[str, torch.Tensor], prefix: str, count: int) -> list[float]:
    """A case's timesteps, one per latent."""
    timestep = _find(tensors, prefix, ("timestep", "timesteps"))
    if timestep is None:
        raise ValueError(f"The case {prefix.removesuffix('.') or 'of this file'} has no timestep; give {prefix}timestep, or --sigma for clean latents.")
    values = [float(value) for value in timestep.flatten().tolist()]
    if len(values) not in (1, count) or not all(0 <= value <= pavrm.TIMESTEPS for value in values):
        raise ValueError(f"{prefix}timestep holds {values} for {count} latents; one number from 0 to {pavrm.TIMESTEPS} is needed, or one each.")
    return values * (count if len(values) == 1 else 1)


def _noised(latent_BCFHW: torch.Tensor, sigma: float, seed: int) -> torch.Tensor:
    noise = torch.randn(latent_BCFHW.shape, generator=torch.Generator().manual_seed(seed))
    return (1 - sigma) * latent_BCFHW.float().cpu() + sigma * noise


def _numbers(text: str | None, kind: type, option: str) -> list:
    try:
        return [kind(part) for part in (text or "").replace(" ", ",").split(",") if part]
    except ValueError as error:
        raise ValueError(f"{option} is {text!r}; give numbers with commas between, such as 0.2,0.5,0.8.") from error

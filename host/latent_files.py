"""`lab.py score-latent`: latents from a safetensors file through a PAVRM.

One case: tensors `latent` [B, 16, F, H, W], `text` [B, P, D] or [P, D], `timestep` [B]. Several: the same names behind `NAME.`; a timestep without a
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
    """A batch to score at one noise level."""

    name: str
    latent_BCFHW: torch.Tensor
    timestep: int
    sigma: float
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
    return pavrm.load(
        options["trunk"], options.get("query"), options.get("head"), taps=taps, use_folded=not options.get("exact_pooling"), device=device, dtype=dtype
    )


def _score_case(model: pavrm.Pavrm, case: Case, out: dict[str, torch.Tensor] | None) -> list[dict[str, Any]]:
    latent = case.latent_BCFHW.float().to(model.device)
    timestep_B = torch.full((len(latent),), case.timestep, device=model.device)
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
        rows.append({"name": name or "latent", "timestep": case.timestep, "sigma": case.sigma, "layers": list(model.taps), **numbers})
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
        levels = list(_levels(tensors, prefix, sigmas))
        for timestep, sigma, is_noisy in levels:
            noisy = latent if is_noisy else _noised(latent, sigma, seed)
            shown = name if len(levels) == 1 else f"{name}@{sigma:g}".removeprefix("@")
            yield Case(name=shown, latent_BCFHW=noisy, timestep=timestep, sigma=sigma, **common)
            if len(levels) > 1:
                continue
            for key in sorted(tensors):
                if key.startswith(prefix) and key.endswith(".feature_layers"):
                    taps = tuple(int(tap) for tap in tensors[key].flatten().tolist())
                    yield Case(name=key.removesuffix(".feature_layers"), latent_BCFHW=noisy, timestep=timestep, sigma=sigma, taps=taps, **common)


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


def _levels(tensors: Mapping[str, torch.Tensor], prefix: str, sigmas: list[float]) -> Iterator[tuple[int, float, bool]]:
    """Timestep, sigma, and whether the latent is noisy already."""
    if sigmas:
        for sigma in sigmas:
            if not 0 <= sigma <= 1:
                raise ValueError(f"--sigma has {sigma}; it must be from 0 (clean) to 1 (noise).")
            yield int(sigma * pavrm.TIMESTEPS), sigma, False
        return
    timestep = _find(tensors, prefix, ("timestep", "timesteps"))
    if timestep is None:
        raise ValueError(f"The case {prefix.removesuffix('.') or 'of this file'} has no timestep; give {prefix}timestep, or --sigma for clean latents.")
    values = {float(value) for value in timestep.flatten().tolist()}
    if len(values) != 1 or not all(0 <= value <= pavrm.TIMESTEPS for value in values):
        raise ValueError(f"{prefix}timestep holds {sorted(values)}; one number from 0 to {pavrm.TIMESTEPS} is needed for a case.")
    (value,) = values
    # Upstream feeds whole numbers; a fraction is cut, as its schedules do.
    yield int(value), value / pavrm.TIMESTEPS, True


def _noised(latent_BCFHW: torch.Tensor, sigma: float, seed: int) -> torch.Tensor:
    noise = torch.randn(latent_BCFHW.shape, generator=torch.Generator().manual_seed(seed))
    return (1 - sigma) * latent_BCFHW.float().cpu() + sigma * noise


def _numbers(text: str | None, kind: type, option: str) -> list:
    try:
        return [kind(part) for part in (text or "").replace(" ", ",").split(",") if part]
    except ValueError as error:
        raise ValueError(f"{option} is {text!r}; give numbers with commas between, such as 0.2,0.5,0.8.") from error

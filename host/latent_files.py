"""`lab.py score-latent`: latents from a safetensors file through a PAVRM.

One case: tensors `latent` [B, C, F, H, W], `text` [B, P, D] or [P, D], `timestep` [B] or one for all. Several: the same names behind `NAME.`; what has
no name of a case before it serves all. Image-to-video trunks also read `image_embeds` (or `img_clip`) and `condition` (or `f1_black`, `y`).
`feature_layers` behind `NAME.VARIANT.` asks for other tapped blocks on the same latent. Without a timestep, `--sigma` says how much noise the clean
latent gets; a latent with one is noisy already. Every case is checked before the first is scored.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from . import pavrm, pavrm_lora, score_files
from .training_mode import training_mode

_LATENTS = ("latent", "noisy_latent", "next_latent", "latents", "samples")
_IMAGE = ("image_embeds", "img_clip", "clip_fea", "imgclip", "clip")
_CONDITION = ("condition", "f1_black", "latents_condition", "y")
# Of Wan's VAEs: a tensor that begins with one of them is a single latent.
_CHANNELS = (16, 48)
_TIMESTEP = ("timestep", "timesteps")
_TEXT = ("text", "text_embeds", "textshort", "context")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """A batch to score, each latent at its own noise level."""

    name: str
    latent_BCFHW: torch.Tensor
    timesteps: tuple[int, ...]
    sigmas: tuple[float, ...]
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
    sigmas = _numbers(options.get("sigma"), float, "--sigma")
    if not all(0 <= sigma <= 1 for sigma in sigmas):
        raise ValueError(f"--sigma is {options['sigma']!r}; every number must be from 0 (clean) to 1 (noise).")
    seed = int(options.get("seed") or 0)
    if not 0 <= seed < 2**63:
        raise ValueError(f"--seed is {seed}; it must be from 0 to 2^63 - 1.")
    cases = list(read_cases(tensors, sigmas, seed))
    layers = _numbers(options.get("layers"), int, "--layers")
    videos, out = [], {} if options.get("tensors") else None
    with score_files.collected_warnings() as warnings:
        taps_of = [case.taps or (tuple(layers) if layers else None) for case in cases]
        models = {taps: _load(options, taps, device, dtype) for taps in dict.fromkeys(taps_of)}
        for case, taps in zip(cases, taps_of, strict=True):
            _check(models[taps], case)
        for case, taps in zip(cases, taps_of, strict=True):
            videos += _score_case(models[taps], case, out)
    if out is not None:
        save_file({name: value.cpu().contiguous() for name, value in out.items()}, options["tensors"])
    first = models[taps_of[0]]
    settings = {"layers": list(first.taps), "dtype": str(dtype).removeprefix("torch."), "model_type": first.model.model_type}
    document = {"kind": "pavrm", "trunk": options["trunk"], "options": settings, "range": "probability 0 to 1, higher is better"}
    return {**document, "videos": videos, "warnings": list(dict.fromkeys(warnings))}


def _load(options: Mapping[str, Any], taps: tuple[int, ...] | None, device: str, dtype: torch.dtype) -> pavrm.Pavrm:
    head, common = pavrm.head_options(options), {"taps": taps, "use_folded": not options.get("exact_pooling"), "device": device, "dtype": dtype}
    if options.get("generator"):
        return pavrm_lora.load(options["trunk"], options["generator"], **common)
    return pavrm.load(options["trunk"], **head, **common)


def _check(model: pavrm.Pavrm, case: Case) -> None:
    """Refuse a case that does not fit the model, before another is scored."""
    try:
        model.check(case.latent_BCFHW, torch.tensor(case.timesteps), case.texts_PD, case.image)
    except ValueError as error:
        raise ValueError(f"{case.name}: {error}" if case.name else str(error)) from error


def _score_case(model: pavrm.Pavrm, case: Case, out: dict[str, torch.Tensor] | None) -> list[dict[str, Any]]:
    latent = case.latent_BCFHW.float().to(model.device)
    timestep_B = torch.tensor(case.timesteps, device=model.device)
    with training_mode(), torch.set_grad_enabled(out is not None):
        leaf = latent.clone().requires_grad_(out is not None)
        features = model.features(leaf, timestep_B, case.texts_PD, case.image)
        output = model.head(features)
        pavrm.check_output(output)
        if out is not None:
            (gradient,) = torch.autograd.grad(output.logit.sum(), leaf)
            values = {"features": features[-1], "pooled": output.pooled, "logit": output.logit, "reward": output.probability, "logit_grad_latent": gradient}
            out.update({f"{case.name}.{name}" if case.name else name: value.detach() for name, value in values.items()})
    rows = []
    for index, (logit, probability) in enumerate(zip(output.logit.tolist(), output.probability.tolist(), strict=True)):
        name = case.name if len(latent) == 1 else f"{case.name}[{index}]"
        numbers = {"logit": logit, "probability": probability, "reward": probability, "per_video": probability, "parts": {"logit": {"per_video": logit}}}
        level = {"timestep": case.timesteps[index], "sigma": case.sigmas[index]}
        rows.append({"name": name or "latent", **level, "layers": list(model.taps), **numbers})
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
        if latent.ndim == 4 and len(latent) in _CHANNELS:
            latent = latent[None]
        name = prefix.removesuffix(".")
        clip, condition = _find(tensors, prefix, _IMAGE), _find(tensors, prefix, _CONDITION)
        image = pavrm.ImageCondition(clip_BPD=_with_batch(clip, 3), latent_BCFHW=_with_batch(condition, 5))
        count = len(latent) if latent.ndim else 1
        common = {"texts_PD": _texts(tensors, prefix, count), "image": image}
        if sigmas:
            _refuse_levels(tensors, prefix)
            for sigma in sigmas:
                shown = name if len(sigmas) == 1 else f"{name}@{sigma:g}".removeprefix("@")
                levels = {"timesteps": (int(sigma * pavrm.TIMESTEPS),) * count, "sigmas": (sigma,) * count}
                yield Case(name=shown, latent_BCFHW=_noised(latent, sigma, seed), **levels, **common)
            continue
        values = _timesteps(tensors, prefix, count)
        # Upstream feeds whole numbers; a fraction is cut, as its schedules do.
        levels = {"timesteps": tuple(map(int, values)), "sigmas": tuple(value / pavrm.TIMESTEPS for value in values)}
        yield Case(name=name, latent_BCFHW=latent, **levels, **common)
        for key in sorted(tensors):
            if key.startswith(prefix) and key.endswith(".feature_layers"):
                taps = tuple(int(tap) for tap in tensors[key].flatten().tolist())
                yield Case(name=key.removesuffix(".feature_layers"), latent_BCFHW=latent, taps=taps, **levels, **common)


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
    text = _find(tensors, prefix, _TEXT)
    if text is None:
        raise ValueError(f"The case {prefix.removesuffix('.') or 'of this file'} has no text; give the text encoder's output as {prefix}text.")
    rows = list(text if text.ndim == 3 else text[None])
    if len(rows) not in (1, count):
        raise ValueError(f"{prefix}text holds {len(rows)} texts for {count} latents; give one, or one each.")
    return rows * (count if len(rows) == 1 else 1)


def _timesteps(tensors: Mapping[str, torch.Tensor], prefix: str, count: int) -> list[float]:
    """The timestep of every latent, which is noisy already."""
    timestep = _find(tensors, prefix, _TIMESTEP)
    if timestep is None:
        raise ValueError(f"The case {prefix.removesuffix('.') or 'of this file'} has no timestep; give {prefix}timestep, or --sigma for clean latents.")
    values = [float(value) for value in timestep.flatten().tolist()]
    if len(values) not in (1, count) or not all(0 <= value <= pavrm.TIMESTEPS for value in values):
        shown = ", ".join(f"{value:g}" for value in values[:5]) + (", ..." if len(values) > 5 else "")
        raise ValueError(f"{prefix}timestep holds {shown or 'nothing'}; one number from 0 to {pavrm.TIMESTEPS} is needed, or one for each of {count} latents.")
    return values * (count if len(values) == 1 else 1)


def _refuse_levels(tensors: Mapping[str, torch.Tensor], prefix: str) -> None:
    """Refuse --sigma for a latent that is noisy already, and beside what is read with the file's own timesteps only."""
    name = prefix.removesuffix(".") or "of this file"
    if _find(tensors, prefix, _TIMESTEP) is not None:
        raise ValueError(
            f"The case {name} has a timestep, so its latent is noisy already, and --sigma would noise it again. Leave --sigma out; for a clean latent, take "
            "the timestep out of the file."
        )
    if any(key.startswith(prefix) and key.endswith("feature_layers") for key in tensors):
        raise ValueError(f"The case {name} has feature_layers, which are not read with --sigma. Take them out of the file, and give --layers instead.")


def _with_batch(tensor: torch.Tensor | None, ndim: int) -> torch.Tensor | None:
    return tensor[None] if tensor is not None and tensor.ndim == ndim - 1 else tensor


def _noised(latent_BCFHW: torch.Tensor, sigma: float, seed: int) -> torch.Tensor:
    noise = torch.randn(latent_BCFHW.shape, generator=torch.Generator().manual_seed(seed))
    return (1 - sigma) * latent_BCFHW.float().cpu() + sigma * noise


def _numbers(text: str | None, kind: type, option: str) -> list:
    try:
        return [kind(part) for part in (text or "").replace(" ", ",").split(",") if part]
    except ValueError as error:
        raise ValueError(f"{option} is {text!r}; give numbers with commas between, such as 0.2,0.5,0.8.") from error

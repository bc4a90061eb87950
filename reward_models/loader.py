"""From a kind and a weight file to a frozen, differentiable reward model.

Does: read the file in any layout, find its config, check every key, build without initialising weights twice.
Does not: download, or hold models; callers decide how long one lives.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import aesthetic, clip, face, hpsv2, layouts, measures, mix, mps, pickscore, published, stability
from .base import RewardModel
from .spec import ALIASES, KINDS, OPTIONS_OF, PATHLESS, MixRow, RewardModelSpec, read_rows
from .weights import Weights, load_into, read_weights

_LOG = logging.getLogger("reward_lab")


def load_reward_model(
    kind: str, weights: str | Path = "", *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, **options: Any
) -> RewardModel:
    """Load a reward model.

    Args:
        kind: one of `spec.KINDS` or `spec.ALIASES`.
        weights: safetensors, `.pt`, `.pth`, `.bin`; open_clip, Hugging Face, MPS and imscore layouts; whole pickled modules are read, not run. Empty for
            the kinds in `spec.PATHLESS`.
        device: where to put it.
        dtype: of the matrices; norms, positions and the final dot product stay at least float32.
        **options: those of the kind in `spec.OPTIONS_OF`; None means the default:
            config: sizes: a dict, a JSON file, JSON text, or "ViT-H-14" / "ViT-L-14". Else looked for in this order: safetensors metadata "config",
                `<stem>.json` beside the file, the shapes of the full-size model.
            resize: "letterbox" (default of hpsv2.1), "crop" (default of the others) or "squash" (VideoX-Fun).
            antialias: filter before shrinking (default True); see the model.
            stability: also tell how much the reward falls on slightly changed frames (default False); see `stability.StabilityCheck`.
            condition, threshold, normalise: see `mps.MPSReward`. scale: "raw" (default) or "cosine".
            clip: aesthetic only: weights of OpenAI's CLIP ViT-L/14, where the file holds the head alone.
            detector, landmarks, reference, missing: see `face.FaceReward`.
            rows: mix only: list of {"name", "reward": spec as dict, "weight", "centre", "scale"}.

    Returns:
        The model: eval mode, frozen, usable for frame gradients even when this is called under `torch.inference_mode()`.

    Raises:
        ValueError: unknown kind or option; the file is missing, damaged, holds another model (which is named), lacks keys (named) or has NaN; no config.
    """
    kind = ALIASES.get(kind, kind)
    if kind == "pavrm":
        raise ValueError("A PAVRM scores latents, not frames: use it with Score Latent (PAVRM) or `lab.py score-latent`.")
    if kind not in KINDS:
        raise ValueError(f"Reward model kind {kind!r} is unknown; choose one of {', '.join(KINDS)}.")
    options = {name: value for name, value in options.items() if value is not None}
    foreign = sorted(set(options) - set(OPTIONS_OF[kind]))
    if foreign:
        raise ValueError(f"{', '.join(foreign)} cannot be set for {kind}; its options are {', '.join(OPTIONS_OF[kind]) or 'none'}.")
    if not weights and kind not in PATHLESS:
        raise ValueError(f"{kind} needs a weight file; give one.")
    with torch.inference_mode(False):
        if kind in measures.KINDS:
            return measures.Measure(kind)
        if kind == "mix":
            return mix_of(read_rows(options.get("rows")), lambda reward: reward.load(device, dtype))
        if kind == "face":
            return face.load(weights, device=device, dtype=dtype, **options)
        if warning := published.file_warning(kind, weights):
            _LOG.warning(warning)
        config, clip_file, is_checked = options.pop("config", None), options.pop("clip", None), options.pop("stability", False)
        content, path = read_weights(weights), Path(weights)
        if kind == "mps":
            network = _mps_network(content, path, config)
        elif kind == "aesthetic":
            network = _aesthetic_network(content, path, config, clip_file)
        else:
            network = _clip_network(content, path, config, kind)
        clip.cast_towers(network, dtype)
        model = _MODELS[kind](network.to(device), **{_ARGUMENT.get(name, name): value for name, value in options.items()})
        return stability.StabilityCheck(model) if is_checked else model


_MODELS = {"hpsv2.1": hpsv2.HPSv2Reward, "mps": mps.MPSReward, "pickscore": pickscore.PickScoreReward, "aesthetic": aesthetic.AestheticReward}
_ARGUMENT = {"antialias": "use_antialias"}


def mix_of(rows: Sequence[MixRow], load: Callable[[RewardModelSpec], RewardModel]) -> RewardModel:
    """The mix of these rows, each reward loaded by `load`."""
    return mix.MixReward([mix.Component(name=row.name, model=load(row.reward), weight=row.weight, centre=row.centre, scale=row.scale) for row in rows])


def _clip_network(content: Weights, path: Path, config: Mapping[str, Any] | str | Path | None, kind: str) -> nn.Module:
    if content.kind not in ("open_clip", "hf_clip"):
        raise _wrong_model(content, path, kind, "a CLIP")
    state = layouts.hf_to_open_clip(content.state) if content.kind == "hf_clip" else content.state
    sizes = _find_config(content, path, config, lambda: clip.config_from_shapes(state))
    sizes = clip.from_hf_config(sizes) if "vision_config" in sizes else sizes
    return _materialise(lambda: hpsv2.build(sizes), state, str(path))


def _mps_network(content: Weights, path: Path, config: Mapping[str, Any] | str | Path | None) -> nn.Module:
    if content.kind != "mps":
        raise _wrong_model(content, path, "mps", "an MPS model")
    state = layouts.mps_to_own(content.state)
    sizes = _find_config(content, path, config, lambda: _mps_config_from_shapes(state))
    given = sizes.get("cross_config", {})
    if isinstance(given, Mapping):
        sizes = {**sizes, "cross_config": {**mps.cross_sizes(state), **given}}
    return _materialise(lambda: mps.build(sizes), state, str(path))


def _aesthetic_network(content: Weights, path: Path, config: Mapping[str, Any] | str | Path | None, clip_file: str | Path | None) -> nn.Module:
    """Head and image tower from one file or from two; text towers in the CLIP file are left out, anything else unknown is an error."""
    head = {key: value for key, value in content.state.items() if key.startswith("layers.")}
    if aesthetic.FIRST_KEY not in head:
        raise _wrong_model(content, path, "aesthetic", "the head of the LAION aesthetic predictor")
    if clip_file:
        content, path = read_weights(clip_file), Path(clip_file)
        if content.kind not in ("open_clip", "hf_clip"):
            raise _wrong_model(content, path, "aesthetic", "a CLIP ViT-L/14")
    elif "visual.conv1.weight" not in content.state:
        raise ValueError(f"{path} holds the head alone; give the weights of OpenAI's CLIP ViT-L/14 as well (option clip, --clip).")
    state = layouts.hf_to_open_clip(content.state) if content.kind == "hf_clip" else content.state
    sizes = _find_config(content, path, config, lambda: clip.VIT_L_14 if clip.is_vit_l_14(state) else None)
    sizes = clip.from_hf_config(sizes) if "vision_config" in sizes else sizes
    tower = {key: value for key, value in state.items() if key.startswith("visual.")}
    return _materialise(lambda: aesthetic.build(sizes), {**tower, **head}, str(path))


def _mps_config_from_shapes(state: Mapping[str, Tensor]) -> Mapping[str, Any] | None:
    sizes = clip.config_from_shapes({key.removeprefix("clip."): value for key, value in state.items() if key.startswith("clip.")})
    return sizes


def _wrong_model(content: Weights, path: Path, kind: str, wanted: str) -> ValueError:
    hint = _KIND_OF.get(content.kind, "")
    hint = f" Load it with kind {hint}." if hint else ""
    keys = ", ".join(sorted(content.state)[:4])
    return ValueError(f"{path} is {layouts.DESCRIPTIONS[content.kind]} (keys {keys}, ...), but {wanted} is needed for {kind}.{hint}")


_KIND_OF = {"mps": "mps", "open_clip": "hpsv2.1", "hf_clip": "hpsv2.1 or pickscore", "aesthetic_head": "aesthetic", "arcface": "face", "pavrm": "pavrm"}


def _find_config(
    content: Weights, path: Path, config: Mapping[str, Any] | str | Path | None, from_shapes: Callable[[], Mapping[str, Any] | None]
) -> Mapping[str, Any]:
    """The sizes, from the first place that has them; see `load_reward_model`."""
    if config is not None:
        return _parse_config(config)
    if "config" in content.metadata:
        return _as_config(content.metadata["config"], f"the metadata of {path}")
    beside = path.with_suffix(".json")
    if beside.is_file():
        return _parse_config(beside)
    found = from_shapes()
    if found is None:
        raise ValueError(
            f"{path} is not the full-size model and its numbers of heads cannot be read off the weights; give the sizes as config, "
            f"as {beside.name} beside it, or as safetensors metadata 'config'."
        )
    return found


_NAMED = {"ViT-H-14": clip.VIT_H_14, "ViT-L-14": clip.VIT_L_14}


def _parse_config(config: Mapping[str, Any] | str | Path) -> Mapping[str, Any]:
    if isinstance(config, Mapping):
        return config.get("model_cfg", config)
    text = str(config)
    if text in _NAMED:
        return _NAMED[text]
    if text.lstrip().startswith("{"):
        return _as_config(text, "the given config")
    path = Path(text)
    if not path.is_file():
        raise ValueError(f"There is no config file {path}; give a JSON file, JSON text, or {' or '.join(_NAMED)}.")
    return _as_config(path.read_text(encoding="utf-8-sig"), str(path))


def _as_config(text: str, where: str) -> Mapping[str, Any]:
    try:
        parsed = json.loads(text)
    except ValueError as error:
        raise ValueError(f"The model config in {where} is not JSON: {error}.") from error
    if not isinstance(parsed, dict):
        raise ValueError(f"The model config in {where} is not a JSON object but {type(parsed).__name__}.")
    return parsed.get("model_cfg", parsed)


def _materialise(build: Callable[[], nn.Module], state: Mapping[str, Tensor], what: str) -> nn.Module:
    """Build on the meta device (no memory, no initialisation), then move the weights in."""
    with torch.device("meta"):
        network = build()
    load_into(network, state, what)
    if not isinstance(network, aesthetic.AestheticNetwork):
        clip.restore_causal_mask(network.clip if isinstance(network, mps.MPS) else network)
    return network

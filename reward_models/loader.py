"""From a kind and a weight file to a frozen, differentiable reward model.

Does: read the file in any layout, find its config, check every key, build without initialising weights twice.
Does not: download, or hold models; callers decide how long one lives.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import clip, hpsv2, layouts, mps
from .base import RewardModel
from .weights import Weights, load_into, read_weights

KINDS: tuple[str, ...] = ("hpsv2.1", "mps")
ALIASES: Mapping[str, str] = {"hpsv2": "hpsv2.1"}


def load_reward_model(
    kind: str,
    weights: str | Path,
    *,
    config: Mapping[str, Any] | str | Path | None = None,
    resize: str | None = None,
    antialias: bool = True,
    condition: str | None = None,
    threshold: float = 0.01,
    normalise: str = "sample",
    scale: str = "raw",
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> RewardModel:
    """Load a reward model.

    Args:
        kind: one of `KINDS` or `ALIASES`.
        weights: safetensors, `.pt`, `.pth`, `.bin`; open_clip, Hugging Face, MPS and imscore layouts; whole pickled modules are read, not run.
        config: sizes: a dict, a JSON file, JSON text, or "ViT-H-14". None looks in this order: safetensors metadata "config", `<stem>.json` beside the
            file, the shapes of the full-size ViT-H/14.
        resize: None (official for the kind: letterbox for hpsv2.1, crop for mps), "letterbox", "crop" or "squash" (VideoX-Fun).
        antialias: filter before shrinking; see the model.
        condition: MPS only: a name in `mps.CONDITIONS` or a text; None is "overall".
        threshold: MPS only: mask threshold, 0.01 or 0.3.
        normalise: MPS only: "sample" or "batch".
        scale: MPS only: "raw" (official) or "cosine" (VideoX-Fun) is the reward.
        device: where to put it.
        dtype: of the matrices; norms, positions and the final dot product stay at least float32.

    Returns:
        The model: eval mode, frozen, usable for frame gradients even when this is called under `torch.inference_mode()`.

    Raises:
        ValueError: unknown kind or option; the file is missing, damaged, holds another model (which is named), lacks keys (named) or has NaN; no config.
    """
    kind = ALIASES.get(kind, kind)
    if kind not in KINDS:
        raise ValueError(f"Reward model kind {kind!r} is unknown; choose one of {', '.join(KINDS)}.")
    if kind != "mps" and (condition is not None or threshold != 0.01 or normalise != "sample" or scale != "raw"):
        raise ValueError(f"condition, threshold, normalise and scale belong to mps; {kind} has none of them.")
    with torch.inference_mode(False):
        content = read_weights(weights)
        read = {"hpsv2.1": _hps_network, "mps": _mps_network}[kind]
        network = read(content, Path(weights), config)
        clip.cast_towers(network, dtype)
        network.to(device)
        if kind == "hpsv2.1":
            return hpsv2.HPSv2Reward(network, resize=resize or hpsv2.DEFAULT_RESIZE, use_antialias=antialias)
        return mps.MPSReward(
            network,
            resize=resize or mps.DEFAULT_RESIZE,
            use_antialias=antialias,
            condition=condition or "overall",
            threshold=threshold,
            normalise=normalise,
            scale=scale,
        )


def _hps_network(content: Weights, path: Path, config: Mapping[str, Any] | str | Path | None) -> nn.Module:
    if content.kind not in ("open_clip", "hf_clip"):
        raise _wrong_model(content, path, "hpsv2.1", "a CLIP")
    state = layouts.hf_to_open_clip(content.state) if content.kind == "hf_clip" else content.state
    sizes = _find_config(content, path, config, lambda: clip.config_from_shapes(state))
    sizes = clip.from_hf_config(sizes) if "vision_config" in sizes else sizes
    return _materialise(lambda: hpsv2.build(sizes), state, str(path))


def _mps_network(content: Weights, path: Path, config: Mapping[str, Any] | str | Path | None) -> nn.Module:
    if content.kind != "mps":
        raise _wrong_model(content, path, "mps", "an MPS model")
    state = layouts.mps_to_own(content.state)
    sizes = _find_config(content, path, config, lambda: _mps_config_from_shapes(state))
    return _materialise(lambda: mps.build(sizes), state, str(path))


def _mps_config_from_shapes(state: Mapping[str, Tensor]) -> Mapping[str, Any] | None:
    sizes = clip.config_from_shapes({key.removeprefix("clip."): value for key, value in state.items() if key.startswith("clip.")})
    # With the full-size towers the cross model has the published sizes too; anything else fails the strict key check by name.
    return None if sizes is None else {**sizes, "cross_config": dict(mps.CROSS_DEFAULTS)}


def _wrong_model(content: Weights, path: Path, kind: str, wanted: str) -> ValueError:
    hint = {"mps": " Load it with kind mps.", "open_clip": " Load it with kind hpsv2.1.", "hf_clip": " Load it with kind hpsv2.1."}.get(content.kind, "")
    keys = ", ".join(sorted(content.state)[:4])
    return ValueError(f"{path} is {layouts.DESCRIPTIONS[content.kind]} (keys {keys}, ...), but {wanted} is needed for {kind}.{hint}")


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
            f"{path} is not the full-size ViT-H/14 and its numbers of heads cannot be read off the weights; give the sizes as config, "
            f"as {beside.name} beside it, or as safetensors metadata 'config'."
        )
    return found


def _parse_config(config: Mapping[str, Any] | str | Path) -> Mapping[str, Any]:
    if isinstance(config, Mapping):
        return config.get("model_cfg", config)
    text = str(config)
    if text == "ViT-H-14":
        return clip.VIT_H_14
    if text.lstrip().startswith("{"):
        return _as_config(text, "the given config")
    path = Path(text)
    if not path.is_file():
        raise ValueError(f"There is no config file {path}; give a JSON file, JSON text, or ViT-H-14.")
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
    clip.restore_causal_mask(network.clip if isinstance(network, mps.MPS) else network)
    return network

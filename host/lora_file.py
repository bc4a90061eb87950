"""Reads a LoRA file and fits it to a model: every layer's shape is compared before anything is applied.

Does not change a model; see lora_patch. The host's weight adapters are made here, so that alpha, rank, LoHa, LoKr and DoRA mean the
same as in the host's own loader.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import comfy.lora
import comfy.utils
import torch

from ..lora_train.safetensors_file import read_header
from .experts import ExpertGuess, guess_expert
from .lora_keys import NormalisedKeys, normalise

MODEL_PREFIX = "diffusion_model."
CACHED_FILES = 4  # files kept in memory, so that changing a strength does not read them again


@dataclass(frozen=True, kw_only=True)
class LoraFile:
    """A LoRA file in memory: its tensors as stored, its metadata and its expert."""

    name: str
    tensors: Mapping[str, torch.Tensor]
    metadata: Mapping[str, str]
    guess: ExpertGuess


@dataclass(frozen=True, kw_only=True)
class FittedLora:
    """A LoRA that fits a model.

    Attributes:
        patches: Model weight key -> the host's weight adapter or patch tuple.
        applied_keys: How many of the file's keys the patches use.
        total_keys: How many keys the file has.
        ranks: The ranks that occur, ascending.
        alphas: The alphas that occur, ascending; empty when the file has none (alpha is the rank then).
        notes: What was left out and why.
    """

    patches: dict[str, object]
    applied_keys: int
    total_keys: int
    ranks: tuple[int, ...]
    alphas: tuple[float, ...]
    notes: tuple[str, ...]


_cache: OrderedDict[tuple[str, int, int], LoraFile] = OrderedDict()
_cache_lock = threading.Lock()


def read_lora(path: Path) -> LoraFile:
    """Read a LoRA file, from memory when it was read before and has not changed.

    Args:
        path: A safetensors file.

    Returns:
        The file.

    Raises:
        ValueError: Not a safetensors file, truncated, empty, or with NaN or infinity in it.
    """
    if path.suffix.lower() not in (".safetensors", ".sft"):
        raise ValueError(
            f"{path.name} is not a safetensors file. Convert it, or ask for the safetensors version: other formats can run code when they are read."
        )
    header = read_header(path, "LoRA")
    status = path.stat()
    key = (str(path), status.st_mtime_ns, status.st_size)
    with _cache_lock:
        if key in _cache:
            _cache.move_to_end(key)
            return _cache[key]
    tensors = comfy.utils.load_torch_file(str(path), safe_load=True)
    if not tensors:
        raise ValueError(f"{path.name} holds no tensors. Choose another file.")
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor.float()).all():
            raise ValueError(f"{path.name}: {name} holds NaN or infinity. The training of this LoRA failed; choose another file or an earlier checkpoint.")
    lora = LoraFile(name=path.name, tensors=tensors, metadata=header.metadata, guess=guess_expert(path.name, header.metadata))
    with _cache_lock:
        _cache[key] = lora
        while len(_cache) > CACHED_FILES:
            _cache.popitem(last=False)
    return lora


def fit(lora: LoraFile, weight_shapes: Mapping[str, tuple[int, ...]]) -> FittedLora:
    """Fit a LoRA to a model without touching the model.

    Args:
        lora: The file.
        weight_shapes: The model's keys (`diffusion_model.…`) and shapes.

    Returns:
        Patches for the model, and what was left out.

    Raises:
        ValueError: No key fits, or the block layers have another width than the model.
    """
    layers = {key[len(MODEL_PREFIX) :].removesuffix(".weight"): key for key in weight_shapes if key.startswith(MODEL_PREFIX) and not key.endswith(".bias")}
    keys = normalise(lora.tensors, layers)
    patches: dict[str, object] = {}
    used_keys: set[str] = set()
    misfits: list[str] = []
    ranks, alphas = set(), set()
    for layer, parts in keys.layers.items():
        tensors = {f"{layer}.{part}": lora.tensors[key] for part, key in parts.items()}
        problem = _misfit(layer, parts, lora, weight_shapes, layers[layer])
        if problem:
            if layer.startswith("blocks."):
                raise ValueError(f"{lora.name} does not fit this model: {problem}. Choose a LoRA that was made for this size of Wan.")
            misfits.append(problem)
            continue
        layer_patches = comfy.lora.load_lora(tensors, {layer: layers[layer]}, log_missing=False)
        layer_patches = {key: patch for key, patch in layer_patches.items() if key in weight_shapes}
        if not layer_patches:
            continue
        patches.update(layer_patches)
        used_keys.update(parts.values())
        if "lora_down.weight" in parts:
            ranks.add(lora.tensors[parts["lora_down.weight"]].shape[0])
        if "alpha" in parts:
            alphas.add(float(lora.tensors[parts["alpha"]]))
    notes = _notes(keys, misfits)
    if not patches:
        raise ValueError(f"{lora.name}: 0 of {len(lora.tensors)} keys fit this model. {_nothing_fits_reason(lora, keys, misfits)}")
    return FittedLora(
        patches=patches, applied_keys=len(used_keys), total_keys=len(lora.tensors), ranks=tuple(sorted(ranks)), alphas=tuple(sorted(alphas)), notes=notes
    )


def _misfit(layer: str, parts: Mapping[str, str], lora: LoraFile, weight_shapes: Mapping[str, tuple[int, ...]], weight_key: str) -> str:
    """Say what does not fit in one layer; empty when everything does."""
    weight = tuple(weight_shapes[weight_key])
    down = lora.tensors[parts["lora_down.weight"]] if "lora_down.weight" in parts else None
    up = lora.tensors[parts["lora_up.weight"]] if "lora_up.weight" in parts else None
    if (down is None) != (up is None):
        return f"layer {layer} has a {'down' if up is None else 'up'} weight only"
    if down is not None and up is not None:
        if min(down.ndim, up.ndim) < 2 or 0 in (*down.shape, *up.shape):
            return f"layer {layer} has weights of shape {tuple(down.shape)} and {tuple(up.shape)}, which are no matrices"
        made_for = (up.shape[0], down[0].numel())
        here = (weight[0], int(torch.Size(weight[1:]).numel()))
        if made_for != here:
            return f"layer {layer} was made for {made_for[1]} inputs and {made_for[0]} outputs, the model has {here[1]} inputs and {here[0]} outputs"
        if up[0].numel() != down.shape[0]:
            return f"layer {layer} has rank {down.shape[0]} in its down weight and {up[0].numel()} in its up weight"
    for part in ("diff", "diff_b"):
        target = weight_key if part == "diff" else weight_key.removesuffix(".weight") + ".bias"
        if part in parts and tuple(lora.tensors[parts[part]].shape) != tuple(weight_shapes.get(target, ())):
            return f"layer {layer} has a difference of shape {tuple(lora.tensors[parts[part]].shape)}, the model's is {tuple(weight_shapes.get(target, ()))}"
    alpha = lora.tensors[parts["alpha"]] if "alpha" in parts else None
    return f"layer {layer} has an alpha of shape {tuple(alpha.shape)}" if alpha is not None and alpha.numel() != 1 else ""


def _notes(keys: NormalisedKeys, misfits: list[str]) -> tuple[str, ...]:
    """List what was left out, by kind."""
    notes = []
    if keys.image_branch:
        notes.append(f"{len(keys.image_branch)} keys of the Wan2.1 image branch left out; Wan2.2 has no such branch, nothing is lost")
    if keys.text_encoder:
        notes.append(f"{len(keys.text_encoder)} keys for a text encoder left out")
    if keys.duplicates:
        notes.append(f"{len(keys.duplicates)} keys name a layer twice, the first counts: {keys.duplicates[0]}")
    if keys.unknown:
        notes.append(f"{len(keys.unknown)} unknown keys left out, for example {keys.unknown[0]}")
    notes.extend(misfits[:3])
    if len(misfits) > 3:
        notes.append(f"{len(misfits) - 3} more layers do not fit")
    return tuple(notes)


def _nothing_fits_reason(lora: LoraFile, keys: NormalisedKeys, misfits: list[str]) -> str:
    """Explain why nothing could be applied."""
    if misfits:
        return f"Its layers have other sizes: {misfits[0]}."
    if len(keys.text_encoder) == len(lora.tensors):
        return "All of them are for a text encoder."
    if len(keys.image_branch) == len(lora.tensors):
        return "All of them are for the image branch of Wan2.1."
    if any(key.endswith((".weight", ".bias")) and "lora" not in key.lower() for key in keys.unknown):
        return f"It looks like a model, not a LoRA (key {keys.unknown[0]}); load it as a model."
    return f"It was made for another model (key {next(iter(lora.tensors))})."

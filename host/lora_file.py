"""Reads a LoRA file and fits it to a model: every layer's shape is compared before anything is applied.

Does not change a model; see lora_patch. The host's weight adapters are made here, so that alpha, rank, LoHa, LoKr and DoRA mean the
same as in the host's own loader.
"""

from __future__ import annotations

import json
import logging
import math
import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import comfy.lora
import comfy.utils
import torch
from safetensors import SafetensorError

from ..lora_train.safetensors_file import Header, read_header
from .experts import ExpertGuess, guess_expert
from .lora_keys import NormalisedKeys, detect_layout, normalise, wan_layers
from .lora_reasons import nothing_fits
from .lora_shapes import misfit
from .weight_source import read_tensor

MODEL_PREFIX = "diffusion_model."
CACHED_FILES = 4  # files kept in memory, so that changing a strength does not read them again
# A LoKr of four keys per linear layer, with biases and norms, needs about 3,000 keys and 500 kB of header on the 14B model with VACE.
MAX_KEYS = 10_000
MAX_HEADER_BYTES = 4_000_000
LORA_DTYPES = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")


@dataclass(frozen=True, kw_only=True)
class LoraFile:
    """A LoRA file in memory.

    Attributes:
        name: The file's name.
        tensors: Its tensors as stored.
        metadata: Of the file.
        guess: The expert it was made for.
        layout: Name of its key layout; `mixed` when no single one describes it.
        path, header: Where it lies, and what its header says; None for tensors that came from elsewhere.
    """

    name: str
    tensors: Mapping[str, torch.Tensor]
    metadata: Mapping[str, str]
    guess: ExpertGuess
    layout: str = "mixed"
    path: Path | None = None
    header: Header | None = None


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
        layers: How many layers of the model are changed.
        kinds: Kind of adapter (`lora`, `loha`, `lokr`, `diff`, …) -> how many weights.
        left_out: Kind of key that was left out (`image_branch`, `text_encoder`, `duplicate`, `unknown`, `misfit`) -> how many keys.
        memory_bytes: Of the tensors that are used.
        parts: Model weight key -> part (`lora_down.weight`) -> key in the file, for reading one layer at a time.
        shapes: Model weight key -> shape of the weight.
    """

    patches: dict[str, object]
    applied_keys: int
    total_keys: int
    ranks: tuple[int, ...]
    alphas: tuple[float, ...]
    notes: tuple[str, ...]
    layers: int = 0
    kinds: Mapping[str, int] = field(default_factory=dict)
    left_out: Mapping[str, int] = field(default_factory=dict)
    memory_bytes: int = 0
    parts: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


_cache: OrderedDict[tuple[str, int, int], LoraFile] = OrderedDict()
_cache_lock = threading.Lock()


def read_lora(path: Path) -> LoraFile:
    """Read a LoRA file, from memory when it was read before and has not changed.

    Args:
        path: A safetensors file.

    Returns:
        The file.

    Raises:
        ValueError: Not a safetensors file, truncated, empty, too many keys, no floating-point numbers, or with NaN or infinity in it.
    """
    status = path.stat() if path.is_file() else None
    key = (str(path), status.st_mtime_ns, status.st_size) if status else None
    with _cache_lock:
        if key in _cache:  # a new strength must not take the time of reading the header
            _cache.move_to_end(key)
            return _cache[key]
    header = read_lora_header(path)
    _check_header(path.name, header)
    try:
        tensors = comfy.utils.load_torch_file(str(path), safe_load=True)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path.name} cannot be read ({str(error)[:300]}). Download or copy it again.") from error
    for name, tensor in tensors.items():
        _check_finite(path, name, tensor)
    lora = _lora_file(path, tensors, header)
    with _cache_lock:
        _cache[key] = lora
        while len(_cache) > CACHED_FILES:
            _cache.popitem(last=False)
    return lora


def scan_lora(path: Path) -> LoraFile:
    """Check a LoRA file as `read_lora` does, with one tensor in memory at a time.

    Args:
        path: A safetensors file.

    Returns:
        The file with tensors that have shape and type but no numbers (device `meta`); alphas have theirs. `fit` takes it;
        `patch_of` reads the numbers of one layer.

    Raises:
        ValueError: As `read_lora`.
    """
    header = read_lora_header(path)
    _check_header(path.name, header)
    tensors = {}
    for key in header.shapes:
        tensor = read_tensor(path, header, key)
        _check_finite(path, key, tensor)
        tensors[key] = tensor.clone() if key.endswith("alpha") else tensor.to("meta")
    return _lora_file(path, tensors, header)


def patch_of(lora: LoraFile, fitted: FittedLora, weight_key: str) -> object:
    """Read one weight's patch from the file.

    Args:
        lora: From `scan_lora`.
        fitted: What `fit` made of it.
        weight_key: One of `fitted.patches`.

    Returns:
        The host's adapter or patch, with numbers.

    Raises:
        ValueError: The file cannot be read any more.
    """
    names = fitted.parts[weight_key]
    real = replace(lora, tensors={key: read_tensor(lora.path, lora.header, key) for key in names.values()})
    return _layer_patches(_parts(real, names), weight_key)[weight_key]


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
    parts_of: dict[str, Mapping[str, str]] = {}
    used_keys: set[str] = set()
    misfits: dict[str, str] = {}
    ranks, alphas = set(), set()
    for layer, names in keys.layers.items():
        parts = _parts(lora, names)
        weight_key = layers[layer]
        problem = misfit(layer, parts, tuple(weight_shapes[weight_key]), _shape(weight_shapes, weight_key.removesuffix(".weight") + ".bias"))
        if problem:
            if layer.startswith("blocks."):
                raise ValueError(f"{lora.name} does not fit this model: {problem}. Choose a LoRA that was made for this size of Wan.")
            misfits[layer] = problem
            continue
        found = _layer_patches(parts, weight_key)
        patches.update(found)
        parts_of.update(dict.fromkeys(found, names))
        used_keys.update(names.values())
        ranks.update(_rank(parts))
        if "alpha" in parts:
            alphas.add(float(parts["alpha"]))
    if not patches:
        reason = nothing_fits(tuple(lora.tensors), keys.text_encoder, keys.image_branch, tuple(misfits.values()))
        raise ValueError(f"{lora.name}: 0 of {len(lora.tensors)} keys can be applied. {reason}")
    kinds = [patch[0] if isinstance(patch, tuple) else patch.name for patch in patches.values()]
    return FittedLora(
        patches=patches,
        applied_keys=len(used_keys),
        total_keys=len(lora.tensors),
        ranks=tuple(sorted(ranks)),
        alphas=tuple(sorted(alphas)),
        notes=_notes(lora, keys, tuple(misfits.values())),
        layers=len(keys.layers) - len(misfits),
        kinds={kind: kinds.count(kind) for kind in sorted(set(kinds))},
        left_out=_left_out(keys, misfits),
        memory_bytes=sum(lora.tensors[key].nbytes for key in used_keys),
        parts=parts_of,
        shapes={key: tuple(weight_shapes[key]) for key in patches},
    )


def _layer_patches(parts: Mapping[str, torch.Tensor], weight_key: str) -> dict[str, object]:
    """Build the host's adapters and patches of one layer: for its weight, and for its bias where the file has a change of it."""
    return comfy.lora.load_lora({f"layer.{part}": tensor for part, tensor in parts.items()}, {"layer": weight_key}, log_missing=False)


def _lora_file(path: Path, tensors: Mapping[str, torch.Tensor], header: Header) -> LoraFile:
    """Say what the names and the metadata tell."""
    layout = detect_layout(normalise(tensors, wan_layers()))
    guess = guess_expert(path.name, header.metadata)
    name = layout.name if layout else "mixed"
    return LoraFile(name=path.name, tensors=tensors, metadata=header.metadata, guess=guess, layout=name, path=path, header=header)


def _check_finite(path: Path, key: str, tensor: torch.Tensor) -> None:
    """Refuse NaN and infinity."""
    if tensor.is_floating_point() and not torch.isfinite(tensor.float()).all():
        raise ValueError(f"{path.name}: {key[:200]} holds NaN or infinity. The training of this LoRA failed; choose another file or an earlier checkpoint.")


def read_lora_header(path: Path) -> Header:
    """Read the header of a LoRA file; other formats are refused unread. Raises ValueError."""
    if path.suffix.lower() not in (".safetensors", ".sft") and path.is_file():
        raise ValueError(
            f"{path.name} is not a safetensors file. Convert it, or ask for the safetensors version: other formats can run code when they are read."
        )
    return read_header(path, "LoRA", limit_bytes=MAX_HEADER_BYTES)


def _check_header(name: str, header: Header) -> None:
    """Refuse what cannot be a LoRA before any of its numbers are read."""
    if not header.shapes:
        raise ValueError(f"{name} holds no tensors. Choose another file.")
    if len(header.shapes) > MAX_KEYS:
        raise ValueError(f"{name} has {len(header.shapes)} keys; no LoRA for Wan has more than {MAX_KEYS}. Choose another file.")
    for key, dtype in header.dtypes.items():
        # Some trainers store alpha as a whole number.
        if dtype not in LORA_DTYPES and not (key.endswith("alpha") and dtype in ("I16", "I32", "I64")):
            raise ValueError(
                f"{name}: {key[:200]} is stored as {dtype}; a LoRA's numbers must be floating point ({', '.join(LORA_DTYPES)}). Choose another file."
            )


def _parts(lora: LoraFile, names: Mapping[str, str]) -> dict[str, torch.Tensor]:
    """Collect one layer's tensors in the form that the host's adapters read."""
    parts = {part: lora.tensors[key] for part, key in names.items()}
    if "dora_scale" in parts and parts["dora_scale"].ndim == 1:
        parts["dora_scale"] = parts["dora_scale"][:, None]  # PEFT's form; without the axis the host would make a matrix of it
    if "alpha" in parts:
        parts["alpha"] = parts["alpha"].float()
    elif "lora_down.weight" in parts and parts["lora_down.weight"].ndim:
        alpha = metadata_alpha(lora.metadata, parts["lora_down.weight"].shape[0])
        if alpha is not None:
            parts["alpha"] = torch.tensor(alpha)
    return parts


def metadata_alpha(metadata: Mapping[str, str], rank: int) -> float | None:
    """Read alpha from what diffusers writes into the file's metadata (`lora_adapter_metadata`), where PEFT's adapter config ends up.

    Args:
        metadata: Of the file.
        rank: Of the layer.

    Returns:
        The alpha that makes alpha / rank the factor of the trainer; None when the metadata say nothing. Rank-stabilised LoRA divides by the
        root of the rank (arXiv 2312.03732), so its alpha is given times that root.
    """
    try:
        config = json.loads(metadata.get("lora_adapter_metadata", "null"))
    except ValueError:
        logging.getLogger("reward_lab").warning("The LoRA's metadata lora_adapter_metadata is not JSON and is left out.")
        return None
    values = {str(key).rsplit(".", 1)[-1]: value for key, value in config.items()} if isinstance(config, dict) else {}
    alpha = values.get("lora_alpha")
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not math.isfinite(alpha):
        return None
    return alpha * math.sqrt(rank) if values.get("use_rslora") is True else float(alpha)


def _shape(weight_shapes: Mapping[str, tuple[int, ...]], key: str) -> tuple[int, ...] | None:
    return tuple(weight_shapes[key]) if key in weight_shapes else None


def _rank(parts: Mapping[str, torch.Tensor]) -> set[int]:
    """Return the rank of one layer's adapter, where it has one."""
    for part, axis in (("lora_down.weight", 0), ("hada_w1_b", 0), ("lokr_w2_b", 0), ("lokr_w1_b", 0)):
        if part in parts:
            return {parts[part].shape[axis]}
    return set()


def _left_out(keys: NormalisedKeys, misfits: Mapping[str, str]) -> dict[str, int]:
    """Count the keys that were left out, by kind; kinds without keys are left out too."""
    counts = {
        "image_branch": len(keys.image_branch),
        "text_encoder": len(keys.text_encoder),
        "duplicate": len(keys.duplicates),
        "unknown": len(keys.unknown),
        "misfit": sum(len(keys.layers[layer]) for layer in misfits),
    }
    return {kind: count for kind, count in counts.items() if count}


def _notes(lora: LoraFile, keys: NormalisedKeys, misfits: tuple[str, ...]) -> tuple[str, ...]:
    """List what was left out, by kind."""
    notes = []
    if keys.image_branch:
        notes.append(f"{len(keys.image_branch)} keys of the Wan2.1 image branch left out; Wan2.2 has no such branch, nothing is lost")
    if keys.text_encoder:
        notes.append(f"{len(keys.text_encoder)} keys for a text encoder left out")
    if keys.duplicates:
        notes.append(f"{len(keys.duplicates)} keys name a layer twice, the first counts: {keys.duplicates[0][:120]}")
    if keys.unknown:
        notes.append(f"{len(keys.unknown)} unknown keys left out, for example {keys.unknown[0][:120]}")
    is_peft = any("lora_magnitude_vector" in key for key in lora.tensors)
    if is_peft:
        notes.append("PEFT DoRA: ComfyUI divides by the norm of the base weight where PEFT divides by that of the changed one, so the result differs a little")
    if lora.layout.startswith("peft") and not any(key.endswith("alpha") for key in lora.tensors) and "lora_adapter_metadata" not in lora.metadata:
        notes.append("a PEFT file keeps alpha in adapter_config.json, not in the file; alpha = rank is taken, set the strength to alpha / rank if it differs")
    notes.extend(misfits[:3])
    if len(misfits) > 3:
        notes.append(f"{len(misfits) - 3} more layers do not fit")
    return tuple(notes)

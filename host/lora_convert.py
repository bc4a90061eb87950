"""Rewrites a LoRA file in another key layout. The numbers stay the same to the bit wherever the layout can hold them."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from .lora_file import LoraFile, metadata_alpha, read_lora
from .lora_keys import Layout, layout_named, normalise, wan_layers
from .lora_reasons import nothing_fits

# Written by trainers about their own bytes or their own keys; wrong once the file is rewritten.
STALE_METADATA = ("sshs_model_hash", "sshs_legacy_hash", "lora_adapter_metadata")


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """What became of a conversion: the file, its layouts before and after, keys written, and what was changed or left out."""

    path: Path
    source_layout: str
    layout: str
    keys: int
    notes: tuple[str, ...] = ()


def convert(source: Path, target: Path, layout_name: str, *, overwrite: bool = False) -> Conversion:
    """Rewrite a LoRA file.

    Args:
        source: The file.
        target: Where to write; only a whole file ever has this name.
        layout_name: Name of a row of `lora_keys.LAYOUTS`.
        overwrite: Whether a file that is there already is replaced.

    Returns:
        What became of it.

    Raises:
        ValueError: Unknown layout, the source cannot be read or names no layer of Wan, or the target is there or is no .safetensors.
    """
    layout = layout_named(layout_name)
    check_target(target, overwrite=overwrite)
    lora = read_lora(source)
    tensors, notes = converted(lora, layout)
    metadata = {key: value for key, value in lora.metadata.items() if key not in STALE_METADATA}
    metadata.update({"reward_lab_layout": layout.name, "reward_lab_converted_from": f"{lora.name} ({lora.layout})"})
    if lora.guess.expert and lora.guess.source != "metadata":
        metadata["reward_lab_expert"] = lora.guess.expert
    save_whole(tensors, target, metadata)
    return Conversion(path=target, source_layout=lora.layout, layout=layout.name, keys=len(tensors), notes=tuple(notes))


def converted(lora: LoraFile, layout: Layout) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Return a LoRA's tensors under the keys of a layout, and notes on what changed. Raises ValueError when no key names a layer of Wan."""
    keys = normalise(lora.tensors, wan_layers())
    if not keys.layers:
        reason = nothing_fits(tuple(lora.tensors), keys.text_encoder, keys.image_branch, ())
        raise ValueError(f"{lora.name}: none of its {len(lora.tensors)} keys name a layer of Wan. {reason}")
    tensors: dict[str, torch.Tensor] = {}
    folded = added = 0
    for layer, names in keys.layers.items():
        parts = {part: lora.tensors[key] for part, key in names.items()}
        is_low_rank = "lora_down.weight" in parts and "lora_up.weight" in parts
        if is_low_rank and "alpha" not in parts:
            alpha = metadata_alpha(lora.metadata, parts["lora_down.weight"].shape[0])
            if alpha is not None or layout.has_alpha:
                parts["alpha"] = torch.tensor(float(parts["lora_down.weight"].shape[0] if alpha is None else alpha))
                added += 1
        if is_low_rank and not layout.has_alpha and "alpha" in parts:
            parts["lora_up.weight"] = _scaled(parts["lora_up.weight"], float(parts.pop("alpha")) / parts["lora_down.weight"].shape[0])
            folded += 1
        if "dora_scale" in parts:
            is_peft = not layout.key(layer, "dora_scale").endswith("dora_scale")
            parts["dora_scale"] = parts["dora_scale"].flatten() if is_peft else parts["dora_scale"].reshape(-1, 1)
        tensors.update({layout.key(layer, part): tensor.contiguous() for part, tensor in parts.items()})
    return tensors, _notes(folded, added, layout, keys)


def check_target(target: Path, *, overwrite: bool) -> None:
    """Refuse a target that cannot or must not be written, before long work."""
    if target.suffix.lower() != ".safetensors":
        raise ValueError(f"{target.name} must end in .safetensors.")
    if target.is_dir():
        raise ValueError(f"{target} is a folder. Choose another name.")
    if target.exists() and not overwrite:
        raise ValueError(f"{target} is there already. Choose another name, or ask to overwrite it.")
    if not target.absolute().parent.is_dir():
        raise ValueError(f"The folder {target.absolute().parent} does not exist. Make it first.")


def save_whole(tensors: dict[str, torch.Tensor], target: Path, metadata: dict[str, str]) -> None:
    """Write a safetensors file under another name and give it its own only when it is whole."""
    part = target.with_name(f"{target.name}.{os.getpid()}.part")
    try:
        save_file({key: tensor.clone() for key, tensor in tensors.items()}, part, metadata=metadata)
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)


def _scaled(up: torch.Tensor, factor: float) -> torch.Tensor:
    """Multiply alpha / rank into the up weight; in its own type where that loses nothing, else in fp32."""
    exact = up.float() * factor
    rounded = exact.to(up.dtype)
    return rounded if torch.equal(rounded.float(), exact) else exact


def _notes(folded: int, added: int, layout: Layout, keys) -> list[str]:
    """Tell what is not the same as before."""
    notes = []
    if folded:
        notes.append(f"alpha / rank is multiplied into {folded} up weights: {layout.name} has no alpha")
    elif added:
        notes.append(f"alpha was added to {added} layers: the source has none in the file")
    for kind, names in (("for a text encoder", keys.text_encoder), ("that name a layer twice", keys.duplicates), ("unknown", keys.unknown)):
        if names:
            notes.append(f"{len(names)} keys {kind} were left out, for example {names[0][:120]}")
    return notes

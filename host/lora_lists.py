"""LoRA rows in the forms that other packs take: `WANVIDLORA` of kijai's WanVideoWrapper and `LORA_STACK` of the stacking loaders.

Both carry a file and one strength. A curve or strengths per block cannot be carried, so rows with these are refused for the lists rather than passed on as
something else. The files are read by the other pack then, which knows fewer layouts than this one; what it would get wrong is told, with the remedy.

Source, read and not copied: kijai/ComfyUI-WanVideoWrapper@3317577 (Apache-2.0), nodes_model_loading.py: the entry of `WanVideoLoraSelect`, what
`standardize_lora_key_format`, `compensate_rs_lora_format` and `add_lora_weights` make of a file, one `merge_loras` for all entries in `loadmodel`;
custom_linear.py: `set_lora_params` passes over the head.
`LORA_STACK`: (name in the LoRA folder, strength on the model, strength on the text encoder), as documented for Comfyroll's `CR LoRA Stack`; its consumers call
ComfyUI's own loader.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from . import paths
from .lora_patch import RowReport
from .lora_rows import LoraRow

SAFE_LAYOUT = "comfyui"  # read by all of them with every part, and conversion to it changes no bit
_NOTHING, _DIFFUSERS = "reads nothing of it", "takes self-attention for cross-attention and leaves out all other layers"
_BLOCKS_ONLY = "leaves out the layers outside of the blocks"
# Layout -> what the wrapper does with it; layouts that are not here are read as they are meant.
WRAPPER_FAULTS = {
    "diffusers": _DIFFUSERS,
    "onetrainer": _DIFFUSERS,
    "diffusers-kohya": _NOTHING,
    "peft": "takes it for a rank-stabilised LoRA and multiplies the strength by the root of the rank",
    "diffsynth": _BLOCKS_ONLY,
    "bare": _BLOCKS_ONLY,
    "lycoris": "leaves out the feed-forward layers and those outside of the blocks",
    "lycoris-diffusers": "leaves out all but the feed-forward layers",
    "hy-video-prfl": _NOTHING,
    "mixed": "may not read all of it",
}
CORE_LAYOUTS = ("videox-fun", "musubi-tuner", "diffusion-pipe", "comfyui", "diffusion-pipe-default")  # that ComfyUI's own loader reads


@dataclass(frozen=True, kw_only=True)
class LoraLists:
    """One expert's rows as a `WANVIDLORA` list and as a `LORA_STACK`; `left_out` names files whose curve or blocks neither can carry."""

    wanvideo: list[dict[str, Any]]
    stack: list[tuple[str, float, float]]
    left_out: tuple[str, ...]


def lora_lists(rows: Sequence[LoraRow], expert: str, application: str) -> LoraLists:
    """Write one expert's rows as lists.

    Args:
        rows: The rows; those that are off or have strength 0 on this expert are not in the lists.
        expert: `high` or `low`.
        application: The node's `application`; `bypass` asks the wrapper not to merge. It has one answer for all rows: one that asks for it is enough.
    """
    active = [row for row in rows if row.on and row.strength(expert) != 0.0]
    plain = [row for row in active if row.curve.is_constant() and not row.blocks]
    strengths = [row.strength(expert) * row.curve.at(1.0) for row in plain]
    is_merged = all((row.application or application) != "bypass" for row in plain)
    return LoraLists(
        wanvideo=[
            {
                "path": str(paths.model_path("loras", row.file)),
                "strength": strength,
                "name": str(PurePath(row.file).with_suffix("")),
                "blocks": {},
                "layer_filter": "",
                "low_mem_load": False,
                "merge_loras": is_merged,
            }
            for row, strength in zip(plain, strengths, strict=True)
        ],
        stack=[(row.file, strength, 0.0) for row, strength in zip(plain, strengths, strict=True)],
        left_out=tuple(row.file for row in active if row not in plain),
    )


def notes(reports: Sequence[RowReport], both: Sequence[LoraLists]) -> list[str]:
    """Say what the lists do not carry, and which of their files another pack would read differently; one line for each.

    Args:
        reports: Of the rows.
        both: The lists of the two experts.
    """
    left_out = tuple(dict.fromkeys(file for lists in both for file in lists.left_out))
    lines = [f"{file}: its curve or block strengths cannot be carried by the lists for other packs" for file in left_out]
    if any(not entry["merge_loras"] for lists in both for entry in lists.wanvideo):
        lines.append("WanVideoWrapper leaves the head out of unmerged rows; the lists for other packs ask for these because of 'bypass'")
    for row in reports:
        fault = reading_faults(row.layout, row.kinds) if row.layout and row.file not in left_out and (row.high or row.low) else ""
        lines += [f"{row.file} {fault}"] if fault else []
    return list(dict.fromkeys(lines))


def reading_faults(layout: str, kinds: Mapping[str, int]) -> str:
    """Say what other packs would do wrong with a file; empty when they read it as it is meant.

    Args:
        layout: Of the file, a name of `lora_keys.LAYOUTS` or `mixed`.
        kinds: Kinds of adapters in it; empty when they are not known.
    """
    wrapper = WRAPPER_FAULTS.get(layout, "")
    if layout == "videox-fun" and set(kinds) - {"lora"}:
        wrapper = "reads low-rank pairs only in this layout"
    faults = [f"WanVideoWrapper {wrapper}"] if wrapper else []
    if layout not in CORE_LAYOUTS:
        faults.append("loaders of a LORA_STACK read nothing of it")
    return f"in the layout {layout}: {'; '.join(faults)}. Convert it to {SAFE_LAYOUT} for the lists for other packs" if faults else ""

"""LoRA rows in the forms that other packs take: `WANVIDLORA` of kijai's WanVideoWrapper and `LORA_STACK` of the stacking loaders.

Both carry a file and one strength. A curve or strengths per block cannot be carried, so rows with these are refused for the lists rather
than passed on as something else.
Source: the fields of a WANVIDLORA entry, kijai/ComfyUI-WanVideoWrapper nodes_model_loading.py@ee982da (Apache-2.0), read, not copied.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from . import paths
from .lora_rows import LoraRow


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
        application: The node's `application`; `bypass` asks the wrapper not to merge.
    """
    active = [row for row in rows if row.on and row.strength(expert) != 0.0]
    plain = [row for row in active if row.curve.is_constant() and not row.blocks]
    strengths = [row.strength(expert) * row.curve.at(1.0) for row in plain]
    return LoraLists(
        wanvideo=[
            {
                "path": str(paths.model_path("loras", row.file)),
                "strength": strength,
                "name": str(PurePath(row.file).with_suffix("")),
                "blocks": {},
                "layer_filter": "",
                "low_mem_load": False,
                "merge_loras": (row.application or application) != "bypass",
            }
            for row, strength in zip(plain, strengths, strict=True)
        ],
        stack=[(row.file, strength, 0.0) for row, strength in zip(plain, strengths, strict=True)],
        left_out=tuple(row.file for row in active if row not in plain),
    )

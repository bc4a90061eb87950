"""Cuts the host's adapters and patches by rows of the weight, so that a large weight can be changed, or its change sampled, in pieces."""

from __future__ import annotations

import torch
from comfy.weight_adapter import LoHaAdapter, LoRAAdapter

Rows = slice | torch.Tensor


def patch_rows(patch: object, rows: Rows) -> object | None:
    """Return the part of a patch that changes some rows of its weight.

    Args:
        patch: The host's adapter, or its tuple `("diff", (tensor,))`.
        rows: A slice, or indices.

    Returns:
        A patch for a weight of these rows alone; None where rows depend on one another or on the base (LoKr, DoRA, Tucker forms, and others).
    """
    if isinstance(patch, LoRAAdapter):
        up, down, alpha, mid, dora_scale, reshape = patch.weights
        is_plain = mid is None and dora_scale is None and reshape is None
        return LoRAAdapter(patch.loaded_keys, (up[rows], down, alpha, None, None, None)) if is_plain else None
    if isinstance(patch, LoHaAdapter):
        first_a, first_b, alpha, second_a, second_b, *rest = patch.weights
        is_plain = all(part is None for part in rest)
        return LoHaAdapter(patch.loaded_keys, (first_a[rows], first_b, alpha, second_a[rows], second_b, *rest)) if is_plain else None
    if isinstance(patch, tuple) and len(patch) == 2 and patch[0] == "diff" and len(patch[1]) == 1:
        return ("diff", (patch[1][0][rows],)) if patch[1][0].ndim else None
    return None

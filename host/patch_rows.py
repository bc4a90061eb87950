"""Cuts the host's adapters and patches by rows of the weight, so that a large weight can be changed, or its change sampled, in pieces."""

from __future__ import annotations

import torch
from comfy.weight_adapter import LoHaAdapter, LoKrAdapter, LoRAAdapter

Rows = slice | torch.Tensor


def patch_rows(patch: object, rows: Rows) -> object | None:
    """Return the part of a patch that changes some rows of its weight.

    Args:
        patch: The host's adapter, or its tuple `("diff", (tensor,))`.
        rows: A slice, or indices.

    Returns:
        A patch for a weight of these rows alone; None where rows depend on one another (DoRA over the inputs, Tucker forms, and others).
    """
    if isinstance(patch, LoRAAdapter):
        up, down, alpha, mid, dora_scale, reshape = patch.weights
        if mid is not None or reshape is not None or not _is_per_row(dora_scale, up.shape[0]):
            return None
        return LoRAAdapter(patch.loaded_keys, (up[rows], down, alpha, None, None if dora_scale is None else dora_scale[rows], None))
    if isinstance(patch, LoHaAdapter):
        first_a, first_b, alpha, second_a, second_b, *rest = patch.weights
        is_plain = all(part is None for part in rest)
        return LoHaAdapter(patch.loaded_keys, (first_a[rows], first_b, alpha, second_a[rows], second_b, *rest)) if is_plain else None
    if isinstance(patch, LoKrAdapter):
        return _kronecker_rows(patch, rows)
    if isinstance(patch, tuple) and len(patch) == 2 and patch[0] == "diff" and len(patch[1]) == 1:
        return ("diff", (patch[1][0][rows],)) if patch[1][0].ndim else None
    return None


def kronecker_factors(patch: LoKrAdapter) -> tuple[torch.Tensor, torch.Tensor, float] | None:
    """Return the two factors of a LoKr, fp32, and its scale; None for Tucker forms and DoRA."""
    first, second, alpha, first_a, first_b, second_a, second_b, core, dora_scale = patch.weights
    if core is not None or dora_scale is not None:
        return None
    rank = next((low.shape[0] for low in (second_b, first_b) if low is not None), None)
    pairs = ((first, first_a, first_b), (second, second_a, second_b))
    left, right = (whole.float() if whole is not None else low_a.float() @ low_b.float() for whole, low_a, low_b in pairs)
    return left, right, alpha / rank if alpha is not None and rank is not None else 1.0


def _kronecker_rows(patch: LoKrAdapter, rows: Rows) -> object | None:
    """Multiply out some rows of a LoKr: row i of the product is row i // n of the first factor times row i % n of the second, of n rows."""
    factors = kronecker_factors(patch)
    if factors is None or factors[0].ndim != 2 or factors[1].ndim != 2:
        return None
    left, right, scale = factors
    index = torch.arange(left.shape[0] * right.shape[0])[rows]
    product = left[index // right.shape[0], :, None] * right[index % right.shape[0], None, :]
    return ("diff", (product.flatten(1).mul_(scale),))


def _is_per_row(dora_scale: torch.Tensor | None, row_count: int) -> bool:
    """Tell whether a DoRA scale has one number per row, as the host decides it; absent ones leave rows alone too."""
    return dora_scale is None or (dora_scale.shape[0] == row_count and dora_scale.numel() == row_count)

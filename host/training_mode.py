"""Makes the host differentiable for a while, and puts everything back.

Within `training_mode()`: PyTorch's inference mode is off, gradients are on, and ComfyUI's `in_training` flag is set, without which its
rotary embedding uses a kernel that has no derivative. The flag must also stand during the backward pass, because checkpointed blocks run again in it.
`attention` is a differentiable attention for `transformer_options["optimized_attention_override"]`: users start ComfyUI with attention
kernels that have no backward.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import comfy.model_management
import torch
from torch.nn import functional


@contextmanager
def training_mode() -> Iterator[None]:
    """Leave inference mode, enable gradients, set the host's training flag; restore all three on exit, also after an error."""
    before = comfy.model_management.in_training
    try:
        comfy.model_management.in_training = True
        with torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        comfy.model_management.in_training = before


def attention(
    _replaced: Any,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    heads: int,
    mask: torch.Tensor | None = None,
    attn_precision: Any = None,
    skip_reshape: bool = False,
    skip_output_reshape: bool = False,
    **_options: Any,
) -> torch.Tensor:
    """Scaled dot-product attention by torch, with the call signature of the host's `optimized_attention`.

    Args:
        q, k, v: [B, L, N*K], or [B, N, L, K] with `skip_reshape`.
        heads: N.
        mask: boolean or additive, [L, S], [B, L, S] or [B, N, L, S].

    Returns:
        [B, L, N*K], or [B, N, L, K] with `skip_output_reshape`.
    """
    if not skip_reshape:
        q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    if mask is not None:
        while mask.ndim < 4:
            mask = mask.unsqueeze(0 if mask.ndim == 2 else 1)
    out_BNLK = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return out_BNLK if skip_output_reshape else out_BNLK.transpose(1, 2).flatten(2)

"""The cross-attention model of MPS: image tokens attend over prompt tokens, then a parallel attention/feed-forward block.

Own implementation of the computation described in Kwai-Kolors/MPS@be9027f:trainer/models/cross_modeling.py (MIT); parameter names are those of
the published checkpoints, so that a state dict of this module is the `cross_model.` part of such a file (without `rotary_emb.inv_freq`, which
is computed here: stored copies may be rounded to half precision, which shifts the angles by up to 0.1 rad).

Shape letters: B pairs, T image tokens, P prompt tokens, D width, N heads, K head width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

_ROTARY_BASE = 10000.0


def rotary_frequencies(head_width: int) -> Tensor:
    """Inverse frequencies 1 / 10000^(2i/K), float32 [K/2]; what published files store as `rotary_emb.inv_freq`."""
    return 1.0 / (_ROTARY_BASE ** (torch.arange(0, head_width, 2, dtype=torch.float32) / head_width))


def _rotate(x_BNTK: Tensor) -> Tensor:
    """Rotary position embedding over T, half-split: the pair of channel i is channel i + K/2."""
    tokens, width = x_BNTK.shape[-2], x_BNTK.shape[-1]
    wide = torch.promote_types(x_BNTK.dtype, torch.float32)
    inverse = rotary_frequencies(width).to(device=x_BNTK.device, dtype=wide)
    angles = torch.outer(torch.arange(tokens, device=x_BNTK.device, dtype=wide), inverse)
    cos, sin = angles.cos().repeat(1, 2), angles.sin().repeat(1, 2)
    low, high = x_BNTK.chunk(2, dim=-1)
    turned = torch.cat([-high, low], dim=-1)
    return (x_BNTK * cos + turned * sin).to(x_BNTK.dtype)


def _attend(q_BNTK: Tensor, k_BTK: Tensor, v_BTK: Tensor, keep_BP: Tensor | None) -> Tensor:
    """Attention of N query heads over one shared key and value head; returns [B, T, N*K]."""
    heads = q_BNTK.shape[1]
    mask = None if keep_BP is None else keep_BP[:, None, None, :]
    out = functional.scaled_dot_product_attention(
        q_BNTK, k_BTK[:, None].expand(-1, heads, -1, -1), v_BTK[:, None].expand(-1, heads, -1, -1), attn_mask=mask
    )
    return out.transpose(1, 2).flatten(2)


def _split_heads(x_BTM: Tensor, heads: int) -> Tensor:
    return x_BTM.unflatten(-1, (heads, -1)).transpose(1, 2)


class _Norm(nn.Module):
    """Layer norm with a learned weight and a stored, not learned, zero bias; computed in the dtype of its weight."""

    keeps_wide_parameters = True

    def __init__(self, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.register_buffer("bias", torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        return functional.layer_norm(x.to(self.weight.dtype), x.shape[-1:], self.weight, self.bias, 1e-5).to(x.dtype)


class _SwiGLU(nn.Module):
    """First half times silu of the second half."""

    def forward(self, x: Tensor) -> Tensor:
        value, gate = x.chunk(2, dim=-1)
        return value * functional.silu(gate)


class _CrossAttention(nn.Module):
    """Image tokens (normed) query prompt tokens (not normed); a feed-forward of the same normed input is added."""

    def __init__(self, dim: int, heads: int, head_width: int, ff_mult: int):
        super().__init__()
        self.heads = heads
        self.norm = _Norm(dim)
        self.to_q = nn.Linear(dim, heads * head_width, bias=False)
        self.to_kv = nn.Linear(dim, 2 * head_width, bias=False)
        self.to_out = nn.Linear(heads * head_width, dim, bias=False)
        self.ff = nn.Sequential(nn.Linear(dim, 2 * ff_mult * dim, bias=False), _SwiGLU(), nn.Linear(ff_mult * dim, dim, bias=False))

    def forward(self, x_BTD: Tensor, text_BPD: Tensor, keep_BP: Tensor) -> Tensor:
        normed = self.norm(x_BTD)
        k_BPK, v_BPK = self.to_kv(text_BPD).chunk(2, dim=-1)
        attended = _attend(_split_heads(self.to_q(normed), self.heads), k_BPK, v_BPK, keep_BP)
        return self.to_out(attended) + self.ff(normed)


class _ParallelBlock(nn.Module):
    """Rotary multi-query self-attention and feed-forward from one fused projection."""

    def __init__(self, dim: int, heads: int, head_width: int, ff_mult: int):
        super().__init__()
        self.heads = heads
        self.widths = (heads * head_width, head_width, head_width, 2 * ff_mult * dim)
        self.norm = _Norm(dim)
        self.fused_attn_ff_proj = nn.Linear(dim, sum(self.widths), bias=False)
        self.attn_out = nn.Linear(heads * head_width, dim, bias=False)
        self.ff_out = nn.Sequential(_SwiGLU(), nn.Linear(ff_mult * dim, dim, bias=False))

    def forward(self, x_BTD: Tensor) -> Tensor:
        q, k_BTK, v_BTK, ff = self.fused_attn_ff_proj(self.norm(x_BTD)).split(self.widths, dim=-1)
        attended = _attend(_rotate(_split_heads(q, self.heads)), _rotate(k_BTK[:, None])[:, 0], v_BTK, None)
        return self.attn_out(attended) + self.ff_out(ff)


class _Residual(nn.Module):
    def __init__(self, fn: nn.Module):
        super().__init__()
        self.fn = fn

    def forward(self, x: Tensor, *others: Tensor) -> Tensor:
        return x + self.fn(x, *others)


class CrossModel(nn.Module):
    """MPS's cross model.

    Args:
        dim: shared width (1024 in the published model).
        layer_num: layers (4).
        heads: query heads (16).
        dim_head: width of a head (64); keys and values have one head of this width.
        ff_mult: feed-forward width over `dim` (4).
    """

    def __init__(self, dim: int, layer_num: int = 4, heads: int = 16, dim_head: int = 64, ff_mult: int = 4):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleList([
                _Residual(_CrossAttention(dim, heads, dim_head, ff_mult)),
                _Residual(_ParallelBlock(dim, heads, dim_head, ff_mult)),
            ])
            for _ in range(layer_num)
        )
        self.head_width = dim_head

    def forward(self, image_BTD: Tensor, text_BPD: Tensor, keep_BP: Tensor) -> Tensor:
        """Image tokens after the last layer.

        Args:
            image_BTD: projected image tokens.
            text_BPD: projected prompt states.
            keep_BP: bool, True where a prompt position may be attended to.

        Returns:
            [B, T, D].
        """
        for cross, block in self.layers:
            image_BTD = block(cross(image_BTD, text_BPD, keep_BP))
        return image_BTD

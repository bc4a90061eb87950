"""Floating-point operations of one pass of a transformer, in closed form. A multiplication and its addition count as two.

M video tokens of one latent, P text tokens, d width, f feed-forward width, r rank.
"""

from __future__ import annotations

from dataclasses import dataclass

from .shapes import ModelShape

TEXT_TOKENS = 512


@dataclass(frozen=True, kw_only=True)
class Passes:
    """Operations of one latent through one transformer, by kind: matrix products and attention run at different rates.

    Attributes:
        forward: without gradient, LoRA merged.
        exact: forward of a pass with gradient: LoRA beside the weights.
        backward: with what runs again.
    """

    forward: dict[str, float]
    exact: dict[str, float]
    backward: dict[str, float]


def passes(
    shape: ModelShape, tokens: int, rank: int, adapted: set[str], *, text_tokens: int = TEXT_TOKENS, keeps_attention: bool = True,
    keeps_feed_forward: bool = False, trains_outside: bool = True
) -> Passes:  # fmt: skip
    """Count a forward and a backward.

    Args:
        adapted: names of a block's adapted Linears, such as `self_attn.q`.
        keeps_attention: self-attention does not run again.
        keeps_feed_forward: ffn.0 does not run again.
        trains_outside: time or text layers have a LoRA, so that gates need gradients and the feed-forward's last product runs again.
    """
    of_text = {"cross_attn.k", "cross_attn.v"}
    linear = {name: 2.0 * (text_tokens if name in of_text else tokens) * out * size for name, (out, size) in shape.block_linears.items()}
    lora = {
        name: 2.0 * (text_tokens if name in of_text else tokens) * rank * (out + size) for name, (out, size) in shape.block_linears.items() if name in adapted
    }
    own = 4.0 * tokens * tokens * shape.width
    cross = 4.0 * tokens * text_tokens * shape.width
    outer = 2.0 * tokens * shape.width * 4 * (shape.in_channels + shape.latent_channels) + 2.0 * text_tokens * shape.width * (shape.text_width + shape.width)
    count = shape.blocks
    forward = {"gemm": count * sum(linear.values()) + outer, "attention": count * (own + cross)}
    exact = {"gemm": forward["gemm"] + count * sum(lora.values()), "attention": forward["attention"]}
    # What runs again: everything but self-attention (if kept) and ffn.2 (unless a gate's gradient needs it); S = x A^T of ffn.2 does.
    left_out = {"ffn.0"} if keeps_feed_forward else set()
    left_out |= set() if trains_outside else {"ffn.2"}
    again = {name: work for name, work in linear.items() if name not in left_out}
    lora_again = {name: work for name, work in lora.items() if name not in left_out}
    inputs = sum(work for name, work in linear.items() if name not in of_text or trains_outside)
    gemm = sum(again.values()) + sum(lora_again.values()) + inputs + 2 * sum(lora.values())
    ran_again = cross + (0 if keeps_attention else own)
    qkv_twice = 0 if keeps_attention else sum((linear[name] + lora.get(name, 0)) for name in ("self_attn.q", "self_attn.k", "self_attn.v"))
    backward = {"gemm": count * (gemm + qkv_twice) + outer / 2, "attention": count * (2.5 * (own + cross) + ran_again)}
    return Passes(forward=forward, exact=exact, backward=backward)

"""Attention as two plain calls, so that output and log-sum-exp can be kept and the backward does not run the forward again.

One backend is chosen per run, by what the device can do, and named in the log. Nothing here falls back in silence.

- `fa3`: FlashAttention-3 in torch's place of FlashAttention-2 (Hopper, with the package `flash_attn_3` installed).
- `cudnn`: torch's cuDNN kernel (CUDA, head width a multiple of 8 up to 128), the fastest with a backward on Hopper without that package.
- `flash`: torch's FlashAttention-2 (CUDA; AOTriton on ROCm).
- `cpu`: torch's flash kernel for the CPU.
- `plain`: products and softmax, [B, N, L, S] in memory; for devices without the others.

Rollouts can use SageAttention, which multiplies in 8 bits and has no backward: only where the settings ask for it.

Shapes: B batch, N heads, L queries, S keys, K head width.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Sequence

import torch
import torch.nn.attention
from torch.autograd.function import once_differentiable

logger = logging.getLogger("reward_lab.kernels")
BACKENDS = ("auto", "fa3", "cudnn", "flash", "cpu", "plain")
ROLLOUT_BACKENDS = ("same", "sage")
_aten = torch.ops.aten
_HOPPER = (9, 0)
_WIDEST, _SAGE_WIDEST = 256, 128


def choose_backend(requested: str, device: torch.device, dtype: torch.dtype, head_width: int) -> str:
    """Decide which kernel a run uses, and say so.

    Raises:
        ValueError: unknown, or unable to run there.
    """
    if requested not in BACKENDS:
        raise ValueError(f"engine.attention is {requested!r}; it must be one of {', '.join(BACKENDS)}")
    able = _able(device, dtype, head_width)
    if requested != "auto" and requested not in able:
        raise ValueError(f"engine.attention is {requested!r}, but {device} in {dtype} with heads of {head_width} can do: {', '.join(able)}; use 'auto'")
    chosen = able[0] if requested == "auto" else requested
    _activate_fa3(chosen == "fa3")
    logger.info("attention: %s (%s, heads of %d)", chosen, dtype, head_width)
    return chosen


def _able(device: torch.device, dtype: torch.dtype, head_width: int) -> list[str]:
    """Usable backends, best first."""
    if device.type == "cpu":
        return ["cpu", "plain"]
    if device.type == "meta":
        return ["flash", "plain"]
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16) or head_width % 8 or head_width > _WIDEST:
        return ["plain"]
    if torch.version.hip is None and head_width <= 128 and torch.cuda.get_device_capability(device) >= _HOPPER:
        is_hopper = torch.cuda.get_device_capability(device)[0] == _HOPPER[0]
        return [*(["fa3"] if is_hopper and _has_fa3() else []), "cudnn", "flash", "plain"]
    cudnn = ["cudnn"] if torch.version.hip is None and head_width <= 128 else []
    return ["flash", *cudnn, "plain"]


def _has_fa3() -> bool:
    return importlib.util.find_spec("flash_attn_interface") is not None and hasattr(torch.nn.attention, "activate_flash_attention_impl")


def _activate_fa3(is_wanted: bool) -> None:
    """Let torch's flash operators run FlashAttention-3, or their own kernel again; the switch is the process's."""
    is_active = hasattr(torch.nn.attention, "current_flash_attention_impl") and torch.nn.attention.current_flash_attention_impl() == "FA3"
    if is_wanted and not is_active:
        torch.nn.attention.activate_flash_attention_impl("FA3")
    elif is_active and not is_wanted:
        torch.nn.attention.restore_flash_attention_impl()


def choose_rollout_backend(requested: str, exact: str, device: torch.device, dtype: torch.dtype, head_width: int) -> str:
    """The kernel of self-attention in rollouts; `exact` is that of passes with gradient. Says so where they differ.

    Raises:
        ValueError: unknown, or unable to run there.
    """
    if requested not in ROLLOUT_BACKENDS:
        raise ValueError(f"engine.rollout_attention is {requested!r}; it must be one of {', '.join(ROLLOUT_BACKENDS)}")
    if requested == "same":
        return exact
    lacks = [
        words
        for is_missing, words in (
            (device.type != "cuda" or torch.version.hip is not None, "an NVIDIA card"),
            (importlib.util.find_spec("sageattention") is None, "the package sageattention (pip install it)"),
            (dtype not in (torch.bfloat16, torch.float16), "bf16 (dtype)"),
            (head_width > _SAGE_WIDEST, f"heads of at most {_SAGE_WIDEST}"),
        )
        if is_missing
    ]
    if lacks:
        raise ValueError(f"engine.rollout_attention is 'sage', which needs {' and '.join(lacks)}; or use 'same'")
    logger.info("attention in rollouts: SageAttention in 8 bits, as asked; passes with gradient, references and the self-check use %s", exact)
    return "sage"


def forward(q_BNLK: torch.Tensor, k_BNSK: torch.Tensor, v_BNSK: torch.Tensor, backend: str) -> tuple[torch.Tensor, torch.Tensor | None, tuple]:
    """Output [B, N, L, K], log-sum-exp [B, N, L] (fp32; none of `sage`) and what the backend's backward wants besides."""
    if backend == "cpu":
        out, lse = _aten._scaled_dot_product_flash_attention_for_cpu(q_BNLK, k_BNSK, v_BNSK)
        return out, lse, ()
    if backend == "sage":
        from sageattention import sageattn

        return sageattn(q_BNLK, k_BNSK, v_BNSK, tensor_layout="HND", is_causal=False), None, ()
    if backend in ("flash", "fa3"):
        out, lse, *rest = _aten._scaled_dot_product_flash_attention(q_BNLK, k_BNSK, v_BNSK)
        return out, lse, tuple(rest[:-1])
    if backend == "cudnn":
        out, lse, *rest = _aten._scaled_dot_product_cudnn_attention(q_BNLK, k_BNSK, v_BNSK, None, True)
        return out, lse, tuple(rest[:-1])
    scores = (q_BNLK @ k_BNSK.transpose(-1, -2)).to(torch.promote_types(q_BNLK.dtype, torch.float32)) * q_BNLK.shape[-1] ** -0.5
    lse = torch.logsumexp(scores, -1)
    return (scores - lse.unsqueeze(-1)).exp().to(v_BNSK.dtype) @ v_BNSK, lse, ()


def backward(
    grad_BNLK: torch.Tensor,
    q_BNLK: torch.Tensor,
    k_BNSK: torch.Tensor,
    v_BNSK: torch.Tensor,
    out_BNLK: torch.Tensor,
    lse_BNL: torch.Tensor,
    extra: tuple,
    backend: str,
    head_groups: int = 1,
    into: Sequence[torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dq, dk and dv from kept output and log-sum-exp, in groups of heads: what a kernel holds besides (dq in fp32, copies) shrinks with the group.

    Heads do not touch each other, so groups change no number; but on a CPU all threads share a group of a single head, and add in another order.

    Args:
        into: where gradients of several groups are written, shaped as q, k, v; may be these themselves.
    """
    heads = q_BNLK.shape[1]
    step = -(-heads // max(1, min(head_groups, heads)))
    if step == heads:
        return _backward(grad_BNLK, q_BNLK, k_BNSK, v_BNSK, out_BNLK, lse_BNL, extra, backend)
    results = tuple(torch.empty_like(value) for value in (q_BNLK, k_BNSK, v_BNSK)) if into is None else tuple(into)
    for start in range(0, heads, step):
        group = slice(start, start + step)
        parts = _backward(*(value[:, group] for value in (grad_BNLK, q_BNLK, k_BNSK, v_BNSK, out_BNLK, lse_BNL)), extra, backend)
        for result, part in zip(results, parts, strict=True):
            result[:, group] = part
    return results


def _backward(grad, q, k, v, out, lse, extra, backend):
    if backend == "cpu":
        return _aten._scaled_dot_product_flash_attention_for_cpu_backward(grad, q, k, v, out, lse, 0.0, False)
    if backend in ("flash", "fa3"):
        cum_q, cum_k, max_q, max_k, seed, offset = extra
        return _aten._scaled_dot_product_flash_attention_backward(
            grad, q, k, v, out, lse.contiguous(), cum_q, cum_k, max_q, max_k, 0.0, False, seed, offset
        )
    if backend == "cudnn":
        cum_q, cum_k, max_q, max_k, seed, offset = extra
        return _aten._scaled_dot_product_cudnn_attention_backward(
            grad, q, k, v, out, lse.contiguous(), seed, offset, None, cum_q, cum_k, max_q, max_k, 0.0, False
        )
    scale = q.shape[-1] ** -0.5
    scores = (q @ k.transpose(-1, -2)).to(lse.dtype) * scale
    weights = (scores - lse.unsqueeze(-1)).exp()
    grad_weights = (grad @ v.transpose(-1, -2)).to(lse.dtype)
    grad_scores = (weights * (grad_weights - (grad * out).to(lse.dtype).sum(-1, keepdim=True)) * scale).to(q.dtype)
    return grad_scores @ k, grad_scores.transpose(-1, -2) @ q, weights.to(v.dtype).transpose(-1, -2) @ grad


class Attention(torch.autograd.Function):
    """softmax(q k^T / sqrt(K)) v with the chosen backend, for parts of a block that run again as a whole."""

    @staticmethod
    def forward(ctx, q, k, v, backend, head_groups):
        out, lse, extra = forward(q, k, v, backend)
        ctx.save_for_backward(q, k, v, out, lse, *(value for value in extra if isinstance(value, torch.Tensor)))
        ctx.extra = [None if isinstance(value, torch.Tensor) else value for value in extra]
        ctx.is_tensor = [isinstance(value, torch.Tensor) for value in extra]
        ctx.choice = (backend, head_groups)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        q, k, v, out, lse, *saved = ctx.saved_tensors
        kept = iter(saved)
        extra = tuple(next(kept) if is_tensor else value for is_tensor, value in zip(ctx.is_tensor, ctx.extra, strict=True))
        return *backward(grad, q, k, v, out, lse, extra, *ctx.choice), None, None

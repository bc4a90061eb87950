"""Compares the first and the last block through the executor with the plain path, on the device and in the type of the run, before the first step.

A driver, a kernel or a build of torch that computes something else is found in a second and not after a night.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch

from ..lora.adapter import new_adapter
from ..lora.linears import install
from .executor import BlockExecutor

logger = logging.getLogger("reward_lab.offload")
_TOKENS, _TEXT, _RANK, _SEED = 96, 16, 4, 20
# fp32: sums in another order. bf16: every product is rounded to 2^-9, in both paths at other places.
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-10, torch.bfloat16: 5e-2, torch.float16: 1e-2}


def self_check(executor: BlockExecutor, dtype: torch.dtype, options: Mapping[str, Any]) -> float:
    """Run it: where only some blocks stay on the device, the first block does, and the last one comes through a slot and its LoRA buffers.

    Args:
        executor: installed on the model; no LoRA may be installed yet.
        options: `transformer_options` for the plain path: a differentiable attention.

    Returns:
        The largest relative difference of the output and of any gradient (input, time, text, LoRA).

    Raises:
        RuntimeError: it is larger than the type explains, or not a number.
    """
    ratios = [_ratio(executor, dtype, options, index) for index in dict.fromkeys((0, len(executor.blocks) - 1))]
    logger.info("self-check: blocks through the engine differ from the plain path by %.2g (%s on %s)", max(ratios), dtype, executor.device)
    return max(ratios)


def _ratio(executor: BlockExecutor, dtype: torch.dtype, options: Mapping[str, Any], index: int) -> float:
    block = executor.blocks[index]
    linears = {path: module for path, module in block.named_modules() if isinstance(module, torch.nn.Linear)}
    adapter = new_adapter(linears, list(linears), rank=_RANK, alpha=_RANK, seed=_SEED, device=executor.device)
    generator = torch.Generator().manual_seed(_SEED)

    def random(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) * scale).to(executor.device, dtype)

    for layer in adapter.layers.values():
        layer.up_OR.data.copy_(random(*layer.up_OR.shape, scale=0.02))
    width, heads = block.modulation.shape[-1], block.self_attn.num_heads
    leaves = [random(1, _TOKENS, width), random(1, 1, 6, width, scale=0.1), random(1, _TEXT, width)]
    angle = torch.randn(1, _TOKENS, 1, width // heads // 2, generator=generator)
    rotations = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], dim=-1).unflatten(-1, (2, 2)).to(executor.device)
    weight = random(1, _TOKENS, width)
    wanted = [leaf.requires_grad_() for leaf in leaves] + adapter.parameters()

    def results(forward) -> list[torch.Tensor]:
        out = forward(leaves[0], leaves[1], rotations, leaves[2], transformer_options=dict(options))
        return [out.detach(), *torch.autograd.grad(out, wanted, weight)]

    with torch.enable_grad(), install(linears, adapter):
        found = results(block.forward)
        with executor.store.use(index, merge=False):
            plain = results(executor.plain_forward(index))
    ratios = [(one.float() - other.float()).norm() / other.float().norm().clamp_min(1e-30) for one, other in zip(found, plain, strict=True)]
    # Python's own maximum passes over what is not a number.
    ratio = float(torch.stack(ratios).max())
    if not ratio <= TOLERANCE[dtype]:
        raise RuntimeError(
            f"self-check: block {index + 1} through the engine differs from the plain path by {ratio:.3g} in {dtype} on {executor.device}, more than "
            f"{TOLERANCE[dtype]:.0e}. Try engine.attention = 'plain' and engine.kernels = 'torch', and report this"
        )
    return ratio

"""Whether a gradient that autograd hands over is held by nobody else, so that its memory may be written over.

In a chain of blocks every gradient has one owner, and the block's backward saves a tensor of the stream's size by writing over it. Where a block's
output is used twice, where a hook kept the gradient, or where it is the caller's own, it is somebody else's as well; there is no public way to ask, so
references are counted and compared with those of a gradient that is known to be alone. Where torch does not tell, no gradient counts as alone.
"""

from __future__ import annotations

import sys
from functools import cache

import torch
from torch.autograd.function import once_differentiable


def is_alone(grad: torch.Tensor) -> bool:
    """Call it in `backward` of an autograd Function with `once_differentiable`, with the gradient as its plain argument: the depth of calls counts."""
    found, alone = _references(grad), _of_a_chain()
    return alone is not None and all(one <= other for one, other in zip(found, alone, strict=True))


def _references(grad: torch.Tensor) -> tuple[int, ...]:
    """References to the tensor by C++ (graph, accumulated gradients), to its memory (views), and by Python (hooks, variables)."""
    return grad._use_count(), torch._C._storage_Use_Count(grad.untyped_storage()._cdata), sys.getrefcount(grad)


@cache
def _of_a_chain() -> tuple[int, ...] | None:
    """The counts where nobody else holds the gradient."""
    if not hasattr(torch.Tensor, "_use_count") or not hasattr(torch._C, "_storage_Use_Count"):
        return None
    seen: list[tuple[int, ...]] = []

    class Probe(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        @once_differentiable
        def backward(ctx, grad):
            seen.append(_asked(grad))
            return grad * 2

    with torch.inference_mode(False), torch.enable_grad():
        start = torch.zeros(2, 2, requires_grad=True)
        torch.autograd.grad((Probe.apply(Probe.apply(start)) * 3).sum(), start)
    return tuple(map(min, zip(*seen, strict=True)))


def _asked(grad: torch.Tensor) -> tuple[int, ...]:
    # As deep as `is_alone`.
    return _references(grad)

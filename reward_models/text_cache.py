"""Text features by prompt, so that a second score with the same text costs no text encoder."""

from __future__ import annotations

import collections
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

# MPS keeps 77 x 1024 float32 values a prompt (308 KiB); 256 prompts are 77 MiB.
_LIMIT = 256


class TextCache:
    """Least-recently-used map from prompt to a tensor.

    Args:
        encode: prompts -> tensor with one row per prompt; called without gradient, outside inference mode (a cached inference tensor could not be
            used in a later gradient pass), only for prompts that are not known.
        limit: prompts kept.
    """

    def __init__(self, encode: Callable[[Sequence[str]], Tensor], limit: int = _LIMIT):
        self._encode = encode
        self._limit = limit
        self._rows: collections.OrderedDict[str, Tensor] = collections.OrderedDict()
        self.misses = 0

    def __call__(self, prompts: Sequence[str]) -> Tensor:
        """Rows of `prompts`, stacked."""
        missing = list(dict.fromkeys(prompt for prompt in prompts if prompt not in self._rows))
        if missing:
            self.misses += len(missing)
            with torch.inference_mode(False), torch.no_grad():
                for prompt, row in zip(missing, self._encode(missing), strict=True):
                    self._rows[prompt] = row.clone()
        for prompt in prompts:
            self._rows.move_to_end(prompt)
        stacked = torch.stack([self._rows[prompt] for prompt in prompts])
        while len(self._rows) > self._limit:
            self._rows.popitem(last=False)
        return stacked

    def clear(self) -> None:
        """Forget everything, e.g. after the weights moved."""
        self._rows.clear()

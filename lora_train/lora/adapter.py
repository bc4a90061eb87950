"""The trainable parameters of one expert's LoRA: fp32 masters, a down and an up matrix per Linear.

Shapes: R rank, I in features, O out features. y = W x + factor * up(down(x)), factor = alpha / rank.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True)
class LoraLayer:
    """One adapted Linear."""

    down_RI: torch.nn.Parameter
    up_OR: torch.nn.Parameter
    factor: float

    def delta_OI(self) -> torch.Tensor:
        """The change of the Linear's weight, fp32, without gradient."""
        return self.factor * (self.up_OR.detach() @ self.down_RI.detach())


@dataclass(frozen=True, kw_only=True)
class LoraAdapter:
    """All adapted Linears of one expert, by path in model order."""

    layers: dict[str, LoraLayer]
    rank: int
    alpha: float

    def parameters(self) -> list[torch.nn.Parameter]:
        """Down and up of every layer, in order."""
        return [parameter for layer in self.layers.values() for parameter in (layer.down_RI, layer.up_OR)]

    def tensors(self) -> dict[str, torch.Tensor]:
        """The masters by `<path>.down` and `<path>.up`, detached."""
        named = {}
        for path, layer in self.layers.items():
            named[f"{path}.down"] = layer.down_RI.detach()
            named[f"{path}.up"] = layer.up_OR.detach()
        return named

    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Copy masters in place.

        Raises:
            ValueError: a name is missing or too many, or a shape differs.
        """
        own = self.tensors()
        if own.keys() != tensors.keys():
            odd = sorted(own.keys() ^ tensors.keys())
            raise ValueError(f"the adapter has {len(own)} tensors, the given ones {len(tensors)}; not in both: {', '.join(odd[:4])}")
        for name, tensor in tensors.items():
            if own[name].shape != tensor.shape:
                raise ValueError(f"{name} is {list(tensor.shape)}, but this model and rank need {list(own[name].shape)}")
            own[name].copy_(tensor)


def new_adapter(linears: Mapping[str, torch.nn.Linear], paths: list[str], *, rank: int, alpha: float, seed: int, device: torch.device) -> LoraAdapter:
    """Fresh LoRA: down Kaiming-uniform with a = sqrt(5), up zero, so the model starts unchanged.

    Args:
        linears: the model's Linears by path.
        paths: those to adapt.
        seed: of the down matrices; drawn on the CPU, so that it does not depend on the device.

    Source: aigc-apps/VideoX-Fun@804a4258:videox_fun/utils/lora_utils.py (Apache-2.0), same initialisation.
    """
    generator = torch.Generator().manual_seed(seed)
    layers = {}
    for path in paths:
        out_features, in_features = linears[path].weight.shape
        bound = math.sqrt(6 / ((1 + 5) * in_features))
        down_RI = torch.empty(rank, in_features, dtype=torch.float32).uniform_(-bound, bound, generator=generator)
        layers[path] = LoraLayer(
            down_RI=torch.nn.Parameter(down_RI.to(device)),
            up_OR=torch.nn.Parameter(torch.zeros(out_features, rank, dtype=torch.float32, device=device)),
            factor=alpha / rank,
        )
    return LoraAdapter(layers=layers, rank=rank, alpha=alpha)

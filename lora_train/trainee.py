"""One expert in training: adapter, optimiser, moving average; and their complete state as tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from .config import Optimiser
from .lora.adapter import LoraAdapter
from .lora.linears import InstalledLora

_MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True, kw_only=True)
class Trainee:
    """What one expert's updates need."""

    expert: str
    adapter: LoraAdapter
    switch: InstalledLora
    optimiser: torch.optim.AdamW
    settings: Optimiser
    average: dict[str, torch.Tensor]

    def update(self, step: int) -> float:
        """Clip, make one AdamW step with warm-up, move the average, clear gradients.

        Args:
            step: number of the update, from 1.

        Returns:
            Norm of the gradient before clipping; when it is not finite, nothing was changed.
        """
        parameters = self.adapter.parameters()
        limit = self.settings.clip_norm if self.settings.clip_norm > 0 else math.inf
        grad_norm = float(torch.nn.utils.clip_grad_norm_(parameters, limit))
        if math.isfinite(grad_norm):
            for group in self.optimiser.param_groups:
                group["lr"] = self.learning_rate(step)
            self.optimiser.step()
            for name, tensor in self.adapter.tensors().items() if self.average else ():
                self.average[name].lerp_(tensor, 1 - self.settings.ema_decay)
        self.optimiser.zero_grad(set_to_none=True)
        return grad_norm

    def learning_rate(self, step: int) -> float:
        """Constant after a linear warm-up."""
        return self.settings.lr * min(1.0, step / self.settings.warmup) if self.settings.warmup else self.settings.lr

    def weights(self) -> dict[str, torch.Tensor]:
        """What is saved as the LoRA: the moving average if there is one, else the masters."""
        return self.average or self.adapter.tensors()

    def state(self) -> dict[str, torch.Tensor]:
        """Everything that the next update depends on, on the CPU."""
        state = {f"master/{name}": tensor for name, tensor in self.adapter.tensors().items()}
        state |= {f"average/{name}": tensor for name, tensor in self.average.items()}
        for name, parameter in zip(self.adapter.tensors(), self.adapter.parameters(), strict=True):
            moments = self.optimiser.state.get(parameter, {})
            state |= {f"{kind}/{name}": moments[kind] for kind in _MOMENTS if kind in moments}
            if "step" in moments:
                state[f"step/{name}"] = moments["step"]
        return {name: tensor.detach().cpu().clone() for name, tensor in state.items()}

    def load_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """Put back what `state` returned.

        Raises:
            ValueError: it belongs to another adapter.
        """
        self.adapter.load({name.removeprefix("master/"): tensor for name, tensor in state.items() if name.startswith("master/")})
        for name, tensor in self.average.items():
            tensor.copy_(state[f"average/{name}"])
        for name, parameter in zip(self.adapter.tensors(), self.adapter.parameters(), strict=True):
            if f"step/{name}" in state:
                moments = {kind: state[f"{kind}/{name}"].to(parameter.device).clone() for kind in _MOMENTS}
                self.optimiser.state[parameter] = {"step": state[f"step/{name}"].clone(), **moments}


def new_trainee(expert: str, adapter: LoraAdapter, switch: InstalledLora, settings: Optimiser) -> Trainee:
    """Set up AdamW and, where asked, the moving average."""
    optimiser = torch.optim.AdamW(
        adapter.parameters(), lr=settings.lr, betas=tuple(settings.betas), weight_decay=settings.weight_decay, eps=settings.eps
    )
    average = {name: tensor.clone() for name, tensor in adapter.tensors().items()} if settings.ema_decay > 0 else {}
    return Trainee(expert=expert, adapter=adapter, switch=switch, optimiser=optimiser, settings=settings, average=average)

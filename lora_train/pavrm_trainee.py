"""A PAVRM in training: optimiser, moving average, and the complete state as tensors. `trainee.py` is its counterpart for LoRAs.

Weights are two groups, blocks and head, each with a learning rate of its own; the gradient is clipped over both together.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from . import optimisers
from .pavrm_config import Optimiser


@dataclass(frozen=True, kw_only=True)
class PavrmTrainee:
    """What an update needs. `expert` names the state in checkpoints."""

    parameters: Mapping[str, torch.nn.Parameter]
    optimiser: torch.optim.Optimizer
    settings: Optimiser
    average: dict[str, torch.Tensor]
    steps: int = 0
    expert: str = "pavrm"

    def update(self, step: int) -> float:
        """Clip everything, make one step of the optimiser, move the average, clear gradients.

        Args:
            step: number of the update, from 1.

        Returns:
            Norm of the whole gradient before clipping; when it is not finite, nothing was changed.
        """
        limit = self.settings.clip_norm if self.settings.clip_norm > 0 else math.inf
        grad_norm = float(torch.nn.utils.clip_grad_norm_(list(self.parameters.values()), limit))
        if math.isfinite(grad_norm):
            optimisers.set_rates(self.optimiser, self.settings, step, self.steps)
            optimisers.step(self.optimiser, self.settings)
            for name, tensor in self.average.items():
                tensor.lerp_(self.parameters[name].detach(), 1 - self.settings.ema_decay)
        self.optimiser.zero_grad(set_to_none=True)
        return grad_norm

    def learning_rate(self, step: int) -> float:
        """The head's rate of update `step`."""
        return optimisers.learning_rate(self.settings, self.settings.head_lr, step, self.steps)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Within, the parameters are those that are saved: the moving average where there is one."""
        kept = {name: self.parameters[name].detach().clone() for name in self.average}
        try:
            with torch.no_grad():
                for name, tensor in self.average.items():
                    self.parameters[name].copy_(tensor)
            yield
        finally:
            with torch.no_grad():
                for name, tensor in kept.items():
                    self.parameters[name].copy_(tensor)

    def state(self) -> dict[str, torch.Tensor]:
        """Everything that the next update depends on, on the CPU."""
        state = {f"master/{name}": parameter for name, parameter in self.parameters.items()}
        state |= {f"average/{name}": tensor for name, tensor in self.average.items()}
        state |= optimisers.state_tensors(self.optimiser, self.parameters)
        return {name: tensor.detach().cpu().clone() for name, tensor in sorted(state.items())}

    def load_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """Put back what `state` returned.

        Raises:
            ValueError: it belongs to another network.
        """
        for name, parameter in self.parameters.items():
            kept = state.get(f"master/{name}")
            if kept is None or kept.shape != parameter.shape:
                raise ValueError(f"the checkpoint has {name} as {None if kept is None else list(kept.shape)}, the network as {list(parameter.shape)}")
            with torch.no_grad():
                parameter.copy_(kept)
        for name, tensor in self.average.items():
            tensor.copy_(state[f"average/{name}"])
        optimisers.load_state(self.optimiser, self.parameters, state)


def new_trainee(groups: Mapping[str, Mapping[str, torch.nn.Parameter]], settings: Optimiser, steps: int = 0) -> PavrmTrainee:
    """Set up the optimiser and, where asked, the moving average.

    Args:
        groups: `blocks` and `head`, see `objectives.pavrm.LatentScorer`; an empty group is left out.
        steps: updates of the whole run, for learning rates that fall.

    Raises:
        ValueError: the optimiser is not installed.
    """
    rates = {"blocks": settings.block_lr, "head": settings.head_lr}
    optimiser = optimisers.make(settings, [(rates[name], list(group.values())) for name, group in groups.items() if group])
    parameters = {name: parameter for group in groups.values() for name, parameter in group.items()}
    average = {name: parameter.detach().clone() for name, parameter in parameters.items()} if settings.ema_decay > 0 else {}
    return PavrmTrainee(parameters=parameters, optimiser=optimiser, settings=settings, average=average, steps=steps)

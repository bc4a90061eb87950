"""One expert in training: adapter, optimiser, moving average; and their complete state as tensors."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch

from . import optimisers
from .config import Optimiser
from .lora.adapter import LoraAdapter
from .lora.linears import InstalledLora


@dataclass(frozen=True, kw_only=True)
class Trainee:
    """What one expert's updates need. `best` holds the weights of the best look at held-out videos, once there was one worth keeping."""

    expert: str
    adapter: LoraAdapter
    switch: InstalledLora
    optimiser: torch.optim.Optimizer
    settings: Optimiser
    steps: int
    average: dict[str, torch.Tensor]
    best: dict[str, torch.Tensor] = field(default_factory=dict)

    def update(self, step: int) -> float:
        """Clip, make one step of the optimiser, move the average, clear gradients.

        Args:
            step: number of the update, from 1.

        Returns:
            Norm of the gradient before clipping; when it is not finite, nothing was changed.

        Memory may end in it anywhere; `optimisers.written` tells whether something was changed by then.
        """
        parameters = self.adapter.parameters()
        limit = self.settings.clip_norm if self.settings.clip_norm > 0 else math.inf
        grad_norm = float(torch.nn.utils.clip_grad_norm_(parameters, limit))
        if math.isfinite(grad_norm):
            optimisers.set_rates(self.optimiser, self.settings, step, self.steps)
            optimisers.step(self.optimiser, self.settings)
            for name, tensor in self.adapter.tensors().items() if self.average else ():
                self.average[name].lerp_(tensor, 1 - self.settings.ema_decay)
        self.optimiser.zero_grad(set_to_none=True)
        return grad_norm

    def to(self, device: torch.device) -> None:
        """Move masters, optimiser and averages; nothing happens where they are there already."""
        for parameter in self.adapter.parameters():
            parameter.data = parameter.data.to(device)
            state = self.optimiser.state.get(parameter, {})
            # torch keeps the step number on the CPU.
            state.update({key: value.to(device) for key, value in state.items() if isinstance(value, torch.Tensor) and value.ndim})
        for tensors in (self.average, self.best):
            tensors.update({name: tensor.to(device) for name, tensor in tensors.items()})

    def learning_rate(self, step: int) -> float:
        """Rate of update `step`."""
        return optimisers.learning_rate(self.settings, self.settings.lr, step, self.steps)

    def remember(self) -> None:
        """Keep the present weights as the best ones."""
        self.best.update({name: tensor.detach().clone() for name, tensor in self.weights().items()})

    def weights(self) -> dict[str, torch.Tensor]:
        """What is saved as the LoRA: the moving average if there is one, else the masters."""
        return self.average or self.adapter.tensors()

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Within, the masters are what is saved: the moving average where there is one."""
        masters = self._named()
        kept = {name: masters[name].detach().clone() for name in self.average}
        try:
            with torch.no_grad():
                for name, tensor in self.average.items():
                    masters[name].copy_(tensor)
            yield
        finally:
            with torch.no_grad():
                for name, tensor in kept.items():
                    masters[name].copy_(tensor)

    def state(self) -> dict[str, torch.Tensor]:
        """Everything that the next update depends on, on the CPU."""
        state = {f"master/{name}": tensor for name, tensor in self.adapter.tensors().items()}
        state |= {f"average/{name}": tensor for name, tensor in self.average.items()}
        state |= {f"best/{name}": tensor for name, tensor in self.best.items()}
        state |= optimisers.state_tensors(self.optimiser, self._named())
        # In one order, however the optimiser came by its state.
        return {name: tensor.detach().cpu().clone() for name, tensor in sorted(state.items())}

    def load_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """Put back what `state` returned.

        Raises:
            ValueError: it belongs to another adapter.
        """
        self.adapter.load({name.removeprefix("master/"): tensor for name, tensor in state.items() if name.startswith("master/")})
        for name, tensor in self.average.items():
            tensor.copy_(state[f"average/{name}"])
        device = self.adapter.parameters()[0].device
        self.best.update({name.removeprefix("best/"): tensor.to(device).clone() for name, tensor in state.items() if name.startswith("best/")})
        optimisers.load_state(self.optimiser, self._named(), state)

    def _named(self) -> dict[str, torch.nn.Parameter]:
        return dict(zip(self.adapter.tensors(), self.adapter.parameters(), strict=True))


@contextmanager
def averaged(trainees: Iterable[Trainee]) -> Iterator[None]:
    """Within, all of them are what is saved."""
    with ExitStack() as stack:
        for trainee in trainees:
            stack.enter_context(trainee.averaged())
        yield


def new_trainee(expert: str, adapter: LoraAdapter, switch: InstalledLora, settings: Optimiser, steps: int = 0) -> Trainee:
    """Set up the optimiser and, where asked, the moving average.

    Args:
        steps: updates of the whole run, for learning rates that fall.

    Raises:
        ValueError: the optimiser is not installed.
    """
    optimiser = optimisers.make(settings, [(settings.lr, adapter.parameters())])
    average = {name: tensor.clone() for name, tensor in adapter.tensors().items()} if settings.ema_decay > 0 else {}
    return Trainee(expert=expert, adapter=adapter, switch=switch, optimiser=optimiser, settings=settings, steps=steps, average=average)

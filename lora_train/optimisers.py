"""Optimisers by name, their learning rate over the updates, and their state as plain tensors, so that a run resumes to the same bytes with any of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

from .method_config import Updates

_TENSOR, _NUMBER = "optimiser/", "optimiser_number/"
_MUON_MOMENTUM = 0.95
# Kinds whose kernels write to tensors without torch's knowledge.
WRITE_UNSEEN = ("adamw8bit",)


def make(settings: Updates, groups: Sequence[tuple[float, Sequence[torch.nn.Parameter]]]) -> torch.optim.Optimizer:
    """The optimiser that the settings name.

    Args:
        groups: highest learning rate and parameters of each group; the rate stays in the optimiser's group as `peak_lr`.

    Raises:
        ValueError: this torch lacks it, or its package is not installed.
    """
    parameters = [{"params": list(group), "lr": rate, "peak_lr": rate} for rate, group in groups]
    kind, common = class_of(settings.kind), {"weight_decay": settings.weight_decay}
    if settings.kind == "adafactor":
        # Its steps are relative to the size of a matrix, and a LoRA's up matrix begins at 0, where it would stay; this floor makes lr absolute.
        return kind(parameters, eps=(None, 1.0), **common)
    if settings.kind == "muon":
        # Muon orthogonalises a matrix's momentum; LoRA has matrices only.
        return kind(parameters, momentum=_MUON_MOMENTUM, **common)
    return kind(parameters, betas=tuple(settings.betas), eps=settings.eps, **common)


def class_of(kind: str) -> type[torch.optim.Optimizer]:
    """The class of an `optimiser.kind`; asked for before a run's work begins as well.

    Raises:
        ValueError: this torch lacks it, or its package is not installed.
    """
    if kind == "adamw8bit":
        try:
            from bitsandbytes.optim import AdamW8bit
        except ImportError as error:
            raise ValueError("optimiser.kind is 'adamw8bit', which needs the package bitsandbytes: pip install it, or use adamw") from error
        return AdamW8bit
    found = getattr(torch.optim, {"adamw": "AdamW", "adafactor": "Adafactor", "muon": "Muon"}[kind], None)
    if found is None:
        raise ValueError(f"optimiser.kind is {kind!r}, which torch {torch.__version__} does not have; install torch 2.9 or newer, or use adamw")
    return found


def learning_rate(settings: Updates, peak: float, step: int, steps: int) -> float:
    """Rate of update `step` (from 1) of `steps`: linear warm-up to `peak`, then constant, or falling to `final_lr` x peak at the last update."""
    if step < settings.warmup:
        return peak * step / settings.warmup
    if settings.schedule == "constant":
        return peak
    done = min(1.0, (step - settings.warmup) / max(1, steps - settings.warmup))
    left = (1 + math.cos(math.pi * done)) / 2 if settings.schedule == "cosine" else 1 - done
    return peak * (settings.final_lr + (1 - settings.final_lr) * left)


def set_rates(optimiser: torch.optim.Optimizer, settings: Updates, step: int, steps: int) -> None:
    """Give every group its rate of update `step`."""
    for group in optimiser.param_groups:
        group["lr"] = learning_rate(settings, group["peak_lr"], step, steps)


def step(optimiser: torch.optim.Optimizer, settings: Updates) -> None:
    """Let the optimiser write. Not every kind says so to torch; `written`, and copies beside streamed blocks, go by torch's count of writes."""
    if settings.kind in WRITE_UNSEEN:
        for group in optimiser.param_groups:
            for parameter in group["params"]:
                torch.autograd.graph.increment_version(parameter)
    optimiser.step()


def written(optimiser: torch.optim.Optimizer, average: Mapping[str, torch.Tensor]) -> dict[int, int]:
    """How often each tensor that an update writes was written to, by id: parameters, the optimiser's state, the moving average."""
    tensors = [parameter for group in optimiser.param_groups for parameter in group["params"]]
    tensors += [value for state in optimiser.state.values() for value in state.values() if isinstance(value, torch.Tensor)]
    return {id(tensor): tensor._version for tensor in (*tensors, *average.values())}


def forget_try(optimiser: torch.optim.Optimizer, before: Mapping[int, int]) -> None:
    """Take back an update that failed before it wrote: gradients, and state that was only begun. `before`: `written` when it began."""
    for parameter, state in list(optimiser.state.items()):
        if any(id(value) not in before for value in state.values() if isinstance(value, torch.Tensor)):
            del optimiser.state[parameter]
    optimiser.zero_grad(set_to_none=True)


def state_tensors(optimiser: torch.optim.Optimizer, parameters: Mapping[str, torch.nn.Parameter]) -> dict[str, torch.Tensor]:
    """Everything the optimiser keeps, by kind and name of the parameter. Numbers become 0-dim tensors."""
    out = {}
    for name, parameter in parameters.items():
        for key, value in optimiser.state.get(parameter, {}).items():
            if isinstance(value, torch.Tensor):
                out[f"{_TENSOR}{key}/{name}"] = value
            elif isinstance(value, int | float):
                out[f"{_NUMBER}{key}/{name}"] = torch.tensor(value)
    return out


def load_state(optimiser: torch.optim.Optimizer, parameters: Mapping[str, torch.nn.Parameter], state: Mapping[str, torch.Tensor]) -> None:
    """Put back what `state_tensors` gave."""
    for name, parameter in parameters.items():
        own = {}
        for kind in (_TENSOR, _NUMBER):
            for full, tensor in state.items():
                if full.startswith(kind) and full.endswith(f"/{name}"):
                    key = full[len(kind) : -len(name) - 1]
                    is_step = key == "step"  # torch keeps it on the CPU
                    own[key] = tensor.item() if kind == _NUMBER else tensor.clone() if is_step else tensor.to(parameter.device).clone()
        if own:
            optimiser.state[parameter] = own

"""Flow matching in plain arithmetic: sigma grids, the Euler step, x0 from velocity, and which expert owns a sigma.

Convention: x_sigma = (1 - sigma) * x0 + sigma * noise, velocity = noise - x0, sigma in [0, 1] from noise (1) to video (0).
Sigmas are Python floats: the border between the experts is decided in double precision, once, from the sigmas themselves.
It does not know models, guidance or LoRAs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeVar

SCHEDULES = ("simple", "linear", "diffusers", "unipc")
EXPERTS = ("high", "low")
_TABLE = 1000  # entries of the host's sigma table, and training timesteps of the published models
# Sigmas that should sit exactly on the border must not flip by a rounding of the last bit.
_BORDER_SLACK = 1e-7

Tensor = TypeVar("Tensor")


def shift_sigma(u: float, shift: float) -> float:
    """Move a uniform position `u` in [0, 1] to its shifted sigma.

    Source: shift * u / (1 + (shift - 1) * u), Esser et al. 2024 (arXiv 2403.03206) eq. 23.
    """
    return shift * u / (1 + (shift - 1) * u)


def shifted_sigmas(steps: int, shift: float, schedule: str = "simple") -> list[float]:
    """The sigmas of a rollout, from 1.0 (`unipc`: just below) to 0.0.

    Args:
        steps: number of Euler steps, >= 1.
        shift: > 0; 1 leaves the grid uniform.
        schedule: `simple` is the host's scheduler of that name (indices into a table of 1000 sigmas), so that training visits the
            sigmas that people sample with; `linear` is a uniform grid, shifted; `diffusers` is FlowMatchEulerDiscreteScheduler, which
            VideoX-Fun trains with: it takes its smallest sigma from the shifted table and shifts again, so its last step starts lower; `unipc` is
            Wan's own FlowUniPC grid, which HY-Video-PRFL trains with: uniform from 0.999 down, shifted, so that it starts a little below 1.

    Returns:
        steps + 1 floats, strictly falling.

    Raises:
        ValueError: steps < 1, shift not positive, or an unknown schedule.

    Source: ComfyUI 0.30.0 comfy/samplers.py simple_scheduler; diffusers scheduling_flow_match_euler_discrete.py set_timesteps.
    """
    if steps < 1:
        raise ValueError(f"steps is {steps}, but a rollout needs at least 1")
    if not (shift > 0 and math.isfinite(shift)):
        raise ValueError(f"shift is {shift}, but it must be a positive number (Wan2.2: 5 to 12)")
    if schedule == "simple":
        # Rounded as the host rounds: index * 1000 / steps falls on the other side of a whole number for some numbers of steps (38, 76, ...).
        stride = _TABLE / steps
        positions = [(_TABLE - int(index * stride)) / _TABLE for index in range(steps)]
    elif schedule == "linear":
        positions = [1 - index / steps for index in range(steps)]
    elif schedule == "diffusers":
        smallest = shift_sigma(1 / _TABLE, shift)
        positions = [1 - (1 - smallest) * index / max(1, steps - 1) for index in range(steps)]
    elif schedule == "unipc":
        positions = [(1 - 1 / _TABLE) * (1 - index / steps) for index in range(steps)]
    else:
        raise ValueError(f"schedule is {schedule!r}, but it must be one of {', '.join(SCHEDULES)}")
    sigmas = [shift_sigma(u, shift) for u in positions] + [0.0]
    if any(after >= before for before, after in zip(sigmas, sigmas[1:], strict=False)):
        raise ValueError(f"{steps} steps at shift {shift} repeat a sigma on the {schedule!r} schedule; use fewer steps")
    return sigmas


def euler_step(latent: Tensor, velocity: Tensor, sigma: float, next_sigma: float) -> Tensor:
    """One Euler step of dx/dsigma = velocity, from `sigma` to `next_sigma`."""
    return latent + (next_sigma - sigma) * velocity


def x0_from_velocity(latent: Tensor, velocity: Tensor, sigma: float) -> Tensor:
    """The clean latent that a velocity at `sigma` points to: x0 = x - sigma * velocity."""
    return latent - sigma * velocity


def expert_of(sigma: float, boundary: float) -> str:
    """`high` for sigma >= boundary, else `low` (Wan2.2's rule, on the timestep divided by 1000)."""
    return "high" if sigma >= boundary - _BORDER_SLACK else "low"


def boundary_index(sigmas: Sequence[float], boundary: float) -> int:
    """Number of steps that the high-noise expert makes, which is the index of the first low-noise step.

    Args:
        sigmas: falling, with the final 0, as `shifted_sigmas` returns them.
    """
    return sum(expert_of(sigma, boundary) == "high" for sigma in sigmas[:-1])


def steps_of_expert(sigmas: Sequence[float], boundary: float, expert: str) -> range:
    """Indices of the steps that `expert` makes."""
    switch = boundary_index(sigmas, boundary)
    return range(switch) if expert == "high" else range(switch, len(sigmas) - 1)

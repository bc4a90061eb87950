"""How a velocity moves a latent to the next sigma: Euler, and UniPC as Wan's own sampler has it.

A solver follows one trajectory: `step` is called for every index in turn. What it keeps of earlier steps is without gradient, so the result carries the
gradient of the present step's velocity and latent only. Coefficients are Python floats (float64).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import torch

from .flow import euler_step, x0_from_velocity

# log(1 - sigma) has no value at sigma 1. Wan's own grid starts below: at 0.9998 with shift 5, at 0.99992 with shift 12.
_SIGMA_MOST = 1 - 1e-7


class Solver(Protocol):
    """Moves one latent along its sigmas."""

    def step(self, index: int, latent: torch.Tensor, velocity: torch.Tensor) -> torch.Tensor:
        """The latent at sigmas[index + 1], from that at sigmas[index] and the velocity there."""


class Euler:
    """x + (next_sigma - sigma) * velocity."""

    def __init__(self, sigmas: Sequence[float]) -> None:
        self._sigmas = sigmas

    def step(self, index: int, latent: torch.Tensor, velocity: torch.Tensor) -> torch.Tensor:
        """See `Solver`."""
        return euler_step(latent, velocity, self._sigmas[index], self._sigmas[index + 1])


class UniPC:
    """UniPC of order 2, form bh2, predicting the clean latent, with corrector, first and last step of order 1.

    Source: Zhao et al. 2023 (arXiv 2302.04867), algorithms 5 to 8; settings of Wan's FlowUniPCMultistepScheduler as Tencent-Hunyuan/HY-Video-PRFL@59ab9d7
    (Apache-2.0) uses it.
    """

    def __init__(self, sigmas: Sequence[float]) -> None:
        self._sigmas = [min(sigma, _SIGMA_MOST) for sigma in sigmas]
        self._clean: list[torch.Tensor] = []  # predictions of x0 at earlier steps, newest last, at most two
        self._first = 0
        self._before: torch.Tensor | None = None  # the (corrected) latent that the newest step left from
        self._order = 1  # of the step that led here

    def step(self, index: int, latent: torch.Tensor, velocity: torch.Tensor) -> torch.Tensor:
        """See `Solver`; calls must follow each other, the first may have any index."""
        clean = x0_from_velocity(latent, velocity, self._sigmas[index])
        if self._clean:
            latent = self._corrected(index, clean)
        else:
            self._first = index
        is_last = index == len(self._sigmas) - 2
        self._order = 1 if is_last or not self._clean else 2
        moved = self._predicted(index, latent, clean)
        self._before = latent.detach() if isinstance(latent, torch.Tensor) else latent
        self._clean = [*self._clean[-1:], clean.detach() if isinstance(clean, torch.Tensor) else clean]
        return moved

    def _lambda(self, index: int) -> float:
        sigma = self._sigmas[index]
        return math.log(1 - sigma) - math.log(sigma) if sigma > 0 else math.inf

    def _line(self, start: int, stop: int) -> tuple[float, float, float]:
        """Factors of the latent and of x0 in the first-order step, and its length in lambda."""
        length = self._lambda(stop) - self._lambda(start)
        return self._sigmas[stop] / self._sigmas[start], -(1 - self._sigmas[stop]) * math.expm1(-length), length

    def _predicted(self, index: int, latent: torch.Tensor, clean: torch.Tensor) -> torch.Tensor:
        of_latent, of_clean, length = self._line(index, index + 1)
        moved = of_latent * latent + of_clean * clean
        if self._order == 2:
            ratio = (self._lambda(index - 1) - self._lambda(index)) / length
            moved = moved + of_clean * 0.5 * (self._clean[-1] - clean) / ratio
        return moved

    def _corrected(self, index: int, clean: torch.Tensor) -> torch.Tensor:
        """The present latent once more, now that x0 at its own sigma is known."""
        start = index - 1
        of_latent, of_clean, length = self._line(start, index)
        anchor = self._clean[-1]
        moved = of_latent * self._before + of_clean * anchor
        if self._order == 1:
            return moved + of_clean * 0.5 * (clean - anchor)
        ratio = (self._lambda(start - 1) - self._lambda(start)) / length
        weights = _order_two(ratio, -length)
        return moved + of_clean * (weights[0] * (self._clean[-2] - anchor) / ratio + weights[1] * (clean - anchor))


def _order_two(ratio: float, h: float) -> tuple[float, float]:
    """Corrector weights: the solution of [[1, 1], [ratio, 1]] w = b of algorithm 7 with B(h) = expm1(h)."""
    b_h = math.expm1(h)
    phi = b_h / h - 1
    first = phi / b_h
    second = 2 * (phi / h - 0.5) / b_h
    w0 = (first - second) / (1 - ratio)
    return w0, first - w0


SOLVERS = {"euler": Euler, "unipc": UniPC}


def gradient_scale(kind: str, sigmas: Sequence[float], index: int, start: int = 0) -> float:
    """|d(next latent) / d(velocity)| of step `index`, all earlier steps held fixed.

    Args:
        start: index of the trajectory's first step.
    """
    ends = []
    for value in (1.0, 0.0):
        solver = SOLVERS[kind](sigmas)
        for step in range(start, index):
            solver.step(step, 0.0, 0.0)
        ends.append(solver.step(index, 0.0, value))
    return abs(ends[0] - ends[1])

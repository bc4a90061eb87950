"""UniPC and Euler on problems whose answer is known, and what feeds a gradient."""

from __future__ import annotations

import math

import pytest
import torch

from reward_lab.lora_train.flow import shifted_sigmas
from reward_lab.lora_train.solvers import SOLVERS, gradient_scale


def test_unipc_is_far_more_exact_than_euler_on_a_gaussian():
    """Data N(0, s^2): velocity and path are known in closed form; order 2 with corrector must beat order 1 by a wide margin.

    Compared before the last step, which both make at order 1 and which leads to the mean of what x0 may be.
    """
    spread, steps = 0.3, 40
    sigmas = shifted_sigmas(steps, 5.0, "unipc")

    def variance(sigma):
        return (1 - sigma) ** 2 * spread**2 + sigma**2

    start = torch.tensor([1.7, -0.4], dtype=torch.float64)
    errors = {}
    for kind in SOLVERS:
        solver, latent = SOLVERS[kind](sigmas), start
        for index in range(steps - 1):
            velocity = latent * (sigmas[index] - (1 - sigmas[index]) * spread**2) / variance(sigmas[index])
            latent = solver.step(index, latent, velocity)
        exact = start * math.sqrt(variance(sigmas[-2]) / variance(sigmas[0]))
        errors[kind] = float(((latent - exact) / exact).abs().max())
    assert errors["unipc"] < errors["euler"] / 5 and errors["unipc"] < 0.02, errors


def test_first_step_of_both_is_the_same():
    sigmas = shifted_sigmas(40, 5.0, "unipc")
    latent, velocity = torch.randn(2, 3, dtype=torch.float64), torch.randn(2, 3, dtype=torch.float64)
    ends = [SOLVERS[kind](sigmas).step(0, latent, velocity) for kind in SOLVERS]
    assert torch.allclose(*ends, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", SOLVERS)
def test_every_schedule_reaches_the_end_without_nan(kind):
    for schedule in ("simple", "linear", "unipc"):
        sigmas = shifted_sigmas(12, 5.0, schedule)
        solver, latent = SOLVERS[kind](sigmas), torch.ones(1, dtype=torch.float64)
        for index in range(12):
            latent = solver.step(index, latent, latent)
        assert latent.isfinite().all()


@pytest.mark.parametrize("kind", SOLVERS)
def test_gradient_scale_is_the_derivative(kind):
    sigmas, index = shifted_sigmas(10, 5.0, "simple"), 6
    solver, latent = SOLVERS[kind](sigmas), torch.zeros(1, dtype=torch.float64)
    for step in range(index):
        latent = solver.step(step, latent, torch.full((1,), 0.3 * step, dtype=torch.float64))
    velocity = torch.ones(1, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(solver.step(index, latent, velocity), velocity)
    assert abs(float(gradient)) == pytest.approx(gradient_scale(kind, sigmas, index), rel=1e-12)


@pytest.mark.parametrize("shift", [3.0, 5.0, 12.0, 15.0])
def test_first_step_of_unipc_is_eulers(shift):
    """Order 1 on a straight path is Euler's step, also on grids that start closer to sigma 1 than Wan's at shift 5."""
    for steps in (8, 40, 50):
        sigmas = shifted_sigmas(steps, shift, "unipc")
        assert gradient_scale("unipc", sigmas, 0) == pytest.approx(sigmas[0] - sigmas[1], rel=1e-6)

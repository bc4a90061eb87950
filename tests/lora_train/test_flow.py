"""Sigma grids against the published tables, and the border between the experts."""

from __future__ import annotations

import pytest

from reward_lab.lora_train.flow import boundary_index, expert_of, shifted_sigmas, steps_of_expert


# Measured on diffusers' FlowMatchEulerDiscreteScheduler: steps, shift, boundary, high-noise steps, last high t, first low t, last t.
@pytest.mark.parametrize(
    ("steps", "shift", "boundary", "high", "last_high", "first_low", "last"),
    [
        (4, 5, 0.9, 2, None, 717.3, 24.4),
        (8, 5, 0.9, 3, 926.4, 870.6, 24.4),
        (20, 5, 0.9, 7, 916.1, 896.3, 24.4),
        (30, 5, 0.9, 11, 905.4, 891.9, 24.4),
        (40, 5, 0.9, 14, 909.71, 899.98, 24.41),
        (50, 5, 0.9, 18, 904.6, 896.7, 24.4),
        (20, 12, 0.875, 13, 878.5, 851.8, 126.0),
        (40, 12, 0.875, 25, 885.5, 874.1, 126.0),
    ],
)
def test_diffusers_grid_and_boundary_counts(steps, shift, boundary, high, last_high, first_low, last):
    sigmas = shifted_sigmas(steps, shift, "diffusers")
    assert boundary_index(sigmas, boundary) == high
    if last_high:
        assert 1000 * sigmas[high - 1] == pytest.approx(last_high, abs=0.06)
    assert 1000 * sigmas[high] == pytest.approx(first_low, abs=0.06)
    assert 1000 * sigmas[-2] == pytest.approx(last, abs=0.06)


@pytest.mark.parametrize("schedule", ["simple", "linear", "diffusers"])
def test_grids_fall_from_one_to_zero(schedule):
    sigmas = shifted_sigmas(12, 5.0, schedule)
    assert len(sigmas) == 13 and sigmas[0] == pytest.approx(1.0) and sigmas[-1] == 0.0
    assert all(after < before for before, after in zip(sigmas, sigmas[1:], strict=False))
    high, low = steps_of_expert(sigmas, 0.875, "high"), steps_of_expert(sigmas, 0.875, "low")
    assert [*high, *low] == list(range(12)) and expert_of(sigmas[low[0]], 0.875) == "low"


def test_a_sigma_on_the_border_is_high_noise_whatever_the_last_bit_says():
    assert expert_of(0.875, 0.875) == expert_of(0.875 - 1e-12, 0.875) == "high"
    assert expert_of(0.8749, 0.875) == "low"


@pytest.mark.parametrize(("arguments", "message"), [((0, 5.0), "at least 1"), ((4, float("nan")), "positive"), ((4, 5.0, "karras"), "one of simple")])
def test_bad_input(arguments, message):
    with pytest.raises(ValueError, match=message):
        shifted_sigmas(*arguments)


@pytest.mark.host
@pytest.mark.parametrize("steps", [8, 12, 20, 38, 40, 76])
def test_simple_grid_equals_the_host(comfyui, steps):
    import comfy.model_sampling
    import comfy.samplers

    sampling = comfy.model_sampling.ModelSamplingDiscreteFlow()
    sampling.set_parameters(shift=5.0)
    assert shifted_sigmas(steps, 5.0) == pytest.approx(comfy.samplers.simple_scheduler(sampling, steps).tolist(), abs=1e-6)

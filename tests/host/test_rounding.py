"""Rounding of merged weights: neighbours, mean, seed, scale."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("comfy.utils", reason="needs ComfyUI on the path")

from reward_lab.host.rounding import FP8, TORCH_DTYPES, Rounder, largest_of  # noqa: E402

pytestmark = pytest.mark.host

NARROW = ("BF16", "F16", *FP8)


class Rounded:
    """One tensor, rounded in three pieces."""

    def __init__(self, values: torch.Tensor, dtype: str, *, is_scaled: bool = False, rounding: str = "nearest", seed: str = "") -> None:
        rounder = Rounder(dtype, largest=largest_of(values) if is_scaled else None, rounding=rounding, seed=seed)
        self.stored = torch.cat([rounder.round(piece) for piece in values.tensor_split(3)])
        self.scale, self.lost = rounder.scale, rounder.lost


def values_of(dtype: str, count: int = 4000) -> torch.Tensor:
    """Numbers of all sizes that the type knows, subnormal ones too, and of both signs."""
    info = torch.finfo(TORCH_DTYPES[dtype])
    low, high = max(info.smallest_normal * info.eps / 4, 1e-37), min(info.max, 1e18)
    generator = torch.Generator().manual_seed(5)
    exponents = torch.rand(count, generator=generator, dtype=torch.float64) * (torch.tensor(high).log2() - torch.tensor(low).log2()) + torch.tensor(low).log2()
    signs = torch.randint(0, 2, (count,), generator=generator) * 2 - 1
    return (2.0**exponents * signs).float().clamp(-info.max, info.max)


def steps_of(values: torch.Tensor, dtype: str) -> torch.Tensor:
    """Distance between the type's numbers around each value."""
    info = torch.finfo(TORCH_DTYPES[dtype])
    return (2.0 ** values.double().abs().clamp(min=info.smallest_normal).log2().floor()) * info.eps


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_each_number_goes_to_a_neighbour(dtype: str, rounding: str) -> None:
    values = values_of(dtype)
    rounded = Rounded(values, dtype, rounding=rounding, seed="a")
    moved = (rounded.stored.double() - values.double()).abs() / steps_of(values, dtype)
    assert rounded.stored.dtype == TORCH_DTYPES[dtype] and torch.isfinite(rounded.stored.float()).all()
    assert float(moved.max()) <= (0.5 if rounding == "nearest" else 1.0) + 1e-6
    if rounding == "stochastic":
        assert float(moved.max()) > 0.9  # some go to the farther one
    assert rounded.lost == pytest.approx(float((rounded.stored.double() - values.double()).square().sum()), rel=1e-4)


@pytest.mark.parametrize("dtype", NARROW)
def test_chance_keeps_the_mean(dtype: str) -> None:
    info = torch.finfo(TORCH_DTYPES[dtype])
    for value in (1.0 + 0.3 * info.eps, -(1.0 + 0.9 * info.eps), info.smallest_normal * info.eps * 2.25 if dtype != "BF16" else 3.0 + 0.1 * info.eps):
        count = 200_000
        rounded = Rounded(torch.full((count,), value), dtype, rounding="stochastic", seed="b").stored.double()
        step = float(steps_of(torch.tensor([value]), dtype))
        # The mean of n draws of up or down has a deviation of at most half a step over the root of n; five of these are never passed.
        assert abs(float(rounded.mean()) - value) < 5 * 0.5 * step / count**0.5, value
        assert len(rounded.unique()) == 2


def test_numbers_of_the_type_stay_and_the_seed_decides() -> None:
    for dtype in NARROW:
        exact = values_of(dtype).to(TORCH_DTYPES[dtype]).float()
        assert torch.equal(Rounded(exact, dtype, rounding="stochastic", seed="c").stored.float(), exact)
    values = torch.randn(5000, generator=torch.Generator().manual_seed(1))
    first, again, other = (Rounded(values, "BF16", rounding="stochastic", seed=seed).stored for seed in ("1 q", "1 q", "1 k"))
    assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.parametrize("dtype", FP8)
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_scales_use_the_whole_range(dtype: str, rounding: str) -> None:
    values = torch.randn(64, 48, generator=torch.Generator().manual_seed(2)) * 1e-3
    rounded = Rounded(values, dtype, is_scaled=True, rounding=rounding, seed="d")
    assert float(rounded.stored.float().abs().max()) == torch.finfo(TORCH_DTYPES[dtype]).max
    error = (rounded.stored.float() * rounded.scale - values).norm() / values.norm()
    # Numbers of the type are 2^-3 (e4m3) or 2^-2 (e5m2) apart: the error of the nearest is at most half of it, by chance at most all of it.
    assert float(error) < torch.finfo(TORCH_DTYPES[dtype]).eps / (2 if rounding == "nearest" else 1)
    zeros = Rounded(torch.zeros(4, 4), dtype, is_scaled=True)
    assert not zeros.stored.float().any() and float(zeros.scale) > 0


def test_too_large_numbers_become_the_largest_and_nan_is_refused() -> None:
    assert float(Rounded(torch.tensor([1e9, -1e9]), "F8_E4M3").stored.float().abs().min()) == 448.0
    assert float(Rounded(torch.tensor([1e9]), "F16", rounding="stochastic", seed="e").stored) == 65504.0
    for value in (float("nan"), float("inf"), -float("inf")):
        with pytest.raises(ValueError, match="NaN or infinity"):
            Rounded(torch.tensor([0.0, value]), "BF16")

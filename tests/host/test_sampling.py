"""Two-expert sampling against the host's own samplers, on tiny Wan models on the CPU."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")
comfy_sd = pytest.importorskip("comfy.sd", reason="needs ComfyUI on the path")

import nodes as host_nodes  # noqa: E402
import torch  # noqa: E402

from reward_lab.host import sampling  # noqa: E402
from reward_lab.nodes.sample import SampleWan22  # noqa: E402

pytestmark = pytest.mark.host


@pytest.fixture(scope="module")
def models(shared_fixtures):
    folder = shared_fixtures / "videoxfun_lora"
    return [comfy_sd.load_diffusion_model(str(folder / f"base_{expert}.safetensors"), model_options={"dtype": torch.float32}) for expert in ("high", "low")]


def conditioning(seed: int) -> list:
    generator = torch.Generator().manual_seed(seed)
    return [[torch.randn(1, 20, 48, generator=generator), {}]]


def run(model_high, model_low, **changes):
    latent = {"samples": torch.zeros(1, 16, 3, 8, 8)}
    settings = {
        "seed": 3,
        "steps": 6,
        "shift": 5.0,
        "guidance_high": 3.0,
        "guidance_low": 3.0,
        "boundary": 0.875,
        "sampler_name": "euler",
        "scheduler": "simple",
    }
    latent = changes.pop("latent", latent)
    return SampleWan22.execute(model_high, model_low, conditioning(1), conditioning(2), latent, **{**settings, **changes}).args


def ksampler(model, sampler_name="euler", **changes):
    latent = {"samples": torch.zeros(1, 16, 3, 8, 8)}
    settings = {"seed": 3, "steps": 6, "cfg": 3.0, "sampler_name": sampler_name, "scheduler": "simple"}
    settings.update(positive=conditioning(1), negative=conditioning(2), latent=latent)
    return host_nodes.common_ksampler(sampling._with_shift(model, 5.0), **{**settings, **changes})[0]["samples"]


def test_one_model_in_both_slots_is_the_host_sampler(models) -> None:
    nameless = models[0].clone()
    nameless.cached_patcher_init = None  # its file name says "high", which the low slot refuses
    samples, report = run(nameless, nameless)
    assert "switch after step 3 of 6 at sigma" in report
    assert torch.allclose(samples["samples"], ksampler(models[0]), atol=2e-5)


def test_two_experts_are_two_advanced_samplers(models) -> None:
    samples, report = run(*models)
    switch = int(report.split("after step ")[1].split()[0])
    high = ksampler(models[0], last_step=switch)
    both = ksampler(models[1], latent={"samples": high}, disable_noise=True, start_step=switch)
    assert torch.allclose(samples["samples"], both, atol=2e-5)
    assert not torch.allclose(samples["samples"], ksampler(models[0]), atol=1e-2)


def test_one_expert_may_get_every_step(models) -> None:
    samples, report = run(*models, boundary=0.0)
    assert "all steps by the high-noise expert" in report
    assert torch.allclose(samples["samples"], ksampler(models[0]), atol=2e-5)
    # beta's schedule starts a little below sigma 1, so that a boundary of 1 leaves the high expert nothing
    samples, report = run(*models, boundary=1.0, scheduler="beta")
    assert "all steps by the low-noise expert" in report or "switch after step 1" in report
    assert torch.isfinite(samples["samples"]).all()


def test_low_expert_alone(models) -> None:
    sigmas = torch.tensor([0.8, 0.4, 0.0])
    assert sampling.switch_step(sigmas, 0.875) == 0


@pytest.mark.parametrize(("steps", "shift", "boundary", "expected"), [(20, 5.0, 0.9, 8), (40, 5.0, 0.9, 15), (50, 5.0, 0.9, 18), (12, 5.0, 0.875, 6)])
def test_switch_is_found_from_the_sigmas(steps: int, shift: float, boundary: float, expected: int) -> None:
    positions = torch.linspace(1.0, 0.0, steps + 1, dtype=torch.float64)
    sigmas = shift * positions / (1 + (shift - 1) * positions)
    found = sampling.switch_step(sigmas, boundary)
    assert found == expected
    assert sigmas[found - 1] >= boundary - 1e-6 and sigmas[found] < boundary


def test_batch_and_every_sampler(models) -> None:
    samples, _ = run(*models, latent={"samples": torch.zeros(2, 16, 1, 4, 4)})
    assert samples["samples"].shape == (2, 16, 1, 4, 4)
    for name in ("euler_ancestral", "uni_pc", "dpmpp_2m", "dpmpp_2m_sde"):
        samples, _ = run(*models, latent={"samples": torch.zeros(1, 16, 1, 4, 4)}, sampler_name=name)
        assert torch.isfinite(samples["samples"]).all(), name


def test_swapped_experts_are_refused(models) -> None:
    with pytest.raises(ValueError, match="swapped"):
        run(models[1], models[0])
    with pytest.raises(ValueError, match="model_low is the high-noise expert"):
        run(models[0], models[0])
    marked = models[1].clone()
    marked.set_attachments("reward_lab_expert", "high")
    with pytest.raises(ValueError, match="model_low is the high-noise expert"):
        run(models[0], marked)


def test_bad_settings() -> None:
    with pytest.raises(ValueError, match="boundary is 1.5"):
        sampling.SampleSettings(seed=0, steps=4, shift=5, guidance_high=1, guidance_low=1, boundary=1.5)
    with pytest.raises(ValueError, match="shift is nan"):
        sampling.SampleSettings(seed=0, steps=4, shift=float("nan"), guidance_high=1, guidance_low=1, boundary=0.9)

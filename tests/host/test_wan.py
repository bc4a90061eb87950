"""Experts through the host: the peers' recorded velocities, gradients with and without checkpointing, and what is refused."""

from __future__ import annotations

import json

import pytest

pytestmark = pytest.mark.host
LORAS = {"hps": "HPS2.1", "mps": "MPS"}


@pytest.fixture(scope="module")
def recorded(comfyui, shared_fixtures):
    from safetensors.torch import load_file

    folder = shared_fixtures / "videoxfun_lora"
    return folder, load_file(folder / "inputs.safetensors"), load_file(folder / "expected.safetensors"), json.loads((folder / "manifest.json").read_text())


@pytest.fixture(scope="module", params=["high", "low"])
def expert(request, recorded):
    import torch

    from reward_lab.host.wan import load_backbone

    return request.param, load_backbone(recorded[0] / f"base_{request.param}.safetensors", dtype=torch.float32, device=torch.device("cpu"))


def _close(found, expected):
    assert float((found.detach() - expected).norm() / expected.norm()) <= 1e-4


@pytest.mark.parametrize("case", ["none", "hps_1.0", "hps_0.55", "mps_1.0", "mps_0.55"])
def test_velocity_equals_videox_fun(recorded, expert, case):
    from safetensors.torch import load_file

    from reward_lab.host.training_mode import training_mode
    from reward_lab.lora_train.lora.keys import from_file_tensors
    from reward_lab.lora_train.lora.linears import install

    folder, inputs, expected, _ = recorded
    name, backbone = expert
    linears = backbone.linears()
    latent, context = inputs[f"{name}.0.latent"], inputs[f"{name}.0.context"]
    sigma = float(inputs[f"{name}.0.timestep"][0]) / 1000
    with training_mode():
        if case == "none":
            _close(backbone.velocity(latent, sigma, context), expected[f"{name}.0.none"])
            return
        kind, strength = case.split("_")
        tensors = load_file(folder / f"Wan2.2-Fun-A14B-InP-{name}-noise-{LORAS[kind]}.safetensors")
        adapter = from_file_tensors(tensors, linears, strength=float(strength))
        assert len(adapter.layers) == 30
        with install(linears, adapter) as switch:
            import torch

            _close(backbone.velocity(latent, sigma, context), expected[f"{name}.0.{case}"])
            with torch.no_grad(), switch.merged():
                _close(backbone.velocity(latent, sigma, context), expected[f"{name}.0.{case}"])


def test_weights_made_in_inference_mode_can_be_trained_through(comfyui, tiny_models):
    import torch

    from reward_lab.host.training_mode import training_mode
    from reward_lab.host.wan import load_backbone

    with torch.inference_mode():
        backbone = load_backbone(tiny_models["high"], dtype=torch.float32, device=torch.device("cpu"))
        with training_mode():
            latent = torch.randn(1, 16, 2, 4, 4, requires_grad=True)
            backbone.velocity(latent, 0.7, torch.randn(1, 16, 32)).sum().backward()
    assert latent.grad.abs().sum() > 0 and not any(parameter.requires_grad for parameter in backbone.model.parameters())


def test_refuses_what_it_cannot_train(comfyui, tiny_models, tmp_path):
    import torch
    from safetensors.torch import load_file, save_file

    from reward_lab.host.wan import load_backbone

    def load(path):
        return load_backbone(path, dtype=torch.float32, device=torch.device("cpu"), role="high-noise expert")

    with pytest.raises(ValueError, match="high-noise expert .* does not exist"):
        load(tmp_path / "none.safetensors")
    quantised = load_file(tiny_models["high"])
    quantised["blocks.0.ffn.0.weight"] = quantised["blocks.0.ffn.0.weight"].to(torch.int8)
    save_file(quantised, tmp_path / "int8.safetensors")
    with pytest.raises(ValueError, match="stores blocks.0.ffn.0.weight as I8, which cannot be trained through"):
        load(tmp_path / "int8.safetensors")

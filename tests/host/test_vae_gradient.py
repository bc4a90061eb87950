"""The decoder with gradient, whose layers run again in backward, against the host's own decode under plain autograd."""

from __future__ import annotations

from pathlib import Path

import pytest

pytestmark = pytest.mark.host
POCKET = Path(__file__).resolve().parents[2] / "pocket" / "weights" / "pocket_wan_2.1_vae.safetensors"
# Latent frames: one (no caches), two (a lone second one), three (a whole chunk), six (a chunk of one at the end).
LENGTHS = [1, 2, 3, 6]


@pytest.fixture(scope="module")
def pocket(comfyui):
    import torch

    from reward_lab.host.vae import load_decoder

    return load_decoder(POCKET, dtype=torch.float32, device=torch.device("cpu"))


@pytest.fixture(scope="module")
def full_width(comfyui):
    """The published architecture with random weights."""
    import comfy.ldm.wan.vae
    import torch

    from reward_lab.host.vae import WanDecoder

    torch.manual_seed(0)
    network = comfy.ldm.wan.vae.WanVAE(dim=96, z_dim=16, dim_mult=[1, 2, 4, 4], num_res_blocks=2, temperal_downsample=[False, True, True])
    for parameter in network.parameters():
        fan = max(1, parameter[0].numel()) if parameter.ndim > 1 else 1
        if fan > 1:
            torch.nn.init.normal_(parameter, std=fan**-0.5)
        else:
            torch.nn.init.constant_(parameter, 0.5)
    return WanDecoder(network, dtype=torch.float32, device=torch.device("cpu"))


def both(decoder, frames, size, seed=0, channels=16):
    """Output and latent gradient, ours and of the host's decode."""
    import torch

    from reward_lab.host import vae22_gradient, vae_gradient

    dtype, ours = decoder.dtype, vae_gradient if channels == 16 else vae22_gradient
    latent = torch.randn(1, channels, frames, *size, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    found = []
    for decode in (lambda z: ours.decode(decoder.network, z), decoder.network.decode):
        leaf = latent.clone().requires_grad_()
        out = decode(leaf)
        weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=dtype)
        (gradient,) = torch.autograd.grad(out, leaf, weight)
        found.append((out.detach(), gradient))
    return found


def ratio(found, wanted):
    return float((found - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("frames", LENGTHS)
@pytest.mark.parametrize("which", ["pocket", "full_width"])
def test_output_and_gradient_equal_the_hosts(request, which, frames):
    decoder = request.getfixturevalue(which)
    (out, gradient), (host_out, host_gradient) = both(decoder, frames, (6, 4) if which == "pocket" else (2, 2))
    assert out.shape[2] == 4 * frames - 3
    assert (out == host_out).all()
    print(which, frames, ratio(gradient, host_gradient))
    assert ratio(gradient, host_gradient) <= 2e-6


def test_gradient_in_double_precision(tiny_models):
    import torch

    from reward_lab.host.vae import load_decoder

    decoder = load_decoder(tiny_models["vae"], dtype=torch.float64, device=torch.device("cpu"))
    (out, gradient), (host_out, host_gradient) = both(decoder, 4, (2, 3))
    assert (out == host_out).all() and ratio(gradient, host_gradient) <= 1e-14


@pytest.mark.parametrize("frames", LENGTHS)
def test_wan22(comfyui, frames):
    """The 5B model's VAE, of small widths with random weights."""
    from types import SimpleNamespace

    import comfy.ldm.wan.vae2_2
    import torch

    torch.manual_seed(0)
    network = comfy.ldm.wan.vae2_2.WanVAE(dim=8, dec_dim=8, z_dim=48, temperal_downsample=[False, True, True])
    for parameter in network.parameters():
        is_gain = parameter.ndim > 1 and parameter[0].numel() == 1
        torch.nn.init.normal_(parameter, 1.0 if is_gain else 0.0, 0.2)
    network.requires_grad_(False)
    decoder = SimpleNamespace(network=network, dtype=torch.float32)
    (out, gradient), (host_out, host_gradient) = both(decoder, frames, (2, 3), channels=48)
    assert out.shape == (1, 3, 4 * frames - 3, 32, 48)
    assert (out == host_out).all() and host_gradient.norm() > 0
    print("wan2.2", frames, ratio(gradient, host_gradient))
    assert ratio(gradient, host_gradient) <= 2e-6


def saved_bytes(decode, latent):
    """Bytes of tensors that a graph holds, each storage once."""
    import torch

    storages = {}

    def pack(tensor):
        storages[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = decode(latent.requires_grad_())
    return sum(tensor.untyped_storage().nbytes() for tensor in storages.values() if not isinstance(tensor, torch.nn.Parameter)), out


@pytest.mark.parametrize(("frames", "most"), [(1, 0.45), (6, 0.1)])
def test_a_graph_holds_less(pocket, frames, most):
    import torch

    from reward_lab.host import vae_gradient

    latent = torch.randn(1, 16, frames, 8, 8)
    ours, _ = saved_bytes(lambda z: vae_gradient.decode(pocket.network, z), latent.clone())
    plain, _ = saved_bytes(pocket.network.decode, latent.clone())
    print(frames, ours, plain, ours / plain)
    assert ours <= most * plain

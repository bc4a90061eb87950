"""The VAE as a differentiable decoder."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.host


@pytest.fixture(scope="module")
def decoder(tiny_models):
    import torch

    from reward_lab.host.vae import load_decoder

    return load_decoder(tiny_models["vae"], dtype=torch.float64, device=torch.device("cpu"))


@pytest.fixture
def latent():
    import torch

    return torch.randn(2, 16, 3, 2, 2, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("selection", "frames"), [(range(1), slice(0, 1)), (range(2), slice(0, 5)), (range(1, 2), slice(1, 5)), (range(2, 3), slice(5, 9))])
def test_any_selection_equals_those_frames_of_the_whole(decoder, latent, selection, frames):
    import torch

    whole = decoder.decode(latent)
    assert whole.shape == (2, 9, 3, 16, 16) and whole.min() >= 0 and whole.max() <= 1
    torch.testing.assert_close(decoder.decode(latent, selection), whole[:, frames], atol=1e-6, rtol=1e-5)


def test_whole_video_equals_the_hosts_own_decode(tiny_models, latent):
    import comfy.latent_formats
    import comfy.sd
    import comfy.utils
    import torch

    from reward_lab.host.vae import load_decoder

    vae = comfy.sd.VAE(sd=comfy.utils.load_torch_file(tiny_models["vae"]), dtype=torch.float32)
    theirs = vae.decode(comfy.latent_formats.Wan21().process_out(latent))
    ours = load_decoder(tiny_models["vae"], dtype=torch.float32, device=torch.device("cpu")).decode(latent)
    torch.testing.assert_close(ours.movedim(2, -1), theirs, atol=1e-5, rtol=1e-4)


def test_a_video_in_pieces_is_the_same_video(decoder, tiny_models, latent):
    import comfy.latent_formats
    import comfy.sd
    import comfy.utils
    import torch

    from reward_lab.host.vae import load_decoder

    whole, pieces = decoder.decode(latent), list(decoder.stream(latent))
    assert torch.equal(torch.cat(pieces, dim=1), whole) and max(piece.shape[1] for piece in pieces) <= 2
    vae = comfy.sd.VAE(sd=comfy.utils.load_torch_file(tiny_models["vae"]), dtype=torch.float32)
    ours = load_decoder(tiny_models["vae"], dtype=torch.float32, device=torch.device("cpu"))
    for frames in (1, 5, 9):
        video = torch.rand(1, frames, 3, 16, 24, generator=torch.Generator().manual_seed(frames))
        theirs = comfy.latent_formats.Wan21().process_in(vae.encode(video[0].movedim(1, -1)))
        made = ours.encode(video)
        torch.testing.assert_close(made, theirs.to(made), atol=1e-5, rtol=1e-4)
        cuts = [video[:, :1], *video[:, 1:].split(2, dim=1)] if frames > 1 else [video]
        assert torch.equal(ours.encode_pieces(iter(cuts)), made)


@pytest.mark.parametrize("selection", [range(1), range(1, 3)])
def test_gradient_equals_finite_differences(decoder, latent, selection):
    """Relative 1e-3: the host's normalisation of latents and the result are fp32 around an fp64 network."""
    import torch

    direction = torch.randn(latent.shape, generator=torch.Generator().manual_seed(1))
    weight = torch.randn(decoder.decode(latent, selection).shape, generator=torch.Generator().manual_seed(2))

    def value(x):
        return (decoder.decode(x, selection).double() * weight).sum()

    leaf = latent.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(value(leaf), leaf)
    step = 1e-3
    difference = (value(latent + step * direction) - value(latent - step * direction)) / (2 * step)
    assert float((gradient * direction).sum()) == pytest.approx(float(difference), rel=1e-3)
    assert gradient[:, :, selection.stop :].abs().sum() == 0


def test_a_small_graph_is_kept_and_gives_the_same_gradient(decoder, latent, monkeypatch):
    """As a run on a CPU has it (`host/engine.py`): no layer runs again where the graph is small; above the limit they do."""
    import torch

    from reward_lab.host import vae_gradient

    walks = []
    again = vae_gradient.decode
    monkeypatch.setattr(vae_gradient, "decode", lambda *args: walks.append(args) or again(*args))
    found = []
    for limit in (10**12, 1000):
        monkeypatch.setattr(decoder, "graph_limit_bytes", limit)
        leaf = latent.clone().requires_grad_()
        frames = decoder.decode(leaf, range(1, 3))
        found.append((frames.detach(), *torch.autograd.grad(frames.square().sum(), leaf)))
    assert len(walks) == 1
    assert torch.equal(found[0][0], found[1][0])
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("selection", [range(0), range(2, 4), range(0, 3, 2)])
def test_bad_selection(decoder, latent, selection):
    with pytest.raises(ValueError, match="ask for consecutive ones from 0 to 2"):
        decoder.decode(latent, selection)


def test_another_file_is_refused(tiny_models):
    import torch

    from reward_lab.host.vae import load_decoder

    with pytest.raises(ValueError, match=r"wan_2.1_vae|does not exist"):
        load_decoder(tiny_models["high"] + ".missing.safetensors", dtype=torch.float32, device=torch.device("cpu"))

"""Attention behind one function: which kernel is chosen on which card, and each kernel that runs here against softmax written down."""

from __future__ import annotations

import importlib.util
import logging

import pytest
import torch

from reward_lab.lora_train.kernels import attention

CUDA, CPU = torch.device("cuda"), torch.device("cpu")
# fp32 and fp64: sums in another order. bf16: probabilities and sums are rounded to 2^-9 at other places.
TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-13, torch.bfloat16: 1.5e-2}


@pytest.fixture
def card(monkeypatch):
    """`card(capability, packages)`: as if that card were there, with those packages; records what torch's flash operators are switched to."""
    switched = []

    def be(capability, packages=()):
        find = importlib.util.find_spec
        monkeypatch.setattr(torch.version, "hip", None)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        fakes = {"flash_attn_interface", "sageattention"}
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: (name in packages or None) if name in fakes else find(name))
        monkeypatch.setattr(torch.nn.attention, "activate_flash_attention_impl", lambda name: switched.append(name))
        monkeypatch.setattr(torch.nn.attention, "restore_flash_attention_impl", lambda: switched.append(None))
        monkeypatch.setattr(torch.nn.attention, "current_flash_attention_impl", lambda: switched[-1] if switched else None)
        return switched

    return be


@pytest.mark.parametrize(
    ("capability", "packages", "wanted"),
    [
        ((9, 0), ("flash_attn_interface",), ["fa3", "cudnn", "flash", "plain"]),
        ((9, 0), (), ["cudnn", "flash", "plain"]),
        ((10, 0), ("flash_attn_interface",), ["cudnn", "flash", "plain"]),  # FlashAttention-3 is for Hopper only
        ((8, 9), ("flash_attn_interface",), ["flash", "cudnn", "plain"]),
    ],
)
def test_the_card_decides(card, caplog, capability, packages, wanted):
    switched = card(capability, packages)
    assert attention._able(CUDA, torch.bfloat16, 128) == wanted
    with caplog.at_level(logging.INFO, logger="reward_lab.kernels"):
        assert attention.choose_backend("auto", CUDA, torch.bfloat16, 128) == wanted[0]
    assert f"attention: {wanted[0]}" in caplog.text and switched == (["FA3"] if wanted[0] == "fa3" else [])
    for name in wanted:
        assert attention.choose_backend(name, CUDA, torch.bfloat16, 128) == name
    # Whoever asks for another kernel later gets that one, and not FlashAttention-3 under its name.
    assert not switched or switched[-1] is None


def test_what_cannot_run_is_refused_and_nothing_falls_back(card):
    card((8, 9))
    for requested, dtype, width in (("fa3", torch.bfloat16, 128), ("cudnn", torch.float32, 128), ("flash", torch.bfloat16, 20), ("cpu", torch.bfloat16, 128)):
        with pytest.raises(ValueError, match=f"engine.attention is '{requested}', but cuda in .* can do: .*use 'auto'"):
            attention.choose_backend(requested, CUDA, dtype, width)
    with pytest.raises(ValueError, match="must be one of auto, fa3"):
        attention.choose_backend("xformers", CPU, torch.float32, 16)


def test_sage_only_where_it_is_asked_for_and_can_run(card, caplog):
    card((8, 9), ("sageattention",))
    assert attention.choose_rollout_backend("same", "flash", CUDA, torch.bfloat16, 128) == "flash"
    with caplog.at_level(logging.INFO, logger="reward_lab.kernels"):
        assert attention.choose_rollout_backend("sage", "flash", CUDA, torch.bfloat16, 128) == "sage"
    assert "SageAttention in 8 bits, as asked" in caplog.text
    for device, dtype, width, words in (
        (CPU, torch.bfloat16, 128, "an NVIDIA card"), (CUDA, torch.float32, 128, "bf16"), (CUDA, torch.bfloat16, 256, "heads of at most 128"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"'sage', which needs {words}"):
            attention.choose_rollout_backend("sage", "flash", device, dtype, width)
    card((8, 9))
    with pytest.raises(ValueError, match="the package sageattention"):
        attention.choose_rollout_backend("sage", "flash", CUDA, torch.bfloat16, 128)


def _backends():
    cards = [("cudnn", torch.bfloat16, "cuda"), ("flash", torch.bfloat16, "cuda"), ("plain", torch.float32, "cuda")]
    here = [(name, dtype, "cpu") for name in ("cpu", "plain") for dtype in TOLERANCE]
    return [*here, *(pytest.param(*case, marks=pytest.mark.gpu) for case in cards)]


@pytest.mark.parametrize(("backend", "dtype", "device"), _backends())
@pytest.mark.parametrize("size", [(1, 2, 5, 7, 8), (3, 4, 33, 17, 16), (2, 1, 64, 64, 64)])
def test_output_and_all_gradients(backend, dtype, device, size):
    B, N, L, S, K = size
    generator = torch.Generator().manual_seed(0)
    q, k, v, grad = (torch.randn(shape, generator=generator).to(device, dtype) for shape in ((B, N, L, K), (B, N, S, K), (B, N, S, K), (B, N, L, K)))
    leaves = [value.double().requires_grad_() for value in (q, k, v)]
    wanted = torch.softmax(leaves[0] @ leaves[1].transpose(-1, -2) * K**-0.5, -1) @ leaves[2]
    wanted_grads = torch.autograd.grad(wanted, leaves, grad.double())
    for groups in (1, 2, 3):
        own = [value.clone().requires_grad_() for value in (q, k, v)]
        out = attention.Attention.apply(*own, backend, groups)
        found = (out, *torch.autograd.grad(out, own, grad))
        for name, one, other in zip(("out", "dq", "dk", "dv"), found, (wanted, *wanted_grads), strict=True):
            ratio = float((one.detach().double() - other.detach()).norm() / other.detach().norm())
            assert ratio <= TOLERANCE[dtype], (name, groups, ratio)

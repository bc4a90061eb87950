"""Every form of the LoRA linear against the plain reference: output, all gradients, odd sizes; merging and its rounding."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import pytest
import torch

from reward_lab.lora_train.kernels import lora_linear as package
from reward_lab.lora_train.kernels.lora_linear import kernels, merge, reference, rows
from reward_lab.lora_train.kernels.lora_linear.rounding import hash32, round_stochastic

SIZES = [(33, 24, 40, 5), (64, 64, 32, 16), (7, 96, 48, 32), (17, 8, 8, 1)]
# fp32: sums of up to 96 products in another order. bf16: one rounding of the output (2^-9 relative, RMS) where the reference rounds twice or thrice.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float64: 1e-14}


def ratio(found, wanted):
    return float((found.double() - wanted.double()).norm() / wanted.double().norm().clamp_min(1e-30))


def operands(size, dtype, seed=0):
    M, I, O, R = size  # noqa: E741
    generator = torch.Generator().manual_seed(seed)
    x, weight, bias, down, up, grad = (
        torch.randn(shape, generator=generator) for shape in ((2, M, I), (O, I), (O,), (R, I), (O, R), (2, M, O))
    )
    masters = torch.float64 if dtype == torch.float64 else torch.float32
    return x.to(dtype), weight.to(dtype), bias.to(dtype), down.to(masters) * I**-0.5, up.to(masters) * 0.3, grad.to(dtype)


def gradients(form, x, weight, bias, down, up, grad):
    leaves = [value.clone().requires_grad_() for value in (x, down, up)]
    y = form(leaves[0], weight, bias, leaves[1], leaves[2], 0.7)
    return (y.detach(), *torch.autograd.grad(y, leaves, grad))


def in_buffers(x, weight, bias, down, up, factor):
    """The fused form as the engine calls it: weight in its buffer, rows of x with room."""
    rank = down.shape[0]
    buffer = rows.weight_buffer(*weight.shape, rank, dtype=weight.dtype, device=weight.device)
    view = buffer[:, : weight.shape[1]]
    view.copy_(weight)

    class WithRoom(torch.autograd.Function):
        @staticmethod
        def forward(ctx, value):
            out = rows.empty_with_room(value.shape, rank, dtype=value.dtype, device=value.device)
            return out.copy_(value)

        @staticmethod
        def backward(ctx, grad):
            return grad

    return package.lora_linear(WithRoom.apply(x), view, bias, down, up, factor, buffer=buffer, has_room=True)


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("size", SIZES)
def test_exact_forms_equal_the_reference(size, dtype, has_bias):
    x, weight, bias, down, up, grad = operands(size, dtype)
    bias = bias if has_bias else None
    wanted = gradients(reference.lora_linear, *(value.double() if value is not None else None for value in (x, weight, bias, down, up, grad)))
    for name, form in {"plain": package.lora_linear, "one product": in_buffers}.items():
        found = gradients(form, x, weight, bias, down, up, grad)
        for part, one, other in zip(("y", "dx", "dA", "dB"), found, wanted, strict=True):
            assert ratio(one, other) <= TOLERANCE[dtype], (name, part)
        assert found[2].dtype == down.dtype and found[3].dtype == up.dtype


def test_one_product_rounds_less_than_the_plain_sum():
    # The base's output is rounded before the LoRA is added in the plain form; beside each other they are added in fp32.
    x, weight, bias, down, up, grad = operands((256, 64, 64, 8), torch.bfloat16)
    wanted = reference.lora_linear(*(value.double() for value in (x, weight, bias, down, up)), 0.7)
    plain = reference.lora_linear(x, weight, bias, down, up, 0.7)
    fused = in_buffers(x, weight, bias, down, up, 0.7)
    assert ratio(fused, wanted) < ratio(plain, wanted)


def test_q_k_and_v_share_one_x():
    x, weight, bias, down, up, grad = operands((40, 32, 32, 4), torch.float32)
    saved = []
    leaf = x.clone().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda value: saved.append(value.data_ptr()) or value, lambda value: value):
        total = sum(package.lora_linear(leaf, weight * scale, bias, down * scale, up, 0.5, has_room=True) for scale in (1.0, 2.0, 3.0))
    assert saved.count(leaf.data_ptr()) == 3 and total.requires_grad
    # Besides x: S and the two masters of each, and nothing of the size [M, O].
    assert len(saved) == 12


def test_the_room_is_only_used_where_it_is():
    made = rows.empty_with_room((2, 3, 4), 2, dtype=torch.float32, device=torch.device("cpu"))
    assert rows.extended(made, 2).shape == (6, 6) and rows.extended(made, 3) is None
    assert rows.extended(torch.zeros(6, 4), 2) is None and rows.extended(torch.zeros(2, 3, 6)[:, 1:, :4], 2) is None


def test_what_lies_behind_a_gradients_only_row_stays():
    """One row at the head of a larger tensor looks like one with room; the rest is somebody's."""
    x, weight, bias, down, up, grad = operands((1, 12, 8, 2), torch.float32)
    x, whole = x[:1], torch.cat([grad[0], torch.full((3, 8), 7.0)])
    y = in_buffers(x.requires_grad_(), weight, bias, down.requires_grad_(), up, 0.7)
    found = torch.autograd.grad(y, [x, down], whole[None, :1])
    wanted = torch.autograd.grad(package.lora_linear(x, weight, bias, down, up, 0.7), [x, down], grad[:1])
    assert (whole[1:] == 7).all() and all(ratio(one, other) <= TOLERANCE[torch.float32] for one, other in zip(found, wanted, strict=True))


def test_no_gradient_is_made_for_what_needs_none():
    x, weight, bias, down, up, grad = operands((9, 8, 8, 2), torch.float32)
    down.requires_grad_()
    y = package.lora_linear(x, weight, bias, down, up, 1.0)
    (found,) = torch.autograd.grad(y, [down], grad)
    assert ratio(found, gradients(reference.lora_linear, x, weight, bias, down.detach(), up, grad)[2] / 0.7) < 1e-6


def test_gradient_in_float64_against_finite_differences():
    x, weight, bias, down, up, _ = operands((3, 5, 4, 2), torch.float64)
    leaves = [value.requires_grad_() for value in (x, down, up)]
    assert torch.autograd.gradcheck(lambda a, b, c: package.lora_linear(a, weight, bias, b, c, 0.3), leaves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merging(dtype):
    _, weight, _, down, up, _ = operands((1, 70, 50, 6), dtype)
    wanted = reference.merged_weight(weight, down, up, 0.7)
    target = rows.weight_buffer(50, 70, 6, dtype=dtype, device=weight.device)[:, :70]
    found = merge.merge_into(target, weight, down, up, 0.7, seed=3)
    # A rounding up or down moves by less than one step of bf16, 2^-7 of the value.
    assert ((found.float() - wanted).abs() <= (0 if dtype == torch.float32 else 2**-7) * wanted.abs() + 1e-6).all()
    assert torch.equal(found, merge.merge_into(target.clone(), weight, down, up, 0.7, seed=3))
    in_place = weight.clone()
    assert torch.equal(merge.merge_into(in_place, in_place, down, up, 0.7, seed=3), found)


def test_rounding_keeps_the_mean_where_the_nearest_drops_everything():
    values = torch.full((512, 512), 1.0 + 2**-12)
    rounded = round_stochastic(values, seed=1)
    assert (values.to(torch.bfloat16) == 1).all()
    # 2^18 draws with probability 2^-5: standard error of the mean 2^-7 * sqrt(p (1 - p) / n) = 2.6e-6, of the step 2.4e-4; five of them.
    assert abs(float(rounded.double().mean()) - (1 + 2**-12)) < 1.4e-5
    assert not torch.equal(rounded, round_stochastic(values, seed=2)) and torch.equal(rounded, round_stochastic(values, seed=1))
    assert torch.equal(rounded[3:], round_stochastic(values[3:], seed=1, first=3 * 512))
    exact = torch.tensor([0.0, -0.0, 1.0, -2.5, 3e38])
    assert torch.equal(round_stochastic(exact.bfloat16().float(), seed=5), exact.bfloat16())


def test_the_hash_is_uniform_and_known():
    drawn = hash32(torch.arange(1 << 16, dtype=torch.int32), 7)
    # Reference values by plain Python integers.
    for index in (0, 1, 65535):
        x = index ^ 7
        for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
            x = ((x ^ (x >> shift)) * factor) & 0xFFFFFFFF
        x ^= x >> 16
        assert int(drawn[index]) & 0xFFFFFFFF == x
    low = (drawn & 0xFFFF).double() / 65536
    assert abs(float(low.mean()) - 0.5) < 5 * (1 / 12) ** 0.5 / 256


@pytest.mark.parametrize("kind", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_fp8(kind):
    weight = torch.randn(20, 16).to(kind)
    stored = package.fp8_weight(weight, torch.tensor([0.25]))
    assert torch.equal(stored.dequantised(torch.float32), weight.float() * 0.25)
    assert torch.equal(stored.dequantised(torch.bfloat16), (weight.float() * 0.25).bfloat16())
    down, up = torch.randn(4, 16), torch.randn(20, 4)
    merged = merge.merge_into(torch.empty(20, 16), stored, down, up, 0.5, seed=0)
    torch.testing.assert_close(merged, weight.float() * 0.25 + 0.5 * up @ down)


def test_other_quantisations_are_refused():
    weight = torch.zeros(4, 32).to(torch.float8_e4m3fn)
    with pytest.raises(ValueError, match="4 scales"):
        package.fp8_weight(weight, torch.ones(4, 1))
    with pytest.raises(ValueError, match="not fp8"):
        package.fp8_weight(torch.zeros(2, 2))
    with pytest.raises(ValueError, match="GGUF type 'iq4_xs'"):
        package.gguf_weight(torch.zeros(1, dtype=torch.uint8), "iq4_xs", (1, 32))
    with pytest.raises(ValueError, match="has 68 bytes"):
        package.gguf_weight(torch.zeros(5, dtype=torch.uint8), "q8_0", (2, 32))


RECORDED = json.loads(Path(__file__).with_name("gguf_blocks.json").read_text())


@pytest.mark.parametrize("kind", RECORDED)
def test_gguf_blocks_are_unpacked_as_the_gguf_package_does(kind):
    raw, numbers = (base64.b64decode(RECORDED[kind][name]) for name in ("raw", "numbers"))
    wanted = torch.frombuffer(bytearray(numbers), dtype=torch.float32)
    weight = package.gguf_weight(torch.frombuffer(bytearray(raw), dtype=torch.uint8), kind, (2, wanted.numel() // 2))
    assert torch.equal(weight.dequantised(torch.float32), wanted.view(2, -1)) and weight.nbytes == len(raw)
    # Written row by row into a matrix with a row stride, as a slot's buffer is.
    target = torch.zeros(4, wanted.numel())[:2, : wanted.numel() // 2]
    assert torch.equal(weight.dequantise_into(target), wanted.view(2, -1))


def test_choice_of_kernels(monkeypatch):
    assert package.choose_kernels("auto", torch.device("cpu")) == "torch"
    with pytest.raises(ValueError, match="must be one of"):
        package.choose_kernels("cutlass", torch.device("cpu"))
    monkeypatch.setattr(kernels, "has_triton", lambda: False)
    with pytest.raises(ValueError, match="not installed or no GPU"):
        package.choose_kernels("triton", torch.device("cpu"))

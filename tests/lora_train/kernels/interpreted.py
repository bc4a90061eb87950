"""Run by test_triton.py with TRITON_INTERPRET=1: compares one kernel with its reference and prints `equal`."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import torch


def ratio(found, wanted):
    return float((found.float() - wanted.float()).norm() / wanted.float().norm())


def one_pass(package):
    from reward_lab.lora_train.kernels.lora_linear import reference, triton_kernels

    # fp32: other order of sums. bf16: dS is rounded once to bf16 (2^-9 RMS at most); dB stays fp32.
    for dtype, size, limit in ((torch.float32, (150, 70, 5), 1e-6), (torch.bfloat16, (130, 96, 16), 2**-8), (torch.bfloat16, (65, 33, 20), 2**-8)):
        M, O, R = size  # noqa: E741
        torch.manual_seed(0)
        grad, hidden, up = torch.randn(M, O + 3).to(dtype)[:, :O], torch.randn(M, R).to(dtype), torch.randn(O, R).to(dtype)
        found, wanted = triton_kernels.hidden_and_up_gradient(grad, hidden, up), reference.hidden_and_up_gradient(grad, hidden, up)
        assert ratio(found[0], wanted[0]) <= limit, (size, ratio(found[0], wanted[0]))
        assert ratio(found[1], wanted[1]) <= 1e-6, (size, ratio(found[1], wanted[1]))
        triton_kernels._PROGRAMS = 2  # several row blocks for each program
        assert ratio(triton_kernels.hidden_and_up_gradient(grad, hidden, up)[1], wanted[1]) <= 1e-6
        triton_kernels._PROGRAMS = 264


def _equal_bits(found, wanted):
    # The same random bits; the products may differ in the last fp32 bit, which changes a rounding once in 2^16 / few.
    differing = (found != wanted).float().mean()
    assert differing <= 2e-3, float(differing)
    torch.testing.assert_close(found.float(), wanted.float(), rtol=2**-7, atol=1e-6)


def merge(package):
    from reward_lab.lora_train.kernels.lora_linear import merge as plain
    from reward_lab.lora_train.kernels.lora_linear import triton_kernels

    torch.manual_seed(0)
    for outs, ins, rank in ((70, 100, 5), (64, 64, 33)):
        base, down, up = torch.randn(outs, ins).bfloat16(), torch.randn(rank, ins) * 0.05, torch.randn(outs, rank) * 0.05
        for seed in (3, 0xF0000001):
            wanted = plain.merge_into(torch.empty_like(base), base, down, up, 0.5, seed)
            buffer = torch.zeros(outs + rank, ins + rank, dtype=torch.bfloat16)
            found = triton_kernels.merge_into(buffer[:outs, :ins], base, down, up, 0.5, seed)
            _equal_bits(found, wanted)
            assert not buffer[outs:].any() and not buffer[:, ins:].any()


def fp8(package):
    from reward_lab.lora_train.kernels.lora_linear import merge as plain
    from reward_lab.lora_train.kernels.lora_linear import triton_kernels

    # Every bit pattern but the two NaNs.
    every = torch.arange(256, dtype=torch.uint8)
    every[(every & 127) == 127] = 0
    every = every.view(torch.float8_e4m3fn).view(16, 16)
    base = package.fp8_weight(every, 0.0625)
    down, up = torch.zeros(2, 16), torch.zeros(16, 2)
    _equal_bits(triton_kernels.merge_into(torch.empty(16, 16, dtype=torch.bfloat16), base, down, up, 1.0, 5), base.dequantised(torch.bfloat16))
    down, up = torch.randn(2, 16), torch.randn(16, 2)
    wanted = plain.merge_into(torch.empty(16, 16, dtype=torch.bfloat16), base, down, up, 0.5, 5)
    _equal_bits(triton_kernels.merge_into(torch.empty(16, 16, dtype=torch.bfloat16), base, down, up, 0.5, 5), wanted)


def function(package):
    from reward_lab.lora_train.kernels.lora_linear import reference

    assert package.choose_kernels("triton", torch.device("cpu")) == "triton"
    torch.manual_seed(0)
    x, weight, bias, down, up, grad = (torch.randn(shape) for shape in ((2, 40, 24), (36, 24), (36,), (4, 24), (36, 4), (2, 40, 36)))
    results = []
    for form in (package.lora_linear, reference.lora_linear):
        leaves = [value.clone().requires_grad_() for value in (x, down, up)]
        y = form(leaves[0], weight, bias, leaves[1], leaves[2], 0.7)
        results.append((y, *torch.autograd.grad(y, leaves, grad)))
    assert all(ratio(one, other) <= 2e-6 for one, other in zip(*results, strict=True))


if __name__ == "__main__":
    spec = importlib.util.spec_from_file_location("reward_lab_alias", Path(sys.argv[1]) / "labtools" / "alias.py")
    alias = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(alias)
    alias.register(Path(sys.argv[1]))

    from reward_lab.lora_train.kernels import lora_linear

    {"one_pass": one_pass, "merge": merge, "fp8": fp8, "function": function}[sys.argv[2]](lora_linear)
    print("equal")

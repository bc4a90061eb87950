"""Run by test_triton.py, on the CPU with TRITON_INTERPRET=1: compares one kernel with its reference and prints `equal`."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import torch


def _choose_triton(package):
    device = torch.get_default_device()
    # The package's own check draws on the CPU, wherever tensors are made by default.
    with torch.device("cpu"):
        assert package.choose_kernels("triton", device) == "triton"


def ratio(found, wanted):
    return float((found.float() - wanted.float()).norm() / wanted.float().norm())


def one_pass(package):
    from reward_lab.lora_train.kernels.lora_linear import reference, triton_kernels

    # fp32: other order of sums. bf16: dS is rounded once to bf16 (2^-9 RMS at most); dB stays fp32.
    for dtype, size, limit in ((torch.float32, (150, 70, 5), 1e-6), (torch.bfloat16, (130, 96, 16), 2**-8), (torch.bfloat16, (65, 33, 20), 2**-8)):
        M, N, R = size
        torch.manual_seed(0)
        grad, hidden, up = torch.randn(M, N + 3).to(dtype)[:, :N], torch.randn(M, R).to(dtype), torch.randn(N, R).to(dtype)
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


def _packed(package):
    """Bases by name: every finite bit pattern of both fp8 types, and Q8_0 blocks in rows of an odd number of them."""
    torch.manual_seed(0)
    found = {}
    for kind, largest in ((torch.float8_e4m3fn, 126), (torch.float8_e5m2, 123)):
        every = torch.arange(256, dtype=torch.uint8)
        every[(every & 127) > largest] = 0
        found[str(kind)] = package.fp8_weight(every.view(kind).view(16, 16), 0.0625)
    scales = torch.randn(70 * 3, 1).half().view(torch.uint8)
    data = torch.cat([scales, torch.randint(0, 256, (70 * 3, 32), dtype=torch.uint8)], dim=1)
    found["q8_0"] = package.gguf_weight(data, "q8_0", (70, 96))
    return found


def unpack(package):
    from reward_lab.lora_train.kernels.lora_linear import merge as plain
    from reward_lab.lora_train.kernels.lora_linear import triton_kernels

    for name, base in _packed(package).items():
        assert triton_kernels.can_read(base)
        outs, ins = base.shape
        buffer = torch.zeros(outs + 3, ins + 3, dtype=torch.bfloat16)
        found = triton_kernels.dequantise_into(buffer[:outs, :ins], base)
        assert torch.equal(found, base.dequantised(torch.bfloat16)), name
        assert not buffer[outs:].any() and not buffer[:, ins:].any()
        for rank in (1, 7, 33):
            down, up = torch.randn(rank, ins), torch.randn(outs, rank)
            wanted = plain.merge_into(torch.empty(outs, ins, dtype=torch.bfloat16), base, down, up, 0.5, 5)
            _equal_bits(triton_kernels.merge_into(torch.empty(outs, ins, dtype=torch.bfloat16), base, down, up, 0.5, 5), wanted)
    assert not triton_kernels.can_read(package.gguf_weight(torch.zeros(144, dtype=torch.uint8), "q4_k", (1, 256)))


def rows(package):
    """Every row-by-row kernel against its function in fp64: output and every gradient, odd sizes, rows with room."""
    from reward_lab.lora_train.kernels import rowwise as module

    _choose_triton(package)
    # bf16: one rounding to the nearest (2^-8); the interpreter's conversion cuts off (2^-7).
    rounding = 2**-7 if torch.get_default_device().type == "cpu" else 2**-8
    for dtype, limit in ((torch.float32, 2e-6), (torch.bfloat16, rounding)):
        # Rounding does not depend on sizes: one is enough for bf16.
        for batch, length, heads, width in ((3, 7, 2, 20), (1, 66, 4, 32), (2, 1, 3, 6))[: 3 if dtype == torch.float32 else 1]:
            torch.manual_seed(1)
            rms = torch.nn.RMSNorm(width, eps=1e-6, dtype=dtype).requires_grad_(False)
            rms.weight.copy_(torch.randn(width))
            layer = torch.nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
            turns = torch.randn(1, length, 1, width // heads // 2, 2, 2)
            x, y = torch.randn(batch, length, width) * 3, torch.randn(batch, length, width)
            shift, scale, grad = torch.randn(batch, 1, width), torch.randn(batch, 1, width), torch.randn(batch, length, width)
            cases = {
                "modulated": (module.Modulated(layer), [x], [shift, scale]),
                "gated": (module.Gated(), [x, y], [scale]),
                "rotated": (module.Rotated(rms, heads), [x, turns], []),
            }
            for name, (function, streams, shared) in cases.items():
                _one_rowwise(module, name, function, streams, shared, grad, dtype, limit)


def _one_rowwise(module, name, function, streams, shared, grad, dtype, limit):
    import copy

    def leaves(to):
        made = [value.to(dtype).to(to) if value.ndim == 3 else value.to(torch.float64 if to == torch.float64 else value.dtype) for value in (*streams, *shared)]
        return [value.requires_grad_(value.ndim == 3) for value in made]

    own = leaves(dtype)
    assert module._fused(function, own[: len(streams)], own[len(streams) :]) is not None, name
    out = module.rowwise(function, own[: len(streams)], own[len(streams) :], room=5)
    assert out.stride(1) == out.shape[-1] + 5
    truth = leaves(torch.float64)
    exact = function if name == "gated" else type(function)(*(copy.deepcopy(part).double() if isinstance(part, torch.nn.Module) else part
                                                              for part in vars(function).values()))  # fmt: skip
    wanted = exact(*truth)
    names = [index for index, value in enumerate(own) if value.requires_grad]
    found_grads = torch.autograd.grad(out, [own[index] for index in names], grad.to(dtype))
    wanted_grads = torch.autograd.grad(wanted, [truth[index] for index in names], grad.to(dtype).double())
    for part, one, other in zip(("out", *names), (out, *found_grads), (wanted, *wanted_grads), strict=True):
        assert one.dtype == dtype and ratio(one.detach(), other.detach()) <= limit, (name, part, dtype, ratio(one.detach(), other.detach()))
    if name == "rotated":
        given = grad.to(dtype).clone()
        assert module.rowwise_backward(function, own[0].detach(), own[1], given) is given
        assert ratio(given, wanted_grads[0]) <= limit


def refused(package):
    """A kernel that computes something else on this device is named, and not used."""
    from reward_lab.lora_train.kernels.lora_linear import kernels, triton_kernels

    right = triton_kernels.dequantise_into
    triton_kernels.dequantise_into = lambda target, base: right(target, base).mul_(1.5)
    try:
        _choose_triton(package)
    except ValueError as error:
        assert "Triton's kernel 'unpack' differs from its reference by 0.5" in str(error), error
    else:
        raise AssertionError("the wrong kernel was taken")
    assert not kernels.is_triton()


def function(package):
    from reward_lab.lora_train.kernels.lora_linear import reference

    _choose_triton(package)
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

    torch.set_default_device(sys.argv[3])
    {"one_pass": one_pass, "merge": merge, "unpack": unpack, "rows": rows, "function": function, "refused": refused}[sys.argv[2]](lora_linear)
    print("equal")

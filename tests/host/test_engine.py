"""The block executor through the host's WanModel: each knob against the plain path, output and every gradient."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.host
# (batch, latent frames, height, width): pocket's size with guidance, and an odd one that the host pads.
SIZES = {"pocket": (2, 3, 8, 8), "odd": (1, 2, 7, 5)}
# Every part of a gradient is a sum over tokens in fp32; chunks and the one-product form add in another order. Measured: at most 2.3e-6.
OTHER_ORDER = 1e-5


@pytest.fixture(scope="module")
def setting(comfyui, tiny_models):
    """A backbone of two blocks with a LoRA on every Linear, and a function that gives output and gradients by name."""
    import torch

    from reward_lab.host.wan import load_backbone
    from reward_lab.lora_train.lora.adapter import new_adapter
    from reward_lab.lora_train.lora.targets import select_targets

    backbone = load_backbone(tiny_models["high"], dtype=torch.float32, device=torch.device("cpu"))
    linears = backbone.linears()
    adapter = new_adapter(linears, select_targets(linears, (), ()), rank=3, alpha=2.0, seed=0, device=torch.device("cpu"))
    for index, layer in enumerate(adapter.layers.values()):
        layer.up_OR.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(index))
    return backbone, adapter


def run(setting, size, wrap=None, only=None):
    import torch

    from reward_lab.host.training_mode import training_mode
    from reward_lab.lora_train.lora.linears import install

    backbone, adapter = setting
    batch, *shape = SIZES[size]
    generator = torch.Generator().manual_seed(3)
    latent = torch.randn(batch, 16, *shape, generator=generator).requires_grad_()
    context = torch.randn(batch, 9, 32, generator=generator)
    with training_mode(), install(backbone.linears(), adapter):
        leaves = {"latent": latent, **dict(zip(adapter.tensors(), adapter.parameters(), strict=True))}
        leaves = {name: leaf for name, leaf in leaves.items() if only is None or only(name)}

        def compute():
            out = backbone.velocity(latent, 0.6, context)
            loss = (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum()
            return {"out": out.detach(), **dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))}

        if wrap is None:
            return compute()
        with wrap(backbone):
            return compute()


@pytest.fixture(scope="module", params=list(SIZES))
def plain(request, setting):
    return request.param, run(setting, request.param)


def engine(**knobs):
    from reward_lab.lora_train.offload.knobs import Knobs

    return lambda backbone: backbone.engine(Knobs(**knobs))


def largest_ratio(found, wanted):
    assert found.keys() == wanted.keys()
    return max(float((found[name] - value).norm() / value.norm()) for name, value in wanted.items())


def assert_equal_bits(found, wanted):
    import torch

    assert [name for name, value in wanted.items() if not torch.equal(found[name], value)] == []


def test_engine_against_the_plain_path(setting, plain):
    import torch

    size, wanted = plain
    found = run(setting, size, engine())
    assert torch.equal(found["out"], wanted["out"])
    assert largest_ratio(found, wanted) <= OTHER_ORDER
    assert all(value.abs().sum() > 0 for value in found.values())


@pytest.mark.parametrize(
    "knobs",
    [
        {"keep_attention": False}, {"keep_feed_forward": True}, {"keep_feed_forward": True, "keep_attention": False}, {"keep_place": "host"},
        {"head_groups": 2}, {"head_groups": 3}, {"attention": "cpu"}, {"merges_resident": False},
    ],  # fmt: skip
    ids=str,
)
def test_knobs_that_change_no_bit(setting, plain, knobs):
    assert_equal_bits(run(setting, plain[0], engine(**knobs)), run(setting, plain[0], engine()))


@pytest.mark.parametrize("slots", [1, 2, 3])
def test_streamed_blocks_are_the_same_in_every_number_of_slots(setting, plain, slots):
    size, wanted = plain
    streamed = run(setting, size, engine(resident_blocks=0, slots=slots))
    assert largest_ratio(streamed, wanted) <= OTHER_ORDER
    assert_equal_bits(streamed, run(setting, size, engine(resident_blocks=0, slots=2, keep_place="host", head_groups=2)))
    # A group of one head is computed by all threads of the CPU together, whose sums have another order.
    assert largest_ratio(run(setting, size, engine(resident_blocks=0, slots=2, head_groups=4)), streamed) <= OTHER_ORDER
    assert largest_ratio(run(setting, size, engine(resident_blocks=1, slots=slots)), wanted) <= OTHER_ORDER


def test_streamed_equals_resident_bit_for_bit_without_lora_buffers(setting, plain):
    """With only the latent's gradient and the LoRA off, slots hold plain copies: nothing at all may differ."""
    from contextlib import contextmanager

    def base_only(knobs):
        @contextmanager
        def wrap(backbone):
            forwards = [linear.__dict__["forward"] for linear in backbone.linears().values() if "forward" in linear.__dict__]
            with forwards[0].switch.disabled(), engine(**knobs)(backbone):
                yield

        return wrap

    def only(name):
        return name == "latent"

    resident = run(setting, plain[0], base_only({}), only)
    assert_equal_bits(run(setting, plain[0], base_only({"resident_blocks": 0}), only), resident)


CHUNKS = [
    {"ffn_chunk_tokens": 5}, {"ffn_chunk_tokens": 5, "keep_feed_forward": True, "keep_place": "host", "resident_blocks": 1},
    {"row_chunk_tokens": 7}, {"ffn_chunk_tokens": 3, "row_chunk_tokens": 2, "resident_blocks": 0},
]  # fmt: skip


@pytest.mark.parametrize("knobs", CHUNKS, ids=str)
def test_chunks(setting, plain, knobs):
    assert largest_ratio(run(setting, plain[0], engine(**knobs)), plain[1]) <= OTHER_ORDER


def test_without_gradient_of_time_and_text_the_last_product_is_left_out(setting, plain, monkeypatch):
    """LoRAs inside of the blocks only: no gate needs a gradient, so ffn.2 does not run again; the numbers stay."""
    import torch

    from reward_lab.lora_train.offload import block as module

    size, wanted = plain
    backbone, adapter = setting
    inside = {name: value for name, value in wanted.items() if name == "out" or name.startswith("blocks.")}
    runs = []
    apply = module._apply
    monkeypatch.setattr(module, "_apply", lambda linear, x, has_room=False: runs.append(linear) or apply(linear, x, has_room))
    outer = [layer for path, layer in adapter.layers.items() if not path.startswith("blocks.")]
    for layer in outer:
        layer.down_RI.requires_grad_(False)
        layer.up_OR.requires_grad_(False)
    try:
        found = run(setting, size, engine(), lambda name: name.startswith("blocks."))
    finally:
        for layer in outer:
            layer.down_RI.requires_grad_(True)
            layer.up_OR.requires_grad_(True)
    assert largest_ratio(found, inside) <= OTHER_ORDER
    assert [sum(linear is block.ffn[2] for linear in runs) for block in backbone.model.blocks] == [1, 1]
    assert torch.equal(found["out"], wanted["out"])


def test_rollouts_stream_with_merged_loras(setting, plain):
    import torch

    from reward_lab.host.training_mode import training_mode
    from reward_lab.lora_train.lora.linears import install

    backbone, adapter = setting
    batch, *shape = SIZES[plain[0]]
    latent, context = torch.randn(batch, 16, *shape), torch.randn(batch, 9, 32)
    with training_mode(), install(backbone.linears(), adapter) as switch, torch.no_grad():
        wanted = backbone.velocity(latent, 0.6, context)
        with switch.disabled():
            base = backbone.velocity(latent, 0.6, context)
        with engine(resident_blocks=0)(backbone) as executor, switch.merged():
            for _ in range(2):
                found = backbone.velocity(latent, 0.6, context)
                assert float((found - wanted).norm() / wanted.norm()) <= OTHER_ORDER
            assert all(forward.linear.__dict__.get("holds_no_merged_copy") for path, forward in switch.forwards.items() if path.startswith("blocks."))
            assert executor.store.copied_bytes > 0
            with switch.disabled():
                assert torch.equal(backbone.velocity(latent, 0.6, context), base)
    assert float((base - wanted).norm() / wanted.norm()) > 0.01


def test_blocks_that_are_not_plain_run_as_a_whole(setting, plain, monkeypatch):
    from reward_lab.host import wan

    monkeypatch.setattr(wan, "is_plain_block", lambda block: False)
    assert largest_ratio(run(setting, plain[0], engine(resident_blocks=0)), plain[1]) <= OTHER_ORDER
    # Without streaming every sum has the plain order, but for the text: it adds up k and v of a block first.
    whole = run(setting, plain[0], engine())
    assert_equal_bits(whole, {name: value for name, value in plain[1].items() if not name.startswith("text_embedding")} | {
        name: whole[name] for name in whole if name.startswith("text_embedding")
    })
    assert largest_ratio(whole, plain[1]) <= OTHER_ORDER


def test_nothing_is_left_behind(setting):
    import torch

    backbone, adapter = setting
    before = {name: (parameter.data_ptr(), parameter.detach().clone()) for name, parameter in backbone.model.named_parameters()}

    class StopError(Exception):
        pass

    def interrupted():
        from contextlib import contextmanager

        @contextmanager
        def wrap(inner):
            linear = inner.model.blocks[1].ffn[0]
            plain_forward = linear.forward
            calls = []

            def failing(x):
                calls.append(x)
                if len(calls) > 1:
                    raise StopError
                return plain_forward(x)

            linear.forward = failing
            try:
                with engine(resident_blocks=0, keep_place="host")(inner):
                    yield
            finally:
                linear.forward = plain_forward

        return wrap

    with pytest.raises(StopError):
        run(setting, "pocket", interrupted())
    assert {name: parameter.data_ptr() for name, parameter in backbone.model.named_parameters()} == {name: value[0] for name, value in before.items()}
    assert all(torch.equal(parameter, before[name][1]) for name, parameter in backbone.model.named_parameters())
    assert not any("forward" in module.__dict__ or "holds_no_merged_copy" in module.__dict__ for module in backbone.model.modules())


def test_a_second_backward_is_refused(setting):
    import torch

    from reward_lab.host.training_mode import training_mode

    backbone, _ = setting
    latent = torch.randn(1, 16, 2, 4, 4, requires_grad=True)
    with training_mode(), engine()(backbone):
        out = backbone.velocity(latent, 0.5, torch.randn(1, 4, 32)).sum()
        out.backward(retain_graph=True)
        with pytest.raises(RuntimeError, match="second backward"):
            out.backward()


def test_masters_on_the_host_and_the_self_check(setting):
    import torch

    from reward_lab.host.training_mode import attention, training_mode
    from reward_lab.lora_train.lora.linears import install
    from reward_lab.lora_train.offload.self_check import self_check

    backbone, adapter = setting
    options = {"optimized_attention_override": attention}
    with training_mode(), engine(resident_blocks=0, optimiser_place="host")(backbone) as executor:
        assert 0 < self_check(executor, torch.float32, options) < 1e-5
        with install(backbone.linears(), adapter):
            assert all(parameter.device.type == "cpu" for parameter in adapter.parameters())
        forward = executor.plain_forward
        executor.plain_forward = lambda index: lambda *args, **kwargs: forward(index)(*args, **kwargs) * 1.01
        with pytest.raises(RuntimeError, match="self-check: .* differs from the plain path by 0.0"):
            self_check(executor, torch.float32, options)

        def without_a_gradient(index):
            def run(*args, **kwargs):
                out = forward(index)(*args, **kwargs)
                out.register_hook(lambda grad: grad * float("nan"))
                return out

            return run

        executor.plain_forward = without_a_gradient
        with pytest.raises(RuntimeError, match="differs from the plain path by nan"):
            self_check(executor, torch.float32, options)
    assert not any("place_of_lora_masters" in module.__dict__ for module in backbone.model.modules())


@pytest.mark.parametrize("resident_blocks", [0, 1])
def test_the_self_check_sees_a_fault_of_slots_where_the_first_block_has_none(setting, monkeypatch, resident_blocks):
    """Products with a LoRA inside of a slot's buffer come out wrong; resident weights have no buffers."""
    import torch

    from reward_lab.host.training_mode import attention, training_mode
    from reward_lab.lora_train.kernels.lora_linear import function
    from reward_lab.lora_train.offload.self_check import self_check

    extended = function.extended
    monkeypatch.setattr(function, "extended", lambda x, room: None if (found := extended(x, room)) is None else found.mul_(1.01))
    with training_mode(), engine(resident_blocks=resident_blocks)(setting[0]) as executor, pytest.raises(RuntimeError, match=f"block {1 + resident_blocks} "):
        self_check(executor, torch.float32, {"optimized_attention_override": attention})
    with training_mode(), engine()(setting[0]) as executor:
        assert self_check(executor, torch.float32, {"optimized_attention_override": attention}) < 1e-5


@pytest.mark.parametrize("knobs", [{"resident_blocks": 0}, {"resident_blocks": 1, "slots": 3}, {}], ids=str)
def test_masters_that_come_with_their_block(setting, plain, knobs):
    """As on a card with masters on the host: copies beside the weights, renewed after every change of the masters; the same bits."""
    from contextlib import contextmanager

    import torch

    backbone, adapter = setting

    def bringing(wanted):
        @contextmanager
        def wrap(inner):
            with engine(**knobs)(inner) as executor:
                executor.store.brings_masters = True
                yield executor
                assert_equal_bits(run_again(inner), wanted)

        return wrap

    def run_again(inner):
        latent, context = torch.ones(1, 16, 2, 4, 4), torch.ones(1, 4, 32)
        found = {}
        for step in range(3):
            with torch.no_grad(), adapter_switch(inner).merged():
                found[f"rollout {step}"] = inner.velocity(latent, 0.5, context)
            grads = torch.autograd.grad(inner.velocity(latent, 0.5, context).sum(), adapter.parameters())
            for parameter, grad in zip(adapter.parameters(), grads, strict=True):
                parameter.data.add_(grad, alpha=1e-3)
                torch.autograd.graph.increment_version(parameter)
            found |= {f"{name} {step}": grad for name, grad in zip(adapter.tensors(), grads, strict=True)}
        adapter.load(before)
        return found

    def adapter_switch(inner):
        return next(linear.__dict__["forward"].switch for linear in inner.linears().values() if "forward" in linear.__dict__)

    before, again = {name: value.clone() for name, value in adapter.tensors().items()}, {}

    @contextmanager
    def without(inner):
        with engine(**knobs)(inner) as executor:
            yield executor
            again.update(run_again(inner))

    wanted = run(setting, plain[0], without)
    assert_equal_bits(run(setting, plain[0], bringing(again)), wanted)
    assert not any(linear.__dict__.get("near") for linear in backbone.linears().values())


def test_sage_runs_in_rollouts_only(setting, monkeypatch):
    """A stand-in of the package, slightly wrong: seen in rollouts, never in passes with gradient, references or the self-check."""
    import sys
    import types

    import torch
    from torch.nn import functional

    from reward_lab.host.training_mode import attention, training_mode
    from reward_lab.lora_train.kernels import attention as module
    from reward_lab.lora_train.lora.linears import install
    from reward_lab.lora_train.offload.self_check import self_check

    calls = []

    def sageattn(q, k, v, tensor_layout="HND", is_causal=False, sm_scale=None, return_lse=False):
        assert tensor_layout == "HND" and not is_causal
        calls.append(q.shape)
        return functional.scaled_dot_product_attention(q, k, v) * 1.01

    monkeypatch.setitem(sys.modules, "sageattention", types.SimpleNamespace(sageattn=sageattn))
    monkeypatch.setattr(module, "choose_rollout_backend", lambda requested, *rest: requested)
    backbone, adapter = setting
    latent, context = torch.randn(1, 16, 2, 4, 4), torch.randn(1, 4, 32)
    with training_mode(), engine(rollout_attention="sage")(backbone) as executor:
        self_check(executor, torch.float32, {"optimized_attention_override": attention})
        with install(backbone.linears(), adapter) as switch:
            torch.autograd.grad(backbone.velocity(latent.requires_grad_(), 0.5, context).sum(), latent)
            with torch.no_grad(), switch.disabled():
                reference = backbone.velocity(latent, 0.5, context)
            assert calls == []
            with torch.no_grad(), switch.merged():
                rolled = backbone.velocity(latent, 0.5, context)
            # Self-attention of both blocks; cross-attention stays exact.
            assert len(calls) == 2 and torch.isfinite(rolled).all()
    with training_mode(), torch.no_grad():
        assert float((backbone.velocity(latent, 0.5, context) - reference).norm() / reference.norm()) <= OTHER_ORDER

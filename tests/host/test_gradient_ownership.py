"""A block's backward writes over the gradient it is given only where nobody else holds it."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.host


@pytest.fixture(scope="module")
def blocks(comfyui, tiny_models):
    """A function that runs the first blocks of a model with and without the engine: `run(use, with_engine)`; `use(outputs, x)` makes the loss."""
    import torch

    from reward_lab.host.training_mode import attention, training_mode
    from reward_lab.host.wan import load_backbone
    from reward_lab.lora_train.offload.knobs import Knobs

    backbone = load_backbone(tiny_models["high"], dtype=torch.float32, device=torch.device("cpu"))
    width, heads = backbone.model.dim, backbone.model.num_heads
    generator = torch.Generator().manual_seed(0)
    e, context = torch.randn(1, 1, 6, width, generator=generator) * 0.1, torch.randn(1, 7, width, generator=generator)
    angle = torch.randn(1, 10, 1, width // heads // 2, generator=generator)
    rotations = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], dim=-1).unflatten(-1, (2, 2))
    start = torch.randn(1, 10, width, generator=generator)

    def run(use, with_engine):
        x = start.clone().requires_grad_()

        def results():
            outputs, stream = [], x * 1
            for block in backbone.model.blocks:
                stream = block(stream, e, rotations, context, transformer_options={"optimized_attention_override": attention})
                outputs.append(stream)
            return use(outputs, x)

        with training_mode():
            if not with_engine:
                return results()
            with backbone.engine(Knobs()) as executor:
                found = results()
                run.copied = executor.copied_gradients
                return found

    return run


def _used_twice(outputs, x):
    import torch

    return torch.autograd.grad((outputs[0] + outputs[1] + (outputs[0] * 2).sin()).square().sum(), x)


def _kept_by_hooks(outputs, x):
    import torch

    seen = []
    for output in outputs:
        output.register_hook(seen.append)
    (grad,) = torch.autograd.grad(outputs[1].square().sum(), x)
    return grad, *seen


def _views_kept_by_hooks(outputs, x):
    import torch

    seen = []
    outputs[1].register_hook(lambda grad: seen.append(grad[:, 2:5]))
    outputs[0].register_hook(lambda grad: seen.append(grad.flatten()))
    (grad,) = torch.autograd.grad(outputs[1].square().sum(), x)
    return grad, *seen


def _of_the_caller(outputs, x):
    import torch

    own = torch.ones_like(outputs[1])
    (grad,) = torch.autograd.grad(outputs[1], x, own)
    return grad, own


def _retained(outputs, x):
    for output in outputs:
        output.retain_grad()
    outputs[1].square().sum().backward()
    return x.grad, *(output.grad for output in outputs)


def _residual(outputs, x):
    import torch

    return torch.autograd.grad((outputs[1] + x).square().sum(), x)


@pytest.mark.parametrize("use", [_used_twice, _kept_by_hooks, _views_kept_by_hooks, _of_the_caller, _retained, _residual])
def test_gradients_of_others_stay_as_they_are(blocks, use):
    found, wanted = blocks(use, True), blocks(use, False)
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        assert float((one - other).norm() / other.norm()) <= 1e-5
    # Autograd itself copies what is retained, and adds up what comes from two uses.
    assert blocks.copied > 0 or use in (_retained, _used_twice)


def test_in_a_chain_nothing_is_copied(blocks):
    def use(outputs, x):
        import torch

        return torch.autograd.grad((outputs[1] * 3).sum(), x)

    blocks(use, True)
    assert blocks.copied == 0


def test_where_torch_does_not_tell_gradients_are_copied(monkeypatch):
    import torch

    from reward_lab.lora_train.offload import ownership

    ownership._of_a_chain.cache_clear()
    monkeypatch.delattr(torch._C, "_storage_Use_Count")
    monkeypatch.setattr(ownership, "_references", lambda grad: (0, 0, 0))
    assert not ownership.is_alone(torch.zeros(2))
    ownership._of_a_chain.cache_clear()

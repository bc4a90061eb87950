"""A pass through a backbone with a random LoRA, with and without the engine: output, every gradient, rollouts."""

from __future__ import annotations

from contextlib import nullcontext


def load(path, dtype=None, device="cpu"):
    import torch

    from reward_lab.host.wan import load_backbone

    return load_backbone(path, dtype=dtype or torch.float32, device=torch.device(device), on_host=True)


def run(backbone, knobs=None, *, rank=3, batch=2, size=(2, 7, 5), text_width=32):
    """Results by name, on the CPU: `out`, the gradient of the latent and of every master, `rollout` (merged), `base` (LoRA off).

    Args:
        knobs: of the engine; None runs the host's own blocks.
        size: frames, height and width of the latent.
    """
    import torch

    from reward_lab.host.training_mode import training_mode
    from reward_lab.lora_train.lora.adapter import new_adapter
    from reward_lab.lora_train.lora.linears import install
    from reward_lab.lora_train.lora.targets import select_targets
    from reward_lab.lora_train.offload.knobs import Knobs

    linears, device = backbone.linears(), backbone.device
    adapter = new_adapter(linears, select_targets(linears, (), ()), rank=rank, alpha=2.0, seed=0, device=device)
    for index, layer in enumerate(adapter.layers.values()):
        layer.up_OR.data.copy_(torch.randn(layer.up_OR.shape, generator=torch.Generator().manual_seed(index)) * 0.1 * (3 / rank) ** 0.5)
    generator = torch.Generator().manual_seed(3)
    latent = torch.randn(batch, 16, *size, generator=generator).to(device).requires_grad_()
    context = torch.randn(batch, 9, text_width, generator=generator).to(device)
    leaves = {"latent": latent, **dict(zip(adapter.tensors(), adapter.parameters(), strict=True))}
    if knobs is None:
        backbone.to(device)
    # As the worker does: the engine first, which tells the LoRA where its masters live.
    with training_mode(), nullcontext() if knobs is None else backbone.engine(Knobs(**knobs)), install(linears, adapter) as switch:
        out = backbone.velocity(latent, 0.6, context)
        loss = (out * torch.linspace(-1, 1, out.numel(), device=device).view_as(out)).sum()
        found = {"out": out.detach(), **dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))}
        with torch.no_grad(), switch.merged():
            found["rollout"] = backbone.velocity(latent, 0.6, context)
        with torch.no_grad(), switch.disabled():
            found["base"] = backbone.velocity(latent, 0.6, context)
    return {name: value.cpu() for name, value in found.items()}


def differing(found, wanted):
    """Names of results that are not bit for bit the same."""
    import torch

    assert found.keys() == wanted.keys()
    return [name for name, value in wanted.items() if not torch.equal(found[name], value)]


def largest_ratio(found, wanted):
    """The largest relative difference of any result."""
    assert found.keys() == wanted.keys()
    return max(float((found[name].float() - value.float()).norm() / value.float().norm()) for name, value in wanted.items())


def error(found, truth):
    """Root mean square of the relative differences."""
    squares = [float((found[name].float() - value.float()).square().sum() / value.float().square().sum()) for name, value in truth.items()]
    return (sum(squares) / len(squares)) ** 0.5

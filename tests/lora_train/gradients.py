"""What the gradient tests share: a LoRA in float64, constants of a loss that stay constant under finite differences, and the differences."""

from __future__ import annotations

import torch

from reward_lab.lora_train.lora.adapter import new_adapter
from reward_lab.lora_train.lora.linears import install
from reward_lab.lora_train.lora.targets import select_targets
from reward_lab.lora_train.trainee import new_trainee


def trainee_of(config, parts, expert, stack, dtype=torch.float64):
    """A trainee whose LoRA does something; installed as long as `stack` is open."""
    linears = parts.experts.backbones[expert].linears()
    adapter = new_adapter(linears, select_targets(linears, (), config.lora.skip), rank=3, alpha=1.5, seed=3, device=torch.device("cpu"))
    for index, layer in enumerate(adapter.layers.values()):
        layer.up_OR.data.normal_(0, 0.3, generator=torch.Generator().manual_seed(index))
        layer.down_RI.data, layer.up_OR.data = layer.down_RI.data.to(dtype), layer.up_OR.data.to(dtype)
    return new_trainee(expert, adapter, stack.enter_context(install(linears, adapter)), config.optimiser)


class Held:
    """Marks what a method takes for constant (frozen steps, cut inputs, references): recorded in the first evaluation, the same in all later ones.

    With it the loss is a function whose true derivative is the method's gradient, so that finite differences may be taken of it.
    """

    def __init__(self):
        self._values, self._at = [], None

    def again(self):
        """Begin a later evaluation."""
        self._at = 0

    def __call__(self, value):
        if self._at is None:
            self._values.append(value.detach())
            return value.detach()
        self._at += 1
        return self._values[self._at - 1]


def assert_gradients(found, loss_of, parameters, *, naive=1e-6, differences=1e-5, step=1e-4):
    """Compare gradients with those of a naive loss, and with its finite differences in a random direction of all parameters.

    Args:
        loss_of: `loss_of(held)`, the loss as one expression in one graph.
        naive, differences: relative tolerances. The trainer asks rewards for their gradient in fp32.
    """
    held = Held()
    expected = torch.autograd.grad(loss_of(held), parameters)
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours - theirs).norm() <= naive * theirs.norm()
    generator, origins = torch.Generator().manual_seed(1), [parameter.detach().clone() for parameter in parameters]
    directions = [torch.randn(origin.shape, generator=generator, dtype=origin.dtype) for origin in origins]
    values = []
    for sign in (1, -1):
        for parameter, origin, direction in zip(parameters, origins, directions, strict=True):
            parameter.data.copy_(origin + sign * step * direction)
        held.again()
        values.append(float(loss_of(held).detach()))
    for parameter, origin in zip(parameters, origins, strict=True):
        parameter.data.copy_(origin)
    slope = sum(float((gradient * direction).sum()) for gradient, direction in zip(found, directions, strict=True))
    # Measured along the whole gradient's length: a direction may happen to lie across it.
    length = sum(float(gradient.square().sum()) for gradient in found) ** 0.5 * sum(float(direction.square().sum()) for direction in directions) ** 0.5
    assert abs((values[0] - values[1]) / (2 * step) - slope) <= differences * length and length > 0

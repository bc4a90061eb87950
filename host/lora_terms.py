"""What one layer's patch of a LoRA adds to the output of that layer, as small modules that the host moves and casts like its own models.

`make_term` builds one from the host's weight adapter or patch; it answers None for kinds whose result depends on the base weight (DoRA,
OFT, BOFT, GLoRA, `set`): those can only be merged. The weights are those of the file, unscaled, so that a new strength needs no new term.

Why not the host's `comfy.weight_adapter.bypass` (0.30.0): it writes strength, device and dtype into the adapter, which rows and the file
cache share; holds one adapter per layer; drops `dora_scale`; binds to the modules of one model; and leaves `forward` attributes behind.

Shapes: B batch, L tokens, I inputs, O outputs, R rank, C channels.
"""

from __future__ import annotations

from typing import Any

import comfy.model_management
import comfy.ops
import comfy.weight_adapter
import torch
import torch.nn.functional as F
from torch import nn

CHUNK_ROWS = 8192  # tokens per addition: the product of 75k tokens with a wide layer would need another 2 GB
_CONVOLUTIONS = {nn.Conv1d: "Conv1d", nn.Conv2d: "Conv2d", nn.Conv3d: "Conv3d"}


def is_linear(module: nn.Module) -> bool:
    """Tell whether a module multiplies with a matrix; the host's quantised linears are no `nn.Linear`."""
    return isinstance(getattr(module, "in_features", None), int) and isinstance(getattr(module, "out_features", None), int)


def make_term(module: nn.Module, parameter: str, patch: Any) -> nn.Module | None:
    """Build what a patch adds to a module's output.

    Args:
        module: The module that owns the parameter.
        parameter: `weight`, `bias`, or the name of a bare parameter such as `modulation`.
        patch: The host's weight adapter, or its tuple `("diff", (tensor,))`.

    Returns:
        A module with `add_to(module, output, inputs, strength)` (a `ParameterTerm` has `shifted` instead); None when the patch can only be merged.
    """
    if isinstance(patch, comfy.weight_adapter.LoRAAdapter):
        return LowRankTerm.build(module, patch) if parameter == "weight" else None
    if isinstance(patch, (comfy.weight_adapter.LoHaAdapter, comfy.weight_adapter.LoKrAdapter)):
        has_dora = patch.weights[-1] is not None
        return ComposedTerm(module, patch) if parameter == "weight" and _multiplies(module) and not has_dora else None
    if not (isinstance(patch, tuple) and len(patch) == 2 and patch[0] == "diff" and len(patch[1]) == 1):
        return None
    (difference,) = patch[1]
    if parameter not in ("weight", "bias"):
        return ParameterTerm(difference)
    if parameter == "bias":
        return BiasTerm(difference)
    if _multiplies(module):
        return WeightTerm(module, difference)
    return GainTerm(difference) if isinstance(module, (nn.LayerNorm, nn.RMSNorm)) else None


class LowRankTerm(nn.Module):
    """`up(down(x)) * alpha / rank` of a plain LoRA, for a linear layer or a convolution."""

    def __init__(self, down: nn.Module, up: nn.Module, scale: float) -> None:
        super().__init__()
        self.down, self.up, self.scale = down, up, scale

    @classmethod
    def build(cls, module: nn.Module, adapter: comfy.weight_adapter.LoRAAdapter) -> LowRankTerm | None:
        """Build the term; None for DoRA, resized and Tucker forms and for grouped convolutions."""
        up, down, alpha, mid, dora_scale, reshape = adapter.weights
        if mid is not None or dora_scale is not None or reshape is not None or not _multiplies(module):
            return None
        scale = 1.0 if alpha is None else float(alpha) / down.shape[0]
        if is_linear(module):
            return cls(_linear(down.flatten(1)), _linear(up.flatten(1)), scale)
        ones = (1,) * len(module.kernel_size)
        down_layer = _convolution(module, down.reshape(down.shape[0], module.in_channels, *module.kernel_size))
        return cls(down_layer, _convolution(None, up.reshape(up.shape[0], down.shape[0], *ones)), scale)

    def add_to(self, module: nn.Module, output: torch.Tensor, inputs: torch.Tensor, strength: float) -> torch.Tensor:
        """Add the term times `strength` to `output` in place."""
        hidden, factor = self.down(inputs), strength * self.scale
        if not is_linear(module):
            return output.add_(self.up(hidden), alpha=factor)
        rows_LO, hidden_LR = output.reshape(-1, output.shape[-1]), hidden.reshape(-1, hidden.shape[-1])
        for begin in range(0, len(rows_LO), CHUNK_ROWS):
            rows_LO[begin : begin + CHUNK_ROWS].add_(self.up(hidden_LR[begin : begin + CHUNK_ROWS]), alpha=factor)
        return rows_LO.view(output.shape)


class WeightTerm(nn.Module):
    """A whole difference of a matrix or a convolution (`.diff`)."""

    def __init__(self, module: nn.Module, difference: torch.Tensor) -> None:
        super().__init__()
        self.layer = _linear(difference) if is_linear(module) else _convolution(module, difference)

    def add_to(self, module: nn.Module, output: torch.Tensor, inputs: torch.Tensor, strength: float) -> torch.Tensor:
        """Add the term times `strength` to `output` in place."""
        return output.add_(self.layer(inputs), alpha=strength)


class ComposedTerm(nn.Module):
    """A LoHa or LoKr: the difference is put together from its factors in fp32 at each call, by the host's own formula."""

    def __init__(self, module: nn.Module, adapter: comfy.weight_adapter.WeightAdapterBase) -> None:
        super().__init__()
        self.kind = type(adapter)
        self.shape = (module.out_features, module.in_features) if is_linear(module) else tuple(module.weight.shape)
        self.rest = [None if isinstance(value, torch.Tensor) else value for value in adapter.weights]
        self.factors = nn.ParameterDict(
            {str(i): nn.Parameter(value, requires_grad=False) for i, value in enumerate(adapter.weights) if isinstance(value, torch.Tensor)}
        )

    def add_to(self, module: nn.Module, output: torch.Tensor, inputs: torch.Tensor, strength: float) -> torch.Tensor:
        """Add the term times `strength` to `output` in place."""
        weights = [self.factors.get(str(i), value) for i, value in enumerate(self.rest)]
        zeros = torch.zeros(self.shape, device=inputs.device, dtype=torch.float32)
        difference = self.kind(set(), weights).calculate_weight(zeros, "", 1.0, 1.0, None, lambda value: value).to(inputs.dtype)
        if is_linear(module):
            return output.add_(F.linear(inputs, difference), alpha=strength)
        convolve = (F.conv1d, F.conv2d, F.conv3d)[len(module.kernel_size) - 1]
        return output.add_(convolve(inputs, difference, None, module.stride, module.padding, module.dilation), alpha=strength)


class BiasTerm(nn.Module):
    """A difference of a bias (`.diff_b`)."""

    def __init__(self, difference: torch.Tensor) -> None:
        super().__init__()
        self.difference = nn.Parameter(difference, requires_grad=False)

    def add_to(self, module: nn.Module, output: torch.Tensor, inputs: torch.Tensor, strength: float) -> torch.Tensor:
        """Add the term times `strength` to `output` in place."""
        difference = comfy.model_management.cast_to(self.difference, dtype=output.dtype, device=output.device)
        return output.add_(_over_channels(module, difference), alpha=strength)


class GainTerm(nn.Module):
    """A difference of a norm's gain: the norm is linear in it, so the normalised input times the difference is added."""

    def __init__(self, difference: torch.Tensor) -> None:
        super().__init__()
        self.difference = nn.Parameter(difference, requires_grad=False)

    def add_to(self, module: nn.Module, output: torch.Tensor, inputs: torch.Tensor, strength: float) -> torch.Tensor:
        """Add the term times `strength` to `output` in place."""
        difference = comfy.model_management.cast_to(self.difference, dtype=inputs.dtype, device=inputs.device)
        if isinstance(module, nn.RMSNorm):
            return output.add_(F.rms_norm(inputs, module.normalized_shape, difference, module.eps), alpha=strength)
        return output.add_(F.layer_norm(inputs, module.normalized_shape, difference, None, module.eps), alpha=strength)


class ParameterTerm(nn.Module):
    """A difference of a bare parameter such as a block's `modulation`, which the owner reads while it runs."""

    def __init__(self, difference: torch.Tensor) -> None:
        super().__init__()
        self.difference = nn.Parameter(difference, requires_grad=False)

    def shifted(self, value: torch.Tensor, strength: float) -> torch.Tensor:
        """Return the parameter plus the term times `strength`, in fp32."""
        return value.float() + strength * comfy.model_management.cast_to(self.difference, dtype=torch.float32, device=value.device)


def _multiplies(module: nn.Module) -> bool:
    return is_linear(module) or (type_of_convolution(module) is not None and module.groups == 1)


def type_of_convolution(module: nn.Module) -> str | None:
    """Return `Conv1d`, `Conv2d` or `Conv3d`; None when the module is no convolution."""
    return next((name for kind, name in _CONVOLUTIONS.items() if isinstance(module, kind)), None)


def _linear(weight_OI: torch.Tensor) -> nn.Module:
    """Return a linear layer of the host around a tensor of the file: nothing is copied, casts happen in use."""
    layer = comfy.ops.manual_cast.Linear(weight_OI.shape[1], weight_OI.shape[0], bias=False, device="meta", dtype=weight_OI.dtype)
    layer.weight = nn.Parameter(weight_OI, requires_grad=False)
    return layer


def _convolution(like: nn.Module | None, weight: torch.Tensor) -> nn.Module:
    """Return a convolution of the host around a tensor, with the steps of `like`."""
    kind = getattr(comfy.ops.manual_cast, f"Conv{weight.ndim - 2}d")
    steps = {} if like is None else {"stride": like.stride, "padding": like.padding, "dilation": like.dilation}
    layer = kind(weight.shape[1], weight.shape[0], tuple(weight.shape[2:]), bias=False, device="meta", dtype=weight.dtype, **steps)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


def _over_channels(module: nn.Module, difference_C: torch.Tensor) -> torch.Tensor:
    """Shape a vector so that it adds to the channels of the module's output."""
    if type_of_convolution(module) is None:
        return difference_C
    return difference_C.reshape(-1, *(1,) * len(module.kernel_size))

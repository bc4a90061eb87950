"""Compares the tensors of a LoRA with the layer they are for, before the host's adapters see them.

The host logs a shape that does not fit and goes on without it; here that is a sentence that the caller turns into an error.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

import torch

from .lora_reasons import width_name

Shape = tuple[int, ...]


def misfit(layer: str, parts: Mapping[str, torch.Tensor], weight: Shape, bias: Shape | None) -> str:
    """Say what does not fit in one layer.

    Args:
        layer: Its name, for the sentence.
        parts: Part (`lora_down.weight`) -> tensor.
        weight: Shape of the model's weight.
        bias: Shape of the model's bias; None when it has none.

    Returns:
        A sentence; empty when everything fits.
    """
    shapes = {part: tuple(tensor.shape) for part, tensor in parts.items()}
    for part, expected in (("diff", weight), ("diff_b", bias)):
        if part in shapes and shapes[part] != expected:
            return f"layer {layer} has a difference of shape {shapes[part]}, the model's is {expected if expected is not None else 'absent'}"
    if "alpha" in parts and (parts["alpha"].numel() != 1 or parts["alpha"].ndim > 2):
        return f"layer {layer} has an alpha of shape {shapes['alpha']}"
    if "dora_scale" in shapes and prod(shapes["dora_scale"]) not in (weight[0], prod(weight[1:])):
        return f"layer {layer} has a DoRA scale of shape {shapes['dora_scale']} for a weight of {weight}"
    for check in (_low_rank, _loha, _lokr):
        sentence = check(layer, shapes, weight)
        if sentence:
            return sentence
    has_change = any(part.startswith(("lora_up", "hada_w1", "lokr_w1", "diff")) for part in parts)
    return "" if has_change else f"layer {layer} has nothing to apply but {', '.join(sorted(parts))}"


def _sizes(layer: str, made_for: tuple[int, int], weight: Shape) -> str:
    """Compare (outputs, inputs) with the weight's."""
    here = (weight[0], prod(weight[1:]))
    if made_for == here:
        return ""
    return (
        f"layer {layer} was made for {width_name(made_for[1])} inputs and {width_name(made_for[0])} outputs, "
        f"the model has {width_name(here[1])} inputs and {width_name(here[0])} outputs"
    )


def _low_rank(layer: str, shapes: Mapping[str, Shape], weight: Shape) -> str:
    """Check the two matrices of a LoRA."""
    down, up, mid = shapes.get("lora_down.weight"), shapes.get("lora_up.weight"), shapes.get("lora_mid.weight")
    if (down is None) != (up is None):
        return f"layer {layer} has {'a down' if up is None else 'an up'} weight only"
    if down is None or up is None:
        return ""
    if min(len(down), len(up)) < 2 or 0 in (*down, *up):
        return f"layer {layer} has weights of shape {down} and {up}, which are no matrices"
    if mid is not None:
        # A Tucker core exists for convolutions over pictures only; the host reads exactly this form.
        inner_fits = len(mid) == 4 and len(weight) == 4 and mid[:2] == (up[1], down[0]) and (up[0], down[1], *mid[2:]) == weight
        return "" if inner_fits else f"layer {layer} has a middle weight of shape {mid}, which does not fit a weight of {weight}"
    if prod(up[1:]) != down[0]:
        return f"layer {layer} has rank {down[0]} in its down weight and {prod(up[1:])} in its up weight"
    return _sizes(layer, (up[0], prod(down[1:])), weight)


def _loha(layer: str, shapes: Mapping[str, Shape], weight: Shape) -> str:
    """Check the four matrices of a LoHa: (a1 b1) times (a2 b2), entry by entry."""
    names = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
    found = [shapes[name] for name in names if name in shapes]
    if not found:
        return ""
    if "hada_t1" in shapes or "hada_t2" in shapes:
        return f"layer {layer} is a LoHa with a Tucker core, which exists for convolutions only"
    if len(found) < 4 or any(len(shape) != 2 or 0 in shape for shape in found):
        return f"layer {layer} is a LoHa without its four matrices"
    for first, second in (found[:2], found[2:]):
        if first[1] != second[0]:
            return f"layer {layer} has ranks {first[1]} and {second[0]} in one LoHa product"
        sentence = _sizes(layer, (first[0], second[1]), weight)
        if sentence:
            return sentence
    return ""


def _lokr(layer: str, shapes: Mapping[str, Shape], weight: Shape) -> str:
    """Check the two factors of a LoKr, each whole or as a product of two matrices."""
    if not any(part.startswith("lokr_") for part in shapes):
        return ""
    if "lokr_t2" in shapes:
        return f"layer {layer} is a LoKr with a Tucker core, which exists for convolutions only"
    factors = []
    for name in ("lokr_w1", "lokr_w2"):
        whole, first, second = shapes.get(name), shapes.get(f"{name}_a"), shapes.get(f"{name}_b")
        if whole is None and first is not None and second is not None and len(first) == len(second) == 2 and first[1] == second[0]:
            whole = (first[0], second[1])
        if whole is None or len(whole) < 2 or 0 in whole:
            return f"layer {layer} is a LoKr without its two factors"
        factors.append((whole[0], prod(whole[1:])))
    return _sizes(layer, (factors[0][0] * factors[1][0], factors[0][1] * factors[1][1]), weight)

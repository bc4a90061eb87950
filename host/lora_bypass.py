"""LoRA rows beside the weights: the base is left as it is and every row adds its part to the outputs of the layers.

For bases that lose by merging (fp8, GGUF and other quantised weights), for strengths that follow sigma, and whenever a strength should
change without touching the weights. Torch forward hooks on the layers do the adding; the host's own injection puts them in after the model
was loaded and takes them out before it is changed or unloaded. The LoRA tensors are a small model of their own (`additional_models`), so
that the host's memory management, low-VRAM streaming and dynamic VRAM treat them like any other weights.

The rows of all nodes in a chain are kept in one sorted list: their order, and the order of the nodes, changes nothing, not even a bit.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import comfy.model_patcher
import torch
from comfy.patcher_extension import CallbacksMP, PatcherInjection
from comfy.quant_ops import QuantizedTensor
from torch import nn

from .lora_terms import ParameterTerm, is_linear, make_term
from .sigma_curve import SigmaCurve

KEY = "reward_lab_unmerged"
FULL_PRECISION = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
GGUF_PLAIN = ("F32", "F16")  # what ComfyUI-GGUF stores as numbers; all others, BF16 too, are packed bytes
MODEL = "diffusion_model"


class LoraModule(nn.Module):
    """The terms of one LoRA file for one kind of model; unscaled, shared by all strengths and both experts."""

    def __init__(self, terms: Mapping[str, nn.Module], file: Any) -> None:
        super().__init__()
        self.keys = tuple(terms)
        self.terms = nn.ModuleList(terms.values())
        self.file = file  # kept alive, as the cache knows this module by the file's identity


@dataclass(frozen=True, kw_only=True)
class UnmergedRow:
    """One row: the host's handle on its terms, the strength, its factor over sigma, and its factor per layer (only those that are not 1)."""

    name: str
    patcher: Any
    strength: float
    curve: SigmaCurve = field(default_factory=SigmaCurve)
    factors: Mapping[str, float] = field(default_factory=dict)

    @property
    def module(self) -> LoraModule:
        """The terms."""
        return self.patcher.model

    def order(self) -> tuple[Any, ...]:
        """Return what rows are sorted by: nothing that depends on where the row stands."""
        return (self.name, self.strength, self.curve.points, tuple(sorted(self.factors.items())))


class UnmergedRows:
    """All unmerged rows of a MODEL. Unchangeable; what is installed on which model is kept beside it."""

    def __init__(self, rows: Sequence[UnmergedRow]) -> None:
        self.rows = tuple(sorted(rows, key=UnmergedRow.order))
        self._handles: weakref.WeakKeyDictionary[nn.Module, list[Any]] = weakref.WeakKeyDictionary()

    def inject(self, patcher: Any) -> None:
        """Install the hooks on the patcher's model; the host calls this after a load."""
        self.eject(patcher)
        run = _Run(self.rows)
        handles = self._handles.setdefault(patcher.model, [])
        by_module: dict[str, list[tuple[str, nn.Module, int, float]]] = {}
        for number, row in enumerate(self.rows):
            for key, term in zip(row.module.keys, row.module.terms, strict=True):
                factor = row.factors.get(key, 1.0)
                if factor != 0.0:
                    owner, _, parameter = key.rpartition(".")
                    by_module.setdefault(owner, []).append((parameter, term, number, factor))
        for owner, parts in by_module.items():
            module = patcher.model.get_submodule(owner)
            added = [part[1:] for part in parts if not isinstance(part[1], ParameterTerm)]
            if added:
                handles.append(module.register_forward_hook(_adder(run, added)))
            shifted = [part for part in parts if isinstance(part[1], ParameterTerm)]
            if shifted:
                shifter = _Shifter(run, shifted)
                handles.append(module.register_forward_pre_hook(shifter.enter))
                handles.append(module.register_forward_hook(shifter.leave, always_call=True))
        if run.follows_sigma():
            reader = _sigma_reader(run, weakref.ref(patcher.model))
            handles.append(patcher.model.get_submodule(MODEL).register_forward_pre_hook(reader, with_kwargs=True))

    def eject(self, patcher: Any) -> None:
        """Take the hooks off the patcher's model; the host calls this before it changes or unloads the weights."""
        for handle in self._handles.pop(patcher.model, []):
            handle.remove()


class _Run:
    """Strengths at the sigma of the forward that is going on."""

    def __init__(self, rows: Sequence[UnmergedRow]) -> None:
        self._rows = rows
        self.strengths = [0.0] * len(rows)
        self.move_to(1.0)

    def follows_sigma(self) -> bool:
        return not all(row.curve.is_constant() for row in self._rows)

    def move_to(self, sigma: float) -> None:
        self.strengths = [row.strength * row.curve.at(sigma) for row in self._rows]


def _adder(run: _Run, parts: Sequence[tuple[nn.Module, int, float]]) -> Any:
    """Return a forward hook that adds the terms of all rows to a layer's output."""

    def add(module: nn.Module, inputs: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        for term, number, factor in parts:
            strength = run.strengths[number] * factor
            if strength != 0.0:
                output = term.add_to(module, output, inputs[0], strength)
        return output

    return add


class _Shifter:
    """Exchanges bare parameters of a module while it runs."""

    def __init__(self, run: _Run, parts: Sequence[tuple[str, nn.Module, int, float]]) -> None:
        self._run, self._parts = run, parts
        self._kept: dict[str, Any] = {}

    def enter(self, module: nn.Module, _inputs: tuple[Any, ...]) -> None:
        for name, term, number, factor in self._parts:
            strength = self._run.strengths[number] * factor
            if strength != 0.0:
                value = module._parameters[name]
                self._kept.setdefault(name, value)
                module._parameters[name] = term.shifted(value, strength)

    def leave(self, module: nn.Module, _inputs: tuple[Any, ...], _output: Any) -> None:
        for name, value in self._kept.items():
            module._parameters[name] = value
        self._kept.clear()


def _sigma_reader(run: _Run, model: Any) -> Any:
    """Return a pre-hook of the whole network that reads sigma from the timestep it is called with."""

    def read(_module: nn.Module, inputs: tuple[Any, ...], named: Mapping[str, Any]) -> None:
        timestep = named.get("timestep", named.get("timesteps", inputs[1] if len(inputs) > 1 else None))
        if timestep is None:
            raise RuntimeError("The model was called without a timestep, so a strength over sigma cannot be followed. Use constant strengths with it.")
        # Frames that are given (image to video with one timestep a frame) carry 0; the noise level of the step is the largest.
        run.move_to(float(torch.as_tensor(timestep).max()) / float(model().model_sampling.multiplier))

    return read


_kinds: weakref.WeakKeyDictionary[nn.Module, str] = weakref.WeakKeyDictionary()  # of loaded models; what they are stored in does not change
_shapes: weakref.WeakKeyDictionary[nn.Module, Mapping[str, tuple[int, ...]]] = weakref.WeakKeyDictionary()


def quantised_kind(model: Any) -> str:
    """Name the storage of a MODEL's weights when merging into them would lose precision: `fp8`, `GGUF`, …; empty otherwise."""
    if model.model not in _kinds:
        _kinds[model.model] = _quantised_kind(model.model.get_submodule(MODEL))
    return _kinds[model.model]


def _quantised_kind(network: nn.Module) -> str:
    """Look at every weight."""
    for module in network.modules():
        if getattr(module, "layout_type", None) is not None or getattr(module, "quant_format", None):
            return str(getattr(module, "quant_format", None) or "quantised")
        for parameter in module._parameters.values():
            if parameter is None:
                continue
            if is_packed(parameter):
                return "GGUF"
            if isinstance(parameter, QuantizedTensor) or parameter.dtype not in FULL_PRECISION:
                return "fp8" if "float8" in str(parameter.dtype) else str(parameter.dtype).removeprefix("torch.")
    return ""


def is_packed(weight: Any) -> bool:
    """Tell whether a weight is one of ComfyUI-GGUF's whose dtype and size are those of packed bytes."""
    return getattr(getattr(weight, "tensor_type", None), "name", GGUF_PLAIN[0]) not in GGUF_PLAIN


def weight_shapes(model: Any) -> Mapping[str, tuple[int, ...]]:
    """Return the shapes of a MODEL's weights as the layers use them, not as a quantised format packs them; the same object every time."""
    if model.model not in _shapes:
        _shapes[model.model] = MappingProxyType(_weight_shapes(model))
    return _shapes[model.model]


def original_weight(model: Any, key: str) -> tuple[torch.Tensor, Callable[..., torch.Tensor]]:
    """Return a weight of a MODEL as it is without any LoRA, and what turns a copy of it into numbers.

    The host's `get_key_patches` gives the same for all keys, but trips over keys that GGUF layers make up for the host's estimate of memory.
    """
    weight, _, convert = comfy.model_patcher.get_key_weight(model.model, key)
    if key in model.hook_backup:
        weight = model.hook_backup[key][0]
    elif key in model.backup:
        weight = model.backup[key].weight
    return weight, convert or (lambda value, **_: value)


def _weight_shapes(model: Any) -> dict[str, tuple[int, ...]]:
    """Collect the shapes."""
    shapes = {key: tuple(value.shape) for key, value in model.model_state_dict().items()}
    for name, module in model.model.named_modules():
        key = f"{name}.weight"
        if key in shapes and is_linear(module):
            shapes[key] = (module.out_features, module.in_features)
    return shapes


_patchers: weakref.WeakValueDictionary[tuple[Any, ...], Any] = weakref.WeakValueDictionary()
_patchers_lock = threading.Lock()


def split_patches(model: Any, file: Any, patches: Mapping[str, Any]) -> tuple[Any, list[str]]:
    """Turn patches into terms.

    Args:
        model: The MODEL they are for.
        file: The LoRA file they come from; the terms are kept and used again while a MODEL uses them.
        patches: Model key -> the host's adapter or patch.

    Returns:
        A patcher of the host whose model is the `LoraModule` of the terms, and the keys whose patches can only be merged.
    """
    signature = ";".join(f"{key}:{type(patch).__name__}" for key, patch in sorted(patches.items()))
    name = (id(file), str(model.load_device), str(model.offload_device), signature)
    with _patchers_lock:
        known = _patchers.get(name)
        if known is None:
            terms = {}
            for key, patch in patches.items():
                owner, _, parameter = key.rpartition(".")
                term = make_term(model.model.get_submodule(owner), parameter, patch)
                if term is not None:
                    terms[key] = term
            module = LoraModule(terms, file)
            known = comfy.model_patcher.CoreModelPatcher(module, load_device=model.load_device, offload_device=model.offload_device)
            _patchers[name] = known
    done = set(known.model.keys)
    return known, [key for key in patches if key not in done]


def add_rows(patcher: Any, rows: Sequence[UnmergedRow]) -> None:
    """Put rows beside the weights of a clone, together with those that it has already.

    Args:
        patcher: The clone; changed in place.
        rows: The new rows.
    """
    if not rows:
        return
    known: UnmergedRows | None = patcher.get_attachment(KEY)
    stack = UnmergedRows([*(known.rows if known else ()), *rows])
    patcher.set_attachments(KEY, stack)
    patcher.set_injections(KEY, [PatcherInjection(inject=stack.inject, eject=stack.eject)])
    patchers = {id(row.module): row.patcher for row in stack.rows}
    patcher.set_additional_models(KEY, [handle.clone() for handle in patchers.values()])
    patcher.remove_callbacks_with_key(CallbacksMP.ON_CLONE, KEY)
    patcher.add_callback_with_key(CallbacksMP.ON_CLONE, KEY, _not_injected_yet)


def _not_injected_yet(_patcher: Any, clone: Any) -> None:
    """A clone copies `is_injected` from a loaded model; when it is dropped it would take the hooks off a model that others still use."""
    clone.is_injected = False

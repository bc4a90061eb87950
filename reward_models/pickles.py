"""Read torch's pickle-based files (.pt, .pth, .ckpt, .bin) without running anything that is in them.

A pickle names functions and classes to call. Here only tensors can come to life: their two rebuild functions, ordered dicts and sets. Every other
name, whatever it is, becomes an inert object that keeps the state which the file gives it, so that a whole pickled module (as MPS publishes) yields
its parameters although neither its package nor transformers is installed, and a hostile pickle yields nothing.
Does not: run TorchScript archives; they are refused.
"""

from __future__ import annotations

import collections
import pickle
import tarfile
import types
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


class Inert:
    """Stands in for any object of a pickle that is not a tensor or a plain container; never does anything."""

    def __new__(cls, *args: object, **kwargs: object) -> Inert:
        return super().__new__(cls)

    def __init__(self, *args: object, **kwargs: object):
        pass

    def __setstate__(self, state: object) -> None:
        if isinstance(state, tuple) and len(state) == 2 and isinstance(state[0], dict):
            state = state[0]
        if isinstance(state, dict):
            object.__setattr__(self, "state", state)

    def __setitem__(self, key: object, value: object) -> None:
        pass

    def append(self, item: object) -> None:
        """Accept list items of a pickled list subclass and forget them."""

    def extend(self, items: object) -> None:
        """As `append`."""

    def add(self, item: object) -> None:
        """As `append`, for set subclasses."""


def _rebuild_tensor(*args: Any) -> Tensor:
    # Storage, offset, size, stride; what follows (requires_grad, hooks) is not data.
    return torch._utils._rebuild_tensor_v2(*args[:4], False, collections.OrderedDict())


def _rebuild_parameter(data: Tensor, *_: object) -> Tensor:
    # The trailing arguments are requires_grad and hooks: callables have no business here.
    if not isinstance(data, Tensor):
        raise pickle.UnpicklingError("a parameter without a tensor")
    return data


class _Unpickler(pickle.Unpickler):
    """Knows tensors and plain containers; any other global is an inert class of its own (so that state set on a class stays harmless)."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if module in ("builtins", "__builtin__") and name == "set":
            return set
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            # Fresh function objects: a pickle can set attributes on what it was given.
            return lambda *args: _rebuild_tensor(*args)
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return lambda *args: _rebuild_parameter(*args)
        # Storage classes never get here: torch.load's wrapper around this class handles them itself.
        # A module name that does not exist keeps torch's older reader from comparing source code (and from writing a patch file about it).
        return type("Inert", (Inert,), {"origin": f"{module}.{name}", "__module__": "reward_lab.nowhere"})


def _load(file: Any, **kwargs: Any) -> Any:
    return _Unpickler(file, **kwargs).load()


# torch.load takes a module with these three names.
_RESTRICTED = types.SimpleNamespace(__name__="reward_lab_restricted_pickle", Unpickler=_Unpickler, load=_load, UnpicklingError=pickle.UnpicklingError)


# What a damaged or hostile file can raise inside pickle, zipfile, tarfile and torch (found by mutating files at random).
_READ_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    SystemError,
    TypeError,
    ValueError,
    pickle.UnpicklingError,
    tarfile.TarError,
    zipfile.BadZipFile,
)


def read_pickle(path: Path) -> dict[str, Tensor]:
    """All tensors of a torch file by name: a state dict, a state dict under `state_dict` / `model` / `module`, or a whole module.

    Args:
        path: a file that `torch.save` wrote, zip or older form. Tensors are placed on the CPU whatever the file says.

    Raises:
        ValueError: not such a file, damaged, a TorchScript archive, or without tensors.
    """
    with path.open("rb") as file:
        is_zip = file.read(2) == b"PK"
    if is_zip:
        if not zipfile.is_zipfile(path):
            raise ValueError(f"{path} is truncated or damaged: its directory, which stands at the end of the file, is missing. Download it again.")
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
        if any(name.endswith("/constants.pkl") or name == "constants.pkl" for name in names):
            raise ValueError(f"{path} is a TorchScript program, which would have to be run to be read; give a checkpoint (state dict) instead.")
    try:
        with torch.inference_mode(False), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Couldn't retrieve source code")
            loaded = torch.load(path, map_location="cpu", pickle_module=_RESTRICTED, weights_only=False, mmap=True if is_zip else None)
    except _READ_ERRORS as error:
        raise ValueError(f"{path} cannot be read as a torch checkpoint ({type(error).__name__}: {error}); it is damaged or not one.") from error
    tensors = _tensors(loaded)
    if not tensors:
        raise ValueError(f"{path} holds no named tensors; a state dict or a whole pickled module is needed.")
    return tensors


def _tensors(loaded: object) -> dict[str, Tensor]:
    if isinstance(loaded, Inert):
        return dict(_walk(loaded, "", set()))
    if isinstance(loaded, Mapping):
        flat = {key: value for key, value in loaded.items() if isinstance(key, str) and isinstance(value, Tensor)}
        if flat:
            return flat
        for name in ("state_dict", "model", "module", "model_state_dict"):
            if isinstance(loaded.get(name), (Mapping, Inert)):
                return _tensors(loaded[name])
    return {}


def _walk(module: Inert, prefix: str, parents: set[int]) -> Any:
    """Named tensors of a pickled torch module: parameters and persistent buffers, as its `state_dict()` would give them."""
    state = getattr(module, "state", {})
    if id(module) in parents:
        return
    hidden = state.get("_non_persistent_buffers_set")
    hidden = hidden if isinstance(hidden, set) else set()
    for group, skip in (("_parameters", set()), ("_buffers", hidden)):
        entries = state.get(group)
        for name, value in (entries.items() if isinstance(entries, Mapping) else ()):
            if isinstance(value, Tensor) and name not in skip:
                yield f"{prefix}{name}", value
    children = state.get("_modules")
    for name, child in (children.items() if isinstance(children, Mapping) else ()):
        if isinstance(child, Inert):
            yield from _walk(child, f"{prefix}{name}.", parents | {id(module)})

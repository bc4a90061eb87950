"""Read torch's pickle-based files (.pt, .pth, .ckpt, .bin) without running anything that is in them.

A pickle names functions and classes to call. Here only tensors can come to life: their two rebuild functions, ordered dicts and sets. Every other
name, whatever it is, becomes an inert object that keeps the state which the file gives it, so that a whole pickled module (as MPS publishes) yields
its parameters although neither its package nor transformers is installed, and a hostile pickle yields nothing. Sizes that a file declares are held
against the size that it has, so that a small file cannot ask for much memory or time.
Does not: run TorchScript archives or open torch's tar form of before 2017; both are refused.
"""

from __future__ import annotations

import collections
import itertools
import math
import pickle
import tarfile
import types
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# No model has as many modules. A file in which every module names the next one twice would never be walked to its end.
_MOST, _DEEPEST = 200_000, 100


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
    storage, _, size, _ = args[:4]
    stored = storage.untyped().nbytes() // storage._dtype.itemsize
    if math.prod(size) > stored:
        # Strides of 0 would make tensors of any size out of one number.
        raise pickle.UnpicklingError(f"a tensor of shape {tuple(size)} over {stored} stored values")
    return torch._utils._rebuild_tensor_v2(*args[:4], False, collections.OrderedDict())


def _rebuild_parameter(data: Tensor, *_: object) -> Tensor:
    # The trailing arguments are requires_grad and hooks: callables have no business here.
    if not isinstance(data, Tensor):
        raise pickle.UnpicklingError("a parameter without a tensor")
    return data


class _Function:
    """A function that a pickle may call and cannot change: it has no attributes to be set."""

    __slots__ = ()

    def __init_subclass__(cls, *, calls: Callable[..., Any]) -> None:
        cls.__call__ = lambda self, *args: calls(*args)


class _RebuildTensor(_Function, calls=_rebuild_tensor):
    __slots__ = ()


class _RebuildParameter(_Function, calls=_rebuild_parameter):
    __slots__ = ()


class _Unpickler(pickle.Unpickler):
    """Knows tensors and plain containers; any other global is an inert class of its own (so that state set on a class stays harmless)."""

    # Bytes of the file, which bound every storage in it.
    limit_bytes = 0

    def __setattr__(self, name: str, value: Any) -> None:
        # torch.load hands its reader of storages over in this way.
        super().__setattr__(name, self._guarded(value) if name == "persistent_load" else value)

    def _guarded(self, read: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def persistent_load(saved_id: Any) -> Any:
            if not isinstance(saved_id, tuple) or len(saved_id) < 2:
                raise pickle.UnpicklingError("a persistent id that is neither a storage nor a module")
            if saved_id[0] in ("module", b"module"):
                # torch's older reader would compare source code here, and write a patch file of any name.
                return saved_id[1]
            if not all(isinstance(value, int) and 0 <= value <= self.limit_bytes for value in saved_id[4:5]):
                raise pickle.UnpicklingError(f"a storage of {saved_id[4]} values in a file of {self.limit_bytes} bytes")
            return read(saved_id)

        return persistent_load

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if module in ("builtins", "__builtin__") and name == "set":
            return set
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _RebuildTensor()
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return _RebuildParameter()
        # Storage classes never get here: torch.load's wrapper around this class handles them itself.
        # A module name that does not exist keeps torch's older reader from comparing source code (and from writing a patch file about it).
        return type("Inert", (Inert,), {"origin": f"{module}.{name}", "__module__": "reward_lab.nowhere"})


def _restricted(limit_bytes: int) -> types.SimpleNamespace:
    """What torch.load takes for its pickle module, for a file of this size."""
    unpickler = type("_Unpickler", (_Unpickler,), {"limit_bytes": limit_bytes})

    def load(file: Any, **kwargs: Any) -> Any:
        return unpickler(file, **kwargs).load()

    return types.SimpleNamespace(__name__="reward_lab_restricted_pickle", Unpickler=unpickler, load=load, UnpicklingError=pickle.UnpicklingError)


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
        _check_archive(path)
    elif tarfile.is_tarfile(path):
        raise ValueError(f"{path} is in torch's tar form of before 2017, which is not read; load it with torch and save it again.")
    try:
        with torch.inference_mode(False):
            module = _restricted(path.stat().st_size)
            loaded = torch.load(path, map_location="cpu", pickle_module=module, weights_only=False, mmap=True if is_zip else None)
        tensors = _tensors(loaded)
    except _READ_ERRORS as error:
        raise ValueError(f"{path} cannot be read as a torch checkpoint ({type(error).__name__}: {error}); it is damaged or not one.") from error
    if not tensors:
        raise ValueError(f"{path} holds no named tensors; a state dict or a whole pickled module is needed.")
    return tensors


def _check_archive(path: Path) -> None:
    """Refuse zip files that torch did not write: torch packs nothing, so an archive that unpacks to more than it is was made to fill the memory."""
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path} is truncated or damaged: its directory, which stands at the end of the file, is missing. Download it again.")
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except _READ_ERRORS as error:
        raise ValueError(f"{path} is damaged: its directory cannot be read ({error}). Download it again.") from error
    if any(entry.filename.endswith("/constants.pkl") or entry.filename == "constants.pkl" for entry in entries):
        raise ValueError(f"{path} is a TorchScript program, which would have to be run to be read; give a checkpoint (state dict) instead.")
    unpacked_bytes, size_bytes = sum(entry.file_size for entry in entries), path.stat().st_size
    if unpacked_bytes > size_bytes or any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise ValueError(
            f"{path} has {size_bytes} bytes and unpacks to {unpacked_bytes}, but torch packs nothing; if you trust the file, load and save it anew with torch."
        )


def _tensors(loaded: object) -> dict[str, Tensor]:
    if isinstance(loaded, Inert):
        return dict(_walk(loaded, "", set(), itertools.count()))
    if isinstance(loaded, Mapping):
        flat = {key: value for key, value in loaded.items() if isinstance(key, str) and isinstance(value, Tensor)}
        if flat:
            return flat
        for name in ("state_dict", "model", "module", "model_state_dict"):
            if isinstance(loaded.get(name), (Mapping, Inert)):
                return _tensors(loaded[name])
    return {}


def _walk(module: Inert, prefix: str, parents: set[int], visits: Iterator[int]) -> Iterator[tuple[str, Tensor]]:
    """Named tensors of a pickled torch module: parameters and persistent buffers, as its `state_dict()` would give them."""
    state = getattr(module, "state", {})
    if id(module) in parents:
        return
    if next(visits) > _MOST or len(parents) > _DEEPEST:
        raise pickle.UnpicklingError(f"more than {_MOST} modules, or nested more than {_DEEPEST} deep")
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
            yield from _walk(child, f"{prefix}{name}.", parents | {id(module)}, visits)

"""Read weight files whatever their extension says, and put them into a model with no key left over, missing or misshapen.

Does: sniff the file header; safetensors (with metadata) and torch pickles (through pickles.py, nothing is executed); checks for NaN; strict loading as new
parameters that gradients can pass through even when the caller is in inference mode.
Does not: download, guess missing weights, or know key layouts (layouts.py).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from . import layouts
from .pickles import read_pickle

_NAMED = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Weights:
    """What a weight file holds.

    Attributes:
        state: tensors on the CPU by name, wrapper prefixes removed.
        metadata: text entries of a safetensors header; empty for other forms.
        form: "safetensors" or "pickle".
        kind: see `layouts.identify`.
    """

    state: dict[str, Tensor]
    metadata: dict[str, str]
    form: str
    kind: str


def sniff(path: str | Path) -> str:
    """Tell "safetensors" from "pickle" by the first bytes, since extensions lie (some `.pth` files are safetensors).

    Raises:
        ValueError: no such file, empty, a Git LFS pointer, a web page, or nothing known.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"There is no file {path}; check the name, or download the weights there.")
    with path.open("rb") as file:
        head = file.read(64)
    if len(head) < 16:
        raise ValueError(f"{path} has {path.stat().st_size} bytes; it is empty or its download stopped. Download it again.")
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 100 * 2**20:
        return "safetensors"
    if head[:4] == b"PK\x03\x04" or head[:1] == b"\x80" or head[:2] in (b"(d", b"ct", b"cc"):
        return "pickle"
    if head.startswith(b"version https://git-lfs"):
        raise ValueError(f"{path} is a Git LFS pointer, not the weights; download the file itself (`git lfs pull`).")
    if head.lstrip()[:1] == b"<":
        raise ValueError(f"{path} is a web page, not weights; download the file itself.")
    raise ValueError(f"{path} is neither safetensors nor a torch checkpoint (first bytes {head[:8]!r}).")


def read_weights(path: str | Path) -> Weights:
    """Read a weight file of any supported form.

    Args:
        path: safetensors, `.pt` / `.pth` / `.ckpt` / `.bin` state dict, or a whole pickled module.

    Raises:
        ValueError: see `sniff`; damaged or truncated; NaN or infinity in a tensor (named).
    """
    path = Path(path)
    form = sniff(path)
    state, metadata = _read_safetensors(path) if form == "safetensors" else (read_pickle(path), {})
    state = layouts.strip_wrappers(state)
    check_finite(state, str(path))
    return Weights(state=state, metadata=metadata, form=form, kind=layouts.identify(state))


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with torch.inference_mode(False), safe_open(path, framework="pt", device="cpu") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except SafetensorError as error:
        needed = _needed_bytes(path)
        size = path.stat().st_size
        detail = f"it has {size} bytes, its header asks for {needed}" if needed is not None and needed != size else str(error)
        raise ValueError(f"{path} is truncated or damaged: {detail}. Download it again.") from error


def _needed_bytes(path: Path) -> int | None:
    """Length that the header promises, or None when the header itself is unreadable."""
    with path.open("rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        try:
            header = json.loads(file.read(header_bytes))
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        except (ValueError, KeyError, TypeError, AttributeError, IndexError):
            return None
    return 8 + header_bytes + max(ends, default=0)


def check_finite(state: Mapping[str, Tensor], what: str) -> None:
    """Refuse weights with NaN or infinity.

    Raises:
        ValueError: names the first tensors that hold one.
    """
    bad = [key for key, value in state.items() if value.is_floating_point() and not _is_finite(value)]
    if bad:
        raise ValueError(f"{what} holds NaN or infinity in {_listing(bad)}; the file is damaged or its training diverged.")


def _is_finite(value: Tensor) -> bool:
    # One reduction is enough when all is well; the exact test only runs when the sum overflows or meets a NaN.
    return bool(value.sum(dtype=torch.float32).isfinite()) or bool(value.isfinite().all())


def _listing(keys: list[str]) -> str:
    shown = ", ".join(sorted(keys)[:_NAMED])
    return f"{shown} and {len(keys) - _NAMED} more" if len(keys) > _NAMED else shown


def check_keys(module: nn.Module, state: Mapping[str, Tensor], what: str) -> None:
    """Compare names and shapes of a state dict with what a module needs.

    Raises:
        ValueError: names missing, unexpected and misshapen keys.
    """
    needed = module.state_dict()
    missing = [key for key in needed if key not in state]
    unexpected = [key for key in state if key not in needed]
    misshapen = [
        f"{key} {tuple(state[key].shape)} instead of {tuple(value.shape)}"
        for key, value in needed.items()
        if key in state and state[key].shape != value.shape
    ]
    numberless = [
        f"{key} {str(state[key].dtype).removeprefix('torch.')}"
        for key, value in needed.items()
        if key in state and value.is_floating_point() and not state[key].is_floating_point()
    ]
    found = {"missing": missing, "unexpected": unexpected, "wrong shape": misshapen, "not floating-point": numberless}
    problems = [f"{title}: {_listing(keys)}" for title, keys in found.items() if keys]
    if problems:
        raise ValueError(f"{what} does not fit the model; {'; '.join(problems)}. Check that file and config belong together.")


def load_into(module: nn.Module, state: Mapping[str, Tensor], what: str) -> None:
    """Give `module` (best built on the meta device) these weights as new parameters, after `check_keys`.

    Parameters are made outside inference mode: one made inside it could never be trained through again.

    Args:
        module: the model; buffers that are not saved are left as they are.
        state: tensors; their dtype is kept.
        what: file name for messages.

    Raises:
        ValueError: see `check_keys`.
    """
    check_keys(module, state, what)
    with torch.inference_mode(False):
        fresh = {key: value.clone() if value.is_inference() else value for key, value in state.items()}
        module.load_state_dict(fresh, strict=True, assign=True)

"""Finds, checks and loads the files of a Wan2.2 model: two experts (or one model for all noise levels, as 5B is), text encoder, VAE.

Every file's header is checked before the first one is loaded, so that a truncated file costs seconds, not minutes.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import comfy.sd
import comfy.utils
import folder_paths
import nodes
import torch

from ..lora_train.flow import EXPERTS
from ..lora_train.input_config import LATENTS
from ..lora_train.safetensors_file import Header, read_header
from . import paths
from .experts import ExpertGuess, guess_expert
from .lora_patch import EXPERT_ATTACHMENT
from .preflight import ROLES, latent_channels
from .text import load_text_encoder

logger = logging.getLogger("reward_lab")

WEIGHT_DTYPES = {"default": None, "fp8_e4m3fn": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}
# Chosen for the low-noise expert of a model that has none.
NO_EXPERT = "none (one model)"
FOLDERS = {"text_encoder": "text_encoders", "vae": "vae"}
# ComfyUI-GGUF's loader: ComfyUI itself knows no layers for such weights.
GGUF_LOADER = "UnetLoaderGGUF"
# A key that only files of that kind have; told apart by suffix, since full checkpoints put prefixes before it.
MARKS = {
    "high": ("head.head.weight", "a Wan diffusion model"),
    "low": ("head.head.weight", "a Wan diffusion model"),
    "text_encoder": ("shared.weight", "a umT5 text encoder"),
    "vae": ("decoder.head.0.gamma", "a Wan VAE"),
}


class NotLoadedError(AttributeError):
    """A node uses a model that is not there. An attribute that is not there, to the host, which asks every output for some."""


class NoModel:
    """Stands in a MODEL's place: whatever uses it fails with the reason, and the nodes that do not, run. An output that blocks would leave no failure in the
    host's history, where sweeps and API clients look for it."""

    def __init__(self, reason: str) -> None:
        self._reason = reason

    def __getattr__(self, name: str) -> Any:
        raise NotLoadedError(self._reason)


@dataclass(frozen=True, kw_only=True)
class LoadedWan:
    """The host's objects for one Wan2.2 model; a GGUF model that cannot be loaded is a `NoModel`."""

    model_high: Any
    model_low: Any
    clip: Any
    vae: Any


def resolve(high: str, low: str, text_encoder: str, vae: str, weight_dtype: str = "default") -> dict[str, str]:
    """Find the files and check them without loading.

    Args:
        high: Name in models/diffusion_models, safetensors or GGUF.
        low: The same, or NO_EXPERT; a 5B model's name stands for that as well.
        text_encoder: Name in models/text_encoders.
        vae: Name in models/vae.
        weight_dtype: One of WEIGHT_DTYPES.

    Returns:
        WAN_FILES: absolute paths under `high`, `low` (empty for one model), `text_encoder`, `vae`, `weight_dtype`, and `latents`, a key of `LATENTS`.

    Raises:
        ValueError: A file is missing, truncated, of another kind, or an expert sits in the other's slot.
    """
    if weight_dtype not in WEIGHT_DTYPES:
        raise ValueError(f"weight_dtype is {weight_dtype!r}; it must be one of {', '.join(WEIGHT_DTYPES)}.")
    names = {"high": high, "low": low, "text_encoder": text_encoder, "vae": vae}
    names = {role: name for role, name in names.items() if name != NO_EXPERT}
    found = {role: paths.model_path(FOLDERS[role], name) if role in FOLDERS else paths.expert_path(name) for role, name in names.items()}
    headers = {role: _checked_header(role, path) for role, path in found.items()}
    if found.get("low") == found["high"] and latent_channels(headers["high"]) == LATENTS["wan2.2"].channels:
        del found["low"], headers["low"]
    experts = [expert for expert in EXPERTS if expert in found]
    _check_slots({expert: guess_expert(found[expert].name, headers[expert].metadata) for expert in experts}, found)
    if len(experts) == 2:
        _check_same_size(headers, found)
    channels = latent_channels(headers["high"])
    latents = next((name for name, layout in LATENTS.items() if layout.channels == channels), "wan2.1")
    return {"low": "", **{role: str(path) for role, path in found.items()}, "weight_dtype": weight_dtype, "latents": latents}


def load(files: dict[str, str]) -> LoadedWan:
    """Load the files that `resolve` found, through the host's own loaders; GGUF files through ComfyUI-GGUF's, where that is installed.

    Args:
        files: WAN_FILES.

    Returns:
        The host's objects. Both experts carry their role, so that later nodes notice when they are swapped; one model stands in both places.
    """
    dtype = WEIGHT_DTYPES[files["weight_dtype"]]
    model_options = {} if dtype is None else {"dtype": dtype}
    models = {}
    for expert in filter(files.get, EXPERTS):
        if paths.is_gguf(files[expert]) and GGUF_LOADER not in nodes.NODE_CLASS_MAPPINGS:
            models[expert] = NoModel(_no_gguf(files[expert]))
            continue
        models[expert] = _load_gguf(files[expert]) if paths.is_gguf(files[expert]) else comfy.sd.load_diffusion_model(files[expert], dict(model_options))
        if files["low"]:
            models[expert].set_attachments(EXPERT_ATTACHMENT, expert)
    clip = load_text_encoder(files["text_encoder"], embedding_directory=folder_paths.get_folder_paths("embeddings"))
    tensors, metadata = comfy.utils.load_torch_file(files["vae"], return_metadata=True)
    vae = comfy.sd.VAE(sd=tensors, metadata=metadata)
    vae.throw_exception_if_invalid()
    return LoadedWan(model_high=models["high"], model_low=models.get("low", models["high"]), clip=clip, vae=vae)


def _load_gguf(path: str) -> Any:
    """The MODEL that ComfyUI-GGUF makes of a file, which it finds by its name in the host's folders."""
    folders = folder_paths.get_folder_paths(paths.GGUF_FOLDER)
    name = next(Path(path).relative_to(folder).as_posix() for folder in folders if Path(path).is_relative_to(folder))
    return nodes.NODE_CLASS_MAPPINGS[GGUF_LOADER]().load_unet(name)[0]


def _no_gguf(path: str) -> str:
    return (
        f"{Path(path).name} can be trained, but ComfyUI itself cannot sample GGUF files: install the custom node ComfyUI-GGUF, whose loader is then used "
        "here, or choose the safetensors file of this expert."
    )


def _checked_header(role: str, path: Path) -> Header:
    """Read a file's header and check that it is of the right kind. Files of other formats than safetensors and GGUF are left to the host."""
    if path.suffix.lower() not in (".safetensors", ".sft", paths.GGUF_EXTENSION):
        logger.warning("%s is neither a safetensors nor a GGUF file; it is not checked before loading", path.name)
        return Header(shapes={}, dtypes={}, bytes_of={}, metadata={})
    header = read_header(path, ROLES[role])
    mark, kind = MARKS[role]
    if not any(key.endswith(mark) for key in header.shapes):
        other = next((words for name, words in MARKS.values() if any(key.endswith(name) for key in header.shapes)), "something else")
        raise ValueError(f"{path.name} is not {kind} but {other}. Choose another file for {role.replace('_', ' ')}.")
    return header


def _check_slots(guesses: dict[str, ExpertGuess], found: dict[str, Path]) -> None:
    """Refuse an expert whose metadata or name says that it belongs into the other slot; warn when both slots hold the same file."""
    wrong = [slot for slot, guess in guesses.items() if guess.expert not in (None, slot)]
    for slot in wrong:
        message = f"{found[slot].name} is the {guesses[slot].expert}-noise expert by its {guesses[slot].source}, but it was chosen for {slot} noise"
        if len(wrong) == 2:
            raise ValueError(f"The experts are swapped: {message}. Exchange the two files.")
        raise ValueError(f"{message}. Choose the {slot}-noise expert; if the file's name is wrong, rename it.")
    if found["high"] == found.get("low"):
        logger.warning("both experts are the same file, %s", found["high"].name)


def _check_same_size(headers: dict[str, Header], found: dict[str, Path]) -> None:
    """Refuse experts of different widths, such as a 14B and a 5B file."""
    widths = {}
    for expert in ("high", "low"):
        shapes = [shape for key, shape in headers[expert].shapes.items() if key.endswith("patch_embedding.weight")]
        widths[expert] = shapes[0][0] if shapes else None
    if None not in widths.values() and widths["high"] != widths["low"]:
        raise ValueError(
            f"The experts differ in width: {found['high'].name} has {widths['high']}, {found['low'].name} has {widths['low']}. "
            "Choose two files of the same model."
        )

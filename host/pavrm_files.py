"""Finds and reads the parts of a PAVRM: a truncated Wan trunk, its sizes, which blocks are tapped.

Forms: HY-Video-PRFL's checkpoint folder (config.json, one or several safetensors), any Wan file, our single file (`trunk.`, `query_attention.`, `mlp.`).
Does not: build the model (pavrm.py).
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..lora_train.input_config import LATENTS, MASK_CHANNELS, PATCH
from ..reward_models.weights import read_weights

# HY-Video-PRFL keeps blocks 0 to 7 of 40 unless told otherwise.
UPSTREAM_BLOCKS = 8
_TEXT_LEN = 512
_HEAD_WIDTH = 128
_WRAPPERS = ("model.diffusion_model.", "diffusion_model.", "_fsdp_wrapped_module.", "_orig_mod.")
_QUERY, _MLP = "query_attention", "mlp"
_STEP = re.compile(r"-(\d+)$")
_BLOCK = re.compile(r"blocks\.(\d+)\.")
_SIZES = ("model_type", "text_len", "in_dim", "dim", "ffn_dim", "freq_dim", "text_dim", "out_dim", "num_heads", "eps", "patch_size")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trunk:
    """A trunk as read.

    Attributes:
        state: tensors in Wan's own names; no output head.
        sizes: arguments of the host's WanModel.
        taps: blocks, counted from 1, whose output is pooled.
    """

    state: dict[str, torch.Tensor]
    sizes: dict[str, Any]
    taps: tuple[int, ...]


def read_trunk(path: str | Path, *, taps: tuple[int, ...] | None = None) -> Trunk:
    """Read a trunk from a folder or a file; blocks above the last tapped one are left out.

    Raises:
        ValueError: nothing there, a part is missing or damaged, it is not a Wan model, sizes cannot be told, or a tapped block is missing.
    """
    path = _checkpoint_in(Path(path))
    state, config = _read_folder(path) if path.is_dir() else _read_file(path)
    if "patch_embedding.weight" not in state or not any(_BLOCK.match(key) for key in state):
        keys = ", ".join(sorted(state)[:4])
        raise ValueError(f"{path} is not a Wan transformer (keys {keys}, ...); give the trunk of a PAVRM: a checkpoint folder or a Wan file.")
    blocks = sorted({int(match.group(1)) for key in state if (match := _BLOCK.match(key))})
    if blocks != list(range(len(blocks))):
        raise ValueError(f"{path} holds blocks {blocks}; they must be 0 to {blocks[-1]} without gaps, so a part of the checkpoint is missing.")
    given = tuple(config.get("feature_layers") or ())
    taps = taps or given or (UPSTREAM_BLOCKS if _is_uncut(state, len(blocks)) else len(blocks),)
    if not all(1 <= tap <= len(blocks) for tap in taps):
        raise ValueError(f"Tapped blocks are {list(taps)}, counted from 1, but {path} has {len(blocks)} blocks; choose among 1 to {len(blocks)}.")
    kept = {key: value for key, value in state.items() if not key.startswith("head.") and not _is_above(key, max(taps))}
    sizes = _sizes(path, kept, config.get("transformer", config), max(taps))
    if "head.head.weight" in state:
        sizes["out_dim"] = state["head.head.weight"].shape[0] // PATCH**2
    return Trunk(state=kept, sizes=sizes, taps=tuple(taps))


def find_heads(
    trunk: str | Path, query: str | Path | None, head: str | Path | None, *, needs_query: bool = True
) -> tuple[Path | None, Path | None]:
    """The two head files: as given, found in a given folder, or where HY-Video-PRFL writes those of a checkpoint folder (`../../mlp`, the same step).

    Returns:
        Query attention and score head; both None for a trunk that brings its own.

    Raises:
        ValueError: a folder holds none or several of a kind; the query attention is missing.
    """
    trunk = _checkpoint_in(Path(trunk))
    folder, step = trunk.parent.parent / "mlp", _STEP.search(trunk.name)
    if query is None and head is None and trunk.is_dir() and step:
        beside = [folder / f"{stem}_step_{step.group(1)}.ckpt" for stem in (_QUERY, _MLP)]
        if all(path.is_file() for path in beside):
            return beside[0], beside[1]
    if needs_query and query is None and (head is not None or trunk.is_dir()):
        raise ValueError(
            f"{trunk} needs both heads: give the query attention ({_QUERY}_step_N.ckpt) and the score head ({_MLP}_step_N.ckpt), or the pooling (mean or max) "
            "of a head that has no query."
        )
    return tuple(None if path is None else _only(Path(path), stem) for path, stem in ((query, _QUERY), (head, _MLP)))


def _only(path: Path, stem: str) -> Path:
    if not path.is_dir():
        return path
    found = sorted(path.glob(f"{stem}_step_*.ckpt"))
    if len(found) != 1:
        raise ValueError(f"{path} holds {len(found)} files {stem}_step_N.ckpt; name the one that belongs to the trunk.")
    return found[0]


def _is_uncut(state: Mapping[str, torch.Tensor], blocks: int) -> bool:
    """Whether this is a whole generator, of which upstream keeps 8 blocks. A saved PAVRM ends with the block that is tapped and has no output head, or one of
    zeros where it was made to be opened by the host."""
    head = state.get("head.head.weight")
    return blocks > 2 * UPSTREAM_BLOCKS and head is not None and bool(head.count_nonzero())


def _is_above(key: str, count: int) -> bool:
    match = _BLOCK.match(key)
    return match is not None and int(match.group(1)) >= count


def _checkpoint_in(path: Path) -> Path:
    """The folder itself, or the one checkpoint in it where it is the folder of all of them."""
    inner = sorted(path.glob("checkpoint-*")) if path.is_dir() and not any(path.glob("*.safetensors")) else []
    if len(inner) > 1:
        raise ValueError(f"{path} holds {len(inner)} checkpoints ({', '.join(folder.name for folder in inner[:5])}); name one of them.")
    return inner[0] if inner else path


def _read_folder(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    index = next(iter(sorted(folder.glob("*.safetensors.index.json"))), None)
    if index is not None:
        names = sorted(set(_json(index).get("weight_map", {}).values()))
        missing = [name for name in names if not (folder / name).is_file()]
        if missing or not names:
            raise ValueError(f"{folder} lacks {', '.join(missing) or 'the files of its index'}, which {index.name} names; download the whole folder.")
        files = [folder / name for name in names]
    else:
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise ValueError(f"{folder} holds no .safetensors; give a checkpoint folder such as checkpoints/checkpoint-100.")
    state: dict[str, torch.Tensor] = {}
    for file in files:
        state.update(_unwrapped(read_weights(file).state))
    if index is not None:
        absent = sorted(set(_unwrapped(dict.fromkeys(_json(index)["weight_map"]))) - set(state))
        if absent:
            raise ValueError(f"{folder} lacks the tensors {', '.join(absent[:5])} that {index.name} names; download the whole folder.")
    config = folder / "config.json"
    return state, _json(config) if config.is_file() else {}


def _read_file(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    content = read_weights(path)
    try:
        config = json.loads(content.metadata.get("config", "{}"))
    except ValueError as error:
        raise ValueError(f"The metadata of {path} has a config that is not JSON: {error}.") from error
    if content.kind == "pavrm_lora":
        raise ValueError(f"{path} is a PAVRM in LoRA form; it needs its generator (--generator FILE).")
    if content.kind == "pavrm":
        return {key.removeprefix("trunk."): value for key, value in content.state.items() if key.startswith("trunk.")}, config
    beside = path.with_name("config.json")
    return _unwrapped(content.state), config or (_json(beside) if beside.is_file() else {})


def _json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as JSON ({error}).") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds a {type(values).__name__}, not an object.")
    return values


def _unwrapped(state: Mapping[str, Any]) -> dict[str, Any]:
    result = {}
    for key, value in state.items():
        for wrapper in _WRAPPERS:
            key = key.replace(wrapper, "")
        result[key] = value
    return result


def _sizes(path: Path, state: Mapping[str, torch.Tensor], config: Mapping[str, Any], blocks: int) -> dict[str, Any]:
    """Arguments for WanModel: what tensors show is read off them; what they do not show comes from the config. Its block count is not believed:
    upstream's config.json keeps the number of the uncut base model."""
    try:
        shown = {
            "dim": state["patch_embedding.weight"].shape[0],
            "in_dim": state["patch_embedding.weight"].shape[1],
            "ffn_dim": state["blocks.0.ffn.0.weight"].shape[0],
            "text_dim": state["text_embedding.0.weight"].shape[1],
            "freq_dim": state["time_embedding.0.weight"].shape[1],
        }
    except KeyError as error:
        raise ValueError(f"{path} lacks {error.args[0]}; it is not a whole Wan trunk.") from error
    wrong = [f"{name} {config[name]} instead of {value}" for name, value in shown.items() if name in config and config[name] != value]
    if wrong:
        raise ValueError(f"Config and tensors of {path} disagree: {'; '.join(wrong)}. They belong to different models.")
    told = {name: config[name] for name in _SIZES if name in config}
    if "num_heads" not in told:
        if shown["dim"] % _HEAD_WIDTH:
            raise ValueError(f"{path} is {shown['dim']} wide and does not tell its number of heads; put num_heads into config.json or the file's metadata.")
        told["num_heads"] = shown["dim"] // _HEAD_WIDTH
    told["model_type"] = "i2v" if "img_emb.proj.1.weight" in state else "t2v"
    positions = state.get("img_emb.emb_pos")
    extra = {} if positions is None else {"flf_pos_embed_token_number": positions.shape[1]}
    # A saved trunk has no output head, which would show how many of its input channels are the latent, and how many an image condition.
    with_image = {2 * layout.channels + MASK_CHANNELS: layout.channels for layout in LATENTS.values()}
    latent = {"out_dim": with_image.get(shown["in_dim"], shown["in_dim"])}
    return {**latent, "text_len": _TEXT_LEN, **told, **shown, "patch_size": (1, 2, 2), "num_layers": blocks, **extra}

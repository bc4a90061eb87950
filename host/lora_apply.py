"""One forward of a model with LoRA rows, from files to a file: what `lab.py lora apply` does, to compare loaders number by number.

Not for pictures: no sampling, no VAE. Everything is computed in fp32, whatever the files hold.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.sd
import comfy.utils
import torch

from ..lora_train.safetensors_file import Header, read_header
from .experts import guess_expert
from .lora_convert import check_target, save_whole
from .lora_file import read_lora_header
from .lora_patch import RowReport, apply_rows
from .lora_rows import MAX_STRENGTH, LoraRow
from .lora_slots import base_warnings

MODES = {"merge": "merged", "bypass": "bypass"}
INPUTS = ("latent", "timestep", "context", "concat")
BARE_NAME = "velocity"  # of the output when the inputs have no group name in front


@dataclass(frozen=True, kw_only=True)
class AppliedForward:
    """What became of it: the file, the expert whose strengths counted, the names of the outputs in it, the rows, and the report as text."""

    path: Path
    expert: str
    outputs: tuple[str, ...]
    rows: tuple[RowReport, ...]
    report: str


def expert_to_take(base: str, metadata: Mapping[str, str], rows: Sequence[LoraRow]) -> str:
    """Tell which expert a model is, on whose side the rows of a command line act.

    Args:
        base: Name of the model.
        metadata: Of the model.
        rows: The rows.

    Returns:
        What the model says; where it is silent, what the first LoRA that says anything was made for; else `low`.
    """
    known = guess_expert(base, metadata).expert
    for path in (Path(row.file) for row in rows):
        if known is None and path.is_file():
            known = guess_expert(path.name, read_lora_header(path).metadata).expert
    return known or "low"


def parse_row(text: str, expert: str = "low") -> LoraRow:
    """Read `FILE:STRENGTH` or `FILE:STRENGTH:merge|bypass`.

    Args:
        text: The argument; the file may have colons itself.
        expert: On which expert the row acts.

    Raises:
        ValueError: No strength, or one that is no finite number within ±100.
    """
    rest, mode = text, ""
    if text.rpartition(":")[2] in MODES:
        rest, _, mode = text.rpartition(":")
    file, _, number = rest.rpartition(":")
    try:
        strength = float(number)
    except ValueError:
        strength = math.nan
    if not file or not abs(strength) <= MAX_STRENGTH:
        raise ValueError(f"{text!r} is no row. Write FILE:STRENGTH or FILE:STRENGTH:merge|bypass, with a strength within ±{MAX_STRENGTH:g}.")
    strengths = {"high": 0.0, "low": 0.0, expert: strength}
    return LoraRow(file=file, application=MODES.get(mode, ""), **strengths)


def apply_and_run(base: Path, rows: Sequence[str], inputs: Path, out: Path, *, overwrite: bool = False) -> AppliedForward:
    """Load a model, apply rows, run one forward per group of inputs, and write the predicted velocities.

    Args:
        base: A diffusion model file.
        rows: Rows as text, see `parse_row`.
        inputs: A safetensors file with `latent` [B, 16, F, H, W], `timestep` [B] (0 to 1000), `context` [B, P, D] and, where the model takes more
            channels, `concat` [B, C, F, H, W]; with a group name in front (`high.0.latent`) for several forwards.
        out: The safetensors file to write: one tensor per group, fp32, under the group's name (`velocity` where there is none).
        overwrite: Whether a file that is there already is replaced.

    Returns:
        What became of it.

    Raises:
        ValueError: A file cannot be used, a row does not fit, or the inputs do not fit the model.
    """
    check_target(out, overwrite=overwrite)
    header = _header_of(base)
    expert = expert_to_take(base.name, header.metadata, [parse_row(row) for row in rows])
    parsed = [parse_row(row, expert) for row in rows]
    groups = _groups(inputs)
    model = _load(base)
    models = {"high": None, "low": None, expert: model}
    applied = apply_rows(models["high"], models["low"], parsed, "merged", locate=_locate, check_slot=lambda lora, _strengths: base_warnings(lora, expert))
    changed = applied.model_high if expert == "high" else applied.model_low
    comfy.model_management.load_models_gpu([changed, *changed.get_nested_additional_models()], force_full_load=True)
    outputs = {name: _forward(changed, name, tensors) for name, tensors in groups.items()}
    save_whole(outputs, out, {"base": base.name, "rows": " ".join(Path(row).name for row in rows)})
    return AppliedForward(path=out, expert=expert, outputs=tuple(outputs), rows=tuple(applied.rows), report=applied.report)


def _header_of(base: Path) -> Header:
    """Read the header of a model. Raises ValueError when it is no safetensors file."""
    if not base.is_file():
        raise ValueError(f"{base} is {'a folder' if base.is_dir() else 'not there'}. Give a diffusion model file.")
    return read_header(base)


def _load(base: Path) -> Any:
    """Load a diffusion model in fp32."""
    try:
        return comfy.sd.load_diffusion_model(str(base), model_options={"dtype": torch.float32})
    except RuntimeError as error:
        raise ValueError(f"{base.name} is no diffusion model that ComfyUI knows ({str(error).strip()}).") from error


def _locate(file: str) -> Path:
    path = Path(file)
    if not path.is_file():
        raise ValueError(f"The LoRA {file} is {'a folder' if path.is_dir() else 'not there'}. Check the path.")
    return path


def _groups(path: Path) -> dict[str, dict[str, torch.Tensor]]:
    """Read the inputs, by group."""
    read_header(path, "file of inputs")
    groups: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in comfy.utils.load_torch_file(str(path), safe_load=True).items():
        name, _, part = key.rpartition(".")
        if part in INPUTS:
            groups.setdefault(name or BARE_NAME, {})[part] = tensor.float()
    whole = {name: tensors for name, tensors in groups.items() if set(INPUTS[:3]) <= set(tensors)}
    if not whole:
        raise ValueError(f"{path.name} has no latent, timestep and context. Name them so, or NAME.latent and so on for several forwards.")
    return whole


def _forward(model: Any, name: str, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """Predict the velocity of one group."""
    device = model.load_device
    latent = torch.cat([tensors[part] for part in ("latent", "concat") if part in tensors], dim=1).to(device)
    network = model.model.diffusion_model
    if latent.shape[1] != network.in_dim or tensors["context"].shape[-1] != network.text_dim:
        raise ValueError(
            f"{name}: latent and concat have {latent.shape[1]} channels and the context {tensors['context'].shape[-1]}; "
            f"the model takes {network.in_dim} and {network.text_dim}."
        )
    with torch.no_grad():
        return network(latent, tensors["timestep"].to(device), tensors["context"].to(device)).float().cpu().contiguous()

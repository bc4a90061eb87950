"""Resumable states and LoRA files of a run, written whole or not at all.

Layout in the run folder: `checkpoints/step-000050.state.safetensors` (masters, moments, averages, step, counters) and beside it the LoRAs of that step.
Random numbers are functions of (seed, step), so the step is their whole state.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import torch
from safetensors import safe_open

from . import safetensors_file
from .config import TrainConfig
from .guards import Watch
from .lora.keys import to_file_tensors
from .trainee import Trainee

FOLDER = "checkpoints"
_STATE = re.compile(r"step-(\d{6,})\.state\.safetensors")
_SAVE_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_REWARD_LABELS = {"hpsv2": "HPS2.1", "hpsv2.1": "HPS2.1", "hpsv2.0": "HPS2.0", "mps": "MPS", "pickscore": "PickScore", "pavrm": "PAVRM"}


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where a run stands, besides its tensors. `measured`: what the objective measured on the base model."""

    step: int = 0
    forwards: float = 0.0
    last_rewards: tuple[float, ...] = ()
    held_out_base: float | None = None
    measured: dict[str, float] = field(default_factory=dict)
    watch: Watch = field(default_factory=Watch)


def reward_label(kind: str) -> str:
    """How a reward is called in file names: `hpsv2.1` -> `HPS2.1`, as the official files have it."""
    return _REWARD_LABELS.get(kind.lower(), re.sub(r"[^A-Za-z0-9.]+", "-", kind).strip("-") or "reward")


def lora_file_name(config: TrainConfig, expert: str) -> str:
    """`<name>-high-noise-<reward>.safetensors`; of a model without experts `<name>-<reward>.safetensors`."""
    side = f"-{expert}-noise" if config.models.has_experts else ""
    return f"{config.name}{side}-{reward_label(config.reward.kind)}.safetensors"


def save_lora(path: Path, config: TrainConfig, trainee: Trainee, step: int, base_sha256: str, *, best: bool = False) -> None:
    """Write one expert's LoRA in VideoX-Fun's layout with metadata that says what it is.

    Args:
        step: the update whose weights these are.
        best: write the weights of the best look in place of the present ones.
    """
    alpha = config.lora.effective_alpha
    metadata = {
        "format": "pt",
        **({"expert": trainee.expert} if config.models.has_experts else {}),
        "boundary": repr(config.sampling.boundary),
        "base_sha256": base_sha256,
        "base_file": Path(getattr(config.models, trainee.expert)).name,
        "rank": str(config.lora.rank),
        "alpha": repr(alpha),
        "reward": config.reward.kind,
        "method": config.method,
        "steps": str(step),
        "config_sha256": config.digest(),
    }
    tensors = to_file_tensors(trainee.best if best else trainee.weights(), alpha, _SAVE_DTYPES[config.save_dtype])
    safetensors_file.write(path, tensors, metadata)


def save_state(folder: Path, config: TrainConfig, trainees: Sequence[Trainee], progress: Progress) -> Path:
    """Write the state of all trainees; returns its path."""
    tensors = {f"{trainee.expert}/{name}": tensor for trainee in trainees for name, tensor in trainee.state().items()}
    path = folder / FOLDER / f"step-{progress.step:06d}.state.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    safetensors_file.write(path, tensors, {"progress": json.dumps(asdict(progress)), "digest": config.digest()})
    return path


def states(folder: Path) -> list[Path]:
    """State files of a run folder, oldest first."""
    found = [(int(match[1]), path) for path in (folder / FOLDER).glob("step-*") if (match := _STATE.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def latest_step(folder: Path) -> int:
    """Step of the newest state, 0 when there is none."""
    found = states(folder)
    return int(_STATE.fullmatch(found[-1].name)[1]) if found else 0


def check_settings(folder: Path, config: TrainConfig) -> None:
    """Refuse to resume with settings that train something else than the newest state; reads its header only.

    Raises:
        ValueError: names the state and the remedy.
    """
    found = states(folder)
    if found and _metadata(found[-1])["digest"] != config.digest():
        raise ValueError(f"{found[-1]} was made with other settings, so it cannot be resumed with these; restore config.json or start a new run")


def _metadata(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        return file.metadata()


def load_latest(folder: Path, config: TrainConfig, trainees: Sequence[Trainee]) -> Progress:
    """Put back the newest state; a run without one starts at step 0.

    Raises:
        ValueError: the state was made with settings that train something else.
    """
    found = states(folder)
    if not found:
        return Progress()
    check_settings(folder, config)
    with safe_open(found[-1], framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no dictionary)
    for trainee in trainees:
        trainee.load_state(_own(tensors, trainee.expert))
    values = json.loads(_metadata(found[-1])["progress"])
    # States that older versions wrote hold more, or less, than is watched now.
    watched = {entry.name: values["watch"][entry.name] for entry in fields(Watch) if entry.name in values["watch"]}
    watch = Watch(**{**watched, "recent_kl": tuple(watched["recent_kl"])})
    return Progress(**{**values, "last_rewards": tuple(values["last_rewards"]), "watch": watch})


def _own(tensors: Mapping[str, torch.Tensor], expert: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(f"{expert}/"): tensor for name, tensor in tensors.items() if name.startswith(f"{expert}/")}


def prune(folder: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints, and what interrupted writes left."""
    for path in (folder / FOLDER).glob("*.partial"):
        path.unlink()
    for state in states(folder)[:-keep]:
        step = int(_STATE.fullmatch(state.name)[1])
        for path in [*(folder / FOLDER).glob(f"*-step{step:06d}.safetensors"), state]:
            path.unlink()

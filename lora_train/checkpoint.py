"""Resumable states and LoRA files of a run, written whole or not at all.

Layout in the run folder: `checkpoints/step-000050.state.safetensors` (masters, moments, averages, step, counters) and beside it the LoRAs of that step.
Random numbers are functions of (seed, step), so the step is their whole state.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from . import identity, safetensors_file
from .config import TrainConfig
from .evaluation import Evaluation
from .guards import Stop, Watch
from .lora.keys import to_file_tensors
from .run_config import RunConfig
from .trainee import Trainee

FOLDER = "checkpoints"
_TOLD = 5  # settings that a refusal names
_STATE = re.compile(r"step-(\d{6,})\.state\.safetensors")
_SAVE_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_REWARD_LABELS = {"hpsv2": "HPS2.1", "hpsv2.1": "HPS2.1", "hpsv2.0": "HPS2.0", "mps": "MPS", "pickscore": "PickScore", "pavrm": "PAVRM"}


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where a run stands, besides its tensors. `measured`: what the objective measured on the base model; `ended`: the guard that ended it;
    `last_look`: a look at its last update that a longer run would not take."""

    step: int = 0
    forwards: float = 0.0
    last_rewards: tuple[float, ...] = ()
    held_out_base: float | None = None
    measured: dict[str, float] = field(default_factory=dict)
    watch: Watch = field(default_factory=Watch)
    ended: Stop | None = None
    last_look: Evaluation | None = None


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


def written_also(write: Callable[[Path], list[Path]], output_folder: str) -> tuple[list[Path], str]:
    """Write finished files once more, to where they are also wanted (empty: nowhere). The run's own are whole by now, so what fails here ends no run.

    Returns:
        The files, and a sentence about why there are none, empty where all went well.
    """
    if not output_folder:
        return [], ""
    try:
        return write(Path(output_folder)), ""
    except OSError as error:
        return [], f"Not everything could be written to output_folder {output_folder} ({error.strerror or error}); copy the files from the run's folder."


def save_state(folder: Path, config: RunConfig, trainees: Sequence[Trainee], progress: Progress) -> Path:
    """Write the state of all trainees; returns its path."""
    tensors = {f"{trainee.expert}/{name}": tensor for trainee in trainees for name, tensor in trainee.state().items()}
    path = folder / FOLDER / f"step-{progress.step:06d}.state.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    settings = config.deciding()
    metadata = {
        "progress": json.dumps(asdict(progress)),
        "digest": config.digest(),
        "settings": json.dumps(identity.portable(settings)),
        "file_bytes": json.dumps(identity.file_bytes(settings)),
    }
    safetensors_file.write(path, tensors, metadata)
    return path


def states(folder: Path) -> list[Path]:
    """State files of a run folder, oldest first."""
    found = [(int(match[1]), path) for path in (folder / FOLDER).glob("step-*") if (match := _STATE.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def latest_step(folder: Path) -> int:
    """Step of the newest state, 0 when there is none."""
    found = states(folder)
    return int(_STATE.fullmatch(found[-1].name)[1]) if found else 0


def check_settings(folder: Path, config: RunConfig) -> None:
    """Refuse to resume with settings, or with model files, that train something else than the newest state; reads its header only.

    Files may lie elsewhere than they did (`identity.py`).

    Raises:
        ValueError: names the state, every setting that is another, and the remedy.
    """
    found = states(folder)
    if not found:
        return
    metadata, settings = _metadata(found[-1]), config.deciding()
    if "settings" in metadata:
        old = identity.completed(json.loads(metadata["settings"]), config, settings)
        others = identity.differences(old, identity.portable(settings)) or _other_files(metadata, settings)
    else:
        # A state that an older version wrote has nothing but a hash.
        unknown = "an older version wrote it, which kept a hash of them alone, so settings that came since may be all the difference"
        others = [] if identity.is_of(metadata["digest"], settings) else [unknown]
    if others:
        told = "; ".join([*others[:_TOLD], *([f"and {len(others) - _TOLD} more"] if len(others) > _TOLD else [])])
        what = f"{found[-1]} was made with other settings, so it cannot be resumed with these"
        raise ValueError(f"{what}: {told}. Set them back in config.json, or start a new run")


def _other_files(metadata: Mapping[str, str], settings: Mapping[str, Any]) -> list[str]:
    """A phrase for each file that has another size than when the state was written."""
    old, new = json.loads(metadata["file_bytes"]), identity.file_bytes(settings)
    return [f"the file of {name} had {size} bytes and has {new[name]}" for name, size in old.items() if new.get(name, size) != size]


def _metadata(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        return file.metadata()


def load_latest(folder: Path, config: RunConfig, trainees: Sequence[Trainee]) -> Progress:
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
    ended, look = values.get("ended"), values.get("last_look")
    parts = {"watch": watch, "ended": Stop(**ended) if ended else None, "last_look": Evaluation(**look) if look else None}
    return Progress(**{**values, "last_rewards": tuple(values["last_rewards"]), **parts})


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

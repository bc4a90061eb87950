"""What the Video Dataset and Train PAVRM nodes do: make a dataset in the host's process, start a PAVRM run in one of its own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.utils
import torch

from ..lora_train import annotations
from ..lora_train.pavrm_config import PavrmConfig
from ..testlab import sweep, votes
from . import datasets, labelling, paths, preflight, preprocess_command, run_files, training

TRUNKS = ("low noise expert", "high noise expert", "PAVRM file")
NO_FILE = "none"


def make_dataset(wan_files: Mapping[str, str], name: str, folder: str, settings: Mapping[str, Any]) -> tuple[str, str]:
    """Encode a folder of videos; what is cached is used.

    Args:
        wan_files: WAN_FILES; VAE and text encoder of it encode.
        name: of the dataset; its folder under output/reward_lab/datasets.
        folder: videos, see `preprocess.find_sources`; a name in the input folder, an absolute path, or `sweep:NAME`.
        settings: the node's widgets by name.

    Returns:
        DATASET (its folder), and a summary for people.

    Raises:
        ValueError: wrong settings, no usable video.
    """
    source = paths.sweeps_folder() / sweep.check_name(folder.split(":", 1)[1]) if folder.startswith("sweep:") else paths.input_path(folder)
    out = paths.datasets_folder() / sweep.check_name(name)
    options = {
        **{key: value for key, value in settings.items() if key != "prompts_file"},
        "source": str(source),
        "out": str(out),
        "vae": wan_files["vae"],
        "text_encoder": wan_files["text_encoder"],
        "prompts": str(paths.input_path(settings["prompts_file"])) if settings["prompts_file"].strip() else "",
    }
    bar = None

    def progress(done: int, total: int) -> None:
        nonlocal bar
        comfy.model_management.throw_exception_if_processing_interrupted()
        bar = bar or comfy.utils.ProgressBar(total)
        bar.update_absolute(done, total)

    comfy.model_management.unload_all_models()
    with torch.inference_mode(False), torch.no_grad():
        made = preprocess_command.run(options, comfy.model_management.get_torch_device(), progress)
    return str(out), f"{made.text()}\n{_labels(out)}"


def _labels(folder: Path) -> str:
    file = folder / annotations.FILE_NAME
    labelled = len(annotations.read(file)) if file.is_file() else 0
    return f"{labelled} of {len(datasets.read_index(folder)['videos'])} videos are labelled."


def fingerprint(folder: str) -> str:
    """A text that changes with a dataset's index and labels."""
    return labelling.stamp(Path(folder))


def make_config(wan_files: Mapping[str, str], dataset: str, settings: Mapping[str, Any]) -> PavrmConfig:
    """Turn the node's inputs into a config.

    Raises:
        ValueError: a value is out of range, a trunk in GGUF, a sweep without votes, or `advanced` is no JSON object or has an unknown name.
    """
    trunk = {TRUNKS[0]: wan_files["low"] or wan_files["high"], TRUNKS[1]: wan_files["high"]}.get(settings["trunk"])
    if trunk is None:
        if settings["pavrm_file"] == NO_FILE:
            raise ValueError("trunk is 'PAVRM file', but no file is chosen. Choose one for pavrm_file, or begin with an expert.")
        trunk = str(paths.model_path(paths.REWARD_MODEL_FOLDER, settings["pavrm_file"]))
    if paths.is_gguf(trunk):
        raise ValueError(
            f"The trunk would be {Path(trunk).name}, a GGUF file, whose weights cannot be learned. Choose the expert's safetensors file, or a PAVRM."
        )
    values: dict[str, Any] = {
        "kind": "pavrm",
        "name": settings["name"],
        "models": {"trunk": trunk},
        "data": {"source": dataset, "quality": settings["quality"], "pairs": _votes_of(settings["votes"])},
        "loss": settings["loss"],
        "sigma": {"kind": settings["noise"]},
        "shape": {"blocks": settings["blocks"], "pooling": settings["pooling"], "head": "file" if settings["trunk"] == TRUNKS[2] else "fresh"},
        "optimiser": {"block_lr": settings["block_lr"], "head_lr": settings["head_lr"]},
        "steps": settings["steps"],
        "batch": settings["batch"],
        "seed": settings["seed"],
        "output_folder": str(paths.trained_reward_models_folder()),
    }
    return PavrmConfig.from_dict(run_files.located(training.laid_over(values, training.advanced_settings(settings["advanced"]))))


def _votes_of(name: str) -> str:
    if not name.strip():
        return ""
    path = labelling.folder_of("sweep", name) / votes.FILE_NAME
    if not votes.read(path).pairs():
        raise ValueError(f"Sweep {name!r} has no votes yet. Vote first: the heart button of the Reward Lab tab.")
    return str(path)


def start_run(wan_files: Mapping[str, str], dataset: str, settings: Mapping[str, Any]) -> training.StartedRun:
    """Check everything, start the run and return; settings that were trained already give that run back.

    Raises:
        ValueError: see `make_config` and `pavrm_worker.learnable_of`.
    """
    from . import pavrm_worker

    config = make_config(wan_files, dataset, settings)
    preflight.check_pavrm(config)
    learnable = pavrm_worker.learnable_of(config)
    started = training.launch(config, f"{config.steps} steps, {config.loss.upper()}, {config.data.quality}")
    return training.StartedRun(run_id=started.run_id, message="\n".join([started.message, *learnable.notes]))

"""Folders and files of the pack inside the host: model lists, run and sweep folders, pictures for nodes to show.

Does not read model files; see wan_files and lora_patch for that.
"""

from __future__ import annotations

import random
from pathlib import Path

import folder_paths
import numpy as np
import torch
from PIL import Image

REWARD_MODEL_FOLDER = "reward_models"
EXPERT_FOLDER = "diffusion_models"
# ComfyUI-GGUF's name for the same folders (`diffusion_models`, `unet`) with another ending.
GGUF_FOLDER = "unet_gguf"
GGUF_EXTENSION = ".gguf"
REWARD_MODEL_EXTENSIONS = (".safetensors", ".pt", ".pth", ".ckpt", ".bin")


def register_model_folders() -> None:
    """Tell the host about `models/reward_models` and GGUF files. The host would list every file of a new folder, so extensions are set here."""
    folder = Path(folder_paths.models_dir) / REWARD_MODEL_FOLDER
    folder_paths.add_model_folder_path(REWARD_MODEL_FOLDER, str(folder))
    # Where Train PAVRM puts its files, as the host does with `output/loras`.
    folder_paths.add_model_folder_path(REWARD_MODEL_FOLDER, str(trained_reward_models_folder()))
    known = folder_paths.folder_names_and_paths
    known[REWARD_MODEL_FOLDER][1].update(REWARD_MODEL_EXTENSIONS)
    if GGUF_EXTENSION not in known.get(GGUF_FOLDER, ([], set()))[1]:
        # The very list of folders, so that those which are added later belong to it as well.
        known[GGUF_FOLDER] = (known[EXPERT_FOLDER][0], {GGUF_EXTENSION})


def model_files(folder_name: str) -> list[str]:
    """List the model files of one of the host's folders, as the host's own loaders do.

    Args:
        folder_name: A host folder such as `diffusion_models`, or `reward_models`.

    Returns:
        File names relative to the folder; empty when the folder is unknown or empty.
    """
    if folder_name not in folder_paths.folder_names_and_paths:
        return []
    return folder_paths.get_filename_list(folder_name)


def expert_files() -> list[str]:
    """List the files of diffusion models, GGUF ones last."""
    return list(dict.fromkeys([*model_files(EXPERT_FOLDER), *model_files(GGUF_FOLDER)]))


def expert_path(file_name: str) -> Path:
    """Return the absolute path of a diffusion model.

    Raises:
        ValueError: When no such file is in the folders.
    """
    return model_path(GGUF_FOLDER if is_gguf(file_name) else EXPERT_FOLDER, file_name)


def is_gguf(file: str | Path) -> bool:
    """Tell by its name whether a file is in the GGUF format."""
    return str(file).lower().endswith(GGUF_EXTENSION)


def model_path(folder_name: str, file_name: str) -> Path:
    """Return the absolute path of a model file.

    Raises:
        ValueError: When no such file is in the folder.
    """
    path = folder_paths.get_full_path(folder_name, file_name) if file_name else None
    if path is None:
        folders = ", ".join(folder_paths.get_folder_paths(folder_name))
        raise ValueError(f"{file_name!r} is not among the {folder_name} files. Put it into {folders}, press R to refresh, and choose it again.")
    return Path(path)


def runs_folder() -> Path:
    """Return `<output>/reward_lab/runs`; made when first written to."""
    return Path(folder_paths.get_output_directory()) / "reward_lab" / "runs"


def sweeps_folder() -> Path:
    """Return `<output>/reward_lab/sweeps`; made when first written to."""
    return Path(folder_paths.get_output_directory()) / "reward_lab" / "sweeps"


def input_folder() -> Path:
    """Return the host's input folder."""
    return Path(folder_paths.get_input_directory())


def input_path(name: str) -> Path:
    """Return the file or folder that a user named: an absolute path, or a name in the input folder.

    Raises:
        ValueError: The name is empty, leaves the input folder, or nothing is there.
    """
    path = Path(name.strip().strip('"')).expanduser()
    if not name.strip():
        raise ValueError("No file or folder is named. Give an absolute path, or a name in the input folder.")
    if not path.is_absolute():
        folder = input_folder().resolve()
        path = (folder / path).resolve()
        if not path.is_relative_to(folder):
            raise ValueError(f"{name!r} leaves the input folder {folder}. Give a name in it, or an absolute path.")
    if not path.exists():
        raise ValueError(f"There is no file or folder {path}. Give an absolute path, or a name in the input folder.")
    return path


def datasets_folder() -> Path:
    """Return `<output>/reward_lab/datasets`; made when first written to."""
    return Path(folder_paths.get_output_directory()) / "reward_lab" / "datasets"


def trained_reward_models_folder() -> Path:
    """Return `<output>/reward_models`; made when first written to."""
    return Path(folder_paths.get_output_directory()) / REWARD_MODEL_FOLDER


def scores_folder() -> Path:
    """Return `<output>/reward_lab/scores`; made when first written to."""
    return Path(folder_paths.get_output_directory()) / "reward_lab" / "scores"


def output_result(path: Path) -> dict[str, str]:
    """Describe a file of the output folder the way a node's `ui` names it to the page."""
    relative = path.resolve().relative_to(Path(folder_paths.get_output_directory()).resolve())
    return {"filename": relative.name, "subfolder": relative.parent.as_posix(), "type": "output"}


def save_temp_images(images_BHWC: torch.Tensor) -> list[dict[str, str]]:
    """Write pictures to the host's temp folder for a node to show.

    Args:
        images_BHWC: float, 0 to 1, RGB.

    Returns:
        One `{"filename", "subfolder", "type"}` per picture.
    """
    folder = Path(folder_paths.get_temp_directory())
    folder.mkdir(parents=True, exist_ok=True)
    results = []
    for image_HWC in images_BHWC:
        name = f"reward_lab_{random.SystemRandom().getrandbits(64):016x}.png"
        pixels = (image_HWC.clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy()
        Image.fromarray(pixels).save(folder / name, compress_level=1)
        results.append({"filename": name, "subfolder": "", "type": "temp"})
    return results


def image_tensor(picture: Image.Image) -> torch.Tensor:
    """Turn a pillow picture into the host's IMAGE: float [1, H, W, 3], 0 to 1."""
    return torch.from_numpy(np.asarray(picture.convert("RGB")).astype(np.float32) / 255.0)[None]

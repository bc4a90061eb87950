"""Prompts for training from the node's text and a file of the input folder."""

from __future__ import annotations

from pathlib import Path

from ..lora_train.config import Prompt
from ..lora_train.prompts import parse_prompt_lines, read_prompt_file, split
from . import paths


def find(file: str) -> Path:
    """Return the path of a prompt file.

    Args:
        file: Absolute path, or a name in the host's input folder.

    Raises:
        ValueError: A relative name that leaves the input folder.
    """
    path = Path(file.strip().strip('"'))
    if path.is_absolute():
        return path
    folder = paths.input_folder().resolve()
    resolved = (folder / path).resolve()
    if not resolved.is_relative_to(folder):
        raise ValueError(f"{file!r} leaves the input folder {folder}. Give a name in it, or an absolute path.")
    return resolved


def read(text: str, file: str) -> list[dict]:
    """Read prompts.

    Args:
        text: One prompt a line; may be empty.
        file: See `find`; empty for none.

    Returns:
        PROMPTS: `{"text", "weight", "image"}` each, without repetitions; `image` is the path of a start image or empty.

    Raises:
        ValueError: No prompt at all, or the file cannot be read.
    """
    found = parse_prompt_lines(text) if text.strip() else []
    if file.strip():
        found += read_prompt_file(find(file))
    if not found:
        raise ValueError("There are no prompts. Write some, one a line, or name a TXT, CSV or JSON file.")
    weights: dict[tuple[str, str], float] = {}
    for prompt in found:
        key = (prompt.text, prompt.image)
        weights[key] = weights.get(key, 0.0) + prompt.weight
    return [{"text": text, "weight": weight, "image": image} for (text, image), weight in weights.items()]


def divide(prompts: list[dict], share: float, seed: int) -> tuple[list[dict], list[dict]]:
    """Divide PROMPTS into those to train on and held-out ones, see `lora_train.prompts.split`."""
    parts = split([Prompt(**prompt) for prompt in prompts], share, seed)
    return tuple([{"text": prompt.text, "weight": prompt.weight, "image": prompt.image} for prompt in part] for part in parts)


def fingerprint(text: str | None, file: str | None) -> str:
    """Return a text that changes when the prompts change or their file does."""
    stamp = ""
    if file and file.strip():
        try:
            status = find(file).stat()
            stamp = f"{status.st_mtime_ns}:{status.st_size}"
        except (OSError, ValueError) as error:
            stamp = str(error)
    return f"{text}|{file}|{stamp}"

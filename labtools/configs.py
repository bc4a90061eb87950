"""Reads a training config for the command line: relative file names are looked up, so that a config can travel with its files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .cache import REPO
from .errors import LabError

REWARD_FILES = ("clip", "detector", "landmarks", "reference", "query", "head", "generator")
MODEL_FILES = ("high", "low", "text_encoder", "vae")
PAVRM_FILES = ("trunk", "query", "head")
DATA_PATHS = ("source", "annotations", "pairs", "losers", "validation")


def read_config(path: Path, repo: Path = REPO, *, with_files: bool = True) -> dict:
    """The settings in a JSON file, with absolute paths; as they are written without `with_files`.

    A relative path of something that is read is looked for beside the config, then in the current folder, then among the pocket models. A relative
    `output_folder` lies in the current folder, as a program's output does; the worker has another one.

    Raises:
        LabError: no such file, no JSON object in it, or a relative path that is found nowhere.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise LabError(f"The config {path} cannot be read: {error.strerror}.", remedy="Give the path of a training config, a JSON file.") from error
    except ValueError as error:
        raise LabError(f"The config {path} is not JSON: {error}.", remedy="Correct it at the place named.") from error
    if not isinstance(values, dict):
        raise LabError(f"The config {path} holds a {type(values).__name__}, not an object of settings.", remedy="Write it as {...}.")
    if not with_files:
        return values
    folders = (path.absolute().parent, Path.cwd(), repo / "pocket" / "weights")
    # Wrong types pass through: the reader of the settings names them better.
    is_pavrm = values.get("kind") == "pavrm"
    _resolve(values.get("models"), PAVRM_FILES if is_pavrm else MODEL_FILES, "models", folders)
    if is_pavrm:
        _resolve(values.get("data"), DATA_PATHS, "data", folders)
    _resolve(values.get("real"), ("path",), "real", folders)
    held_out, one_pass = values.get("held_out"), values.get("one_pass")
    rewards = {"reward": values.get("reward"), "held_out.judge": _entry(held_out, "judge"), "one_pass.pavrm": _entry(one_pass, "pavrm")}
    for section, reward in rewards.items():
        _resolve_reward(reward, section, folders)
    lists = {"prompts": values.get("prompts"), "held_out.prompts": _entry(held_out, "prompts"), "sample_prompts": values.get("sample_prompts")}
    for section, prompts in lists.items():
        for index, prompt in enumerate(prompts if isinstance(prompts, list) else ()):
            _resolve(prompt, ("image",), f"{section}[{index}]", folders)
    if isinstance(values.get("output_folder"), str) and values["output_folder"]:
        values["output_folder"] = str(Path(values["output_folder"]).expanduser().absolute())
    return values


def _entry(section: Any, name: str) -> Any:
    return section.get(name) if isinstance(section, dict) else None


def _resolve(entries: Any, names: tuple[str, ...], section: str, folders: tuple[Path, ...]) -> None:
    for name in names if isinstance(entries, dict) else ():
        if isinstance(entries.get(name), str) and entries[name]:
            entries[name] = _absolute(entries[name], f"{section}.{name}", folders)


def _resolve_reward(reward: Any, section: str, folders: tuple[Path, ...]) -> None:
    """Paths of a reward model; those of a mix lie in its rows."""
    _resolve(reward, ("path",), section, folders)
    options = _entry(reward, "options")
    # A config may also hold the sizes themselves, or the name of a CLIP.
    config = _entry(options, "config")
    is_file = isinstance(config, str) and config.lower().endswith(".json")
    _resolve(options, (*REWARD_FILES, *(("config",) if is_file else ())), f"{section}.options", folders)
    rows = _entry(options, "rows")
    for index, row in enumerate(rows if isinstance(rows, list) else ()):
        if isinstance(row, dict):
            _resolve_reward(row.get("reward"), f"{section}.options.rows[{index}].reward", folders)


def _absolute(name: str, setting: str, folders: tuple[Path, ...]) -> str:
    given = Path(name).expanduser()
    if given.is_absolute():
        return str(given)
    for folder in folders:
        if (folder / given).exists():
            return str((folder / given).absolute())
    looked = ", ".join(map(str, folders))
    raise LabError(f"{setting} is {name!r}, and no such file is in: {looked}.", remedy="Give the whole path, or put the file beside the config.")

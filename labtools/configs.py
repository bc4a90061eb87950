"""Reads a training config for the command line: relative file names are looked up, so that a config can travel with its files."""

from __future__ import annotations

import json
from pathlib import Path

from .cache import REPO
from .errors import LabError

MODEL_FILES = ("high", "low", "text_encoder", "vae")


def read_config(path: Path, repo: Path = REPO) -> dict:
    """The settings in a JSON file, with absolute paths of models and reward.

    A relative path is looked for beside the config, then in the current folder, then among the pocket models.

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
    folders = (path.absolute().parent, Path.cwd(), repo / "pocket" / "weights")
    # Wrong types pass through: the reader of the settings names them better.
    for section, names in (("models", MODEL_FILES), ("reward", ("path",))):
        entries = values.get(section)
        for name in names if isinstance(entries, dict) else ():
            if isinstance(entries.get(name), str) and entries[name]:
                entries[name] = _absolute(entries[name], f"{section}.{name}", folders)
    return values


def _absolute(name: str, setting: str, folders: tuple[Path, ...]) -> str:
    given = Path(name).expanduser()
    if given.is_absolute():
        return str(given)
    for folder in folders:
        if (folder / given).is_file():
            return str((folder / given).absolute())
    looked = ", ".join(map(str, folders))
    raise LabError(f"{setting} is {name!r}, and no such file is in: {looked}.", remedy="Give the whole path, or put the file beside the config.")

"""The files that a training run of the nodes reads: where names in `advanced` are looked up, and which files make a run out of date when they change.

Does not check the files: `preflight.py` and the datasets' reader do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import folder_paths

from ..lora_train import annotations, identity, needs
from ..lora_train.config import TrainConfig
from ..lora_train.pavrm_config import PavrmConfig
from ..reward_models.spec import FILE_OPTIONS, RewardModelSpec
from . import datasets, paths

# Of a reward's files, those that lie elsewhere than rewards do.
_ELSEWHERE = ("generator", "reference")
_REWARD_OPTIONS = tuple(name for name in FILE_OPTIONS if name not in _ELSEWHERE)
_DATA = tuple(sorted(identity.DATA - {"source"}))


def located(values: dict[str, Any]) -> dict[str, Any]:
    """LoRA or PAVRM settings with whole paths where `advanced` gave names, as the worker has a current folder of its own.

    Rewards are looked up in `models/reward_models`, clips and other data among the datasets and in the input folder, start images in the input folder; a
    relative `output_folder` lies in the output folder.

    Raises:
        ValueError: the setting, and where its file is missing.
    """
    found, output = dict(values), values.get("output_folder")
    if isinstance(output, str) and output:
        found["output_folder"] = str(Path(folder_paths.get_output_directory()) / Path(output).expanduser())
    for section, name in (("held_out", "judge"), ("one_pass", "pavrm")):
        if isinstance(values.get(section), Mapping) and name in values[section]:
            found[section] = {**values[section], name: _reward(values[section][name], f"{section}.{name}")}
    if "prompts" in values:
        found["prompts"] = _prompts(values["prompts"], "prompts")
    if "sample_prompts" in values:
        found["sample_prompts"] = _prompts(values["sample_prompts"], "sample_prompts")
    if isinstance(found.get("held_out"), Mapping) and "prompts" in found["held_out"]:
        found["held_out"] = {**found["held_out"], "prompts": _prompts(found["held_out"]["prompts"], "held_out.prompts")}
    if isinstance(values.get("real"), Mapping):
        found["real"] = _changed(values["real"], ("path",), "real", _data_path)
    if isinstance(values.get("data"), Mapping):
        found["data"] = _changed(values["data"], _DATA, "data", _data_path)
    return found


def _reward(values: Any, where: str) -> Any:
    """What a reward names; other types than an object are left to the reader of the settings."""
    if not isinstance(values, Mapping):
        return values
    found = _changed(values, ("path",), where, lambda name: str(paths.model_path(paths.REWARD_MODEL_FOLDER, name)))
    if not isinstance(values.get("options"), Mapping):
        return found
    options, where = values["options"], f"{where}.options"
    options = _changed(options, _REWARD_OPTIONS, where, lambda name: str(paths.model_path(paths.REWARD_MODEL_FOLDER, name)))
    options = _changed(options, ("generator",), where, lambda name: str(paths.model_path(paths.EXPERT_FOLDER, name)))
    options = _changed(options, ("reference",), where, lambda name: str(paths.input_path(name)))
    if isinstance(options.get("rows"), list):
        rows = [{**row, "reward": _reward(row.get("reward"), where)} if isinstance(row, Mapping) else row for row in options["rows"]]
        options = {**options, "rows": rows}
    return {**found, "options": options}


def _prompts(values: Any, where: str) -> Any:
    """Prompts with their start images; plain texts have none."""
    if not isinstance(values, list):
        return values
    return [_changed(prompt, ("image",), where, lambda name: str(paths.input_path(name))) if isinstance(prompt, Mapping) else prompt for prompt in values]


def _data_path(name: str) -> str:
    dataset = paths.datasets_folder() / name
    return str(dataset if dataset.exists() else paths.input_path(name))


def _changed(values: Mapping[str, Any], names: tuple[str, ...], where: str, find: Callable[[str], str]) -> dict[str, Any]:
    found = dict(values)
    for name in names:
        value = values.get(name)
        if not isinstance(value, str) or not value.strip():
            continue
        path = Path(value).expanduser()
        try:
            found[name] = str(path) if path.is_absolute() else find(value)
        except ValueError as error:
            raise ValueError(f"{where}.{name}: {error}") from error
    return found


def inputs(config: TrainConfig | PavrmConfig) -> list[str]:
    """Every file that a run reads, once: it is out of date when one of them is newer. Datasets count by their index and labels."""
    found = _pavrm_inputs(config) if isinstance(config, PavrmConfig) else _lora_inputs(config)
    return list(dict.fromkeys(filter(None, found)))


def _lora_inputs(config: TrainConfig) -> list[str]:
    models = [getattr(config.models, name) for name in ("high", "low", "text_encoder", "vae")]
    judge = config.held_out.judge if config.held_out.every else None
    rewards = [RewardModelSpec.from_dict(asdict(source)) for source in (config.reward, judge, needs.pavrm(config)) if source is not None]
    clips = _dataset(config.real.path) if needs.real_latents(config) else []
    return [*models, *(file for reward in rewards for file in reward.files()), *needs.start_images(config), *clips]


def _pavrm_inputs(config: PavrmConfig) -> list[str]:
    data = config.data
    labels = [data.annotations] if data.annotations else _labels(data.source)
    sources = [file for source in (data.source, data.losers, data.validation) for file in _dataset(source)]
    return [config.models.trunk, config.models.query, config.models.head, *sources, *labels, *_labels(data.validation), data.pairs]


def _dataset(source: str) -> list[str]:
    """What of a dataset changes with its videos: its index and the folders of its caches, where broken ones are made again; else the list file."""
    folder = Path(source)
    is_own = source and (folder / datasets.INDEX).is_file()
    return [str(folder / name) for name in (datasets.INDEX, "latents", "texts")] if is_own else [source]


def _labels(source: str) -> list[str]:
    file = Path(source) / annotations.FILE_NAME
    return [str(file)] if source and file.is_file() else []

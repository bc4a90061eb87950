"""The JSON Schema (draft 2020-12) of a run's config, made from the dataclasses: `lab.py train --schema` prints it, `docs/train_config.schema.json` is it.

It has both kinds of run, of which `kind` says which one it is (run_config.py). It knows names, types, defaults and words to choose from. Ranges, and what fits
together, are checked when a config is read. No torch.
"""

from __future__ import annotations

import json
import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any

from . import config, flow, input_config, labels, method_config, pavrm_config, presets
from .run_config import LORA

_Choices = Mapping[str, tuple[str, ...]]
_LORA_CHOICES = {
    "method": config.METHODS, "expert": config.EXPERT_CHOICES, "dtype": config.DTYPES, "save_dtype": config.SAVE_DTYPES,
    "sampling.schedule": flow.SCHEDULES, "objective.mode": config.MODES, "objective.strategy": config.STRATEGIES, "objective.decode": config.DECODES,
    "objective.start": config.STARTS, "video.vae": tuple(input_config.LATENTS), "prfl.solver": method_config.SOLVERS, "prfl.loss": method_config.PRFL_LOSSES,
    "optimiser.kind": method_config.OPTIMISERS, "optimiser.schedule": method_config.LR_SCHEDULES,
}  # fmt: skip
_PAVRM_CHOICES = {
    "kind": (pavrm_config.KIND,), "loss": pavrm_config.LOSSES, "dtype": pavrm_config.DTYPES, "save_dtype": pavrm_config.SAVE_DTYPES,
    "data.quality": labels.QUALITIES, "data.missing": labels.MISSING, "data.mixed": labels.MIXED, "data.caption": pavrm_config.CAPTIONS,
    "data.pairing": pavrm_config.PAIRINGS, "sigma.kind": pavrm_config.SIGMA_KINDS, "shape.pooling": pavrm_config.POOLINGS, "shape.head": pavrm_config.HEADS,
    "optimiser.kind": pavrm_config.PAVRM_OPTIMISERS, "optimiser.schedule": method_config.LR_SCHEDULES,
}  # fmt: skip
_PLAIN = {str: "string", int: "integer", float: "number", bool: "boolean", dict: "object"}


def schema() -> dict[str, Any]:
    """The schema of a config file of either kind."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "Reward Lab training config", "oneOf": [_lora(), _pavrm()]}


def _lora() -> dict[str, Any]:
    """A LoRA's run, where `preset` and `card` may stand for what they bring."""
    root = _of(config.TrainConfig, "", _LORA_CHOICES)
    root["properties"] = {
        "kind": {"enum": [LORA], "default": LORA},
        "preset": {"enum": list(presets.PRESETS), "description": "Settings to start from; what is given here wins over them."},
        "card": {"enum": list(presets.CARD_SIZES), "description": "Sizes that fit a card, laid over the preset."},
        **root["properties"],
    }
    # A preset may bring the video; the rest of what a run needs, none does.
    root["required"] = [name for name in root["required"] if name != "video"]
    return {"title": "LoRA", **root}


def _pavrm() -> dict[str, Any]:
    root = _of(pavrm_config.PavrmConfig, "", _PAVRM_CHOICES)
    # Without the key a file is a LoRA's.
    root["required"] = ["kind", *root["required"]]
    return {"title": "PAVRM", **root}


def _of(hint: Any, where: str, choices: _Choices) -> dict[str, Any]:
    origin = typing.get_origin(hint)
    if is_dataclass(hint):
        whole = _of_dataclass(hint, where, choices)
        return {"anyOf": [{"type": "string"}, whole]} if hasattr(hint, "SHORT_FORM") else whole
    if origin is tuple:
        return {"type": "array", "items": _of(typing.get_args(hint)[0], f"{where}[]", choices)}
    if origin in (typing.Union, types.UnionType):
        return {"anyOf": [_of(entry, where, choices) for entry in typing.get_args(hint) if entry is not type(None)] + [{"type": "null"}]}
    if where in choices:
        return {"enum": list(choices[where])}
    return {"type": _PLAIN[origin or hint]}


def _of_dataclass(kind: type, where: str, choices: _Choices) -> dict[str, Any]:
    hints, properties, required = typing.get_type_hints(kind), {}, []
    for entry in fields(kind):
        part = _of(hints[entry.name], f"{where}.{entry.name}" if where else entry.name, choices)
        if entry.default is not MISSING:
            part["default"] = list(entry.default) if isinstance(entry.default, tuple) else entry.default
        elif entry.default_factory is MISSING:
            required.append(entry.name)
        properties[entry.name] = part
    told = [base.__doc__ or "" for base in kind.__mro__ if is_dataclass(base)]
    text = {"description": " ".join(" ".join(told).split())}
    return {"type": "object", **text, "properties": properties, "required": required, "additionalProperties": False}


def as_text() -> str:
    """The schema as the shipped file has it."""
    return json.dumps(schema(), indent=1) + "\n"


def main(argv: list[str]) -> int:
    """Print the schema."""
    print(as_text(), end="")
    return 0

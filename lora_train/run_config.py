"""Which settings a `config.json` holds: those of a LoRA (`TrainConfig`, no `kind`) or of a PAVRM (`"kind": "pavrm"`). No torch."""

from __future__ import annotations

from typing import Any

from .config import TrainConfig
from .pavrm_config import KIND, PavrmConfig

LORA = "lora"
RunConfig = TrainConfig | PavrmConfig


def kind_of(values: Any) -> str:
    """`pavrm` or `lora`.

    Raises:
        ValueError: another kind.
    """
    kind = values.get("kind", LORA) if isinstance(values, dict) else LORA
    if kind not in (LORA, KIND):
        raise ValueError(f"kind is {kind!r}, but a run trains a {LORA!r} (also without the key) or a {KIND!r}")
    return kind


def read(values: dict[str, Any]) -> RunConfig:
    """The settings, checked.

    Raises:
        ValueError: see `TrainConfig.from_dict` and `PavrmConfig.from_dict`.
    """
    if kind_of(values) == KIND:
        return PavrmConfig.from_dict(values)
    return TrainConfig.from_dict({key: value for key, value in values.items() if key != "kind"})

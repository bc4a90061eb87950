"""Objectives: what a LoRA is trained for. One file each; `create` makes the one that a config names."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .reward_backprop import RewardBackprop

if TYPE_CHECKING:
    from ..config import TrainConfig
    from ..protocols import Objective
    from ..run import Parts

OBJECTIVES = {"reward_backprop": RewardBackprop}


def create(config: TrainConfig, parts: Parts) -> Objective:
    """The objective of `config.method`, wired with the run's parts."""
    return OBJECTIVES[config.method](config, parts)

"""Objectives: what a LoRA is trained for. One file each; `create` makes the one that a config names."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .one_pass import OnePass
from .prfl import Prfl
from .reward_backprop import RewardBackprop
from .reward_flow import RewardFlow

if TYPE_CHECKING:
    from ..config import TrainConfig
    from ..protocols import Objective
    from ..run import Parts

OBJECTIVES = {"reward_backprop": RewardBackprop, "prfl": Prfl, "reward_flow": RewardFlow, "one_pass": OnePass}


def create(config: TrainConfig, parts: Parts) -> Objective:
    """The objective of `config.method`, wired with the run's parts."""
    return OBJECTIVES[config.method](config, parts)

"""Chooses how a run uses the memory at hand, and wires the block executors of both experts."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch

from ..lora_train.config import TrainConfig
from ..lora_train.kernels.lora_linear import choose_kernels
from ..lora_train.offload.knobs import Knobs
from ..lora_train.offload.self_check import self_check
from ..lora_train.offload.store import Slot
from ..lora_train.plan import free_memory_bytes, passes_per_update
from ..lora_train.planning.memory_plan import memory_plan, refusal
from ..lora_train.planning.shapes import header_shape
from ..lora_train.planning.speed import CARDS, GIB, Card
from ..lora_train.safetensors_file import read_header
from .latent_reward import PavrmReward
from .training_mode import attention
from .wan import WanBackbone

logger = logging.getLogger("reward_lab")


def choose_knobs(config: TrainConfig, device: torch.device) -> Knobs:
    """The plan's knobs for this run, with those that the settings fix.

    Raises:
        ValueError: the run cannot fit; says by how much, and what would.
    """
    path = getattr(config.models, config.trained_experts[0])
    shape = header_shape(read_header(path), Path(path).name)
    card, host_bytes = card_of(config, device), int(config.engine.ram_gb * 1e9) or free_memory_bytes()
    plan = memory_plan(config, shape, card, host_bytes, passes_per_update(config, config.trained_experts[0]))
    if not plan["fits"] and device.type != "cpu":
        raise ValueError(refusal(plan))
    knobs = plan["knobs"]
    logger.info("plan: %.1f GB on %s, %.1f GB of memory: %s", plan["gpu_peak_bytes"] / 1e9, card.name, plan["host_peak_bytes"] / 1e9, knobs)
    return Knobs(**knobs, attention=config.engine.attention)


def card_of(config: TrainConfig, device: torch.device) -> Card:
    """The device of the run: its memory as measured, its rates as assumed for the card whose name is nearest."""
    if device.type == "cpu":
        memory = int(config.engine.card_gb * GIB) or free_memory_bytes()
        return Card(**{**vars(CARDS["cpu"]), "memory_bytes": memory})
    name = torch.cuda.get_device_name(device)
    known = next((card for key, card in CARDS.items() if key in name.lower()), CARDS["rtx 4090"])
    memory = int(config.engine.card_gb * GIB) or torch.cuda.mem_get_info(device)[0]
    return Card(**{**vars(known), "name": name, "memory_bytes": memory})


@contextmanager
def engines(
    config: TrainConfig, backbones: Mapping[str, WanBackbone], device: torch.device, dtype: torch.dtype, latent_reward: PavrmReward | None = None
) -> Iterator[None]:
    """Both experts, and a PAVRM's trunk, through block executors that share their slots; checked before anything is trained.

    Raises:
        ValueError: the run cannot fit.
        RuntimeError: the self-check found a difference.
    """
    knobs = choose_knobs(config, device)
    choose_kernels(config.engine.kernels, device)
    slots = [Slot() for _ in range(knobs.slots)]
    with ExitStack() as stack:
        for expert, backbone in backbones.items():
            executor = stack.enter_context(backbone.engine(knobs, slots))
            if config.engine.self_check and expert in config.trained_experts:
                self_check(executor, dtype, {"optimized_attention_override": attention})
        if latent_reward is not None:
            streams = any(0 <= knobs.resident_blocks < len(backbone.model.blocks) for backbone in backbones.values())
            stack.enter_context(latent_reward.engine(knobs, device, slots, streams=streams))
        yield

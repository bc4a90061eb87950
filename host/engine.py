"""Chooses how a run uses the memory at hand, and wires the block executors of both experts."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch

from ..lora_train.config import TrainConfig
from ..lora_train.kernels.lora_linear import choose_kernels
from ..lora_train.offload.executor import BlockExecutor, Shared
from ..lora_train.offload.knobs import Knobs
from ..lora_train.offload.self_check import self_check
from ..lora_train.plan import free_memory_bytes, passes_per_update
from ..lora_train.planning.choose import candidates, smaller
from ..lora_train.planning.job import job_of
from ..lora_train.planning.memory import Choice
from ..lora_train.planning.memory_plan import fixed_by_hand, memory_plan, refusal
from ..lora_train.planning.shapes import ModelShape, header_shape
from ..lora_train.planning.speed import CARDS, GIB, Card
from ..lora_train.protocols import Shrunk
from ..lora_train.safetensors_file import read_header
from .latent_reward import PavrmReward
from .training_mode import attention
from .vae import WanDecoder
from .wan import WanBackbone

logger = logging.getLogger("reward_lab")


@dataclass(frozen=True, kw_only=True)
class FreeMemory:
    """What a run may use of card and host. The plan counts models and process itself, so this is measured before any model is loaded; what would be measured
    later lacks their bytes already."""

    card: Card
    host_bytes: int

    @classmethod
    def of(cls, config: TrainConfig, device: torch.device) -> FreeMemory:
        return cls(card=card_of(config, device), host_bytes=_host_bytes(config))


def choose_knobs(config: TrainConfig, device: torch.device, free: FreeMemory | None = None) -> Knobs:
    """The plan's knobs for this run, with those that the settings fix. `free`: by default what is free now.

    Raises:
        ValueError: the run cannot fit; says by how much, and what would.
    """
    free = FreeMemory.of(config, device) if free is None else free
    plan = memory_plan(config, _shape(config), free.card, free.host_bytes, passes_per_update(config, config.trained_experts[0]))
    if not plan["fits"] and device.type != "cpu":
        raise ValueError(refusal(plan))
    knobs = plan["knobs"]
    logger.info("plan: %.1f GB on %s, %.1f GB of memory: %s", plan["gpu_peak_bytes"] / 1e9, free.card.name, plan["host_peak_bytes"] / 1e9, knobs)
    return Knobs(**knobs, attention=config.engine.attention, rollout_attention=config.engine.rollout_attention)


def _shape(config: TrainConfig) -> ModelShape:
    path = getattr(config.models, config.trained_experts[0])
    return header_shape(read_header(path), Path(path).name)


def _host_bytes(config: TrainConfig) -> int:
    return int(config.engine.ram_gb * 1e9) or free_memory_bytes()


def card_of(config: TrainConfig, device: torch.device) -> Card:
    """The device of the run: its memory as measured, its rates as assumed for the card whose name is nearest."""
    if device.type == "cpu":
        memory = int(config.engine.card_gb * GIB) or free_memory_bytes()
        return Card(**{**vars(CARDS["cpu"]), "memory_bytes": memory})
    name = torch.cuda.get_device_name(device)
    known = next((card for key, card in CARDS.items() if key in name.lower()), CARDS["rtx 4090"])
    memory = int(config.engine.card_gb * GIB) or torch.cuda.mem_get_info(device)[0]
    return Card(**{**vars(known), "name": name, "memory_bytes": memory})


class Engines:
    """Block executors of both experts and of a PAVRM's trunk, which share slots and streams and can be exchanged for smaller ones in the middle of a run."""

    def __init__(
        self,
        config: TrainConfig,
        backbones: Mapping[str, WanBackbone],
        device: torch.device,
        *,
        decoder: WanDecoder | None = None,
        latent_reward: PavrmReward | None = None,
        free: FreeMemory | None = None,
    ) -> None:
        """`free`: by default what is free now. Raises ValueError when the run cannot fit."""
        self._config, self._backbones, self._device = config, backbones, device
        self._decoder, self._latent_reward = decoder, latent_reward
        self._free = FreeMemory.of(config, device) if free is None else free
        self.knobs = choose_knobs(config, device, self._free)
        self._installed = ExitStack()

    def open(self) -> dict[str, BlockExecutor]:
        """Install executors with the present knobs."""
        shared = Shared.of(self.knobs, self._device)
        executors = {expert: self._installed.enter_context(backbone.engine(self.knobs, shared)) for expert, backbone in self._backbones.items()}
        if self._latent_reward is not None:
            # Quantised experts have slots wherever they lie, so the trunk can stream through these; the plan counts it so.
            resident = self.knobs.resident_blocks
            streams = any(backbone.quantised or 0 <= resident < len(backbone.model.blocks) for backbone in self._backbones.values())
            self._installed.enter_context(self._latent_reward.engine(self.knobs, self._device, shared, streams=streams))
        if self._decoder is not None:
            self._decoder.keep_device = torch.device("cpu") if self.knobs.keep_place == "host" else self._device
            # On a card the plan counts layers that run again; without one, memory is rarely what is short, and time is.
            self._decoder.graph_limit_bytes = _host_bytes(self._config) // 4 if self._device.type == "cpu" else 0
        return executors

    def close(self) -> None:
        """Take them out and free what they hold."""
        self._installed.close()

    def shrink(self) -> Shrunk | None:
        """Go on with the next smaller plan; None: this is the smallest. Knobs that the settings fix stay."""
        shape = _shape(self._config)
        job = job_of(self._config, shape)
        present = Choice(**{entry.name: getattr(self.knobs, entry.name) for entry in fields(Choice)})
        choices = candidates(job, lambda choice: fixed_by_hand(self._config, choice, shape))
        chosen = smaller(job, choices, present, self._free.host_bytes)
        if chosen is None:
            return None
        self.close()
        self.knobs = replace(self.knobs, **asdict(chosen))
        self.open()
        before = asdict(present)
        changes = ", ".join(f"{name} {before[name]} -> {value}" for name, value in asdict(chosen).items() if value != before[name])
        return Shrunk(changes=changes, masters_on=torch.device("cpu") if chosen.optimiser_place == "host" else self._device)


@contextmanager
def engines(
    config: TrainConfig,
    backbones: Mapping[str, WanBackbone],
    device: torch.device,
    dtype: torch.dtype,
    *,
    decoder: WanDecoder | None = None,
    latent_reward: PavrmReward | None = None,
    free: FreeMemory | None = None,
) -> Iterator[Engines]:
    """Both experts, and a PAVRM's trunk, through block executors that share their slots; checked before anything is trained.

    Args:
        free: as measured before the models were loaded; by default what is free now.

    Raises:
        ValueError: the run cannot fit.
        RuntimeError: the self-check found a difference.
    """
    choose_kernels(config.engine.kernels, device)
    installed = Engines(config, backbones, device, decoder=decoder, latent_reward=latent_reward, free=free)
    try:
        for expert, executor in installed.open().items():
            if config.engine.self_check and expert in config.trained_experts:
                self_check(executor, dtype, {"optimized_attention_override": attention})
        yield installed
    finally:
        installed.close()

"""The plan of a training run for the node: table, verdict, JSON and a picture of the peaks against the limits."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..lora_train.config import TrainConfig
from ..lora_train.plan import free_memory_bytes, plan
from ..lora_train.planning import table
from ..lora_train.planning.memory_plan import refusal
from ..lora_train.planning.shapes import NAMES, ModelShape, named_shape
from ..lora_train.planning.speed import CARDS, GIB, Card
from ..reward_models.spec import RewardModelSpec
from ..testlab.bars import Bars, bar_chart
from . import engine, paths, training

THIS_MACHINE = "this machine"
THESE_FILES = "these files"
CARD_CHOICES = (THIS_MACHINE, *CARDS)
SHAPE_CHOICES = (THESE_FILES, *(f"{name}{base}" for name in NAMES for base in ("", " fp8")))


@dataclass(frozen=True, kw_only=True)
class PlanReport:
    """What the node shows and hands on; `chart` is an IMAGE [1, H, W, 3]."""

    text: str
    verdict: str
    fits: bool
    json: str
    chart: torch.Tensor
    chart_files: list[dict[str, str]]


def report(
    wan_files: Mapping[str, str],
    prompts: list[dict],
    reward_model: RewardModelSpec,
    settings: Mapping[str, Any],
    *,
    shape: str,
    card: str,
    card_gb: float,
    ram_gb: float,
) -> PlanReport:
    """Plan a run with the settings of Train Reward LoRA.

    Args:
        settings: the widgets of Train Reward LoRA.
        shape: THESE_FILES, or a named size in whose place no file is read.
        card: THIS_MACHINE, or a named card.
        card_gb: use only so much of the card, GiB; 0 takes all of it.
        ram_gb: host memory for the run, GB; 0 takes what this machine has free.

    Raises:
        ValueError: settings that cannot work; a model file that is missing or no Wan transformer.
    """
    config = training.make_config(wan_files, prompts, reward_model, settings)
    host_bytes = int((ram_gb or config.engine.ram_gb) * 1e9) or free_memory_bytes()
    found = plan(config, shape=_shape(shape), card=_card(config, card, card_gb, host_bytes), host_free_bytes=host_bytes)
    why = "" if found["fits"] else refusal(found)
    chart = paths.image_tensor(picture(config, found))
    return PlanReport(
        text=table.text(config, found, why), verdict="\n".join(filter(None, (table.verdict(found), why))), fits=found["fits"], json=json.dumps(found, indent=2),
        chart=chart, chart_files=paths.save_temp_images(chart),
    )  # fmt: skip


def _shape(name: str) -> ModelShape | None:
    if name == THESE_FILES:
        return None
    size, _, base = name.partition(" ")
    return named_shape(size, 1 if base == "fp8" else 2)


def _card(config: TrainConfig, name: str, card_gb: float, host_bytes: int) -> Card:
    if name != THIS_MACHINE:
        card = CARDS[name]
    elif torch.cuda.is_available():
        card = engine.card_of(config, torch.device("cuda"))
        # What ComfyUI keeps loaded now is unloaded before a run starts.
        card = replace(card, memory_bytes=card.memory_bytes + (0 if config.engine.card_gb else torch.cuda.memory_reserved()))
    else:
        card = engine.card_of(config, torch.device("cpu"))
    return replace(card, memory_bytes=int(card_gb * GIB) or card.memory_bytes or host_bytes)


def picture(config: TrainConfig, found: Mapping[str, Any]):
    """Peaks by phase and host memory by part, against the limits; seconds by phase as a line."""
    driver = found["gpu_peak_bytes"] - max(found["gpu_phase_bytes"].values())
    card = tuple((name, (value + driver) / 1e9) for name, value in found["gpu_phase_bytes"].items())
    memory = tuple((name, value / 1e9) for name, value in table.memory_rows(found).items())
    usable, free = found["card"]["usable_bytes"] / 1e9, found["host_free_bytes"] / 1e9
    groups = [
        Bars(title="On the card", unit="GB", rows=card, limit=usable, limit_label=f"{usable:.1f} GB of {found['card']['name']}"),
        Bars(title="In memory", unit="GB", rows=(*memory, ("peak", found["host_peak_bytes"] / 1e9)), limit=free, limit_label=f"{free:.1f} GB free"),
    ]
    seconds = ", ".join(f"{name} {table.duration(value)}" for name, value in found["seconds_per_step"].items() if name != "total" and value >= 0.005)
    once = table.clips(config, found)
    notes = [
        f"An update: {seconds}.",
        *([f"{once[0].upper()}{once[1:]}."] if once else []),
        f"Knobs: {table.knobs(found['knobs'])}.",
        f"{found['note'][0].upper()}{found['note'][1:]}.",
    ]
    if not found["fits"]:
        notes.insert(0, f"{refusal(found).partition('; ')[2][:1].upper()}{refusal(found).partition('; ')[2][1:]}.")
    video = config.video
    title = f"{config.method}, {video.width_px} x {video.height_px} x {video.frames}, rank {config.lora.rank}, batch {config.batch}"
    return bar_chart(groups, title=title, verdict=table.verdict(found), is_good=found["fits"], notes=notes)

"""A plan as text for people: does it fit, where the memory and the time go, with which knobs, what else would do."""

from __future__ import annotations

from typing import Any

from ..config import TrainConfig

_GB = 1e9


def verdict(plan: dict[str, Any]) -> str:
    """One line: fits or not, and the figures that matter."""
    card, host, seconds = plan["gpu_peak_bytes"] / _GB, plan["host_peak_bytes"] / _GB, plan["seconds_per_step"]["total"]
    word = "Fits" if plan["fits"] else "Does not fit"
    before = f", once {duration(plan['seconds_before_first_step'])} before them" if plan["seconds_before_first_step"] else ""
    return f"{word}: {card:.1f} GB on {plan['card']['name']}, {host:.1f} GB of memory, about {duration(seconds)} an update{before}"


def text(config: TrainConfig, plan: dict[str, Any], refusal: str = "") -> str:
    """The whole plan.

    Args:
        plan: of `plan.plan` with a card.
        refusal: why it does not fit, if it does not.
    """
    video = config.video
    card = {name: value / _GB for name, value in plan["gpu_phase_bytes"].items()}
    memory = {name: value / _GB for name, value in memory_rows(plan).items()}
    lines = [
        f"{config.method}, {config.expert}-noise, {video.width_px} x {video.height_px} x {video.frames} frames ({plan['tokens_per_video']} tokens), "
        f"batch {config.batch}, rank {config.lora.rank}",
        verdict(plan),
        *([refusal[0].upper() + refusal[1:]] if refusal else []),
        "",
        *_columns(
            ("on the card", "GB", {**card, "peak, with driver": plan["gpu_peak_bytes"] / _GB}),
            ("in memory", "GB", {**memory, "peak": plan["host_peak_bytes"] / _GB}),
            ("an update", "s", plan["seconds_per_step"]),
        ),
        "",
        *filter(None, (clips(config, plan),)),
        f"limits: {plan['card']['usable_bytes'] / _GB:.1f} of {plan['card']['memory_bytes'] / _GB:.1f} GB on {plan['card']['name']}, "
        f"{plan['host_free_bytes'] / _GB:.1f} GB of memory, {plan['disk_bytes'] / _GB:.2f} GB of disk for checkpoints",
        f"knobs: {knobs(plan['knobs'])}",
        *(f"or: {_alternative(other, plan['knobs'])}" for other in plan["alternatives"]),
        f"({plan['note']})",
    ]
    return "\n".join(lines)


def memory_rows(plan: dict[str, Any]) -> dict[str, int]:
    """Parts of host memory that there are; and what comes before the training, where that asks for more than all of them together."""
    before = {f"while {name}": value for name, value in plan["host_before_bytes"].items() if value == plan["host_peak_bytes"]}
    return {name: value for name, value in plan["host_part_bytes"].items() if value} | before


def clips(config: TrainConfig, plan: dict[str, Any]) -> str:
    """What is done with clips before the first update, in words; empty where nothing is."""
    seconds, real = plan["seconds_before_first_step"], config.real
    if not seconds:
        return ""
    if real.path:
        return f"once, before the first update: {duration(seconds)} for scoring the clips of real.path, of which {real.keep:.0%} are learned from"
    tries = f", the best of {real.tries} videos each," if real.tries > 1 else ""
    return f"once, before the first update: {duration(seconds)} for {real.replay} clips of the base model{tries} at {config.sampling.steps} steps"


def knobs(values: dict[str, Any]) -> str:
    """Knobs in the words of the settings."""
    shown = {True: "yes", False: "no"}
    return ", ".join(f"{name} {shown.get(value, value) if isinstance(value, bool) else value}" for name, value in values.items())


def duration(seconds: float) -> str:
    """Seconds in a unit that can be read."""
    return f"{seconds:.1f} s" if seconds < 120 else f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _alternative(other: dict[str, Any], chosen: dict[str, Any]) -> str:
    changed = {name: value for name, value in other["knobs"].items() if value != chosen[name]}
    sizes = f"{other['gpu_peak_bytes'] / _GB:.1f} GB on the card, {other['host_peak_bytes'] / _GB:.1f} GB of memory"
    return f"{sizes}, {duration(other['seconds_per_step'])}: {knobs(changed)}"


def _columns(*columns: tuple[str, str, dict[str, float]]) -> list[str]:
    """Tables side by side; the last row of each stands on the last line."""
    height = max(len(rows) for _, _, rows in columns)
    blocks = []
    for title, unit, rows in columns:
        *body, last = [f"{name:<20}{value:>8.2f}" for name, value in rows.items()]
        blocks.append([f"{title:<20}{unit:>8}", *body, *[" " * 28] * (height - len(rows)), last])
    return ["    ".join(parts).rstrip() for parts in zip(*blocks, strict=True)]

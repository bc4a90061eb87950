"""What a run will need, read from file headers alone: no weights are loaded and no torch is imported.

Counted here: parameters and bytes of the models, size of the LoRA and of a checkpoint, transformer passes per update. `planning/` adds peaks of card and
host memory, seconds by phase, and the knobs that fit.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from . import needs, run_config
from .config import TrainConfig
from .lora.targets import select_targets
from .planning import table
from .planning.job import guidance_of, video_of
from .planning.memory_plan import least_host, memory_plan, refusal, remedies
from .planning.shapes import NAMES, ModelShape, header_shape, shape_of
from .planning.speed import CARDS, GIB, Card
from .safetensors_file import Header, read_header
from .weight_formats import quantised_weights

_SAVED_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
_PREFIXES = ("model.diffusion_model.", "diffusion_model.")
# fp32 master and AdamW's two moments
_STATE_BYTES = 12
# Larger than any, where only the host's memory is in question
_ANY_CARD = 10**15


def linear_shapes(header: Header) -> dict[str, tuple[int, int]]:
    """(out, in) features of every Linear of a transformer file, by path, in the order of the file."""
    shapes = {}
    for key, shape in header.shapes.items():
        if key.endswith(".weight") and len(shape) == 2:
            path = key.removesuffix(".weight")
            for prefix in _PREFIXES:
                path = path.removeprefix(prefix)
            shapes[path] = (shape[0], shape[1])
    return shapes


def lora_parameters(shapes: dict[str, tuple[int, int]], config: TrainConfig) -> tuple[int, int]:
    """Number of adapted Linears and of LoRA parameters for one expert, from its Linears' shapes."""
    chosen = select_targets(shapes, config.lora.targets, config.lora.skip)
    return len(chosen), sum(config.lora.rank * sum(shapes[path]) for path in chosen)


def passes_per_update(config: TrainConfig, expert: str) -> dict[str, float]:
    """Transformer passes of one update and one video: rollout, gradient (a backward is two passes), reference, real videos; and their sum.

    For steps that are drawn: the mean (a shortened rollout is reckoned at the mean step).
    """
    guidance = guidance_of(config)
    first, last, selected = _gradient_span(config, expert)
    is_chain = config.method == "reward_backprop" and config.objective.mode == "chain"
    end = config.sampling.steps - 1 if is_chain else last
    if config.starts_from_clips:
        skipped = first
    else:
        skipped = max(0.0, first - config.objective.rollout_steps) if config.objective.rollout_steps else 0.0
    # Steps of reward flow run once without gradient, if they are run again in backward.
    again = selected if config.method == "reward_flow" and config.reward_flow.recompute else 0
    needs_reference = config.objective.kl_weight > 0 or config.guards.kl_budget > 0
    is_real = config.method == "prfl" and config.prfl.real_weight > 0
    factor = (1 if guidance == 1.0 else 2) * config.optimiser.accumulate
    passes = {
        "rollout": factor * (end + 1 - selected - skipped + again),
        "gradient": factor * 3.0 * selected,
        "reference": factor * float(selected if needs_reference else 0),
        "real": config.optimiser.accumulate * (3.0 if is_real else 0.0),
    }
    return {**passes, "total": sum(passes.values())}


def _gradient_span(config: TrainConfig, expert: str) -> tuple[float, float, int]:
    """Mean index of the first and of the last step with gradient, and how many there are."""
    own, objective = config.gradient_steps(expert), config.objective
    if config.method == "reward_flow":
        return own[0], own[-1], len(own)
    strategy, count = {"prfl": ("random", config.prfl.points), "one_pass": ("random", 1)}.get(config.method, (objective.strategy, objective.grad_steps))
    if strategy == "list":
        chosen = sorted(step for step in objective.step_list if step in own)
        return chosen[0], chosen[-1], len(chosen)
    if strategy == "random":
        spread = (len(own) + 1) / (count + 1)
        return own[0] + spread - 1, own[0] + spread * count - 1, count
    if strategy == "uniform":
        reach = (count - 1) * (len(own) // count)
        start = own[0] + (len(own) - 1 - reach) / 2
        return start, start + reach, count
    count = 1 if strategy == "last" else count
    return own[-1] - count + 1, own[-1], count


def plan(config: TrainConfig, *, shape: ModelShape | None = None, card: Card | None = None, host_free_bytes: int = 0) -> dict[str, Any]:
    """The plan as JSON values.

    Args:
        shape: of the experts; without it their files' headers are read.
        card: device to plan for; without it only counts and disk are told.
        host_free_bytes: host memory that the run may use.

    Raises:
        ValueError: a model file is missing, truncated, neither safetensors nor GGUF, or stored in a way that cannot be trained through.
    """
    if card is not None and card.name == "cpu" and config.dtype == "auto":
        config = replace(config, dtype="fp32")
    experts, lora_bytes, state_bytes = {}, 0, 0
    for expert in needs.experts(config):
        header = None if shape else _trainable_header(getattr(config.models, expert), f"{expert}-noise expert")
        is_trained = expert in config.trained_experts
        linears = linear_shapes(header) if header else shape.linears
        modules, parameters = lora_parameters(linears, config) if is_trained else (0, 0)
        lora_bytes += parameters * _SAVED_BYTES[config.save_dtype]
        state_bytes += parameters * (_STATE_BYTES + (4 if config.optimiser.ema_decay else 0))
        experts[expert] = {
            "parameters": sum(_count(size) for size in header.shapes.values()) if header else shape.parameters,
            "file_bytes": sum(header.bytes_of.values()) if header else shape.parameters * shape.weight_bytes,
            "is_trained": is_trained,
            "lora_modules": modules,
            "lora_parameters": parameters,
            "passes_per_update_and_video": passes_per_update(config, expert) if is_trained else None,
        }
    first = config.trained_experts[0]
    shape = shape or header_shape(read_header(getattr(config.models, first)), Path(getattr(config.models, first)).name)
    _, _, frames, height, width = video_of(config, shape).latent_shape(1)
    copies = 2 if config.output_folder else 1
    found = {
        "experts": experts,
        "tokens_per_video": frames * (height // 2) * (width // 2),
        "lora_file_bytes": lora_bytes,
        "trained_state_bytes": state_bytes,
        "disk_bytes": (config.keep_checkpoints + 1) * (state_bytes + lora_bytes) + copies * lora_bytes,
        "steps": config.steps,
        "videos": config.steps * config.batch * config.optimiser.accumulate,
    }
    if card is not None:
        found |= memory_plan(config, shape, card, host_free_bytes, passes_per_update(config, first))
    return found


def _trainable_header(path: str, what: str) -> Header:
    header = read_header(path, what)
    quantised_weights(path, header, what)
    return header


def check_disk(config: TrainConfig, folder: Path) -> None:
    """Refuse a run whose checkpoints do not fit on the disk of `folder`, or whose LoRAs do not fit on that of `output_folder`.

    Raises:
        ValueError: not enough free space; says how much is needed and what to change.
    """
    found = plan(config)
    places = [(folder, found["disk_bytes"], "checkpoints of this run need", "lower keep_checkpoints or lora.rank")]
    if needs.replays(config):
        # Every try, and then the kept ones in one file; fp32.
        clips = 4 * math.prod(config.video.latent_shape(1)) * config.real.replay * (config.real.tries + 1)
        places.append((folder, found["disk_bytes"] + clips, "checkpoints and clips of this run need", "lower real.replay or real.tries"))
    if config.output_folder:
        places.append((Path(config.output_folder), found["lora_file_bytes"], "this run's LoRAs need", "choose another output_folder"))
    for place, wanted_bytes, what, remedy in places:
        existing = next(path for path in (place, *place.parents) if path.exists())
        free_bytes = shutil.disk_usage(existing).free
        if free_bytes < wanted_bytes:
            raise ValueError(f"{what} {wanted_bytes / 1e9:.2f} GB, but {existing} has {free_bytes / 1e9:.2f} GB free; make room, or {remedy}")


def check_memory(config: TrainConfig) -> None:
    """Refuse a run that this machine's memory cannot hold, however much of it a card takes.

    Raises:
        ValueError: says how much is needed at least, for what, and what would fit.
    """
    first = config.trained_experts[0]
    shape = header_shape(read_header(getattr(config.models, first)), Path(getattr(config.models, first)).name)
    free_bytes = int(config.engine.ram_gb * 1e9) or free_memory_bytes()
    needed, part = least_host(config, shape)
    if needed > free_bytes:
        words = "; ".join(remedies(config, shape, _ANY_CARD, free_bytes)) or "use smaller models, or a machine with more memory"
        raise ValueError(
            f"this run needs at least {needed / 1e9:.2f} GB of memory, most of it for {part}, but {free_bytes / 1e9:.2f} GB are free; close other programs. "
            f"Would fit: {words}"
        )


def _count(shape: tuple[int, ...]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total


def main(argv: list[str]) -> int:
    """Print the plan of a config file; `lab.py plan CONFIG` calls this."""
    parser = argparse.ArgumentParser(prog="lab.py plan", description="What a training run would need; needs no weights with --shape, and no GPU.")
    parser.add_argument("config", help="training config, a JSON file")
    parser.add_argument("--json", action="store_true", help="print JSON in place of a table")
    parser.add_argument("--shape", help=f"size of the experts without their files: {', '.join(NAMES)}, or a safetensors file")
    parser.add_argument("--base", choices=["bf16", "fp8"], help="how the experts' weights are stored, with a named --shape (default: bf16)")
    parser.add_argument("--card", default="rtx 4090", help=f"device to plan for: {', '.join(CARDS)} (default: rtx 4090)")
    parser.add_argument("--card-gb", type=float, default=0.0, help="use only so much of its memory, in GiB")
    parser.add_argument("--ram-gb", type=float, default=0.0, help="host memory for the run, in GB (default: what this machine has free)")
    options = parser.parse_args(argv)
    try:
        values = json.loads(Path(options.config).read_text(encoding="utf-8-sig"))
        if run_config.kind_of(values) != run_config.LORA:
            raise ValueError(f"{options.config} trains a PAVRM, whose blocks learn whole and outside of the block executor: plans are made for LoRAs only")
        config = run_config.read(values)
        found = plan(config, shape=_shape(options), **_machine(options))
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(found, indent=2) if options.json else table.text(config, found, "" if found["fits"] else refusal(found)))
    return 0


def _shape(options: argparse.Namespace) -> ModelShape | None:
    if options.base and options.shape not in NAMES:
        raise ValueError(f"--base {options.base} goes with a named --shape ({', '.join(NAMES)}); a file tells how its weights are stored")
    if not options.shape:
        return None
    shape = shape_of(options.shape)
    return replace(shape, weight_bytes=1) if options.base == "fp8" else shape


def _machine(options: argparse.Namespace) -> dict[str, Any]:
    if options.card.lower() not in CARDS:
        raise ValueError(f"--card is {options.card!r}; it must be one of {', '.join(CARDS)}; use --card-gb for another size")
    for name in ("card_gb", "ram_gb"):
        value = getattr(options, name)
        if not 0 <= value < 1e6:
            raise ValueError(f"--{name.replace('_', '-')} is {value:g}; give a size above 0, or leave it out")
    host_bytes = int(options.ram_gb * 1e9) or free_memory_bytes()
    card = CARDS[options.card.lower()]
    if options.card_gb or not card.memory_bytes:
        card = replace(card, memory_bytes=int(options.card_gb * GIB) or host_bytes)
    return {"card": card, "host_free_bytes": host_bytes}


def free_memory_bytes() -> int:
    """Host memory that can be had now; where the system does not tell (neither Linux nor POSIX sysconf), 64 GB are assumed."""
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        for line in meminfo.read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return min(int(line.split()[1]) * 1024, _container_bytes())
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return 64 * 10**9


def _container_bytes(folder: Path = Path("/sys/fs/cgroup")) -> int:
    """What a container's limit leaves; caches of files, which it gives up when asked, count as free. Without a limit: more than there is."""
    try:
        limit, used = ((folder / name).read_text(encoding="ascii").strip() for name in ("memory.max", "memory.current"))
        caches = dict(line.split() for line in (folder / "memory.stat").read_text(encoding="ascii").splitlines())
    except OSError:
        return _ANY_CARD
    return _ANY_CARD if limit == "max" else max(0, int(limit) - int(used) + int(caches.get("inactive_file", 0)))

"""From settings, model shapes, card and host to knobs, peaks and seconds; and a refusal with what would fit."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

from .. import needs
from ..config import TrainConfig
from ..lora.targets import select_targets
from .choose import USABLE, choose, remedies, smallest
from .memory import Choice, Job, gpu_bytes, host_bytes, kept_bytes, phases
from .shapes import ModelShape
from .speed import Card, pass_seconds
from .work import passes

# Text to reward and VAE: weights of a CLIP-H-sized reward model and of the Wan VAE in bf16 (assumed; published sizes).
_REWARD_BYTES = 2_200_000_000
_ALTERNATIVES = 4


def job_of(config: TrainConfig, shape: ModelShape, *, reward_bytes: int = _REWARD_BYTES) -> Job:
    """What one update holds at once.

    Raises:
        ValueError: the model's latents are not those of `video.vae`.
    """
    if shape.latent_channels != config.video.latent_channels:
        raise ValueError(
            f"the model has latents of {shape.latent_channels} channels, but video.vae is {config.video.vae!r}, which has {config.video.latent_channels}; "
            "Wan2.2 5B needs wan2.2, all others wan2.1"
        )
    _, _, frames, height, width = config.video.latent_shape(1)
    chosen = select_targets(shape.linears, config.lora.targets, config.lora.skip)
    adapted = frozenset(path.removeprefix("blocks.0.") for path in chosen if path.startswith("blocks.0."))
    branches = 1 if config.sampling.guidance == 1.0 else 2
    objective = config.objective
    selected = max(1, len(objective.step_list)) if objective.strategy == "list" else 1 if objective.strategy == "last" else objective.grad_steps
    latents = frames if objective.decode == "all" else min(frames, objective.decode_count)
    return Job(
        shape=shape,
        tokens=frames * (height // 2) * (width // 2),
        rollout_batch=config.batch * branches,
        gradient_batch=config.batch * branches,
        graphs=selected if objective.mode == "chain" else 1,
        element_bytes=4 if config.dtype == "fp32" else 2,
        rank=config.lora.rank,
        adapted=adapted,
        adapted_outside=frozenset(chosen) & shape.outer_linears.keys(),
        lora_parameters=len(config.trained_experts) * config.lora.rank * sum(sum(shape.linears[path]) for path in chosen),
        experts=len(needs.experts(config)),
        has_average=config.optimiser.ema_decay > 0,
        decode=(config.video.width_px * config.video.height_px, latents, config.batch),
        reward_bytes=reward_bytes,
    )


def trains_outside(config: TrainConfig, shape: ModelShape) -> bool:
    """Whether Linears around the blocks have a LoRA, so that gates and text need gradients inside of the blocks."""
    chosen = select_targets(shape.linears, config.lora.targets, config.lora.skip)
    return any(path.startswith(("time_", "text_")) for path in chosen)


def step_seconds(config: TrainConfig, job: Job, choice: Choice, card: Card, counts: dict[str, float]) -> dict[str, float]:
    """Seconds of one update by phase. `counts`: passes of one video by kind, from `plan.passes_per_update`."""
    work = passes(
        job.shape, job.tokens, job.rank, set(job.adapted), keeps_attention=choice.keep_attention, trains_outside=trains_outside(config, job.shape)
    )
    one = pass_seconds(job, choice, card, work, job.rollout_batch)
    # One pass of the whole batch carries rollout_batch latents; counts are of single latents.
    branches = 1 if config.sampling.guidance == 1.0 else 2
    rolled = (counts["rollout"] + counts["reference"]) / branches
    selected = counts["gradient"] / 3 / branches
    optimiser = job.lora_parameters * 28 / (20e9 if choice.optimiser_place == "host" else 2000e9)
    seconds = {"rollout": rolled * one["rollout"], "forward": selected * one["forward"], "backward": selected * one["backward"], "optimiser": optimiser}
    return {**seconds, "total": sum(seconds.values())}


def memory_plan(config: TrainConfig, shape: ModelShape, card: Card, host_free_bytes: int, counts: dict[str, float]) -> dict[str, Any]:
    """The plan as JSON values; `fits` is False where nothing does, and then `remedies` says what would."""
    job = job_of(config, shape)

    def seconds(choice: Choice) -> float:
        return step_seconds(config, job, choice, card, counts)["total"]

    chosen, others = choose(job, card.memory_bytes, host_free_bytes, seconds)
    choice = chosen or smallest(job)
    choice = fixed_by_hand(config, choice, shape)
    is_fitting = gpu_bytes(job, choice) <= USABLE * card.memory_bytes and host_bytes(job, choice) <= host_free_bytes
    return {
        "gpu_peak_bytes": gpu_bytes(job, choice),
        "gpu_phase_bytes": phases(job, choice),
        "host_peak_bytes": host_bytes(job, choice),
        "kept_activation_bytes": job.graphs * kept_bytes(job, choice),
        "seconds_per_step": {name: round(value, 3) for name, value in step_seconds(config, job, choice, card, counts).items()},
        "fits": is_fitting,
        "card": {"name": card.name, "memory_bytes": card.memory_bytes},
        "host_free_bytes": host_free_bytes,
        "knobs": asdict(choice),
        "alternatives": [
            {
                "knobs": asdict(other), "gpu_peak_bytes": gpu_bytes(job, other), "host_peak_bytes": host_bytes(job, other),
                "seconds_per_step": round(seconds(other), 3),
            }
            for other in others[:_ALTERNATIVES]
        ],  # fmt: skip
        "remedies": [] if is_fitting else remedies(job, card.memory_bytes, host_free_bytes, _changed(config, job)),
        "note": "predicted from operations and assumed rates; not measured on this card",
    }


def fixed_by_hand(config: TrainConfig, choice: Choice, shape: ModelShape) -> Choice:
    """The choice with the knobs that the settings fix."""
    engine = config.engine
    numbers = {name: getattr(engine, name) for name in ("resident_blocks", "slots", "ffn_chunk_tokens", "row_chunk_tokens", "head_groups")}
    words = {name: getattr(engine, name) for name in ("keep_place", "optimiser_place")}
    changes: dict[str, Any] = {name: value for name, value in numbers.items() if value >= 0}
    changes |= {name: value for name, value in words.items() if value != "auto"}
    if engine.keep_attention != "auto":
        changes["keep_attention"] = engine.keep_attention == "yes"
    if "resident_blocks" in changes:
        changes["resident_blocks"] = min(changes["resident_blocks"], shape.blocks)
        changes["merges_resident"] = choice.merges_resident and changes["resident_blocks"] == choice.resident_blocks
    return replace(choice, **changes)


def refusal(plan: dict[str, Any]) -> str:
    """Why a plan does not fit, in one sentence with its remedy."""
    card, host = plan["card"]["memory_bytes"], plan["host_free_bytes"]
    facts = f"this run needs {plan['gpu_peak_bytes'] / 1e9:.1f} GB on the card and {plan['host_peak_bytes'] / 1e9:.1f} GB of memory"
    limits = f"but {plan['card']['name']} has {card / 1e9:.1f} GB and {host / 1e9:.1f} GB are free"
    remedy = f"would fit: {'; '.join(plan['remedies'])}" if plan["remedies"] else "use a smaller video, or a machine with more memory"
    return f"{facts}, {limits}; {remedy}"


def _changed(config: TrainConfig, job: Job) -> dict[str, Job]:
    """Jobs that ask for less, by words."""
    pixels, latents, batch = job.decode
    others = {}
    if job.gradient_batch > 1 and config.batch > 1:
        share = job.gradient_batch // config.batch
        others["batch 1"] = replace(job, rollout_batch=share, gradient_batch=share, decode=(pixels, latents, 1))
    if latents > 1:
        others["objective.decode_count 1"] = replace(job, decode=(pixels, 1, batch))
    for words, part in (("half of the frames", 0.5), ("a quarter of the pixels", 0.25)):
        others[words] = replace(job, tokens=max(1, int(job.tokens * part)), decode=(int(pixels * (part if part == 0.25 else 1)), latents, batch))
    if job.rank > 32:
        others["lora.rank 32"] = replace(job, rank=32, lora_parameters=job.lora_parameters * 32 // job.rank)
    return others

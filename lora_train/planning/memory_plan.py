"""From settings, model shapes, card and host to knobs, peaks and seconds; and a refusal with what would fit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

from .. import needs
from ..config import TrainConfig
from ..input_config import LATENTS
from ..lora.targets import select_targets
from .choose import USABLE, candidates, choose, fits, nearest
from .job import job_of, size_step
from .memory import PROCESS_BYTES, Choice, Job, base_job, gpu_bytes, host_before, host_bytes, host_parts, judged, kept_bytes, phases, rest_bytes
from .scoring import decode_flops, shown_flops
from .shapes import ModelShape
from .speed import Card, pass_seconds
from .work import Passes, passes

_ALTERNATIVES = 4
_CPU_CHUNK = 1024
# An alternative must spare so much of card or host against those before it.
_WORTH = 0.9
_OPTIMISER_BYTES = 28  # read and written for a parameter: weight, gradient, two moments
_HOST_RATE, _CARD_RATE = 20e9, 2000e9


def trains_outside(config: TrainConfig, shape: ModelShape) -> bool:
    """Whether Linears around the blocks have a LoRA, so that gates and text need gradients inside of the blocks."""
    chosen = select_targets(shape.linears, config.lora.targets, config.lora.skip)
    return any(path.startswith(("time_", "text_")) for path in chosen)


def step_seconds(config: TrainConfig, job: Job, choice: Choice, card: Card, counts: dict[str, float]) -> dict[str, float]:
    """Seconds of one update by phase. `counts`: passes of one video by kind, from `plan.passes_per_update`."""
    branches = job.rollout_batch // job.videos
    gate = trains_outside(config, job.shape)

    def one(of: Job, gated: bool = gate) -> dict[str, float]:
        return pass_seconds(of, choice, card, _passes(of, choice, gated), of.rollout_batch)

    # One pass of the whole batch carries all branches; counts are of single latents. Real videos have no second branch.
    step = one(job)
    rolled, selected = (counts["rollout"] + counts["reference"]) / branches, counts["gradient"] / 3 / branches
    seconds = {name: (rolled if name == "rollout" else selected) * step[name] for name in ("rollout", "forward", "backward")}
    if counts["real"]:
        real = one(replace(job, rollout_batch=job.videos, gradient_batch=job.videos))
        seconds["real videos"] = counts["real"] / 3 * (real["forward"] + real["backward"])
    scorings = max(1.0, selected if config.method != "reward_flow" else config.optimiser.accumulate)
    if job.judged_blocks:
        trunk = one(judged(job), False)
        seconds["scoring"] = scorings * (trunk["forward"] + trunk["backward"])
    elif job.scored is not None:
        seconds["scoring"] = scorings * decode_flops(job.scored) / card.gemm
    seconds["optimiser"] = job.lora_parameters * _OPTIMISER_BYTES / (_HOST_RATE if choice.optimiser_place == "host" else _CARD_RATE)
    return {**seconds, "total": sum(seconds.values())}


def clips_seconds(config: TrainConfig, job: Job, choice: Choice, card: Card) -> float:
    """Seconds that the base model takes for its clips, or the rewards to choose, once, before the first update; 0 without either."""
    if job.clips is None:
        return 0.0
    base = base_job(job)
    seconds = shown_flops(job.scored, job.clips.frames) / card.gemm if job.clips.frames else 0.0
    if job.clips.branches:
        seconds += config.sampling.steps * pass_seconds(base, choice, card, _passes(base, choice, False), job.clips.branches)["rollout"]
    if job.clips.is_judged and job.judged_blocks:
        trunk = judged(job)
        seconds += pass_seconds(trunk, choice, card, _passes(trunk, choice, False), 1)["rollout"]
    return job.clips.total * seconds


def _passes(job: Job, choice: Choice, gate: bool) -> Passes:
    return passes(
        job.shape, job.tokens, job.rank, set(job.adapted), keeps_attention=choice.keep_attention, keeps_feed_forward=choice.keep_feed_forward,
        trains_outside=gate,
    )  # fmt: skip


def memory_plan(config: TrainConfig, shape: ModelShape, card: Card, host_free_bytes: int, counts: dict[str, float]) -> dict[str, Any]:
    """The plan as JSON values; `fits` is False where nothing does, and then `remedies` says what would."""
    job = job_of(config, shape)
    choices = candidates(job, lambda choice: fixed_by_hand(config, _on_cpu(choice, shape) if card.name == "cpu" else choice, shape))

    def seconds(choice: Choice) -> float:
        return step_seconds(config, job, choice, card, counts)["total"]

    chosen, others = choose(choices, job, card.memory_bytes, host_free_bytes, seconds)
    choice = chosen or nearest(choices, job, card.memory_bytes, host_free_bytes)
    return {
        "gpu_peak_bytes": gpu_bytes(job, choice),
        "gpu_phase_bytes": phases(job, choice),
        "gpu_rest_bytes": rest_bytes(job, choice),
        "host_peak_bytes": host_bytes(job, choice),
        "host_part_bytes": host_parts(job, choice),
        "host_before_bytes": host_before(job, choice),
        "kept_activation_bytes": job.graphs * kept_bytes(job, choice),
        "seconds_per_step": {name: round(value, 3) for name, value in step_seconds(config, job, choice, card, counts).items()},
        "seconds_before_first_step": round(clips_seconds(config, job, choice, card), 3),
        "fits": chosen is not None,
        "card": {"name": card.name, "memory_bytes": card.memory_bytes, "usable_bytes": int(USABLE * card.memory_bytes)},
        "host_free_bytes": host_free_bytes,
        "knobs": asdict(choice),
        "alternatives": _alternatives(job, choice, others, seconds),
        "remedies": [] if chosen else remedies(config, shape, card.memory_bytes, host_free_bytes),
        "note": _note(config, shape),
    }


def _on_cpu(choice: Choice, shape: ModelShape) -> Choice:
    """Weights are where they are needed already, and copying them to slots would only cost time. Merged copies would be the weights' memory once more, for a
    few percent of a rollout; and a CPU loses nothing by smaller pieces."""
    chunk = min(_CPU_CHUNK, choice.ffn_chunk_tokens)
    return replace(choice, resident_blocks=shape.blocks, merges_resident=False, ffn_chunk_tokens=chunk, row_chunk_tokens=min(chunk, choice.row_chunk_tokens))


def _note(config: TrainConfig, shape: ModelShape) -> str:
    notes = ["predicted from operations and assumed rates; not measured on this card"]
    if shape.latent_channels == LATENTS["wan2.2"].channels and needs.start_images(config):
        notes.append("with start images a 5B model's blocks run whole in backward: more than is counted here")
    pavrm = needs.pavrm(config)
    if pavrm and pavrm.options.get("generator"):
        notes.append("a PAVRM in LoRA form runs its blocks whole: more than is counted here")
    return "; ".join(notes)


def _alternatives(job: Job, chosen: Choice, others: list[Choice], seconds: Callable[[Choice], float]) -> list[dict[str, Any]]:
    """Slower choices that spare card or host memory."""
    found, card, host = [], gpu_bytes(job, chosen), host_bytes(job, chosen)
    for other in others:
        sizes = {"gpu_peak_bytes": gpu_bytes(job, other), "host_peak_bytes": host_bytes(job, other)}
        if sizes["gpu_peak_bytes"] <= _WORTH * card or sizes["host_peak_bytes"] <= _WORTH * host:
            card, host = min(card, sizes["gpu_peak_bytes"]), min(host, sizes["host_peak_bytes"])
            found.append({"knobs": asdict(other), **sizes, "seconds_per_step": round(seconds(other), 3)})
    return found[:_ALTERNATIVES]


def fixed_by_hand(config: TrainConfig, choice: Choice, shape: ModelShape) -> Choice:
    """The choice with the knobs that the settings fix."""
    engine = config.engine
    numbers = {name: getattr(engine, name) for name in ("resident_blocks", "slots", "ffn_chunk_tokens", "row_chunk_tokens", "head_groups")}
    words = {name: getattr(engine, name) for name in ("keep_place", "optimiser_place")}
    changes: dict[str, Any] = {name: value for name, value in numbers.items() if value >= 0}
    changes |= {name: value for name, value in words.items() if value != "auto"}
    for name in ("keep_attention", "keep_feed_forward"):
        if getattr(engine, name) != "auto":
            changes[name] = getattr(engine, name) == "yes"
    if "resident_blocks" in changes:
        changes["resident_blocks"] = min(changes["resident_blocks"], shape.blocks)
        changes["merges_resident"] = choice.merges_resident and changes["resident_blocks"] == choice.resident_blocks
    return replace(choice, **changes)


def refusal(plan: dict[str, Any]) -> str:
    """Why a plan does not fit, in one sentence with its remedy."""
    card, host, needed_card, needed_host = plan["card"]["usable_bytes"], plan["host_free_bytes"], plan["gpu_peak_bytes"], plan["host_peak_bytes"]
    short = []
    if needed_card > card:
        short.append(f"{needed_card / 1e9:.1f} GB on the card, but {plan['card']['name']} has {card / 1e9:.1f} GB for it")
    if needed_host > host:
        parts = {**plan["host_part_bytes"], **{f"weights while {name}": value for name, value in plan["host_before_bytes"].items() if value == needed_host}}
        largest = max(parts, key=parts.get)
        part = f"{parts[largest] / 1e9:.1f} GB of it for {largest}"
        short.append(f"{needed_host / 1e9:.1f} GB of memory ({part}), but {host / 1e9:.1f} GB are free")
    remedy = f"would fit: {'; '.join(plan['remedies'])}" if plan["remedies"] else "use a smaller video, or a machine with more memory"
    return f"this run needs {', and '.join(short)}; {remedy}"


def least_host(config: TrainConfig, shape: ModelShape) -> tuple[int, str]:
    """The least bytes of host memory that any knobs ask for, without those of the process, and what most of them are for."""
    job = job_of(config, shape)
    choices = candidates(job, lambda choice: fixed_by_hand(config, choice, shape))
    choice = min(choices, key=lambda choice: host_bytes(job, choice))
    parts = {name: value for name, value in host_parts(job, choice).items() if name != "process"}
    needed = host_bytes(job, choice) - PROCESS_BYTES
    before = {f"{name} with the experts' weights": value for name, value in host_before(job, choice).items()}
    return needed, max(before, key=before.get) if sum(parts.values()) < needed else max(parts, key=parts.get)


def remedies(config: TrainConfig, shape: ModelShape, card_bytes: int, host_free_bytes: int) -> list[str]:
    """Which changes of the settings would fit, in words."""
    found = []
    for words, changed, its_shape in _changes(config, shape):
        job = job_of(changed, its_shape)
        if any(fits(job, choice, card_bytes, host_free_bytes) for choice in candidates(job, lambda choice, own=changed: fixed_by_hand(own, choice, shape))):
            found.append(words)
    return found


def _changes(config: TrainConfig, shape: ModelShape) -> list[tuple[str, TrainConfig, ModelShape]]:
    """Settings that ask for less, each with its words."""
    video, objective = config.video, config.objective
    found = []
    if config.engine != type(config.engine)(card_gb=config.engine.card_gb, ram_gb=config.engine.ram_gb):
        found.append(("the engine's knobs left to the plan", replace(config, engine=type(config.engine)()), shape))
    if config.batch > 1:
        found.append(("batch 1", replace(config, batch=1), shape))
    if needs.replays(config):
        found.append(("clips of your own (real.path)", replace(config, real=replace(config.real, path="clips")), shape))
    if needs.decodes_training_videos(config) and objective.decode == "all":
        found.append(("objective.decode random", replace(config, objective=replace(objective, decode="random", decode_history=1)), shape))
    elif needs.decodes_training_videos(config) and objective.decode != "first":
        found.append(("objective.decode first with decode_count 1", replace(config, objective=replace(objective, decode="first", decode_count=1)), shape))
    if shape.weight_bytes > 1:
        found.append(("fp8 files of the experts", config, replace(shape, weight_bytes=1)))
    frames = video.frames // 8 * 4 + 1
    step = size_step(shape)
    width, height = (max(step, size // (2 * step) * step) for size in (video.width_px, video.height_px))
    if frames < video.frames:
        found.append((f"{frames} frames", replace(config, video=replace(video, frames=frames)), shape))
    found.append((f"{width} x {height}", replace(config, video=replace(video, width_px=width, height_px=height)), shape))
    if config.lora.rank > 32:
        found.append(("lora.rank 32", replace(config, lora=replace(config.lora, rank=32)), shape))
    return found

"""The fastest knobs that fit, and what to change when none do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from .memory import Choice, Job, gpu_bytes, host_bytes

_FFN_CHUNK, _ROW_CHUNK = 8192, 4096
# Of the card's free memory, what is planned for: fragmentation takes the rest (assumed).
USABLE = 0.94


def candidates(job: Job) -> list[Choice]:
    """From the fastest to the smallest."""
    blocks = job.shape.blocks
    is_quantised = job.shape.weight_bytes < job.element_bytes
    whole = Choice(
        resident_blocks=0 if is_quantised else blocks, slots=2, keep_place="device", keep_attention=True, ffn_chunk_tokens=_FFN_CHUNK,
        row_chunk_tokens=_ROW_CHUNK, head_groups=1, merges_resident=not is_quantised, optimiser_place="device",
    )  # fmt: skip
    some = [replace(whole, merges_resident=False, keep_place="host", resident_blocks=count) for count in range(blocks - 4, 0, -4)]
    small = replace(whole, resident_blocks=0, merges_resident=False, keep_place="host", optimiser_place="host")
    return [
        replace(whole, keep_feed_forward=True),
        whole,
        *([] if is_quantised else [replace(whole, merges_resident=False), replace(whole, merges_resident=False, keep_place="host"), *some]),
        *([] if is_quantised else [replace(choice, optimiser_place="host") for choice in some]),
        small,
        replace(small, keep_attention=False, keep_place="device", optimiser_place="host"),
        replace(small, head_groups=4),
        replace(small, head_groups=8, ffn_chunk_tokens=4096, row_chunk_tokens=2048),
        replace(small, keep_attention=False),
        replace(small, keep_attention=False, head_groups=8, ffn_chunk_tokens=2048, row_chunk_tokens=1024, slots=1),
    ]


def fits(job: Job, choice: Choice, card_bytes: int, host_free_bytes: int) -> bool:
    return gpu_bytes(job, choice) <= USABLE * card_bytes and host_bytes(job, choice) <= host_free_bytes


def choose(job: Job, card_bytes: int, host_free_bytes: int, seconds: Callable[[Choice], float]) -> tuple[Choice | None, list[Choice]]:
    """The fastest choice that fits (None if none does) and the others that fit, in order of their time."""
    fitting = [choice for choice in candidates(job) if fits(job, choice, card_bytes, host_free_bytes)]
    fitting.sort(key=seconds)
    return (fitting[0] if fitting else None), fitting[1:]


def smallest(job: Job) -> Choice:
    """What needs least on the card."""
    return min(candidates(job), key=lambda choice: gpu_bytes(job, choice))


def remedies(job: Job, card_bytes: int, host_free_bytes: int, others: dict[str, Job]) -> list[str]:
    """Which of the changed jobs (by words) would fit."""
    return [words for words, other in others.items() if any(fits(other, choice, card_bytes, host_free_bytes) for choice in candidates(other))]

"""The fastest knobs that fit, and what to change when none do."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import product

from .memory import Choice, Job, gpu_bytes, host_bytes

# Feed-forward and row chunks in tokens, coarse first.
_CHUNKS = ((8192, 4096), (4096, 2048), (2048, 1024))
_HEAD_GROUPS = (1, 2, 4, 8)
_RESIDENT_STEP = 4
# Of the card's free memory, what is planned for: fragmentation takes the rest (assumed).
USABLE = 0.94
# Times nearer than this are held to be equal: the rates are assumed anyway.
_SAME_TIME = 0.002


def candidates(job: Job, fixed: Callable[[Choice], Choice] = lambda choice: choice) -> list[Choice]:
    """Every combination worth a thought, what is simpler and faster first.

    Args:
        fixed: puts in the knobs that are fixed by hand.
    """
    blocks = job.shape.blocks
    is_quantised = job.shape.is_quantised
    resident = [blocks, *range((blocks - 1) // _RESIDENT_STEP * _RESIDENT_STEP, -1, -_RESIDENT_STEP)]
    base = Choice(
        resident_blocks=0, slots=2, keep_place="device", keep_attention=True, ffn_chunk_tokens=_CHUNKS[0][0], row_chunk_tokens=_CHUNKS[0][1], head_groups=1,
        merges_resident=False, optimiser_place="device",
    )  # fmt: skip
    # What GELU gets is kept where everything else stays on the device as well: it takes more room than all the rest.
    wide = replace(base, resident_blocks=blocks, keep_feed_forward=True)
    found = [replace(wide, merges_resident=True), replace(base, resident_blocks=blocks, merges_resident=True), wide] if not is_quantised else [wide]
    for keep_attention, groups, chunks, place, count, optimiser in product(
        (True, False), _HEAD_GROUPS, _CHUNKS, ("device", "host"), resident, ("device", "host")
    ):
        # Small pieces cost time; they are for passes that do not fit otherwise.
        if chunks != _CHUNKS[0] and groups == 1:
            continue
        knobs = {"keep_attention": keep_attention, "head_groups": groups, "ffn_chunk_tokens": chunks[0], "row_chunk_tokens": chunks[1]}
        found.append(replace(base, **knobs, keep_place=place, resident_blocks=count, optimiser_place=optimiser))
    found.append(replace(found[-1], slots=1))
    return list(dict.fromkeys(map(fixed, found)))


def fits(job: Job, choice: Choice, card_bytes: int, host_free_bytes: int) -> bool:
    return gpu_bytes(job, choice) <= USABLE * card_bytes and host_bytes(job, choice) <= host_free_bytes


def choose(
    choices: Iterable[Choice], job: Job, card_bytes: int, host_free_bytes: int, seconds: Callable[[Choice], float]
) -> tuple[Choice | None, list[Choice]]:
    """The fastest choice that fits (None if none does) and the others that fit, in order of their time."""
    timed = [(seconds(choice), choice) for choice in choices if fits(job, choice, card_bytes, host_free_bytes)]
    if not timed:
        return None, []
    least = min(time for time, _ in timed)
    # Among equals the first one named: its knobs are the simplest.
    best = next(choice for time, choice in timed if time <= least * (1 + _SAME_TIME))
    return best, [choice for _, choice in sorted(timed, key=lambda pair: pair[0]) if choice != best]


def smaller(job: Job, choices: Sequence[Choice], present: Choice, host_free_bytes: int) -> Choice | None:
    """The largest of `choices` that needs clearly less on the card than `present`, by a tenth of what can be saved at all; None if none does."""
    now, least = gpu_bytes(job, present), min(gpu_bytes(job, choice) for choice in choices)
    limit = now - max(1, (now - least) // 10)
    fitting = [choice for choice in choices if gpu_bytes(job, choice) <= limit and host_bytes(job, choice) <= host_free_bytes]
    return max(fitting, key=lambda choice: gpu_bytes(job, choice), default=None)


def nearest(choices: Iterable[Choice], job: Job, card_bytes: int, host_free_bytes: int) -> Choice:
    """Where none fits: what fits the card and asks least of the host; else what fits the host and asks least of the card; else the nearest to both."""
    choices = list(choices)
    on_card = [choice for choice in choices if gpu_bytes(job, choice) <= USABLE * card_bytes]
    on_host = [choice for choice in choices if host_bytes(job, choice) <= host_free_bytes]
    if on_card:
        return min(on_card, key=lambda choice: host_bytes(job, choice))
    if on_host:
        return min(on_host, key=lambda choice: gpu_bytes(job, choice))
    return min(choices, key=lambda choice: max(gpu_bytes(job, choice) / (USABLE * card_bytes), host_bytes(job, choice) / max(1, host_free_bytes)))

"""What the block executor can trade: memory against transfers, memory against time. None of the knobs changes what is computed.

Bit for bit the same: resident or streamed, kept on device or host, attention or feed-forward kept or computed again, head groups. Token chunks and
slots with a LoRA buffer only change the order of sums (tests record by how much).
"""

from __future__ import annotations

from dataclasses import dataclass

PLACES = ("device", "host")


@dataclass(frozen=True, kw_only=True)
class Knobs:
    """Choices for one run.

    Attributes:
        resident_blocks: the first so many blocks keep their weights on the device; the others stream. -1: all.
        slots: device copies of a block's weights that streaming rotates through; two hide transfers, one saves memory.
        keep_place: where block inputs and attention outputs wait for the backward pass.
        keep_attention: keep attention output and log-sum-exp, so that attention does not run again.
        keep_feed_forward: keep what GELU gets, so that ffn.0 does not run again: F / D times an input. Pays where memory is ample and linears are most of
            the work (short sequences).
        ffn_chunk_tokens: tokens of the feed-forward layers at a time; 0: all.
        row_chunk_tokens: tokens of norms, gates and rotary embedding at a time; 0: all.
        head_groups: parts in which attention runs backward.
        merges_resident: rollouts use merged copies of resident weights (one more copy of these); else the exact form.
        optimiser_place: where the LoRA's masters, and with them the optimiser, live.
        attention, rollout_attention: see `kernels.attention.BACKENDS` and `ROLLOUT_BACKENDS`. SageAttention in rollouts does change what they compute.
    """

    resident_blocks: int = -1
    slots: int = 2
    keep_place: str = "device"
    keep_attention: bool = True
    keep_feed_forward: bool = False
    ffn_chunk_tokens: int = 0
    row_chunk_tokens: int = 0
    head_groups: int = 1
    merges_resident: bool = True
    optimiser_place: str = "device"
    attention: str = "auto"
    rollout_attention: str = "same"

    def __post_init__(self) -> None:
        for name in ("keep_place", "optimiser_place"):
            if getattr(self, name) not in PLACES:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be one of {', '.join(PLACES)}")
        for name, least in (("resident_blocks", -1), ("slots", 1), ("ffn_chunk_tokens", 0), ("row_chunk_tokens", 0), ("head_groups", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {least}")

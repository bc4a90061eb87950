"""Seconds by phase from operations, bytes and a card's rates. All rates are assumed from published figures, none measured by this project.

Source of the rates: FlashAttention-3 and SageAttention papers, vendor peaks, and the project's reference on performance, section 1 and 3.
"""

from __future__ import annotations

from dataclasses import dataclass

from .memory import Choice, Job, block_bytes, kept_bytes
from .work import Passes

GIB = 1024**3


@dataclass(frozen=True, kw_only=True)
class Card:
    """A device. Rates in FLOP/s, transfers in byte/s."""

    name: str
    memory_bytes: int
    gemm: float
    attention: float
    attention_backward: float
    transfer: float


CARDS = {
    "h200": Card(name="h200", memory_bytes=139 * GIB, gemm=700e12, attention=600e12, attention_backward=500e12, transfer=50e9),
    "h100": Card(name="h100", memory_bytes=79 * GIB, gemm=700e12, attention=600e12, attention_backward=500e12, transfer=50e9),
    "a100": Card(name="a100", memory_bytes=79 * GIB, gemm=250e12, attention=190e12, attention_backward=150e12, transfer=25e9),
    "l40s": Card(name="l40s", memory_bytes=44 * GIB, gemm=170e12, attention=160e12, attention_backward=130e12, transfer=25e9),
    "rtx 5090": Card(name="rtx 5090", memory_bytes=31 * GIB, gemm=220e12, attention=205e12, attention_backward=170e12, transfer=50e9),
    "rtx 4090": Card(name="rtx 4090", memory_bytes=int(23.5 * GIB), gemm=155e12, attention=160e12, attention_backward=130e12, transfer=25e9),
    "rtx 4080": Card(name="rtx 4080", memory_bytes=int(15.5 * GIB), gemm=90e12, attention=95e12, attention_backward=75e12, transfer=25e9),
    "rtx 3090": Card(name="rtx 3090", memory_bytes=int(23.5 * GIB), gemm=65e12, attention=65e12, attention_backward=50e12, transfer=25e9),
    "cpu": Card(name="cpu", memory_bytes=0, gemm=0.05e12, attention=0.03e12, attention_backward=0.03e12, transfer=10e9),
}


def pass_seconds(job: Job, choice: Choice, card: Card, work: Passes, batch: int) -> dict[str, float]:
    """Seconds of one pass of `batch` latents: `rollout`, `forward` (exact) and `backward`; each is the longer of computing and streaming."""
    streamed = (job.shape.blocks - choice.resident_blocks) * block_bytes(job) / card.transfer
    kept = kept_bytes(job, choice) / card.transfer if choice.keep_place == "host" else 0.0
    # Copies out and in run on their own streams; those in the same direction add up.
    # Resident weights that are not copied merged keep their LoRA beside them in rollouts, too.
    beside = 0.0 if choice.merges_resident else choice.resident_blocks / job.shape.blocks
    rollout = (1 - beside) * _seconds(work.forward, card) + beside * _seconds(work.exact, card)
    return {
        "rollout": max(batch * rollout, streamed),
        "forward": max(batch * _seconds(work.exact, card), streamed, kept),
        "backward": max(batch * (work.backward["gemm"] / card.gemm + work.backward["attention"] / card.attention_backward), streamed + kept),
    }


def _seconds(work: dict[str, float], card: Card) -> float:
    return work["gemm"] / card.gemm + work["attention"] / card.attention

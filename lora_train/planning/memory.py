"""Bytes on card and host for one run of the block executor, counted from what its phases hold.

The unit is X, the residual stream of one pass: batch * tokens * width * bytes. tests/host/test_plan_14b.py runs the executor on fake tensors of the
real sizes and holds these figures to what it sees.
"""

from __future__ import annotations

from dataclasses import dataclass

from .shapes import ModelShape

# Driver and libraries of a process, and what the allocator cannot reuse (assumed; 1.5 GB in the published plan with 0.6 GB of outer weights).
CONTEXT_BYTES = 900_000_000
# Python, torch, ComfyUI and file caches of the process (assumed).
PROCESS_BYTES = 4_000_000_000
_LSE_BYTES = 4
# Row chunks of a merge in fp32 with their random numbers (`kernels/lora_linear/merge.py`).
_MERGE_BYTES = 6 * 4 << 22
# fp32 master, gradient and AdamW's two moments
STATE_BYTES = 16
# Bytes of the decoder's graph per pixel with a checkpoint per residual block: the first latent, and every later one (four frames).
_DECODE_FIRST, _DECODE_LATER = 4232, 15190


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The knobs as the plan sees them; names and meaning as in `offload/knobs.py`, plus where masters and optimiser live."""

    resident_blocks: int
    slots: int
    keep_place: str
    keep_attention: bool
    ffn_chunk_tokens: int
    row_chunk_tokens: int
    head_groups: int
    merges_resident: bool
    optimiser_place: str


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is run.

    Attributes:
        shape: of one expert.
        tokens: video tokens of one latent.
        rollout_batch, gradient_batch: latents in one pass; guidance doubles.
        graphs: passes with gradient that wait for one backward.
        element_bytes: of the compute type.
        rank: of the LoRA; 0 for an expert without one.
        adapted: names of a block's adapted Linears.
        lora_parameters: of all trained experts together.
        experts: transformers in memory.
        has_average: a moving average of the masters is kept.
        decode: (pixels of a frame, latents decoded with gradient, batch).
        reward_bytes: weights of the reward model and the VAE.
    """

    shape: ModelShape
    tokens: int
    rollout_batch: int
    gradient_batch: int
    graphs: int
    element_bytes: int
    rank: int
    adapted: frozenset[str]
    lora_parameters: int
    experts: int
    has_average: bool
    decode: tuple[int, int, int]
    reward_bytes: int

    def stream_bytes(self, batch: int) -> int:
        """X."""
        return batch * self.tokens * self.shape.width * self.element_bytes


def block_bytes(job: Job) -> int:
    """A block's weights as stored."""
    shape = job.shape
    linear = sum(out * size for out, size in shape.block_linears.values())
    return linear * min(shape.weight_bytes, job.element_bytes) + (shape.block_parameters - linear) * job.element_bytes


def slot_bytes(job: Job) -> int:
    """A device slot: weights in the compute type, each adapted one inside of its LoRA buffer; the stored bytes beside them if quantised."""
    shape, rank = job.shape, job.rank
    total = shape.block_parameters * job.element_bytes
    for name, (out, size) in shape.block_linears.items():
        total += (rank * (out + size) + rank * rank) * job.element_bytes if name in job.adapted else 0
    return total + (block_bytes(job) if shape.weight_bytes < job.element_bytes else 0)


def phases(job: Job, choice: Choice) -> dict[str, int]:
    """Bytes of tensors on the card at the height of each phase, without driver and libraries."""
    shape = job.shape
    fixed = job.experts * (shape.outer_parameters * job.element_bytes + shape.width * shape.in_channels * 4 * (4 - job.element_bytes)) + job.reward_bytes
    fixed += job.tokens * 128 * 2 * 4  # rotations, fp32
    streams = choice.resident_blocks < shape.blocks
    fixed += job.experts * choice.resident_blocks * block_bytes(job) * (2 if choice.merges_resident and choice.resident_blocks else 1)
    fixed += choice.slots * slot_bytes(job) if streams else 0  # shared by the experts
    fixed += job.lora_parameters * (STATE_BYTES + 4 * job.has_average) if choice.optimiser_place == "device" else 0
    kept = job.graphs * kept_bytes(job, choice) if choice.keep_place == "device" else 0
    roll, x = job.stream_bytes(job.rollout_batch), job.stream_bytes(job.gradient_batch)
    groups = choice.head_groups
    # Self-attention: x, out, its gradient, the stream's gradient, h, q and k before their norms, q, k, v; a group's gradients; the kernel's fp32 dq.
    attention = 10 * x + 3 * x // groups + _workspace(x, groups)
    # Cross-attention: x, out, y, x1, h, q twice, its output, the sum, two gradients; dq.
    cross = (11 if groups == 1 else 12) * x + 2 * x // groups + _workspace(x, groups)
    feed = 10 * x + _feed_bytes(job, choice, job.gradient_batch, backward=True)
    again = 0 if choice.keep_attention else x
    pixels, latents, batch = job.decode
    return {
        "rollout": fixed + _MERGE_BYTES + 6 * roll + max(roll, _feed_bytes(job, choice, job.rollout_batch, backward=False)),
        "forward": fixed + kept + 6 * x + max(x, _feed_bytes(job, choice, job.gradient_batch, backward=False)),
        "decode": fixed + kept + batch * pixels * (_DECODE_FIRST + _DECODE_LATER * (latents - 1)),
        "backward": fixed + kept + again + max(attention, cross, feed) + _row_bytes(job, choice),
    }


def _workspace(x: int, groups: int) -> int:
    return 2 * x // groups


def _feed_bytes(job: Job, choice: Choice, batch: int, *, backward: bool) -> int:
    tokens = min(job.tokens, choice.ffn_chunk_tokens or job.tokens)
    wide, narrow = (4, 4) if backward else (2, 3)
    return batch * tokens * (wide * job.shape.ffn + narrow * job.shape.width) * job.element_bytes


def _row_bytes(job: Job, choice: Choice) -> int:
    """Pieces of the rotary embedding's backward, in fp32."""
    tokens = min(job.tokens, choice.row_chunk_tokens or job.tokens)
    return 6 * job.gradient_batch * tokens * job.shape.width * 4


def kept_bytes(job: Job, choice: Choice) -> int:
    """Activations that one pass with gradient keeps for its backward."""
    x = job.stream_bytes(job.gradient_batch)
    lse = job.gradient_batch * job.tokens * job.shape.heads * _LSE_BYTES
    return job.shape.blocks * (x + (x + lse if choice.keep_attention else 0))


def host_bytes(job: Job, choice: Choice) -> int:
    """Bytes in host memory: streamed weights, kept activations, masters and optimiser, the process."""
    streamed = job.experts * (job.shape.blocks - choice.resident_blocks) * block_bytes(job)
    kept = job.graphs * kept_bytes(job, choice) if choice.keep_place == "host" else 0
    state = job.lora_parameters * (STATE_BYTES + 4 * job.has_average) if choice.optimiser_place == "host" else 0
    return streamed + kept + state + PROCESS_BYTES


def gpu_bytes(job: Job, choice: Choice) -> int:
    """Peak on the card with driver and libraries."""
    return max(phases(job, choice).values()) + CONTEXT_BYTES

"""Bytes on card and host for one run of the block executor, counted from what its phases hold.

The unit is X, the residual stream of one pass: batch * tokens * width * bytes. tests/host/test_plan_14b.py runs the executor on fake tensors of the
real sizes and holds these figures to what it sees.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from .scoring import Scored, decode_bytes, shown_bytes, tower_bytes
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
# The clips that the base model makes are there three times while their file is written: each, all as one tensor, and the bytes that are written.
_WRITTEN = 3


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
    keep_feed_forward: bool = False


@dataclass(frozen=True, kw_only=True)
class Finished:
    """Finished videos without gradient: sampled, decoded, scored.

    Attributes:
        videos: at once.
        branches: latents in a pass for each of them; guidance doubles; 0: they are not sampled.
        frames: decoded of each; 0: none are.
        held_frames: of these, kept together for a reward model, and not let go piece by piece.
        is_judged: a latent reward scores them.
        total: how many there are, where the time of all of them is asked.
        kept_bytes: of latents that are collected on the host.
    """

    videos: int
    branches: int
    frames: int
    held_frames: int
    is_judged: bool = False
    total: int = 0
    kept_bytes: int = 0


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is run.

    Attributes:
        shape: of one expert.
        tokens: video tokens of one latent.
        videos: of one micro-batch.
        rollout_batch, gradient_batch: latents in one pass; guidance doubles.
        graphs: passes with gradient that wait for one backward.
        element_bytes: of the compute type.
        rank: of the LoRA; 0 for an expert without one.
        adapted: names of a block's adapted Linears.
        adapted_outside: names of the adapted Linears around the blocks.
        lora_parameters: of all trained experts together.
        experts: transformers in memory.
        has_average: a moving average of the masters is kept.
        scored: what is decoded and scored; None with a latent reward.
        reward_bytes: weights of the reward model and the VAE, on the card.
        looks: samples and held-out videos; None without any.
        clips: what the base model makes, or the rewards choose among, before the first update; None without any.
        judged_blocks: blocks of a latent reward's own trunk, whose weights go through the executor like the experts'; 0 without one.
    """

    shape: ModelShape
    tokens: int
    videos: int
    rollout_batch: int
    gradient_batch: int
    graphs: int
    element_bytes: int
    rank: int
    adapted: frozenset[str]
    adapted_outside: frozenset[str]
    lora_parameters: int
    experts: int
    has_average: bool
    scored: Scored | None
    reward_bytes: int
    looks: Finished | None = None
    clips: Finished | None = None
    judged_blocks: int = 0

    def stream_bytes(self, batch: int) -> int:
        """X."""
        return batch * self.tokens * self.shape.width * self.element_bytes


def block_bytes(job: Job) -> int:
    """A block's weights as stored."""
    shape = job.shape
    linear = sum(out * size for out, size in shape.block_linears.values())
    return int(linear * (shape.weight_bytes if shape.is_quantised else job.element_bytes)) + (shape.block_parameters - linear) * job.element_bytes


def slot_bytes(job: Job) -> int:
    """A device slot: weights in the compute type, each adapted one inside of its LoRA buffer; the stored bytes beside them if quantised."""
    shape, rank = job.shape, job.rank
    total = shape.block_parameters * job.element_bytes
    for name, (out, size) in shape.block_linears.items():
        total += (rank * (out + size) + rank * rank) * job.element_bytes if name in job.adapted else 0
    return total + (block_bytes(job) if shape.is_quantised else 0)


def _master_bytes(job: Job) -> int:
    """fp32 copies of a block's masters beside it."""
    return sum(4 * job.rank * sum(size) for name, size in job.shape.block_linears.items() if name in job.adapted)


def rest_bytes(job: Job, choice: Choice) -> int:
    """Bytes on the card between two steps: weights, slots, LoRA and optimiser where they live there, and what both experts share."""
    shape = job.shape
    fixed = job.experts * (shape.outer_parameters * job.element_bytes + shape.width * shape.in_channels * 4 * (4 - job.element_bytes)) + job.reward_bytes
    fixed += job.tokens * 128 * 2 * 4  # rotations, fp32
    # Quantised blocks are unpacked in a slot wherever they are stored.
    streams = choice.resident_blocks < shape.blocks or shape.is_quantised
    fixed += job.experts * choice.resident_blocks * block_bytes(job) * (2 if choice.merges_resident and choice.resident_blocks else 1)
    # A latent reward's trunk lies on the card beside experts that do so whole, and streams with others.
    fixed += 0 if streams else _trunk_bytes(job)
    fixed += choice.slots * slot_bytes(job) if streams else 0  # shared by the experts
    fixed += choice.slots * _master_bytes(job) if streams and choice.optimiser_place == "host" else 0
    fixed += job.lora_parameters * (STATE_BYTES + 4 * job.has_average) if choice.optimiser_place == "device" else 0
    return fixed


def phases(job: Job, choice: Choice, *, in_kernels: bool = True) -> dict[str, int]:
    """Bytes of tensors on the card at the height of each phase, without driver and libraries: those of an update, then `looks` and `clips` if there are any.

    Args:
        in_kernels: with what the attention kernel allocates inside of itself.
    """
    shape, fixed = job.shape, rest_bytes(job, choice)
    kept = job.graphs * kept_bytes(job, choice) if choice.keep_place == "device" else 0
    # Where a block runs, its own share is among the tensors that are counted below.
    wide = job.gradient_batch * job.tokens * shape.ffn * job.element_bytes if choice.keep_feed_forward else 0
    others = kept - (kept_bytes(job, choice) // shape.blocks - wide if kept else -wide)
    # With the others kept the last block is the highest, and the patch embedding's result is gone by then.
    gone = job.stream_bytes(job.gradient_batch) if kept and shape.blocks > 1 else 0
    found = {
        "rollout": fixed + _rollout_bytes(job, choice, job.rollout_batch),
        "forward": fixed + others - gone + _forward_bytes(job, choice, job.gradient_batch, held=1 if choice.keep_attention else 0),
        # The output head's input waits as well.
        "scoring": fixed + kept + (job.graphs * job.stream_bytes(job.gradient_batch) if kept else 0) + _scoring_bytes(job, choice, in_kernels),
        "backward": fixed + others + _backward_bytes(job, choice, in_kernels),
    }
    if job.looks:
        found["looks"] = fixed + _finished_bytes(job, choice, job.looks)
    if job.clips:
        base, unmerged = base_job(job), replace(choice, merges_resident=False)
        found["clips"] = rest_bytes(base, unmerged) + _finished_bytes(base, unmerged, job.clips)
    return found


def base_job(job: Job) -> Job:
    """The same before any LoRA is installed."""
    return replace(job, rank=0, adapted=frozenset(), adapted_outside=frozenset(), lora_parameters=0)


def _finished_bytes(job: Job, choice: Choice, made: Finished) -> int:
    """Rollout, then the decoder or a latent reward's trunk."""
    judging = _forward_bytes(judged(job), choice, made.videos, held=0) if made.is_judged and job.judged_blocks else 0
    shown = _outer_merged_bytes(job) + shown_bytes(job.scored, made.videos, made.frames, made.held_frames) if made.frames else 0
    return max(_rollout_bytes(job, choice, made.videos * made.branches), shown, judging)


def _rollout_bytes(job: Job, choice: Choice, batch: int) -> int:
    merging = 2 * job.stream_bytes(batch) + _MERGE_BYTES if job.rank else 0
    return _outer_merged_bytes(job) + max(merging, _forward_bytes(job, choice, batch, held=0))


def _outer_merged_bytes(job: Job) -> int:
    """Merged copies of the Linears around the blocks, held through a rollout (`lora/linears.py`)."""
    outer = job.shape.outer_linears
    return job.experts * sum(outer[name][0] * outer[name][1] for name in job.adapted_outside) * job.element_bytes


def _scoring_bytes(job: Job, choice: Choice, in_kernels: bool) -> int:
    """Decoder and reward model one after the other; or a latent reward's trunk forward and backward, while the step's own kept tensors wait."""
    decoded = max(decode_bytes(job.scored, choice.keep_place)[0], tower_bytes(job.scored)) if job.scored and job.scored.latents else 0
    if not job.judged_blocks:
        return decoded
    trunk = judged(job)
    waiting = kept_bytes(trunk, choice) if choice.keep_place == "device" else 0
    return max(decoded, waiting + max(_forward_bytes(trunk, choice, trunk.gradient_batch, held=1), _backward_bytes(trunk, choice, in_kernels)))


def _trunk_bytes(job: Job) -> int:
    return job.judged_blocks * block_bytes(judged(job)) if job.judged_blocks else 0


def judged(job: Job) -> Job:
    """The pass through a latent reward's trunk, which has no LoRA and sees no guidance."""
    shape = replace(job.shape, blocks=job.judged_blocks, weight_bytes=max(2, job.shape.weight_bytes))
    return replace(job, shape=shape, rank=0, adapted=frozenset(), gradient_batch=job.videos, rollout_batch=job.videos, graphs=1, judged_blocks=0)


def _forward_bytes(job: Job, choice: Choice, batch: int, *, held: int) -> int:
    """The height of a block's forward; `held`: streams of attention output that are kept beyond self-attention.

    The first block is the highest: the patch embedding's result waits beside its contiguous copy, which is the block's input (two X in every line).
    """
    x, pieces = job.stream_bytes(batch), _row_elements(job, choice, batch)
    return max(
        # Turning k: h, q, k before and after; of a piece the one before, the norm in the compute type, three tensors in fp32.
        6 * x + pieces * (2 * job.element_bytes + 3 * 4),
        # v's product and its bias beside h, q, k; as much: the end of cross-attention with y, the stream after the gate, joined heads, product, sum.
        (7 + held) * x,
        # Norm of cross-attention's q: y, the stream after the gate, q before and after; of a piece the one before and three tensors in fp32.
        (6 + held) * x + pieces * (job.element_bytes + 3 * 4),
        # Feed-forward: its input and its result.
        (4 + held) * x + _feed_bytes(job, choice, batch, wide=2, narrow=1),
    )


def _backward_bytes(job: Job, choice: Choice, in_kernels: bool) -> int:
    """The height of a block's backward. In every line: the stream's gradient, x and attention's output."""
    x, pieces, groups = job.stream_bytes(job.gradient_batch), _row_elements(job, choice, job.gradient_batch), choice.head_groups
    kernel = _workspace(x, groups) if in_kernels else 0
    # What the block before kept comes in while q and k have their backward.
    fetched = (2 if choice.keep_attention else 1) * x if choice.keep_place == "host" and job.shape.blocks > 1 else 0
    return max(
        # Cross-attention ran again: y, the stream after the gate, h, q before and after its norm, joined heads, the sum.
        10 * x + _feed_bytes(job, choice, job.gradient_batch, wide=4, narrow=2),
        # Its attention: without the sum; the joined heads' gradient and dq; with several groups, one group's dq beside the whole.
        11 * x + (x // groups if groups > 1 else 0) + kernel,
        # Norm of its q: without q after the norm, joined heads and their gradient, with dq and its result; of a piece six tensors in fp32, two others.
        9 * x + pieces * (2 * job.element_bytes + 6 * 4),
        # Self-attention: gradient of its output, h, q and k before and after, v; a group's three gradients, written over q, k and v.
        10 * x + 3 * x // groups + kernel,
        # Rotary embedding and norm of k, then q: the gradient of h in place of v's; of a piece six tensors in fp32, one other.
        10 * x + fetched + pieces * (job.element_bytes + 6 * 4),
    )


def _workspace(x: int, groups: int) -> int:
    """The attention kernel's own dq, fp32."""
    return 2 * x // groups


def _feed_bytes(job: Job, choice: Choice, batch: int, *, wide: int, narrow: int) -> int:
    """One piece of the feed-forward: tensors of its inner width and of the model's."""
    tokens = min(job.tokens, choice.ffn_chunk_tokens or job.tokens)
    return batch * tokens * (wide * job.shape.ffn + narrow * job.shape.width) * job.element_bytes


def _row_elements(job: Job, choice: Choice, batch: int) -> int:
    """Elements of one piece of a row-by-row function (`kernels/rowwise.py`)."""
    return batch * min(job.tokens, choice.row_chunk_tokens or job.tokens) * job.shape.width


def kept_bytes(job: Job, choice: Choice) -> int:
    """Activations that one pass with gradient keeps for its backward."""
    x = job.stream_bytes(job.gradient_batch)
    lse = job.gradient_batch * job.tokens * job.shape.heads * _LSE_BYTES
    wide = job.gradient_batch * job.tokens * job.shape.ffn * job.element_bytes
    return job.shape.blocks * (x + (x + lse if choice.keep_attention else 0) + (wide if choice.keep_feed_forward else 0))


def host_parts(job: Job, choice: Choice) -> dict[str, int]:
    """Bytes in host memory by what they hold."""
    streamed = job.experts * (job.shape.blocks - choice.resident_blocks) * block_bytes(job)
    streams = choice.resident_blocks < job.shape.blocks or job.shape.is_quantised
    trunk = judged(job) if job.judged_blocks else None
    # Of every graph, what its blocks keep and the output head's input.
    waiting = job.graphs * (kept_bytes(job, choice) + job.stream_bytes(job.gradient_batch)) + (kept_bytes(trunk, choice) if trunk else 0)
    return {
        "weights": streamed + (_trunk_bytes(job) if streams else 0),
        "activations": waiting if choice.keep_place == "host" else 0,
        "decoder": decode_bytes(job.scored, choice.keep_place)[1] if job.scored else 0,
        "lora and optimiser": job.lora_parameters * (STATE_BYTES + 4 * job.has_average) if choice.optimiser_place == "host" else 0,
        "process": PROCESS_BYTES,
    }


def host_before(job: Job, choice: Choice) -> dict[str, int]:
    """Bytes in host memory before the training itself: while models are loaded, when all weights are there before some move to the card; while the base model
    makes clips, if it does."""
    found = {"loading": job.experts * job.shape.blocks * block_bytes(job) + _trunk_bytes(job) + PROCESS_BYTES}
    if job.clips and job.clips.kept_bytes:
        found["making clips"] = host_parts(job, choice)["weights"] + _WRITTEN * job.clips.kept_bytes + PROCESS_BYTES
    return found


def host_bytes(job: Job, choice: Choice) -> int:
    """Peak in host memory: of the training, or of what comes before it."""
    return max(*host_before(job, choice).values(), sum(host_parts(job, choice).values()))


def gpu_bytes(job: Job, choice: Choice) -> int:
    """Peak on the card with driver and libraries."""
    return max(phases(job, choice).values()) + CONTEXT_BYTES

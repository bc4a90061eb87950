"""What a reward model is: frames and prompts in, one reward per frame and per video out, differentiable with respect to the frames.

Also here: the check of what users hand in, scoring in chunks, and the exact gradient in constant memory.
Does not: know any particular model, read files, decode latents.

Shape letters: B videos, F frames, C channels (3), H W pixels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

# Decoders that round or blend may leave [0,1] by a hair; anything further is a different value range.
_RANGE_SLACK = 1e-3


@dataclasses.dataclass(frozen=True, kw_only=True)
class RewardOutput:
    """Rewards of a batch of videos; higher is better.

    Attributes:
        per_frame: [B, F] float32.
        per_video: [B] float32, the mean over frames unless the model's docstring says otherwise.
        parts: named [B, F] float32 tensors that the reward is made of or that explain it.
    """

    per_frame: Tensor
    per_video: Tensor
    parts: dict[str, Tensor]


class RewardModel(Protocol):
    """A frozen scorer of videos.

    Attributes:
        name: kind and, where it matters, version ("hpsv2.1").
        range_note: what values mean, in words; the direction is always "higher is better".
        mixes_prompts: True when the score of one video depends on the prompts of the others in the same call; taken as False where absent.
        needs_whole_video: True when frames are compared with each other, so that a video must not be cut; taken as False where absent.

    A model made of others (mix.py) brings `score_in_chunks` and `reward_and_frame_gradient` of its own; the functions here then call these, so that
    each of its parts is cut in the way that suits it.
    """

    name: str
    range_note: str
    mixes_prompts: bool

    def score(self, frames_BFCHW: Tensor, prompts: Sequence[str]) -> RewardOutput:
        """Reward of every frame and video.

        Args:
            frames_BFCHW: float in [0,1], RGB, on the model's device; gradients flow back to it.
            prompts: one text per video.
        """
        ...

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> RewardModel:
        """Move (and cast) the model; returns itself."""
        ...


def check_frames(frames_BFCHW: Tensor, prompts: Sequence[str], *, allow_bytes: bool = False) -> None:
    """Refuse input that cannot be scored, before any work. An empty prompt has a published score and is scored, with a warning.

    Args:
        frames_BFCHW: what the user handed in.
        prompts: as handed in.
        allow_bytes: accept uint8 frames (0 to 255) too.

    Raises:
        ValueError: not 5-D floating point; no video, no frame or an empty picture; not 3 channels; NaN or values outside [0,1];
            prompts and videos differ in number; a prompt that is not text.
    """
    is_bytes = allow_bytes and isinstance(frames_BFCHW, Tensor) and frames_BFCHW.dtype == torch.uint8
    if not isinstance(frames_BFCHW, Tensor) or frames_BFCHW.ndim != 5 or not (frames_BFCHW.is_floating_point() or is_bytes):
        found = f"{tuple(frames_BFCHW.shape)} {frames_BFCHW.dtype}" if isinstance(frames_BFCHW, Tensor) else type(frames_BFCHW).__name__
        raise ValueError(f"Frames must be a floating-point tensor [videos, frames, 3, height, width] in [0,1], got {found}.")
    videos, frames, channels, height, width = frames_BFCHW.shape
    if videos == 0 or frames == 0 or height == 0 or width == 0:
        raise ValueError(f"Frames have shape {tuple(frames_BFCHW.shape)}: there is nothing to score; give at least one video with one frame.")
    if channels != 3:
        hint = {1: "repeat the grey channel three times", 4: "drop the alpha channel"}.get(channels, "give RGB")
        raise ValueError(f"Frames have {channels} channels, 3 (RGB) are needed; {hint}.")
    if isinstance(prompts, str):
        raise ValueError("Prompts must be a list with one text per video, got one string; put it in a list.")
    if len(prompts) != videos:
        raise ValueError(f"{len(prompts)} prompts were given for {videos} videos; give one prompt per video.")
    for index, prompt in enumerate(prompts):
        if not isinstance(prompt, str):
            raise ValueError(f"Prompt {index} is {type(prompt).__name__}, not a text.")
    if is_bytes:
        return
    low, high = torch.stack(torch.aminmax(frames_BFCHW.detach())).tolist()
    if not (low == low and high == high):
        raise ValueError("Frames contain NaN; the decoder or sampler before the reward model failed.")
    if low < -_RANGE_SLACK or high > 1 + _RANGE_SLACK:
        raise ValueError(f"Frames range from {low:.4g} to {high:.4g}, [0,1] is needed; rescale (x + 1) / 2 for [-1,1], x / 255 for 8-bit, or clamp.")


def as_float(frames_BFCHW: Tensor) -> Tensor:
    """8-bit frames as float32 in [0,1]; float frames as they are."""
    return frames_BFCHW.float() / 255 if frames_BFCHW.dtype == torch.uint8 else frames_BFCHW


def _chunks(model: RewardModel, videos: int, frames: int, frames_per_chunk: int) -> Iterator[tuple[slice, slice]]:
    """Cut [videos, frames] into rectangles of at most `frames_per_chunk` pictures.

    A model that mixes prompts must see all videos at once, so there the smallest rectangle is one frame of every video.
    """
    if frames_per_chunk < 1:
        raise ValueError(f"frames_per_chunk is {frames_per_chunk}; it must be at least 1.")
    rows = videos if getattr(model, "mixes_prompts", False) else max(1, min(videos, frames_per_chunk // frames))
    columns = frames if getattr(model, "needs_whole_video", False) else min(frames, max(1, frames_per_chunk // rows))
    for row in range(0, videos, rows):
        for column in range(0, frames, columns):
            yield slice(row, min(row + rows, videos)), slice(column, min(column + columns, frames))


def _assemble(pieces: list[tuple[slice, slice, RewardOutput]], videos: int, frames: int) -> RewardOutput:
    first = pieces[0][2]
    is_whole = all(columns == slice(0, frames) for _, columns, _ in pieces)
    per_frame = torch.empty(videos, frames, dtype=torch.float32, device=first.per_frame.device)
    parts = {name: torch.empty_like(per_frame) for name in first.parts}
    for rows, columns, output in pieces:
        per_frame[rows, columns] = output.per_frame.detach().float()
        for name, value in output.parts.items():
            parts[name][rows, columns] = value.detach().float()
    per_video = torch.cat([output.per_video.detach().float() for _, _, output in pieces]) if is_whole else per_frame.mean(dim=1)
    return RewardOutput(per_frame=per_frame, per_video=per_video, parts=parts)


def score_in_chunks(model: RewardModel, frames_BFCHW: Tensor, prompts: Sequence[str], frames_per_chunk: int) -> RewardOutput:
    """Score without gradient, a few pictures at a time; equal to `model.score`.

    Args:
        model: the scorer.
        frames_BFCHW: as for `RewardModel.score`, or uint8, which is widened chunk by chunk.
        prompts: one per video.
        frames_per_chunk: pictures scored together (for a model that mixes prompts: at least one of every video).

    Raises:
        ValueError: as `check_frames`, or `frames_per_chunk` < 1.
    """
    check_frames(frames_BFCHW, prompts, allow_bytes=True)
    if hasattr(model, "score_in_chunks"):
        return model.score_in_chunks(frames_BFCHW, prompts, frames_per_chunk)
    videos, frames = frames_BFCHW.shape[:2]
    with torch.no_grad():
        pieces = [
            (rows, columns, model.score(as_float(frames_BFCHW[rows, columns]), prompts[rows]))
            for rows, columns in _chunks(model, videos, frames, frames_per_chunk)
        ]
        return _assemble(pieces, videos, frames)


def reward_and_frame_gradient(
    model: RewardModel, frames_BFCHW: Tensor, prompts: Sequence[str], frames_per_chunk: int
) -> tuple[RewardOutput, Tensor]:
    """Rewards and the exact gradient of `per_video.sum()` with respect to the frames, with the activations of one chunk at a time.

    Every video has its own slice of the gradient, so for a loss L(per_video) continue with
    `frames.backward(gradient * dL_dreward[:, None, None, None, None])`; the graph before the frames is walked once.
    Works inside `torch.inference_mode()` too.

    Args:
        model: the scorer.
        frames_BFCHW: as for `RewardModel.score`; it is not changed and its own graph is not touched.
        prompts: one per video.
        frames_per_chunk: pictures in one forward and backward pass.

    Returns:
        Rewards without graph, and the gradient [B, F, C, H, W] in the dtype of the frames.

    Raises:
        ValueError: as `check_frames`, or `frames_per_chunk` < 1.
    """
    check_frames(frames_BFCHW, prompts)
    if hasattr(model, "reward_and_frame_gradient"):
        return model.reward_and_frame_gradient(frames_BFCHW, prompts, frames_per_chunk)
    videos, frames = frames_BFCHW.shape[:2]
    pieces = []
    with torch.inference_mode(False), torch.enable_grad():
        gradient = torch.empty(frames_BFCHW.shape, dtype=frames_BFCHW.dtype, device=frames_BFCHW.device)
        for rows, columns in _chunks(model, videos, frames, frames_per_chunk):
            leaf = frames_BFCHW[rows, columns].detach().clone().requires_grad_()
            output = model.score(leaf, prompts[rows])
            share = output.per_video.sum() if columns == slice(0, frames) else output.per_frame.sum() / frames
            (gradient[rows, columns],) = torch.autograd.grad(share, leaf)
            # Only numbers are kept: a graph held here would keep the activations of every chunk.
            pieces.append((rows, columns, _detached(output)))
            del output, share
        return _assemble(pieces, videos, frames), gradient


def _detached(output: RewardOutput) -> RewardOutput:
    return RewardOutput(
        per_frame=output.per_frame.detach(),
        per_video=output.per_video.detach(),
        parts={name: value.detach() for name, value in output.parts.items()},
    )

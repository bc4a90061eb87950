"""Scores pictures, videos and tensor files: what `lab.py score` and the folder input of Score Video do. Needs no running ComfyUI.

One clip is in memory at a time; finished ones are stored at once (score_store.py), so that a run that was stopped goes on where it was.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from ..reward_models.base import RewardModel, RewardOutput, reward_and_frame_gradient, score_in_chunks
from ..reward_models.spec import RewardModelSpec
from . import media, reward_loading
from .score_store import ScoreStore, key_of

logger = logging.getLogger("reward_lab")
Progress = Callable[[int, int, str], None]
# Part of every stored score's key: raise it when a reward model's numbers change, or what is kept with them, and stored ones are not used any more.
_VERSION = 2
# Errors that a sentence lists.
_SHOWN = 10


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """What is scored with what.

    Attributes:
        clips: from `media.find_clips`.
        prompts: one per clip.
        spec: the reward model.
        device: where it runs.
        dtype: of its matrices.
    """

    clips: Sequence[media.Clip]
    prompts: Sequence[str]
    spec: RewardModelSpec
    device: str = "cpu"
    dtype: torch.dtype = torch.float32


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scores:
    """What became of a job.

    Attributes:
        videos: a dictionary per scored clip, in order: name, path, prompt, frames, size_px, per_frame, per_video, parts, best_frame, worst_frame, warnings.
        errors: name and reason of each clip that could not be read or scored.
    """

    videos: list[dict[str, Any]]
    errors: list[dict[str, str]]

    def failure(self) -> str:
        """What could not be scored, in a sentence and a line each."""
        shown = [f"{error['name']}: {error['reason']}" for error in self.errors[:_SHOWN]]
        more = [f"and {len(self.errors) - _SHOWN} more"] if len(self.errors) > _SHOWN else []
        head = f"{len(self.errors)} of {len(self.videos) + len(self.errors)} videos cannot be scored; mend them or take them out:"
        return "\n".join([head, *shown, *more]) if len(self.errors) > 1 or self.videos else shown[0]


def score(
    job: Job,
    store: ScoreStore,
    on_progress: Progress | None = None,
    gradients: dict[str, torch.Tensor] | None = None,
    load: Callable[[], RewardModel] | None = None,
) -> Scores:
    """Score every clip; one that cannot be scored does not keep the others from it.

    Args:
        job: what to score; prompts and clips are equally many.
        store: where finished scores are looked up and kept.
        on_progress: called with (done, all, name) before each clip and at the end.
        load: gives the model, when something is left to score; None loads it from `job.spec`.
        gradients: filled with d(per_video)/d(frames) [F, 3, H, W] by clip name, when given; then nothing is taken from the store.

    Raises:
        ValueError: the model cannot be loaded, or not one clip scored.
    """
    clips = list(zip(job.clips, job.prompts, _keys(job), strict=True))
    is_kept = gradients is None and all(store.get(key) for _, _, key in clips)
    model = None if is_kept else _in_batch(load() if load else reward_loading.load(job.spec, job.device, job.dtype), job)
    scores = Scores(videos=[], errors=[])
    for done, (clip, prompt, key) in enumerate(clips):
        if on_progress:
            on_progress(done, len(clips), clip.name)
        known = store.get(key) if gradients is None else None
        if known is None:
            try:
                known = _with_warnings(model, clip, prompt, job, gradients)
            except (ValueError, OSError) as error:
                scores.errors.append({"name": clip.name, "path": str(clip.path), "reason": str(error)})
                continue
            store.put(key, known)
        scores.videos.append({**known, "name": clip.name, "path": str(clip.path)})
    if on_progress:
        on_progress(len(clips), len(clips), "")
    if not scores.videos:
        raise ValueError(scores.failure())
    return scores


def _keys(job: Job) -> list[str]:
    """What the score of each clip is stored under."""
    batch, model_stamp = sorted(set(job.prompts)) if _is_batched(job.spec) else [], job.spec.stamp()
    rest = (job.spec.to_dict(), model_stamp, batch, str(job.dtype))
    return [key_of(_VERSION, clip.stamp(), prompt, *rest) for clip, prompt in zip(job.clips, job.prompts, strict=True)]


def _is_batched(spec: RewardModelSpec) -> bool:
    return spec.options.get("normalise") == "batch" or any(_is_batched(row.reward) for row in spec.rows())


def _in_batch(model: Any, job: Job) -> RewardModel:
    if getattr(model, "mixes_prompts", False) and hasattr(model, "in_batch_of"):
        # All prompts of the call are the batch, as if every video had been handed in together.
        model = model.in_batch_of(list(job.prompts))
    return model


def _with_warnings(model: Any, clip: media.Clip, prompt: str, job: Job, gradients: dict[str, torch.Tensor] | None) -> dict[str, Any]:
    with collected_warnings() as logged:
        known = _score_clip(model, clip, prompt, job.device, gradients)
    # A text is encoded once, for whichever clip comes first, and what is logged then may be about others: each clip asks about its own.
    about_text = getattr(model, "prompt_warnings", lambda _: [])
    others = set(about_text(sorted(set(job.prompts)))) if logged else set()
    return {**known, "warnings": [*about_text([prompt]), *(message for message in dict.fromkeys(logged) if message not in others)]}


def _score_clip(model: RewardModel, clip: media.Clip, prompt: str, device: str, gradients: dict[str, torch.Tensor] | None) -> dict[str, Any]:
    frames_BFCHW = clip.read()[None]
    height, width = frames_BFCHW.shape[-2:]
    count = reward_loading.frames_per_chunk(height, width)
    frames_BFCHW = frames_BFCHW.to(device)
    if gradients is None:
        output = score_in_chunks(model, frames_BFCHW, [prompt], count)
        check_finite(output)
    else:
        wide = frames_BFCHW.float() / 255 if frames_BFCHW.dtype == torch.uint8 else frames_BFCHW.float()
        output, gradient = reward_and_frame_gradient(model, wide, [prompt], count)
        check_finite(output)
        gradients[clip.name] = gradient[0].cpu().contiguous()
    return {"prompt": prompt, "frames": frames_BFCHW.shape[1], "size_px": [width, height], **as_numbers(output, 0)}


def check_finite(output: RewardOutput) -> None:
    """Refuse rewards that are no numbers: a table with NaN in it helps nobody.

    Raises:
        ValueError: names the first frame.
    """
    is_finite = output.per_frame.isfinite()
    if not is_finite.all():
        video, frame = (~is_finite).nonzero()[0].tolist()
        value = float(output.per_frame[video, frame])
        raise ValueError(f"The reward of frame {frame} is {value}: the model's numbers overflow. Score with --dtype fp32, or check the weights.")


def as_numbers(output: RewardOutput, video: int) -> dict[str, Any]:
    """The scores of one video of an output as plain numbers."""
    per_frame = output.per_frame[video].tolist()
    parts = {name: {"per_frame": value[video].tolist(), "per_video": float(value[video].mean())} for name, value in output.parts.items()}
    best, worst = max(range(len(per_frame)), key=per_frame.__getitem__), min(range(len(per_frame)), key=per_frame.__getitem__)
    return {"per_frame": per_frame, "per_video": float(output.per_video[video]), "parts": parts, "best_frame": best, "worst_frame": worst}


@contextlib.contextmanager
def collected_warnings() -> Iterator[list[str]]:
    """What the pack warns about while the context is open, for the output (it is logged as well)."""
    messages: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: messages.append(record.getMessage())
    logger.addHandler(handler)
    try:
        yield messages
    finally:
        logger.removeHandler(handler)


def progress_bar() -> Progress:
    """A progress line on standard error: redrawn in a terminal, one line in ten percent elsewhere."""
    start, shown = time.monotonic(), -1

    def show(done: int, total: int, name: str) -> None:
        nonlocal shown
        is_terminal = sys.stderr.isatty()
        tenth = done * 10 // max(1, total)
        if not is_terminal and (tenth == shown or total < 2):
            return
        shown = tenth
        spent = time.monotonic() - start
        left = f", about {spent / done * (total - done):.0f} s left" if 0 < done < total else ""
        bar = "#" * (done * 30 // max(1, total))
        text = f"[{bar:<30}] {done}/{total}{left} {name}"
        print(f"\r{text[:118]:<118}" if is_terminal else text, end="\n" if not is_terminal or done == total else "", file=sys.stderr, flush=True)

    return show

"""Scores IMAGE batches with reward models on the host's device, and draws the curve.

Models stay loaded between scores, at most CACHED_MODELS of them, and are offered to nobody else: the host is asked for the memory
first, so it can unload its own models.
"""

from __future__ import annotations

import json
import logging
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import comfy.model_management
import torch

from ..reward_models.base import score_in_chunks
from ..reward_models.spec import RewardModelSpec
from ..testlab.plot import Curve, line_chart
from . import paths

logger = logging.getLogger("reward_lab")

REWARD_KINDS = ("hpsv2.1", "mps")
RESIZE_MODES = ("default", "letterbox", "crop", "squash")
FRAMES_PER_CHUNK = 16
CACHED_MODELS = 2

_models: OrderedDict[str, Any] = OrderedDict()
_models_lock = threading.Lock()


@dataclass(frozen=True, kw_only=True)
class VideoScore:
    """Scores of one video. `per_frame` has one reward per frame, `reward` is their mean as the reward model defines it."""

    model_name: str
    prompt: str
    reward: float
    per_frame: tuple[float, ...]

    @property
    def best_frame(self) -> int:
        """Index of the frame with the highest reward."""
        return max(range(len(self.per_frame)), key=self.per_frame.__getitem__)

    @property
    def worst_frame(self) -> int:
        """Index of the frame with the lowest reward."""
        return min(range(len(self.per_frame)), key=self.per_frame.__getitem__)

    def summary(self) -> str:
        """Return one line for the node."""
        best, worst = self.best_frame, self.worst_frame
        return (
            f"{self.model_name}: {self.reward:.4f} over {len(self.per_frame)} frames; "
            f"best frame {best} ({self.per_frame[best]:.4f}), worst frame {worst} ({self.per_frame[worst]:.4f})"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain data."""
        return {
            "reward_model": self.model_name,
            "prompt": self.prompt,
            "reward": self.reward,
            "per_frame": list(self.per_frame),
            "best_frame": self.best_frame,
            "worst_frame": self.worst_frame,
        }

    def to_json(self) -> str:
        """Return everything as JSON."""
        return json.dumps(self.to_dict())


def reward_model_spec(kind: str, file: str, resize: str, antialias: bool) -> RewardModelSpec:
    """Make the value of a REWARD_MODEL socket.

    Raises:
        ValueError: An unknown kind or resize mode, or no such file.
    """
    if kind not in REWARD_KINDS:
        raise ValueError(f"kind is {kind!r}; it must be one of {', '.join(REWARD_KINDS)}.")
    if resize not in RESIZE_MODES:
        raise ValueError(f"resize is {resize!r}; it must be one of {', '.join(RESIZE_MODES)}.")
    options: dict[str, Any] = {"antialias": antialias}
    if resize != "default":
        options["resize"] = resize
    return RewardModelSpec(kind=kind, path=str(paths.model_path(paths.REWARD_MODEL_FOLDER, file)), options=options)


def score_images(images_FHWC: torch.Tensor, spec: RewardModelSpec, prompt: str) -> VideoScore:
    """Score the frames of one video.

    Args:
        images_FHWC: IMAGE batch, float, 0 to 1; an alpha channel is dropped.
        spec: Which reward model.
        prompt: What the video should show.

    Returns:
        The scores.

    Raises:
        ValueError: No frames, or an empty prompt.
    """
    if images_FHWC.ndim != 4 or images_FHWC.shape[0] == 0:
        raise ValueError(f"The video has no frames (shape {tuple(images_FHWC.shape)}). Connect the decoded frames of one video.")
    if not prompt.strip():
        raise ValueError("The prompt is empty. Write what the video should show; reward models score frames for a text.")
    device = comfy.model_management.get_torch_device()
    model = _loaded(spec, device)
    # Weights that were made inside the host's inference mode could never be trained through, so the mode is left for all of it.
    with torch.inference_mode(False), torch.no_grad():
        frames_BFCHW = images_FHWC[..., :3].movedim(-1, 1)[None].to(device=device, dtype=torch.float32).clone().clamp_(0.0, 1.0)
        output = score_in_chunks(model, frames_BFCHW, [prompt], FRAMES_PER_CHUNK)
    per_frame = tuple(float(value) for value in output.per_frame[0].cpu())
    return VideoScore(model_name=model.name, prompt=prompt, reward=float(output.per_video[0]), per_frame=per_frame)


def plot_scores(score: VideoScore) -> torch.Tensor:
    """Draw the scores over the frames.

    Returns:
        IMAGE [1, H, W, 3].
    """
    curve = Curve(label=score.model_name, values=score.per_frame)
    title = f"{score.model_name}: {score.reward:.4f}"
    return paths.image_tensor(line_chart([curve], title=title, subtitle=score.prompt, x_label="frame", mark_extremes=True))


def plot_run(rewards: Sequence[float], losses: Sequence[float], title: str) -> torch.Tensor:
    """Draw reward and loss of a training run over its steps.

    Returns:
        IMAGE [1, H, W, 3].
    """
    curves = [Curve(label="reward", values=tuple(rewards), smooth=True), Curve(label="loss", values=tuple(losses), smooth=True, axis="right")]
    return paths.image_tensor(line_chart(curves, title=title, x_label="step", first_x=1))


def _loaded(spec: RewardModelSpec, device: torch.device) -> Any:
    """Return a loaded reward model, from memory when the file has not changed."""
    status = Path(spec.path).stat()
    key = json.dumps([spec.to_dict(), status.st_mtime_ns, status.st_size, str(device)], sort_keys=True)
    with _models_lock:
        if key in _models:
            _models.move_to_end(key)
            return _models[key]
        while len(_models) >= CACHED_MODELS:
            _models.popitem(last=False)
        if device.type != "cpu":
            comfy.model_management.free_memory(status.st_size * 2, device)
        logger.info("loading reward model %s from %s", spec.kind, spec.path)
        with torch.inference_mode(False):
            _models[key] = spec.load(device=device)
        return _models[key]

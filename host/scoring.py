"""Scores videos with reward models on the host's device, for the nodes.

Models are handed to the host's memory manager: it loads them, makes room for others, and frees them. At most CACHED_MODELS stay in main memory.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.model_patcher
import comfy.utils
import torch

from ..reward_models import published
from ..reward_models.base import score_in_chunks
from ..reward_models.spec import OPTIONS_OF, PATHLESS, RewardModelSpec
from . import media, paths, reward_loading, score_files, score_settings, video_prompts
from .score_store import ScoreStore, key_of, write_csv

logger = logging.getLogger("reward_lab")

REWARD_KINDS = ("hpsv2.1", "mps", "pickscore", "aesthetic", "face", "dynamic_degree", "flicker", "drift", "pavrm")
RESIZE_MODES = ("default", "letterbox", "crop", "squash")
CACHED_MODELS = 2
NO_FILE = "(none)"

# What sharpening and enlarging filters may make of [0,1]; anything further is another value range. Less than a grey level does not show.
_OVERSHOOT, _SHOWN = 0.25, 1 / 255

_models: OrderedDict[str, Any] = OrderedDict()
_models_lock = threading.Lock()


@dataclasses.dataclass(frozen=True, kw_only=True)
class VideoScore:
    """Scores of one video. `per_frame` has one reward per frame, `reward` is the video's as the reward model defines it (mostly their mean). `settings` are
    what it was scored with: weights, options with their defaults, and the rows of a mix."""

    model_name: str
    prompt: str
    reward: float
    per_frame: tuple[float, ...]
    name: str = ""
    parts: dict[str, Any] = dataclasses.field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def best_frame(self) -> int:
        """Index of the frame with the highest reward."""
        return max(range(len(self.per_frame)), key=self.per_frame.__getitem__)

    @property
    def worst_frame(self) -> int:
        """Index of the frame with the lowest reward."""
        return min(range(len(self.per_frame)), key=self.per_frame.__getitem__)

    def summary(self) -> str:
        """Return a line for the node, and one for every warning."""
        best, worst = self.best_frame, self.worst_frame
        return (
            f"{self.name + ': ' if self.name else ''}{self.model_name}: {self.reward:.4f} over {len(self.per_frame)} frames; "
            f"best frame {best} ({self.per_frame[best]:.4f}), worst frame {worst} ({self.per_frame[worst]:.4f})"
            + "".join(f"\n{message}" for message in self.warnings)
        )

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain data."""
        return {
            "reward_model": self.model_name,
            **self.settings,
            "name": self.name,
            "prompt": self.prompt,
            "reward": self.reward,
            "per_frame": list(self.per_frame),
            "best_frame": self.best_frame,
            "worst_frame": self.worst_frame,
            "parts": self.parts,
            "warnings": list(self.warnings),
        }

    def to_json(self) -> str:
        """Return everything as JSON."""
        return json.dumps(self.to_dict())


def reward_model_spec(kind: str, file: str, resize: str, antialias: bool, **options: Any) -> RewardModelSpec:
    """Make the value of a REWARD_MODEL socket.

    Args:
        kind: One of `REWARD_KINDS`.
        file: Name in models/reward_models, or `NO_FILE` for kinds without one.
        resize: One of `RESIZE_MODES`.
        antialias: Filter before shrinking.
        **options: Further options, see `spec.OPTIONS_OF`; those that the kind does not know are left out.

    Raises:
        ValueError: An unknown kind or resize mode, or no such file.
    """
    if kind not in REWARD_KINDS:
        raise ValueError(f"kind is {kind!r}; it must be one of {', '.join(REWARD_KINDS)}.")
    if resize not in RESIZE_MODES:
        raise ValueError(f"resize is {resize!r}; it must be one of {', '.join(RESIZE_MODES)}.")
    known = OPTIONS_OF[kind]
    given = {"antialias": antialias, **({} if resize == "default" else {"resize": resize}), **options}
    given = {name: value for name, value in given.items() if name in known and value is not None}
    if kind in PATHLESS:
        return RewardModelSpec(kind=kind, path="", options=given)
    if file in ("", NO_FILE):
        remedy = ", or switch download on" if published.of_kind(kind) else ""
        raise ValueError(f"{kind} needs a weight file, and none is chosen. Choose one of models/reward_models{remedy}.")
    path = paths.model_path(paths.REWARD_MODEL_FOLDER, file)
    if kind == "pavrm" and path.name.startswith("diffusion_pytorch_model"):
        # HY-Video-PRFL's checkpoints are folders; any file in one stands for all of it.
        path = path.parent
    return RewardModelSpec(kind=kind, path=str(path), options=given)


def require_text(spec: RewardModelSpec, prompt: str) -> None:
    """Refuse an empty prompt for models that read it: on a node it is a widget that was forgotten.

    Raises:
        ValueError: The prompt is empty and the model needs one.
    """
    if not prompt.strip() and spec.reads_text:
        raise ValueError("The prompt is empty. Write what the video should show; reward models score frames for a text.")


def score_images(images_FHWC: torch.Tensor, spec: RewardModelSpec, prompt: str) -> VideoScore:
    """Score the frames of one video.

    Args:
        images_FHWC: IMAGE batch, float, 0 to 1; an alpha channel is dropped, and what filters make of a value range (a quarter beyond it) is clipped as on
            saving; both are told.
        spec: Which reward model.
        prompt: What the video should show.

    Returns:
        The scores.

    Raises:
        ValueError: No frames, not RGB, another value range, an empty prompt, or rewards that are no numbers.
    """
    require_text(spec, prompt)
    images_FHWC, warnings = _checked(images_FHWC)
    device = comfy.model_management.get_torch_device()
    model = _loaded(spec, device)
    height, width = images_FHWC.shape[1:3]
    # Weights that were made inside the host's inference mode could never be trained through, so the mode is left for all of it.
    with torch.inference_mode(False), torch.no_grad():
        frames_BFCHW = images_FHWC.movedim(-1, 1)[None].to(device=device, dtype=torch.float32).clone().clamp_(0.0, 1.0)
        output = score_in_chunks(model, frames_BFCHW, [prompt], reward_loading.frames_per_chunk(height, width))
    score_files.check_finite(output)
    return _video_score(spec, "", prompt, {**score_files.as_numbers(output, 0), "warnings": [*warnings, *_about_text(model, prompt)]})


def _checked(images_FHWC: torch.Tensor) -> tuple[torch.Tensor, list[str]]:
    """RGB frames of an IMAGE, and what was done to make them so."""
    shape = tuple(images_FHWC.shape)
    if images_FHWC.ndim == 3:
        raise ValueError(f"The images have shape {shape}, as a MASK has; frames [F, H, W, 3] are needed. Convert Mask to Image makes grey frames of a mask.")
    if images_FHWC.ndim != 4 or 0 in shape:
        raise ValueError(f"The video has no frames (shape {shape}). Connect the decoded frames of one video.")
    if shape[-1] not in (3, 4):
        hint = "repeat the grey channel three times" if shape[-1] == 1 else "give RGB"
        raise ValueError(f"The images have shape {shape}, that is {shape[-1]} channels; 3 (RGB) are needed; {hint}.")
    warnings = ["The frames have transparency, which is dropped: the colours under it are scored."] if shape[-1] == 4 else []
    images_FHWC = images_FHWC[..., :3]
    low, high = (float(value) for value in torch.aminmax(images_FHWC))
    if not (low >= -_OVERSHOOT and high <= 1 + _OVERSHOOT):
        found = "hold NaN; the decoder or sampler before this node failed" if low != low or high != high else f"range from {low:.4g} to {high:.4g}"
        raise ValueError(f"The frames {found}. Frames are numbers from 0 to 1: rescale (x + 1) / 2 for [-1,1], x / 255 for 8-bit, or clamp.")
    if low < -_SHOWN or high > 1 + _SHOWN:
        warnings.append(f"The frames range from {low:.3g} to {high:.3g}; values outside [0,1] are clipped, as on saving.")
    return images_FHWC, warnings


def _about_text(model: Any, prompt: str) -> list[str]:
    """Asked for at every score: the text is encoded once only."""
    return getattr(model, "prompt_warnings", lambda _: [])([prompt])


def score_path(path: str, spec: RewardModelSpec, prompt: str, prompts_file: str = "") -> list[VideoScore]:
    """Score a video file, or every video of a folder; what was scored before is taken from the store.

    Args:
        path: File or folder; relative ones are looked for in the host's input folder.
        spec: Which reward model.
        prompt: For all videos, where `prompts_file` is empty.
        prompts_file: A prompt per video, see video_prompts.py.

    Raises:
        ValueError: Nothing to score, prompts and videos do not fit, or videos that cannot be scored; the scores of the others are kept.
    """
    found = paths.input_path(path)
    clips = media.find_clips([found])
    if prompts_file.strip():
        prompts = video_prompts.read(paths.input_path(prompts_file), [clip.name for clip in clips], [clip.path.absolute() for clip in clips])
    else:
        require_text(spec, prompt)
        prompts = [prompt] * len(clips)
    device = comfy.model_management.get_torch_device()
    bar = comfy.utils.ProgressBar(len(clips))

    def on_progress(done: int, total: int, _name: str) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        bar.update_absolute(done, total)

    job = score_files.Job(clips=clips, prompts=prompts, spec=spec, device=str(device))
    store = ScoreStore(paths.scores_folder() / f"{key_of(str(found.resolve()))[:24]}.jsonl")
    with torch.inference_mode(False):
        scores = score_files.score(job, store, on_progress, load=lambda: _loaded(spec, device))
    if scores.errors:
        # A mean over fewer videos than the folder holds would pass for the folder's.
        raise ValueError(scores.failure())
    return [_video_score(spec, row["name"], row["prompt"], row) for row in scores.videos]


def files_stamp(path: str | None, prompts_file: str | None = None) -> str:
    """A text that changes when the files that a node reads do; what cannot be read is told when the node runs.

    Args:
        path: of videos; None where it comes from another node, before that has run.
        prompts_file: as `path`.
    """
    stamps: list[Any] = []
    for name, is_text in ((path, False), (prompts_file, True)):
        if not (name or "").strip():
            continue
        try:
            found = paths.input_path(name)
            stamps += [found.stat().st_mtime_ns, found.stat().st_size] if is_text else [clip.stamp() for clip in media.find_clips([found])]
        except (ValueError, OSError) as error:
            stamps.append(str(error))
    return key_of(stamps) if stamps else ""


def save_table(scores: Sequence[VideoScore], name: str) -> Path:
    """Write scores as CSV to the output folder; returns the path."""
    rows = [{**score.to_dict(), "per_video": score.reward, "name": score.name or name} for score in scores]
    path = paths.scores_folder() / f"{key_of([score.to_dict() for score in scores])[:16]}.csv"
    write_csv(path, rows, {"reward_model": scores[0].model_name, **scores[0].settings})
    return path


def _video_score(spec: RewardModelSpec, name: str, prompt: str, numbers: dict[str, Any]) -> VideoScore:
    return VideoScore(
        model_name=spec.kind,
        name=name,
        prompt=prompt,
        reward=numbers["per_video"],
        per_frame=tuple(numbers["per_frame"]),
        parts=numbers["parts"],
        warnings=(*score_settings.about_files(spec), *numbers.get("warnings", ())),
        settings=score_settings.described(spec),
    )


def _loaded(spec: RewardModelSpec, device: torch.device) -> Any:
    """Return a loaded reward model on the host's device, from memory when its files have not changed."""
    key = json.dumps([spec.to_dict(), spec.stamp(), str(device)], sort_keys=True, default=str)
    offload = comfy.model_management.unet_offload_device() if device.type != "cpu" else device
    with _models_lock:
        if key not in _models:
            while len(_models) >= CACHED_MODELS:
                _models.popitem(last=False)
            logger.info("loading reward model %s from %s", spec.kind, spec.path or "no file")
            with torch.inference_mode(False):
                model = reward_loading.load(spec, offload)
                patchers = [comfy.model_patcher.ModelPatcher(network, device, offload) for network in networks(model)]
            _models[key] = model, patchers
        _models.move_to_end(key)
        model, patchers = _models[key]
        with torch.inference_mode(False):
            comfy.model_management.load_models_gpu(patchers, force_full_load=True)
        return model


def networks(model: Any) -> list[torch.nn.Module]:
    """Every network with weights in a reward model, those of a mix's rewards included."""
    if hasattr(model, "components"):
        return [network for component in model.components for network in networks(component.model)]
    found = [getattr(model, "network", None), getattr(getattr(model, "find_landmarks", None), "network", None)]
    return [network for network in found if network is not None]

"""MPS: multi-dimensional preference score. CLIP ViT-H/14 plus a cross model; a condition text masks the prompt positions it has nothing to do with.

Source: Kwai-Kolors/MPS@be9027f (MIT): trainer/models/clip_model.py, README.md; VideoX-Fun@804a425:videox_fun/reward/MPS (Apache-2.0).
Differs in: the mask is normalised per prompt by default (upstream divides by the largest similarity of the whole batch, so that prompts influence
each other; `normalise="batch"` does that); the final dot is in float32.

Shape letters: B pairs or videos, F frames, M pictures, P prompt positions, T image tokens, D shared width.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from . import clip
from .base import RewardOutput, check_frames
from .layouts import own_to_mps
from .mps_cross import CrossModel, rotary_frequencies
from .preprocess import Preparation
from .text_cache import TextCache

DEFAULT_RESIZE = "crop"
NORMALISATIONS = ("sample", "batch")
SCALES = ("raw", "cosine")

# The released checkpoint was trained with "overall" annotations only; the other texts are DiffSynth-Studio's and experimental with it.
# Source: Kwai-Kolors/MPS README; DiffSynth-Studio@e63f9d6:diffsynth/extensions/ImageQualityMetric/mps.py (Apache-2.0).
CONDITIONS: Mapping[str, str] = {
    "overall": (
        "light, color, clarity, tone, style, ambiance, artistry, shape, face, hair, hands, limbs, structure, instance, texture, "
        "quantity, attributes, position, number, location, word, things."
    ),
    "aesthetics": "light, color, clarity, tone, style, ambiance, artistry",
    "quality": "shape, face, hair, hands, limbs, structure, instance, texture",
    "semantic": "quantity, attributes, position, number, location",
}
EXPERIMENTAL_CONDITIONS = ("aesthetics", "quality", "semantic")

# Sizes of the published cross model.
CROSS_DEFAULTS: Mapping[str, int] = {"layer_num": 4, "dim_head": 64, "heads": 16, "ff_mult": 4}


class MPS(nn.Module):
    """The network: `clip` (open_clip) and `cross_model`.

    Args:
        clip_model: CLIP.
        cross_model: cross attention model of the same shared width.
    """

    def __init__(self, clip_model: nn.Module, cross_model: CrossModel):
        super().__init__()
        self.clip = clip_model
        self.cross_model = cross_model

    def text_states(self, ids_BP: Tensor) -> Tensor:
        """Projected states [B, P, D] of all prompt positions, padding included."""
        return clip.text_states(self.clip, ids_BP)

    def image_tokens(self, pixels_BCHW: Tensor) -> Tensor:
        """Projected image tokens [B, T, D] of normalised pictures."""
        return clip.image_tokens(self.clip, pixels_BCHW)

    def cosine(self, image_BTD: Tensor, text_BPD: Tensor, end_B: Tensor, keep_BP: Tensor) -> Tensor:
        """Cosine [B] between the prompt's end state and the first image token after the cross model, at least float32.

        Args:
            image_BTD: from `image_tokens`.
            text_BPD: from `text_states`.
            end_B: position of the end id.
            keep_BP: from `condition_mask`.
        """
        picture_BD = self.cross_model(image_BTD, text_BPD, keep_BP)[:, 0]
        text_BD = text_BPD[torch.arange(len(text_BPD), device=text_BPD.device), end_B]
        return (functional.normalize(clip.wide(text_BD), dim=-1) * functional.normalize(clip.wide(picture_BD), dim=-1)).sum(dim=-1)

    def image_text_score(
        self, pixels_BCHW: Tensor, token_ids_BP: Tensor, condition_ids_P: Tensor, *, threshold: float = 0.01, normalise: str = "sample"
    ) -> Tensor:
        """Raw score exp(logit_scale) * cosine of picture i with prompt i; differentiable in everything but the mask.

        Args:
            pixels_BCHW: normalised pictures.
            token_ids_BP: prompts padded with 49407.
            condition_ids_P: condition, [P], [1, P] or [B, P], padded with 49407.
            threshold: see `condition_mask`.
            normalise: "sample" or "batch".

        Returns:
            [B], at least float32.
        """
        text_BPD = self.text_states(token_ids_BP)
        condition_BPD = self.text_states(torch.atleast_2d(condition_ids_P))
        keep_BP = condition_mask(best_similarity(text_BPD.detach(), condition_BPD.detach()), threshold=threshold, normalise=normalise)
        cosine_B = self.cosine(self.image_tokens(pixels_BCHW), text_BPD, end_positions(token_ids_BP), keep_BP)
        return cosine_B * clip.wide(self.clip.logit_scale).exp()

    def forward(self, pixels_BCHW: Tensor, token_ids_BP: Tensor, condition_ids_P: Tensor) -> Tensor:  # noqa: D102
        return self.image_text_score(pixels_BCHW, token_ids_BP, condition_ids_P)


def end_positions(ids_BP: Tensor) -> Tensor:
    """Position [B] of the first end id."""
    return (ids_BP == clip.END_ID).int().argmax(dim=-1)


def best_similarity(text_BPD: Tensor, condition_BPD: Tensor) -> Tensor:
    """Largest raw dot product [B, P] of every prompt position with any condition position, at least float32.

    Args:
        text_BPD: prompt states.
        condition_BPD: condition states, first axis B or 1.
    """
    return (clip.wide(text_BPD) @ clip.wide(condition_BPD).transpose(1, 2)).amax(dim=-1)


def condition_mask(similarity_BP: Tensor, *, threshold: float, normalise: str) -> Tensor:
    """Which prompt positions the picture may attend to: similarity over its maximum strictly above the threshold.

    Args:
        similarity_BP: from `best_similarity`.
        threshold: 0.01 in the model's forward and in training, 0.3 in the published evaluation scripts.
        normalise: "sample": maximum of the same prompt; "batch": maximum of all prompts (upstream).

    Returns:
        bool [B, P].

    Raises:
        ValueError: unknown `normalise`.
    """
    if normalise not in NORMALISATIONS:
        raise ValueError(f"normalise is {normalise!r}; choose one of {', '.join(NORMALISATIONS)}.")
    largest = similarity_BP.amax(dim=-1, keepdim=True) if normalise == "sample" else similarity_BP.amax()
    return similarity_BP / largest > threshold


def tokenize(prompts: Sequence[str]) -> Tensor:
    """Token ids [B, 77] as MPS wants them: no text repair, padded with the end id (padding takes part in the score)."""
    return clip.tokenize(prompts, is_plain=True, pad_id=clip.END_ID)


def build(config: Mapping[str, Any]) -> MPS:
    """The trainable network with random weights.

    Args:
        config: either Hugging Face sizes (`projection_dim`, `text_config`, `vision_config`) or open_clip sizes (`embed_dim`, `vision_cfg`,
            `text_cfg`), and optionally `cross_config` (`dim`, `layer_num`, `dim_head`, `heads`, `ff_mult`; published sizes where absent).

    Raises:
        ValueError: the config is incomplete, names something unknown, or the two widths differ.
    """
    is_hf = "vision_config" in config
    clip_config = clip.from_hf_config(config) if is_hf else {key: value for key, value in config.items() if key != "cross_config"}
    given = config.get("cross_config", {})
    if not isinstance(given, Mapping):
        raise ValueError(f"cross_config is {given!r}; it must be an object with sizes: dim, {', '.join(CROSS_DEFAULTS)}.")
    cross_config = {**CROSS_DEFAULTS, **given}
    unknown = sorted(set(cross_config) - {"dim", *CROSS_DEFAULTS})
    if unknown:
        raise ValueError(f"cross_config has unknown entries {', '.join(unknown)}; allowed are dim, {', '.join(CROSS_DEFAULTS)}.")
    clip.check_sizes(cross_config, "cross_config")
    dim = cross_config.pop("dim", clip_config.get("embed_dim"))
    if dim != clip_config.get("embed_dim"):
        raise ValueError(f"cross_config dim {dim} differs from the CLIP's shared width {clip_config.get('embed_dim')}; they must be equal.")
    return MPS(clip.build_clip(clip_config), CrossModel(dim, **cross_config))


def cross_sizes(state: Mapping[str, Tensor]) -> dict[str, int]:
    """Sizes of the cross model, `cross_config` of `build`, read off its weights: unlike the towers' heads, all of them show.

    Args:
        state: names of `MPS` or of a published file.
    """
    first = "cross_model.layers.0.0.fn"
    layers = {key.split(".")[2] for key in state if key.startswith("cross_model.layers.")}
    to_q, to_kv, feed = (state.get(f"{first}.{name}.weight") for name in ("to_q", "to_kv", "ff.0"))
    if any(weight is None or weight.ndim != 2 or min(weight.shape) < 1 for weight in (to_q, to_kv, feed)) or len(to_kv) < 2:
        return {}
    head_width = len(to_kv) // 2
    return {"layer_num": len(layers), "dim_head": head_width, "heads": len(to_q) // head_width, "ff_mult": len(feed) // (2 * to_q.shape[1])}


def export_state_dict(network: MPS) -> dict[str, Tensor]:
    """State dict in the published layout: `model.` + Hugging Face names, `cross_model.` with the rotary frequencies; no position_ids."""
    state = own_to_mps({key: value.detach() for key, value in network.state_dict().items()})
    for index in range(len(network.cross_model.layers)):
        frequencies = rotary_frequencies(network.cross_model.head_width)
        state[f"cross_model.layers.{index}.1.fn.rotary_emb.inv_freq"] = frequencies
    return state


def parse_condition(condition: str) -> tuple[tuple[str, str, float], ...]:
    """Name, text and weight of every condition in an option.

    Args:
        condition: see `MPSReward`.

    Raises:
        ValueError: a weight that is no finite number, or all of them 0.
    """
    entries = [entry.partition("=") for entry in condition.split(",")]
    if not all(sign and name.strip() in CONDITIONS for name, sign, _ in entries):
        name = condition if condition in CONDITIONS else "own"
        return ((name, CONDITIONS.get(condition, condition), 1.0),)
    try:
        weights = {name.strip(): float(value) for name, _, value in entries}
    except ValueError as error:
        raise ValueError(f"condition is {condition!r}; weights per dimension are numbers, as in 'aesthetics=0.3, quality=0.7'.") from error
    if not any(weights.values()) or not all(math.isfinite(weight) for weight in weights.values()):
        raise ValueError(f"condition is {condition!r}; at least one weight must differ from 0, and all must be finite.")
    return tuple((name, CONDITIONS[name], weight) for name, weight in weights.items())


class MPSReward:
    """Frozen MPS.

    Args:
        network: loaded weights; set to eval mode and frozen.
        resize: "crop" (official), "squash" (what VideoX-Fun trains with) or "letterbox".
        use_antialias: True with "crop" follows Pillow's 8-bit arithmetic exactly, as the official processor; False is a plain float resize.
        condition: a name in `CONDITIONS`, any text, or a weight per dimension such as "aesthetics=0.3, quality=0.7": the weighted sum of their scores.
        threshold: see `condition_mask`.
        normalise: see `condition_mask`.
        scale: which number is the reward: "raw" = exp(logit_scale) * cosine (official, about 9 for ordinary pictures) or "cosine" (VideoX-Fun, about
            0.09). Both are in `parts`.
    """

    name = "mps"

    def __init__(
        self,
        network: MPS,
        *,
        resize: str = DEFAULT_RESIZE,
        use_antialias: bool = True,
        condition: str = "overall",
        threshold: float = 0.01,
        normalise: str = "sample",
        scale: str = "raw",
    ):
        if normalise not in NORMALISATIONS:
            raise ValueError(f"normalise is {normalise!r}; choose one of {', '.join(NORMALISATIONS)}.")
        if scale not in SCALES:
            raise ValueError(f"scale is {scale!r}; choose one of {', '.join(SCALES)}.")
        if not isinstance(threshold, (int, float)) or not -math.inf < threshold < 1:
            raise ValueError(f"threshold is {threshold!r}; it must be a number below 1, or every prompt position is masked (official: 0.01 or 0.3).")
        if not condition.strip():
            raise ValueError(f"The condition is empty; give a text or one of {', '.join(CONDITIONS)}.")
        self.prepare = Preparation(size_px=network.clip.visual.image_size[0], resize=resize, use_antialias=use_antialias, is_pillow=True)
        self.network = network.eval().requires_grad_(False)
        self.conditions = parse_condition(condition)
        self.is_experimental = any(text != CONDITIONS["overall"] for _, text, _ in self.conditions)
        self.threshold = threshold
        self.normalise = normalise
        self.scale = scale
        self.mixes_prompts = normalise == "batch"
        self._batch: tuple[str, ...] | None = None
        self.range_note = (
            "exp(logit_scale) x cosine, higher is better; ordinary pictures lie around 9; two scores of one prompt give a preference by softmax"
            if scale == "raw"
            else "cosine, higher is better; ordinary pictures lie around 0.09"
        )
        self._states = TextCache(lambda prompts: _encoded(network, prompts))
        self._ends = TextCache(lambda prompts: end_positions(tokenize(prompts)).to(_device(network)))

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return _device(self.network)

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> MPSReward:
        """Move the model; `dtype` casts its matrices (norms and positions stay wide). Returns itself."""
        clip.move(self.network, device, dtype)
        self._states.clear()
        self._ends.clear()
        return self

    def in_batch_of(self, prompts: Sequence[str]) -> MPSReward:
        """This model with the batch of `normalise="batch"` fixed to `prompts`, so that videos can be scored one by one, whatever their sizes."""
        fixed = copy.copy(self)
        fixed._batch = tuple(prompts)
        fixed.mixes_prompts = False
        return fixed

    def masks(self, prompts: Sequence[str], condition: str | None = None) -> Tensor:
        """Bool [B, 77]: prompt positions that are not masked by the condition text (None: the first of the model's).

        Raises:
            ValueError: nothing of a prompt is left, which a prompt's own maximum rules out but the batch's does not; the published code gives NaN.
        """
        condition = self.conditions[0][1] if condition is None else condition
        others = list(self._batch or ()) if self.normalise == "batch" else []
        with torch.no_grad():
            similarity_BP = best_similarity(self._states([*prompts, *others]), self._states([condition]))
        keep_BP = condition_mask(similarity_BP, threshold=self.threshold, normalise=self.normalise)[: len(prompts)]
        if not (is_left := keep_BP.any(dim=1)).all():
            prompt = prompts[is_left.int().argmin()]
            raise ValueError(
                f"threshold {self.threshold:g} with normalise {self.normalise!r} masks every position of the prompt {prompt[:60]!r}, which then has no score; "
                "lower the threshold (official: 0.01 or 0.3), or normalise by sample."
            )
        return keep_BP

    def score_prepared(self, pixels_BFCHW: Tensor, prompts: Sequence[str]) -> RewardOutput:
        """As `score`, for frames that are already resized and normalised."""
        videos, frames = pixels_BFCHW.shape[:2]
        image_MTD = self.network.image_tokens(pixels_BFCHW.flatten(0, 1).to(clip.tower_dtype(self.network.clip)))
        text_BPD, end_B = self._states(prompts), self._ends(prompts)
        text_MPD, end_M = (x.repeat_interleave(frames, dim=0) for x in (text_BPD, end_B))
        cosine_BF, parts = torch.zeros(()), {}
        for name, text, weight in self.conditions:
            keep_MP = self.masks(prompts, text).repeat_interleave(frames, dim=0)
            own_BF = self.network.cosine(image_MTD, text_MPD, end_M, keep_MP).unflatten(0, (videos, frames))
            cosine_BF = weight * own_BF + cosine_BF.to(own_BF.device)
            if len(self.conditions) > 1:
                parts[f"mps_cosine_{name}"] = own_BF
        raw_BF = cosine_BF * clip.wide(self.network.clip.logit_scale).exp()
        reward_BF = raw_BF if self.scale == "raw" else cosine_BF
        return RewardOutput(per_frame=reward_BF, per_video=reward_BF.mean(dim=1), parts={"mps_raw": raw_BF, "mps_cosine": cosine_BF, **parts})

    def prompt_warnings(self, prompts: Sequence[str]) -> list[str]:
        """See `clip.prompt_warnings`."""
        return clip.prompt_warnings(prompts, is_plain=True)

    def score(self, frames_BFCHW: Tensor, prompts: Sequence[str]) -> RewardOutput:
        """MPS per frame and their mean; see `base.RewardModel.score`.

        Raises:
            ValueError: see `base.check_frames`.
        """
        check_frames(frames_BFCHW, prompts)
        return self.score_prepared(self.prepare(frames_BFCHW.flatten(0, 1)).unflatten(0, frames_BFCHW.shape[:2]), prompts)


def _device(network: MPS) -> torch.device:
    return network.clip.logit_scale.device


def _encoded(network: MPS, prompts: Sequence[str]) -> Tensor:
    clip.warn_about(prompts, is_plain=True)
    return network.text_states(tokenize(prompts).to(_device(network)))

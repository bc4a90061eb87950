"""A weighted sum of rewards, each centred and scaled first: sum of weight x (reward - centre) / scale, all parts kept visible.

Centre and scale are the mean and the standard deviation of a reward over videos of the untrained model (`measure_baseline`), so that weights compare
rewards of different units: +1 then means one standard deviation better than the base model.
Does not: load models (loader.py), read videos.

Shape letters: B videos, F frames, C H W.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from . import base
from .base import RewardModel, RewardOutput


@dataclasses.dataclass(frozen=True, kw_only=True)
class Component:
    """One reward of a mix.

    Attributes:
        name: unique in the mix; its parts are called `name.part`.
        model: the scorer.
        weight: factor of the centred and scaled reward; negative turns the direction.
        centre: reward that counts as 0.
        scale: reward difference that counts as 1.
    """

    name: str
    model: RewardModel
    weight: float = 1.0
    centre: float = 0.0
    scale: float = 1.0

    def __post_init__(self) -> None:
        for field in ("weight", "centre", "scale"):
            if not math.isfinite(getattr(self, field)):
                raise ValueError(f"{field} of {self.name} in the reward mix is {getattr(self, field)}; give a finite number.")
        if self.scale <= 0:
            raise ValueError(f"scale of {self.name} in the reward mix is {self.scale}; it must be above 0 (1 leaves the reward as it is).")


class MixReward:
    """The weighted sum as a reward model; every component is cut into chunks as suits it.

    Args:
        components: at least one, with different names.
    """

    name = "mix"

    def __init__(self, components: Sequence[Component]):
        if not components:
            raise ValueError("A reward mix needs at least one reward; connect one.")
        names = [component.name for component in components]
        if len(set(names)) != len(names):
            raise ValueError(f"Rewards of a mix must have different names, got {', '.join(names)}.")
        self.components = tuple(components)
        self.mixes_prompts = any(getattr(component.model, "mixes_prompts", False) for component in components)
        self.needs_whole_video = any(getattr(component.model, "needs_whole_video", False) for component in components)
        self.ignores_prompts = all(getattr(component.model, "ignores_prompts", False) for component in components)
        terms = (f"{c.weight:g} x ({c.name} - {c.centre:g}) / {c.scale:g}" for c in components)
        self.range_note = f"{' + '.join(terms)}; higher is better; 0 is the centre of all, 1 one scale above it at weight 1"

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> MixReward:
        """Move every component; returns itself."""
        for component in self.components:
            component.model.to(device, dtype)
        return self

    def in_batch_of(self, prompts: Sequence[str]) -> MixReward:
        """See `mps.MPSReward.in_batch_of`."""
        models = [c.model.in_batch_of(prompts) if getattr(c.model, "mixes_prompts", False) else c.model for c in self.components]
        return MixReward([dataclasses.replace(c, model=model) for c, model in zip(self.components, models, strict=True)])

    def prompt_warnings(self, prompts: Sequence[str]) -> list[str]:
        """See `clip.prompt_warnings`; each sentence once, although several rewards read the text."""
        models = [component.model for component in self.components if hasattr(component.model, "prompt_warnings")]
        return list(dict.fromkeys(message for model in models for message in model.prompt_warnings(prompts)))

    def score(self, frames_BFCHW: Tensor, prompts: Sequence[str]) -> RewardOutput:
        """See `base.RewardModel.score`; `parts` holds every component's reward under its name and its own parts under `name.part`."""
        return self._sum([component.model.score(frames_BFCHW, prompts) for component in self.components])

    def score_in_chunks(self, frames_BFCHW: Tensor, prompts: Sequence[str], frames_per_chunk: int) -> RewardOutput:
        """See `base.score_in_chunks`."""
        return self._sum([base.score_in_chunks(component.model, frames_BFCHW, prompts, frames_per_chunk) for component in self.components])

    def reward_and_frame_gradient(self, frames_BFCHW: Tensor, prompts: Sequence[str], frames_per_chunk: int) -> tuple[RewardOutput, Tensor]:
        """See `base.reward_and_frame_gradient`."""
        outputs = []
        with torch.inference_mode(False):
            total = torch.zeros(frames_BFCHW.shape, dtype=frames_BFCHW.dtype, device=frames_BFCHW.device)
            for component in self.components:
                output, gradient = base.reward_and_frame_gradient(component.model, frames_BFCHW, prompts, frames_per_chunk)
                outputs.append(output)
                total.add_(gradient, alpha=component.weight / component.scale)
                # As large as the frames: not kept while the next component works.
                del gradient
            return self._sum(outputs), total

    def _sum(self, outputs: Sequence[RewardOutput]) -> RewardOutput:
        per_frame, per_video, parts = 0, 0, {}
        for component, output in zip(self.components, outputs, strict=True):
            factor = component.weight / component.scale
            per_frame = per_frame + factor * (output.per_frame - component.centre)
            per_video = per_video + factor * (output.per_video - component.centre)
            parts[component.name] = output.per_frame
            parts.update({f"{component.name}.{part}": value for part, value in output.parts.items()})
        return RewardOutput(per_frame=per_frame, per_video=per_video, parts=parts)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Baseline:
    """Mean and standard deviation of one reward over base videos."""

    centre: float
    scale: float
    videos: int


def measure_baseline(rewards: Iterable[float]) -> Baseline:
    """Centre and scale from the rewards of base videos.

    Raises:
        ValueError: fewer than two videos, or all with the same reward.
    """
    values = torch.tensor(list(rewards), dtype=torch.float64)
    if len(values) < 2:
        raise ValueError(f"{len(values)} base videos were given; at least 2 are needed to measure how far rewards spread (better 16 or more).")
    if not values.isfinite().all():
        raise ValueError("A reward of the base videos is not finite; check these videos.")
    scale = float(values.std())
    if scale <= 1e-9 * max(1.0, float(values.abs().max())):
        raise ValueError(f"All {len(values)} base videos have the same reward {float(values[0]):.6g}, so no scale can be measured; give different videos.")
    return Baseline(centre=float(values.mean()), scale=scale, videos=len(values))

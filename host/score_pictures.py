"""Charts that the scoring and training nodes show."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from ..testlab.plot import Curve, line_chart, with_pictures
from . import paths

if TYPE_CHECKING:
    from .scoring import VideoScore

_CURVES = 4


def plot_scores(score: VideoScore, images_FHWC: torch.Tensor | None = None) -> torch.Tensor:
    """Draw the scores over the frames, with the best and the worst frame below.

    Args:
        score: Of one video.
        images_FHWC: Its frames, 0 to 1; None leaves the pictures out.

    Returns:
        IMAGE [1, H, W, 3].
    """
    curve = Curve(label=score.model_name, values=score.per_frame)
    chart = line_chart([curve], title=f"{score.model_name}: {score.reward:.4f}", subtitle=score.prompt, x_label="frame", mark_extremes=True)
    if images_FHWC is not None:
        rows = ((f"best frame {score.best_frame}", score.best_frame), (f"worst frame {score.worst_frame}", score.worst_frame))
        chart = with_pictures(chart, [(f"{label}: {score.per_frame[index]:.4f}", _picture(images_FHWC[index])) for label, index in rows])
    return paths.image_tensor(chart)


def _picture(image_HWC: torch.Tensor) -> Image.Image:
    return Image.fromarray((image_HWC[..., :3].clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy().astype(np.uint8))


def plot_videos(scores: Sequence[VideoScore]) -> torch.Tensor:
    """Draw the rewards of several videos, best first, with the frame curves of the first ones where they are few.

    Returns:
        IMAGE [1, H, W, 3].
    """
    if len(scores) <= _CURVES:
        curves = [Curve(label=f"{score.name} {score.reward:.4f}", values=score.per_frame) for score in scores]
        return paths.image_tensor(line_chart(curves, title=f"{scores[0].model_name}, {len(scores)} videos", x_label="frame"))
    ranked = sorted(scores, key=lambda score: score.reward, reverse=True)
    subtitle = f"best: {ranked[0].name}, worst: {ranked[-1].name}"
    curve = Curve(label="reward", values=tuple(score.reward for score in ranked))
    return paths.image_tensor(line_chart([curve], title=f"{scores[0].model_name}, {len(scores)} videos", subtitle=subtitle, x_label="rank", first_x=1))


def plot_sigmas(sigmas: Sequence[float], probabilities: Sequence[Sequence[float]], title: str) -> torch.Tensor:
    """Draw a PAVRM's probability over the noise level, a curve per latent.

    Returns:
        IMAGE [1, H, W, 3].
    """
    is_one = len(probabilities) == 1
    curves = [Curve(label="probability" if is_one else f"latent {number}", values=tuple(row)) for number, row in enumerate(probabilities, 1)]
    subtitle = f"the first {_CURVES} of {len(curves)} latents" if len(curves) > _CURVES else ""
    names = [f"{sigma:g}" for sigma in sigmas]
    return paths.image_tensor(line_chart(curves[:_CURVES], title=title, subtitle=subtitle, x_label="sigma", x_names=names, mark_extremes=is_one))


def plot_run(steps: Sequence[Mapping[str, Any]], title: str) -> torch.Tensor:
    """Draw reward and loss of a training run over its steps, and the reward of its held-out prompts where it was measured.

    Args:
        steps: The run's `step` events.

    Returns:
        IMAGE [1, H, W, 3].
    """
    bases = [step["held_out_base"] for step in steps if step.get("held_out_base") is not None]
    held_out = (bases[0] if bases else math.nan, *(_number(step, "held_out") for step in steps))
    curves = [
        Curve(label="reward", values=(math.nan, *(_number(step, "reward") for step in steps)), smooth=True),
        Curve(label="loss", values=(math.nan, *(_number(step, "loss") for step in steps)), smooth=True, axis="right"),
        *([Curve(label="held-out reward", values=held_out, sparse=True)] if any(map(math.isfinite, held_out)) else []),
    ]
    return paths.image_tensor(line_chart(curves, title=title, x_label="step"))


def _number(step: Mapping[str, Any], name: str) -> float:
    value = step.get(name)
    return math.nan if value is None else float(value)


def draw_validation(report: dict[str, Any], path: Path) -> None:
    """Draw a PAVRM's validation report (see lora_train/pavrm_validation.py): accuracy by noise level, and the calibration curve; write it as PNG."""
    rows = [row for row in (report["buckets"] if report["all"].get("count") else report["pairs"]) if row["count"]]
    levels = [f"{row['sigma'][0]:g}-{row['sigma'][1]:g}" for row in rows]
    curves = [Curve(label="accuracy", values=tuple(row["accuracy"] for row in rows))]
    if rows and rows[0].get("auc") is not None:
        curves.append(Curve(label="area under ROC", values=tuple(row["auc"] if row["auc"] is not None else math.nan for row in rows)))
    title = f"accuracy {report['accuracy']:.3f} ± {report['standard_error']:.3f} after step {report['step']} ({report['loss'].upper()}, {report['quality']})"
    charts = [line_chart(curves, title=title, x_label="sigma", x_names=levels)]
    curve = report["calibration"]
    if curve:
        ideal = Curve(label="said probability", values=tuple(entry["probability"] for entry in curve))
        found = Curve(label="share that is good", values=tuple(entry["good"] for entry in curve))
        counts = ", ".join(str(entry["count"]) for entry in curve)
        title, subtitle = f"calibration: mean gap {report['calibration_error']:.3f}", f"scores in each tenth of probability: {counts}"
        charts.append(line_chart([found, ideal], title=title, subtitle=subtitle, x_label="tenth of probability that occurs", first_x=1))
    picture = Image.new("RGB", (max(chart.width for chart in charts), sum(chart.height for chart in charts)))
    top = 0
    for chart in charts:
        picture.paste(chart, (0, top))
        top += chart.height
    picture.save(path)

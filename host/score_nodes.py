"""What the reward nodes do once their inputs are unpacked."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..reward_models.spec import RewardModelSpec
from . import latent_scoring, media, mixing, paths, score_pictures, scoring

ROWS = 4


@dataclass(frozen=True, kw_only=True)
class Shown:
    """What a scoring node gives out and shows."""

    reward: float
    plot: torch.Tensor
    json: str
    text: str
    csv: str = ""


def score_video(spec: RewardModelSpec, prompt: str, *, images: Any, video: Any, path: str, prompts_file: str) -> Shown:
    """Score frames, a VIDEO, a file or a folder.

    Raises:
        ValueError: None or several of these are given; see `scoring.score_images` and `scoring.score_path`.
    """
    given = [name for name, value in (("images", images), ("video", video), ("path", path.strip() or None)) if value is not None]
    if len(given) != 1:
        raise ValueError(f"Score Video got {', '.join(given) or 'nothing to score'}; connect images or video, or give a path: exactly one of them.")
    if spec.kind == "pavrm":
        raise ValueError("A PAVRM scores latents, not frames: use Score Latent (PAVRM).")
    if path.strip():
        return _score_path(spec, prompt, path, prompts_file)
    frames = images if video is None else video.get_components().images
    score = scoring.score_images(frames, spec, prompt)
    table = scoring.save_table([score], "video")
    return Shown(reward=score.reward, plot=score_pictures.plot_scores(score, frames), json=score.to_json(), text=score.summary(), csv=str(table))


def _score_path(spec: RewardModelSpec, prompt: str, path: str, prompts_file: str) -> Shown:
    scores = scoring.score_path(path, spec, prompt, prompts_file)
    table = str(scoring.save_table(scores, Path(path).name))
    if len(scores) == 1:
        frames = media.find_clips([paths.input_path(path)])[0].read()
        images = (frames.float() / 255 if frames.dtype == torch.uint8 else frames).movedim(1, -1)
        return Shown(
            reward=scores[0].reward, plot=score_pictures.plot_scores(scores[0], images), json=scores[0].to_json(), text=scores[0].summary(), csv=table
        )
    mean = sum(score.reward for score in scores) / len(scores)
    ranked = sorted(scores, key=lambda score: score.reward, reverse=True)
    text = f"{len(scores)} videos, mean {mean:.4f}; best {ranked[0].name} ({ranked[0].reward:.4f}), worst {ranked[-1].name} ({ranked[-1].reward:.4f})"
    text += "".join(f"\n{line}" for line in _warnings_of(scores))
    document = json.dumps({"reward_model": spec.kind, "reward": mean, "videos": [score.to_dict() for score in scores]})
    return Shown(reward=mean, plot=score_pictures.plot_videos(scores), json=document, text=text, csv=table)


def _warnings_of(scores: list[scoring.VideoScore]) -> list[str]:
    """Each warning once, with the videos that it is about."""
    names: dict[str, list[str]] = {}
    for score in scores:
        for message in score.warnings:
            names.setdefault(message, []).append(score.name)
    return [f"{', '.join(about[:3])}{f' and {len(about) - 3} more' if len(about) > 3 else ''}: {message}" for message, about in names.items()]


def score_latent(latent: dict, conditioning: list, spec: RewardModelSpec, sigmas: str, seed: int) -> Shown:
    """Score a LATENT; see `latent_scoring.score`."""
    score = latent_scoring.score(latent, conditioning, spec, sigmas, seed)
    plot = score_pictures.plot_sigmas(score.sigmas, score.probabilities, f"PAVRM: {score.probability:.4f}")
    return Shown(reward=score.probability, plot=plot, json=score.to_json(), text=score.summary())


@dataclass(frozen=True, kw_only=True)
class Mixed:
    """A mix, its report, and what was measured: row, centre and scale of each reward, for the node's widgets."""

    spec: RewardModelSpec
    report: str
    measured: tuple[dict[str, float], ...] = ()


def mix(values: dict[str, Any], measure: bool, folder: str, prompts_file: str) -> Mixed:
    """Make a mix of the node's rows (`reward_N`, `weight_N`, `centre_N`, `scale_N`), measured on base videos when asked.

    Raises:
        ValueError: See `mixing.mix_spec` and `mixing.measured`.
    """
    numbers = [number for number in range(1, ROWS + 1) if values.get(f"reward_{number}") is not None]
    rows = [
        mixing.Row(
            spec=values[f"reward_{number}"],
            weight=float(values.get(f"weight_{number}", 1.0)),
            centre=float(values.get(f"centre_{number}", 0.0)),
            scale=float(values.get(f"scale_{number}", 1.0)),
        )
        for number in numbers
    ]
    if not measure:
        spec, report = mixing.mix_spec(rows)
        return Mixed(spec=spec, report=report)
    rows, lines = mixing.measured(rows, folder, "", prompts_file)
    spec, report = mixing.mix_spec(rows)
    measured = tuple({"row": number, "centre": row.centre, "scale": row.scale} for number, row in zip(numbers, rows, strict=True))
    return Mixed(spec=spec, report=f"{report}\n{lines}", measured=measured)

"""How well a PAVRM tells good from bad: by noise level, per video, and whether its probabilities mean what they say. Numbers only, no drawing.

Each held-out video gets `validation_draws` noise levels in each of the five ranges; these depend on the video alone, so that updates can be compared.
A model trained on pairs has no absolute zero: besides accuracy at 0.5 (as upstream reports) there are the area under the ROC curve and the accuracy at the
best threshold, which do not depend on it.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from .objectives.pavrm import Noisy, PavrmObjective, noised
from .pavrm_config import BUCKETS, PavrmConfig
from .pavrm_data import Example, Pair, Sample
from .prompts import derived_seed

if TYPE_CHECKING:
    from .pavrm_data import Learnable

_BINS = 10
_CHUNK = 8


@torch.no_grad()
def validate(config: PavrmConfig, objective: PavrmObjective, learnable: Learnable) -> dict[str, Any]:
    """Score the held-out videos and pairs.

    Returns:
        JSON values: `buckets` (per range of sigma: sigma, count, accuracy, precision, recall, f1, bce, auc), `all` (the same over everything, with
        best_accuracy and best_threshold), `calibration` (per tenth of probability: mean probability, share of good, count) and `calibration_error`,
        `videos` (per video: label, probability and logit by range), `pairs` (per range: share of pairs in the right order); parts that have no data are empty.
    """
    samples = {example.sample.id: example.sample for example in learnable.held_out}
    samples |= {sample.id: sample for pair in learnable.held_out_pairs for sample in (pair.winner, pair.loser)}
    logits = _logits(config, objective, list(samples.values()))
    examples = [example for example in learnable.held_out if example.label is not None]
    report: dict[str, Any] = {"buckets": [], "all": {}, "calibration": [], "calibration_error": None, "videos": [], "pairs": []}
    for number, (low, high) in enumerate(BUCKETS):
        rows = [(logit, example.label) for example in examples for logit in logits[example.sample.id][number]]
        report["buckets"].append({"sigma": [low, high], **_measures(rows)})
        right = [_right_order(pair, logits, number) for pair in learnable.held_out_pairs if pair.share != 0.5]
        report["pairs"].append({"sigma": [low, high], "count": len(right), "accuracy": sum(right) / len(right) if right else None})
    rows = [(logit, example.label) for example in examples for draws in logits[example.sample.id] for logit in draws]
    report["all"] = _measures(rows) | _best_threshold(rows)
    report["calibration"], report["calibration_error"] = _calibration(rows)
    report["videos"] = [_video(samples[name], logits[name], examples) for name in sorted(samples)]
    return report


def summary(report: dict[str, Any]) -> tuple[float, float]:
    """The one number of a report, and its standard error: accuracy over all ranges, of labels, else of pairs; NaN where there are neither."""
    rows = report["buckets"] if report["all"].get("count") else report["pairs"]
    total = sum(row["count"] for row in rows)
    if not total:
        return math.nan, math.nan
    accuracy = sum(row["accuracy"] * row["count"] for row in rows if row["count"]) / total
    # The ranges share their videos, so they are no independent looks: the error is that of one range.
    return accuracy, math.sqrt(accuracy * (1 - accuracy) / max(1, total // len(rows)))


def _logits(config: PavrmConfig, objective: PavrmObjective, samples: Sequence[Sample]) -> dict[str, list[list[float]]]:
    """Logits by sample id, range and draw."""
    found: dict[str, list[list[float]]] = {sample.id: [[] for _ in BUCKETS] for sample in samples}
    caption = "short" if config.data.caption == "either" else config.data.caption
    for sample in samples:
        video = sample.read()
        places, noisy = [], []
        for number, (low, high) in enumerate(BUCKETS):
            for draw in range(config.validation_draws):
                sigma = random.Random(derived_seed(0, "validation", sample.id, number, draw)).uniform(low, high)
                generator = torch.Generator().manual_seed(derived_seed(0, "validation noise", sample.id, number, draw))
                latent = noised(video.latent_CFHW.float(), torch.randn(video.latent_CFHW.shape, generator=generator), sigma)
                places.append(number)
                noisy.append(Noisy(video=video, latent_CFHW=latent, sigma=sigma, caption=caption))
        for start in range(0, len(noisy), _CHUNK):
            for indices, logit_B in objective.scored(noisy[start : start + _CHUNK]):
                for index, logit in zip(indices, logit_B.tolist(), strict=True):
                    found[sample.id][places[start + index]].append(logit)
    return found


def _measures(rows: Sequence[tuple[float, int]]) -> dict[str, Any]:
    if not rows:
        return {"count": 0}
    said = [logit > 0 for logit, _ in rows]
    truth = [label == 1 for _, label in rows]
    both = sum(a and b for a, b in zip(said, truth, strict=True))
    precision = both / sum(said) if any(said) else 0.0
    recall = both / sum(truth) if any(truth) else 0.0
    return {
        "count": len(rows),
        "accuracy": sum(a == b for a, b in zip(said, truth, strict=True)) / len(rows),
        "precision": precision,
        "recall": recall,
        "f1": 2 * precision * recall / (precision + recall) if precision + recall else 0.0,
        "bce": sum(_softplus(-logit if label else logit) for logit, label in rows) / len(rows),
        "auc": _auc(rows),
    }


def _softplus(x: float) -> float:
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


def _auc(rows: Sequence[tuple[float, int]]) -> float | None:
    """Share of (good, bad) pairs with the good one higher; ties count half."""
    good, bad = ([logit for logit, label in rows if label == wanted] for wanted in (1, 0))
    if not good or not bad:
        return None
    ordered = sorted(rows)
    ranks, at = 0.0, 0
    while at < len(ordered):
        end = at
        while end < len(ordered) and ordered[end][0] == ordered[at][0]:
            end += 1
        ranks += (at + 1 + end) / 2 * sum(label for _, label in ordered[at:end])
        at = end
    return (ranks - len(good) * (len(good) + 1) / 2) / (len(good) * len(bad))


def _best_threshold(rows: Sequence[tuple[float, int]]) -> dict[str, float]:
    """The logit that separates best. Chosen on the very videos it is judged on, so it is an upper bound."""
    if not rows:
        return {}
    ordered = sorted(rows)
    right = sum(label for _, label in ordered)
    best, threshold = right, ordered[0][0] - 1
    for index, (logit, label) in enumerate(ordered):
        right += -1 if label else 1
        is_border = index + 1 == len(ordered) or ordered[index + 1][0] > logit
        if right > best and is_border:
            best, threshold = right, logit if index + 1 == len(ordered) else (logit + ordered[index + 1][0]) / 2
    return {"best_accuracy": best / len(rows), "best_threshold": threshold}


def _calibration(rows: Sequence[tuple[float, int]]) -> tuple[list[dict[str, Any]], float | None]:
    bins: list[list[tuple[float, int]]] = [[] for _ in range(_BINS)]
    for logit, label in rows:
        probability = math.exp(-_softplus(-logit))
        bins[min(_BINS - 1, int(probability * _BINS))].append((probability, label))
    curve = [
        {"count": len(part), "probability": sum(value for value, _ in part) / len(part), "good": sum(label for _, label in part) / len(part)}
        for part in bins
        if part
    ]
    error = sum(entry["count"] * abs(entry["probability"] - entry["good"]) for entry in curve) / len(rows) if rows else None
    return curve, error


def _right_order(pair: Pair, logits: dict[str, list[list[float]]], number: int) -> float:
    better, worse = (sum(logits[sample.id][number]) for sample in ((pair.winner, pair.loser) if pair.share > 0.5 else (pair.loser, pair.winner)))
    return float(better > worse)


def _video(sample: Sample, logits: list[list[float]], examples: Sequence[Example]) -> dict[str, Any]:
    means = [sum(draws) / len(draws) for draws in logits]
    probabilities = [math.exp(-_softplus(-mean)) for mean in means]
    label = next((example.label for example in examples if example.sample.id == sample.id), None)
    return {
        "id": sample.id,
        "caption": sample.caption,
        "label": label,
        "logit": means,
        "probability": probabilities,
        "mean_probability": sum(probabilities) / len(probabilities),
    }

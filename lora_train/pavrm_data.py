"""Labelled latents for PAVRM: which videos count, who is held out, which pairs there are, and what each update draws. No files are read here.

Everything random is a function of (seed, position), so a resumed run draws what it would have drawn.
"""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from .labels import label_of
from .pavrm_config import Data
from .prompts import derived_seed


@dataclass(frozen=True, kw_only=True)
class LatentVideo:
    """What a video gives to the network, on the CPU: latent [C, F, H, W] in model space, text [P, D] by caption, and what an image-to-video trunk needs."""

    latent_CFHW: torch.Tensor
    texts_PD: Mapping[str, torch.Tensor]
    clip_PD: torch.Tensor | None = None
    condition_CFHW: torch.Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A video of a dataset; `read` fetches its tensors. `labels`: as they stand in files. `has_condition`: whether these hold an image condition;
    `text_widths`: numbers per token of its texts, by caption (short, long)."""

    id: str
    shape: tuple[int, ...]
    read: Callable[[], LatentVideo]
    caption: str = ""
    labels: Mapping[str, Any] = field(default_factory=dict)
    has_condition: bool = False
    text_widths: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Example:
    """A sample and its label: 1 good, 0 bad; None where only pairs are learned."""

    sample: Sample
    label: int | None


@dataclass(frozen=True, kw_only=True)
class Pair:
    """`winner` was preferred with probability `share` (1: always, 0.5: a tie)."""

    winner: Sample
    loser: Sample
    share: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Learnable:
    """What a run learns from and is validated on. `given_pairs`: from votes or from a list of losers; empty makes pairs of labels.

    `notes`: what was left out and why; for the log.
    """

    train: tuple[Example, ...]
    held_out: tuple[Example, ...]
    given_pairs: tuple[Pair, ...] = ()
    held_out_pairs: tuple[Pair, ...] = ()
    notes: tuple[str, ...] = ()

    def facts(self) -> dict[str, dict[str, Any]]:
        """Label, size and caption of every video, share of every pair, by what they are and which side they are on; see `learned_from.py`."""
        found: dict[str, dict[str, Any]] = {}
        for side, examples, pairs in (("", self.train, self.given_pairs), ("held-out ", self.held_out, self.held_out_pairs)):
            for example in examples:
                sample = example.sample
                label = {1: "good", 0: "bad", None: "none"}[example.label]
                found[f"{side}{sample.id}"] = {"label": label, "latent": list(sample.shape), "caption": sample.caption}
            for pair in pairs:
                # The same two may have been compared several times.
                found.setdefault(f"{side}{pair.winner.id} over {pair.loser.id}", {"shares": []})["shares"].append(pair.share)
        return found


def labelled(samples: Sequence[Sample], data: Data) -> tuple[list[Example], list[str]]:
    """Samples with a label for `data.quality`, and sentences on those without.

    Raises:
        ValueError: a value that is no label.
    """
    examples, without = [], []
    for sample in samples:
        label = label_of(sample.labels, data.quality, missing=data.missing, mixed=data.mixed, where=sample.id)
        if label is None:
            without.append(sample.id)
        else:
            examples.append(Example(sample=sample, label=label))
    counts = Counter(example.label for example in examples)
    notes = [f"{data.quality}: {counts[1]} good, {counts[0]} bad videos"]
    if without:
        shown = ", ".join(without[:5]) + (" ..." if len(without) > 5 else "")
        notes.append(f'{len(without)} videos have no label for {data.quality} and are left out ({shown}); data.missing = "bad" would take them for bad')
    return examples, notes


def require_both_classes(examples: Sequence[Example], quality: str, what: str) -> None:
    """Refuse labels of one class.

    Raises:
        ValueError: all labels are equal, or there are none.
    """
    counts = Counter(example.label for example in examples)
    if not counts[1] or not counts[0]:
        raise ValueError(
            f"{what} holds {counts[1]} good and {counts[0]} bad videos for {quality}; PAVRM learns the difference, so both are needed: label more videos, or "
            "choose another quality"
        )


def partnerless(examples: Sequence[Example]) -> list[Sample]:
    """Good videos that make no pair: no bad one has a latent of their shape."""
    shapes = {tuple(example.sample.shape) for example in examples if example.label == 0}
    return [example.sample for example in examples if example.label == 1 and tuple(example.sample.shape) not in shapes]


def require_pairs(examples: Sequence[Example]) -> list[str]:
    """Sentences on the good videos that labels make no pair of.

    Raises:
        ValueError: they make no pair at all.
    """
    alone = partnerless(examples)
    if not alone:
        return []
    shown = ", ".join(f"{sample.id} {list(sample.shape)}" for sample in alone[:5]) + (" ..." if len(alone) > 5 else "")
    if len(alone) == sum(example.label == 1 for example in examples):
        raise ValueError(
            f"no good video has a latent of the shape of a bad one ({shown}), and the two of a pair must be alike: use loss 'ce', or encode all videos at one "
            "size and length"
        )
    return [f"{len(alone)} good videos are in no pair, for no bad one has a latent of their shape ({shown}); encode all at one size and length"]


def split(samples: Sequence[Sample], share: float, seed: int, *, by_caption: bool = False) -> tuple[set[str], set[str]]:
    """Ids to train on and ids to hold out.

    Whether a video is held out depends on its id (or caption) and the seed alone: new videos in the dataset move no old one.
    """
    held_out = {sample.id for sample in samples if _position(sample.caption if by_caption else sample.id, seed) < share}
    return {sample.id for sample in samples} - held_out, held_out


def _position(text: str, seed: int) -> float:
    return int.from_bytes(hashlib.sha256(f"{seed}/held out/{text}".encode()).digest()[:7], "big") / 2**56


class Draws:
    """What each update learns from.

    Args:
        learnable: from the host.
        data: settings.
        seed: of the run.
    """

    def __init__(self, learnable: Learnable, data: Data, seed: int) -> None:
        self._seed, self._data = seed, data
        self._given = learnable.given_pairs
        self._examples = [example for example in learnable.train if example.label is not None]
        self._classes = {label: [example for example in self._examples if example.label == label] for label in (1, 0)}
        alone = {sample.id for sample in partnerless(self._examples)}
        self._winners = [example.sample for example in self._classes[1] if example.sample.id not in alone]
        self._order: dict[str, tuple[int, list[int]]] = {}

    def examples(self, start: int, count: int) -> list[Example]:
        """Labelled videos number `start` to `start + count` of the endless stream."""
        if not self._data.balance:
            return [self._examples[self._index("examples", position, len(self._examples))] for position in range(start, start + count)]
        found = []
        for position in range(start, start + count):
            group = self._classes[position % 2]
            found.append(group[self._index(f"class {position % 2}", position // 2, len(group))])
        return found

    def pairs(self, start: int, count: int) -> list[Pair]:
        """Pairs number `start` to `start + count`: given ones, else a good video and a bad one of the same shape."""
        if self._given:
            return [self._given[self._index("pairs", position, len(self._given))] for position in range(start, start + count)]
        winners = self._winners
        return [self._partnered(winners[self._index("pairs", position, len(winners))], position) for position in range(start, start + count)]

    def _partnered(self, winner: Sample, position: int) -> Pair:
        alike = [example.sample for example in self._classes[0] if tuple(example.sample.shape) == tuple(winner.shape)]
        same = [sample for sample in alike if sample.caption == winner.caption] if self._data.pairing == "caption" else []
        return Pair(winner=winner, loser=random.Random(derived_seed(self._seed, "partner", position)).choice(same or alike))

    def _index(self, stream: str, position: int, size: int) -> int:
        """Every element once a pass, in an order of its own each pass."""
        number, offset = divmod(position, size)
        known = self._order.get(stream)
        if known is None or known[0] != number:
            order = list(range(size))
            random.Random(derived_seed(self._seed, stream, number)).shuffle(order)
            known = self._order[stream] = (number, order)
        return known[1][offset]

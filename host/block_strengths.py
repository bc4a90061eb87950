"""Strengths per block and per kind of layer, as text: `0-9:0.5, 10-29:1`. Pure text and numbers.

Rules are separated by commas, semicolons or lines; each is `WHERE:FACTOR`. WHERE is a block (`7`), a range (`0-9`), a kind of layer
(`attention`, `self_attn`, `cross_attn`, `ffn`, `norm`, `outside`), both (`0-9 ffn`), or `rest`. The last rule that matches a layer counts, `rest`
stands for what no other rule matches, and a layer that nothing matches keeps its strength.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

KINDS = {
    "self_attn": ("self_attn",),
    "cross_attn": ("cross_attn",),
    "attention": ("self_attn", "cross_attn"),
    "ffn": ("ffn",),
    "norm": ("norm",),
    "outside": ("outside",),
}
PRESETS = ("all", "first half", "last half", "attention only", "self-attention only", "cross-attention only", "feed-forward only", "blocks only")
MAX_FACTOR = 10.0
MAX_TEXT = 10_000

_RULE = re.compile(r"(?:(?P<first>\d{1,6})(?:\s*-\s*(?P<last>\d{1,6}))?)?\s*(?P<kind>[a-z_]+)?", re.IGNORECASE)
_MODULE = re.compile(r"^(?:diffusion_model\.)?blocks\.(\d+)(?:\.([a-z_]+)|$)")


@dataclass(frozen=True, kw_only=True)
class Rule:
    """One rule: which blocks (None: all, and what is outside of blocks), which kinds of layer (None: all), and the factor."""

    blocks: tuple[int, int] | None
    kinds: tuple[str, ...] | None
    factor: float

    def matches(self, block: int | None, kind: str) -> bool:
        """Tell whether the rule is about a layer."""
        if self.blocks is not None and (block is None or not self.blocks[0] <= block <= self.blocks[1]):
            return False
        return self.kinds is None or kind in self.kinds


@dataclass(frozen=True, kw_only=True)
class BlockStrengths:
    """A factor for every layer of a model.

    Attributes:
        rules: In the order in which they were written.
        rest: The factor of layers that no rule matches.
    """

    rules: tuple[Rule, ...] = ()
    rest: float = 1.0

    @property
    def is_identity(self) -> bool:
        """Whether every layer keeps its strength."""
        return self.rest == 1.0 and all(rule.factor == 1.0 for rule in self.rules)

    def factor(self, module_name: str) -> float:
        """Return the factor of a layer.

        Args:
            module_name: For example `blocks.0.self_attn.q`; `diffusion_model.` in front and `.weight` behind do not matter.
        """
        found = _MODULE.match(module_name)
        block, name = (int(found[1]), found[2]) if found else (None, "")
        kind = "outside" if block is None else name if name in ("self_attn", "cross_attn", "ffn") else "norm"
        for rule in reversed(self.rules):
            if rule.matches(block, kind):
                return rule.factor
        return self.rest


def parse_block_strengths(text: str, blocks: int) -> BlockStrengths:
    """Read strengths per block.

    Args:
        text: A preset of PRESETS, or rules such as `0-9:0.5, 10-29 attention:1, rest:0`. Empty is `all`.
        blocks: How many blocks the model has.

    Returns:
        The factors.

    Raises:
        ValueError: A rule without a factor, an unknown name, a block that the model does not have, or a factor that is no number within ±10.
    """
    if len(text) > MAX_TEXT:
        raise ValueError(f"The block strengths have {len(text)} characters; at most {MAX_TEXT} are read.")
    plain = " ".join(text.lower().split())
    entries = [entry.strip() for entry in re.split(r"[,;\n]", _preset(plain, blocks) if plain in PRESETS else text.lower()) if entry.strip()]
    rules, rest = [], 1.0
    for entry in entries:
        where, colon, number = entry.partition(":")
        if not colon:
            raise ValueError(f"Block strengths: {entry!r} has no factor. Write for example 0-9:0.5, or choose a preset ({', '.join(PRESETS)}).{_near(entry)}")
        factor = _factor(entry, number)
        if where.strip() == "rest":
            rest = factor
        else:
            rules.append(_rule(entry, where.strip(), factor, blocks))
    return BlockStrengths(rules=tuple(rules), rest=rest)


def _preset(name: str, blocks: int) -> str:
    """Write a preset as rules. Halves are about blocks alone; what is outside of blocks keeps its strength."""
    middle = blocks // 2
    first, last = f"0-{middle - 1}", f"{middle}-{blocks - 1}"
    return {
        "all": "",
        "first half": f"{last}:0",
        "last half": f"{first}:0" if middle else "",
        "attention only": "attention:1, rest:0",
        "self-attention only": "self_attn:1, rest:0",
        "cross-attention only": "cross_attn:1, rest:0",
        "feed-forward only": "ffn:1, rest:0",
        "blocks only": "outside:0",
    }[name]


def _factor(entry: str, text: str) -> float:
    """Read one factor."""
    try:
        factor = float(text)
    except ValueError:
        factor = math.nan
    if not abs(factor) <= MAX_FACTOR:
        raise ValueError(f"Block strengths: the factor of {entry!r} must be a number from {-MAX_FACTOR:g} to {MAX_FACTOR:g}.")
    return factor


def _rule(entry: str, where: str, factor: float, blocks: int) -> Rule:
    """Read one rule that is not `rest`."""
    found = _RULE.fullmatch(where)
    if not where or found is None:
        raise ValueError(f"Block strengths: {entry!r} names no blocks and no kind of layer. Write for example 0-9:0.5 or 0-9 ffn:0.5.")
    kind, span = found["kind"], None
    if kind is not None and kind not in KINDS:
        raise ValueError(f"Block strengths: {kind!r} in {entry!r} is no kind of layer. Choose of {', '.join((*KINDS, 'rest'))}.{_near(kind)}")
    if found["first"] is not None:
        first = int(found["first"])
        span = (first, int(found["last"]) if found["last"] is not None else first)
        if span[0] > span[1] or span[1] >= blocks:
            raise ValueError(f"Block strengths: {entry!r} names blocks that are not there; this model has the blocks 0 to {blocks - 1}.")
    return Rule(blocks=span, kinds=KINDS[kind] if kind else None, factor=factor)


def _near(word: str) -> str:
    """Suggest the nearest known word."""
    near = difflib.get_close_matches(word, (*KINDS, "rest", *PRESETS), n=1)
    return f" Did you mean {near[0]!r}?" if near else ""


def layer_factors(text: str, weights: Iterable[str], blocks: int) -> dict[str, float]:
    """Return the factor of every weight of a model.

    Args:
        text: The rules; empty is 1 everywhere.
        weights: Keys such as `diffusion_model.blocks.0.self_attn.q.weight`.
        blocks: How many blocks the model has.

    Raises:
        ValueError: As `parse_block_strengths`.
    """
    if not text:
        return dict.fromkeys(weights, 1.0)
    strengths = parse_block_strengths(text, blocks)
    return {weight: strengths.factor(weight.rpartition(".")[0]) for weight in weights}

"""Strengths per block as text."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reward_lab.host.block_strengths import PRESETS, parse_block_strengths

Q, CROSS, FFN, NORM, HEAD = "self_attn.q", "cross_attn.k", "ffn.0", "norm3", "head.head"


def factors(text: str, blocks: int = 40) -> dict[str, float]:
    """Factors of some telling layers."""
    strengths = parse_block_strengths(text, blocks)
    names = [f"blocks.{block}.{layer}" for block in (0, 19, 20, 39) for layer in (Q, CROSS, FFN, NORM)] + [HEAD]
    return {name: strengths.factor(name) for name in names}


@pytest.mark.parametrize(
    ("text", "changed"),
    [
        ("", {}),
        ("all", {}),
        ("first half", {f"blocks.{block}.{layer}": 0.0 for block in (20, 39) for layer in (Q, CROSS, FFN, NORM)}),
        ("Last  Half", {f"blocks.{block}.{layer}": 0.0 for block in (0, 19) for layer in (Q, CROSS, FFN, NORM)}),
        ("attention only", {**{f"blocks.{block}.{layer}": 0.0 for block in (0, 19, 20, 39) for layer in (FFN, NORM)}, HEAD: 0.0}),
        ("self-attention only", {**{f"blocks.{block}.{layer}": 0.0 for block in (0, 19, 20, 39) for layer in (CROSS, FFN, NORM)}, HEAD: 0.0}),
        ("cross-attention only", {**{f"blocks.{block}.{layer}": 0.0 for block in (0, 19, 20, 39) for layer in (Q, FFN, NORM)}, HEAD: 0.0}),
        ("feed-forward only", {**{f"blocks.{block}.{layer}": 0.0 for block in (0, 19, 20, 39) for layer in (Q, CROSS, NORM)}, HEAD: 0.0}),
        ("blocks only", {HEAD: 0.0}),
        ("0-19:0.5, 20-39:1", {f"blocks.{block}.{layer}": 0.5 for block in (0, 19) for layer in (Q, CROSS, FFN, NORM)}),
        ("39:-1", {f"blocks.39.{layer}": -1.0 for layer in (Q, CROSS, FFN, NORM)}),
        ("0 - 19 ffn : 0.25\n", {"blocks.0.ffn.0": 0.25, "blocks.19.ffn.0": 0.25}),
        ("0-39:0.5; 0-19 attention:2; 0:0", {
            **{f"blocks.{block}.{layer}": 0.5 for block in (19, 20, 39) for layer in (FFN, NORM)},
            **{f"blocks.{block}.{layer}": 0.5 for block in (20, 39) for layer in (Q, CROSS)},
            **{f"blocks.19.{layer}": 2.0 for layer in (Q, CROSS)},
            **{f"blocks.0.{layer}": 0.0 for layer in (Q, CROSS, FFN, NORM)},
        }),
        ("outside:0.1, norm:0.2", {HEAD: 0.1, **{f"blocks.{block}.norm3": 0.2 for block in (0, 19, 20, 39)}}),
        ("0:1, rest:0", {name: 0.0 for name in factors("") if not name.startswith("blocks.0.")}),
    ],
)  # fmt: skip
def test_rows(text: str, changed: dict[str, float]) -> None:
    assert factors(text) == {**factors(""), **changed}
    assert parse_block_strengths(text, 40).is_identity == (not changed)


def test_prefix_and_ending_of_a_layer_do_not_matter() -> None:
    strengths = parse_block_strengths("3 self_attn:0.5", 4)
    assert strengths.factor("diffusion_model.blocks.3.self_attn.q.weight") == strengths.factor("blocks.3.self_attn.q") == 0.5
    assert strengths.factor("blocks.30.self_attn.q") == 1.0


@pytest.mark.parametrize("blocks", [1, 2, 3, 30, 40])
@pytest.mark.parametrize("preset", PRESETS)
def test_presets_fit_every_model(preset: str, blocks: int) -> None:
    strengths = parse_block_strengths(preset, blocks)
    assert {strengths.factor(f"blocks.{block}.{layer}") for block in range(blocks) for layer in (Q, CROSS, FFN, NORM)} <= {0.0, 1.0}


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("0-9", "no factor"),
        ("firts half", "first half"),
        ("0-40:1", "blocks 0 to 39"),
        ("9-0:1", "blocks 0 to 39"),
        ("atention:1", "'attention'"),
        ("0-9:x", "must be a number"),
        ("0-9:nan", "must be a number"),
        ("0-9:1e9", "must be a number"),
        (":1", "names no blocks"),
        ("0--9:1", "names no blocks"),
        ("1" * 20_000, "characters"),
    ],
)
def test_refusals_say_what_to_do(text: str, told: str) -> None:
    with pytest.raises(ValueError, match=".*"):
        parse_block_strengths(text, 40)
    try:
        parse_block_strengths(text, 40)
    except ValueError as error:
        assert told in str(error)


@given(st.text(max_size=40), st.integers(1, 50))
def test_any_text_is_read_or_refused(text: str, blocks: int) -> None:
    try:
        strengths = parse_block_strengths(text, blocks)
    except ValueError:
        return
    assert abs(strengths.factor("blocks.0.self_attn.q")) <= 10.0


@given(st.lists(st.tuples(st.integers(0, 39), st.integers(0, 39), st.floats(-10, 10)), max_size=8))
def test_last_matching_rule_counts(rules: list[tuple[int, int, float]]) -> None:
    rules = [(min(first, last), max(first, last), factor) for first, last, factor in rules]
    strengths = parse_block_strengths(", ".join(f"{first}-{last}:{factor!r}" for first, last, factor in rules), 40)
    for block in range(40):
        expected = [factor for first, last, factor in rules if first <= block <= last]
        assert strengths.factor(f"blocks.{block}.ffn.0") == (expected[-1] if expected else 1.0)

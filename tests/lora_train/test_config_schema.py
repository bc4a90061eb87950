"""The published schema: it is the shipped file, it names every setting, and it agrees with the reader on presets and refusals."""

from __future__ import annotations

import json

import pytest

from reward_lab.lora_train.config import TrainConfig
from reward_lab.lora_train.config_schema import as_text, schema
from reward_lab.lora_train.presets import CARD_SIZES, PRESETS


def _allows(part: dict, value) -> bool:
    """The few words of JSON Schema that the schema uses."""
    if "anyOf" in part:
        return any(_allows(entry, value) for entry in part["anyOf"])
    if "enum" in part:
        return value in part["enum"]
    kind = part["type"]
    if kind == "object":
        known = part.get("properties")
        is_known = known is None or all(name in known and _allows(known[name], entry) for name, entry in value.items()) if isinstance(value, dict) else False
        return is_known and all(name in value for name in part.get("required", ()))
    if kind == "array":
        return isinstance(value, list | tuple) and all(_allows(part["items"], entry) for entry in value)
    if kind in ("integer", "number"):
        return isinstance(value, int if kind == "integer" else (int, float)) and not isinstance(value, bool)
    return isinstance(value, {"string": str, "boolean": bool, "null": type(None)}[kind])


def test_shipped_file_is_the_schema(repo):
    text = (repo / "docs" / "train_config.schema.json").read_text(encoding="utf-8")
    assert text == as_text(), "write it again: python lab.py train --schema > docs/train_config.schema.json"


def test_every_config_that_is_read_fits(toy):
    rules = schema()
    full = toy.config(expert="both", held_out={"every": 2, "prompts": ["y"], "judge": {"kind": "mps", "path": "x"}}).to_dict()
    assert _allows(rules, json.loads(json.dumps(full)))
    base = {key: toy.settings()[key] for key in ("models", "reward", "prompts")}
    for preset in PRESETS:
        for card in CARD_SIZES:
            values = {**base, "preset": preset, "card": card, "real": {"path": "real.safetensors"}}
            assert _allows(rules, values)
            config = TrainConfig.from_dict(values)
            assert _allows(rules, config.to_dict()) and config.video.width_px == CARD_SIZES[card]["video"]["width_px"]
            without = TrainConfig.from_dict({key: value for key, value in values.items() if key != "card"} | {"video": CARD_SIZES[card]["video"]})
            assert config.lora.rank == CARD_SIZES[card]["lora"]["rank"] and config.lora.factor == without.lora.factor


def test_a_plain_text_stands_for_a_prompt(toy):
    mixed = {"every": 2, "prompts": ["y", {"text": "z", "image": "z.png"}]}
    values = {**toy.settings(held_out=mixed), "prompts": ["a", {"text": "b", "weight": 2}], "sample_prompts": ["c"]}
    assert _allows(schema(), values)
    config = TrainConfig.from_dict(values)
    assert [(prompt.text, prompt.weight, prompt.image) for prompt in (*config.prompts, *config.held_out.prompts, *config.sample_prompts)] == [
        ("a", 1.0, ""), ("b", 2.0, ""), ("y", 1.0, ""), ("z", 1.0, "z.png"), ("c", 1.0, ""),
    ]  # fmt: skip
    with pytest.raises(ValueError, match=r"a prompt is empty"):
        TrainConfig.from_dict({**values, "held_out": {"every": 2, "prompts": ["y", " "]}})


@pytest.mark.parametrize("changes", [{"stepz": 1}, {"method": "prlf"}, {"optimiser": {"kind": "adam"}}, {"steps": "many"}, {"lora": {"rnk": 2}}])
def test_schema_and_reader_refuse_the_same(toy, changes):
    assert not _allows(schema(), toy.settings(**changes))
    with pytest.raises(ValueError):  # noqa: PT011 (which message is test_config's matter)
        toy.config(**changes)


def test_unknown_card_is_named(toy):
    with pytest.raises(ValueError, match="unknown card '24Gb'; known: 24GB, 48GB, 80GB; the nearest is '24GB'"):
        toy.config(card="24Gb")

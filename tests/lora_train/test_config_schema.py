"""The published schema: it is the shipped file, it names every setting, and it agrees with the reader on presets and refusals."""

from __future__ import annotations

import json

import pytest

from reward_lab.lora_train import run_config
from reward_lab.lora_train.config import TrainConfig
from reward_lab.lora_train.config_schema import as_text, schema
from reward_lab.lora_train.presets import CARD_SIZES, PRESETS

PAVRM = {"kind": "pavrm", "models": {"trunk": "t"}, "data": {"source": "d"}}


def _allows(part: dict, value) -> bool:
    """The few words of JSON Schema that the schema uses."""
    if "oneOf" in part:
        return sum(_allows(entry, value) for entry in part["oneOf"]) == 1
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


def test_both_kinds_of_run_fit():
    """Every file that `run_config.read` takes: a LoRA's with and without its kind, a PAVRM's in short and written out."""
    rules = schema()
    lora = {"models": {"high": "h", "low": "l", "text_encoder": "t", "vae": "v"}, "reward": {"kind": "mps", "path": "m"}, "prompts": [{"text": "x"}]}
    lora["preset"] = "reward-lab"
    for values in (lora, {**lora, "kind": "lora"}, PAVRM, {**PAVRM, "loss": "both", "sigma": {"kind": "list", "sigmas": [0.2, 0.5]}}):
        assert _allows(rules, values), values
        written = json.loads(json.dumps(run_config.read(values).to_dict()))
        assert _allows(rules, written), written
    assert [entry["title"] for entry in rules["oneOf"]] == ["LoRA", "PAVRM"]
    assert not _allows(rules, {key: value for key, value in PAVRM.items() if key != "kind"})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stepz": 1}, "unknown setting 'stepz'; the nearest known one is 'steps'"),
        ({"data": {"source": "d", "qualty": "x"}}, "unknown setting 'data.qualty'; the nearest known one is 'data.quality'"),
        ({"kind": "dpo"}, "kind is 'dpo'"),
        ({"loss": "dpo"}, "loss is 'dpo'"),
        ({"sigma": {"kind": "beta"}}, "sigma.kind is 'beta'"),
        ({"shape": {"pooling": "sum"}}, "shape.pooling is 'sum'"),
        ({"preset": "reward-lab"}, "unknown setting 'preset'"),
        ({"steps": "many"}, "steps must be a whole number"),
        ({"kind": "lora"}, "unknown setting 'data'"),
    ],
)
def test_schema_and_reader_refuse_the_same_of_a_pavrm(changes, message):
    assert not _allows(schema(), {**PAVRM, **changes})
    with pytest.raises(ValueError, match=message):
        run_config.read({**PAVRM, **changes})


def test_a_lora_config_with_its_kind_names_the_nearest_key(toy):
    with pytest.raises(ValueError, match="unknown setting 'stepz'; the nearest known one is 'steps'"):
        run_config.read({**toy.settings(), "kind": "lora", "stepz": 1})


@pytest.mark.parametrize("changes", [{"stepz": 1}, {"method": "prlf"}, {"optimiser": {"kind": "adam"}}, {"steps": "many"}, {"lora": {"rnk": 2}}])
def test_schema_and_reader_refuse_the_same(toy, changes):
    assert not _allows(schema(), toy.settings(**changes))
    with pytest.raises(ValueError):  # noqa: PT011 (which message is test_config's matter)
        toy.config(**changes)


def test_unknown_card_is_named(toy):
    with pytest.raises(ValueError, match="unknown card '24Gb'; known: 24GB, 48GB, 80GB; the nearest is '24GB'"):
        toy.config(card="24Gb")

"""The comparison with PEFT as it is run, on a tiny model: two processes, equal gradients, ratios. PEFT itself is stood in for (`peft_double`)."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("torch")
pytest.importorskip("comfy.ldm.wan.model", reason="needs ComfyUI on the path")

import torch  # noqa: E402

from reward_lab.benchmarks import against_peft  # noqa: E402

pytestmark = pytest.mark.host


def test_both_sides_of_a_tiny_model(tmp_path, peft_double, capsys):
    out = tmp_path / "r.json"
    assert against_peft.main(["--shapes", "tiny", "--repeats", "1", "--peft", str(peft_double()), "--out", str(out)]) == 0
    result = json.loads(out.read_text(encoding="utf-8"))
    row = result["shapes"]["tiny"]
    assert row["gradient_difference"] < 1e-5 and row["tokens"] == 32
    assert {side: len(steps) for side, steps in row["steps"].items()} == {"ours": 2, "peft": 2}
    assert row["facts"]["ours"]["lora_parameters"] == row["facts"]["peft"]["lora_parameters"] > 0
    # The engine as a run on a CPU gets it: no merged copies of all weights, what can be kept is kept.
    knobs = row["facts"]["ours"]["knobs"]
    assert not knobs["merges_resident"] and knobs["keep_feed_forward"] and knobs["resident_blocks"] == 3
    assert row["time_ratio"] == row["fastest"]["ours"]["seconds"] / row["fastest"]["peft"]["seconds"]
    assert len(result["goals"]) == 2 and "step time at most 0.85 x" in capsys.readouterr().out


def test_other_gradients_are_no_comparison(tmp_path, peft_double):
    with pytest.raises(RuntimeError, match="gradients of the two sides differ by"):
        against_peft.main(["--shapes", "tiny", "--peft", str(peft_double(scale=1.01)), "--out", str(tmp_path / "r.json")])
    assert not (tmp_path / "r.json").exists()


def test_differences_are_seen():
    one = {"a": torch.tensor([3.0, 4.0])}
    assert against_peft._difference(one, one) == 0
    assert against_peft._difference({"a": torch.tensor([3.0, 4.5])}, one) == pytest.approx(0.1)
    with pytest.raises(RuntimeError, match="one side alone"):
        against_peft._difference(one, {"b": one["a"]})


def test_a_missing_peft_is_told(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(ValueError, match="PEFT cannot be imported .* give --peft FOLDER"):
        against_peft.main(["--shapes", "tiny", "--peft", str(tmp_path), "--out", str(tmp_path / "r.json")])

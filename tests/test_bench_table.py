"""`lab.py bench` without a name prints every committed result, and what is only predicted as such."""

from __future__ import annotations

import importlib.util
import json
import subprocess
from pathlib import Path

import torch

from reward_lab.benchmarks import report, table
from reward_lab.benchmarks.gpu import goals, run_all

ROOT = Path(__file__).resolve().parent.parent


def load_lab():
    """The command line as a module."""
    spec = importlib.util.spec_from_file_location("lab_script", ROOT / "lab.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_lines_of_results_failures_and_predictions(tmp_path):
    settled = {"key": "stall", "goal": goals.WORDS["stall"], "measured": "0.7 %", "met": True}
    missed = {"key": "lora.exact", "goal": goals.WORDS["lora.exact"], "measured": "+7.0 %", "met": False}
    card = {"hardware": "H200", "date": "2026-12-01", "goals": [settled, missed], "failed": {"block": "exit status 1"}}
    (tmp_path / "gpu-h200.json").write_text(json.dumps(card))
    (tmp_path / "old.json").write_text(json.dumps({"figures": 3}))
    (tmp_path / "rehearsal.json").write_text(json.dumps({"is_rehearsal": True, "goals": [{**settled, "measured": "toy"}]}))
    lines = table.rows(tmp_path)
    verdicts = {row["goal"]: row["verdict"] for row in lines}
    assert verdicts[goals.WORDS["stall"]] == "met" and verdicts[goals.WORDS["lora.exact"]] == "MISSED" and verdicts["block"] == "failed"
    assert verdicts[goals.WORDS["peak.720p"]] == "predicted" and verdicts[goals.WORDS["peft.faster"]] == "not measured"
    assert not any(row["measured"] == "toy" for row in lines)
    printed = table.text(lines)
    assert "gpu-h200  (H200, 2026-12-01)" in printed and "old  (hardware not told, date not told)" in printed
    assert [row["goal"] for row in lines].count(goals.WORDS["stall"]) == 1


def test_predictions_are_numbers_of_the_plan():
    found = goals.predictions()
    assert set(found) <= set(goals.WORDS)
    assert (found["lora.exact"], found["lora.merged"], found["lora.backward"]) == ("+5.8 %", "+0.4 %", "+10.8 %")
    assert 200 < float(found["seconds.720p"].split()[0]) < 300 and 10 < float(found["peak.720p"].split()[0]) < 16


def test_the_committed_results_can_be_printed(capsys):
    assert table.main([]) == 0
    printed = capsys.readouterr().out
    for path in table.RESULTS.glob("*.json"):
        assert path.stem in printed
    assert table.main(["--json"]) == 0
    assert json.loads(capsys.readouterr().out) == table.rows(table.RESULTS)


def test_a_card_is_named_by_its_driver(monkeypatch):
    answer = subprocess.CompletedProcess([], 0, stdout="NVIDIA H100 80GB HBM3, 580.159.04\n")
    monkeypatch.setattr(report.subprocess, "run", lambda *_args, **_options: answer)
    found = report.machine(torch.device("cuda"))
    assert (found["card"], found["driver"]) == ("NVIDIA H100 80GB HBM3", "580.159.04") and found["hardware"].startswith("NVIDIA H100 80GB HBM3, ")
    assert run_all._slug(found["card"]) == "h100-80gb-hbm3"


def test_a_name_is_optional():
    lab = load_lab()
    assert lab.parse(["bench"]).what == "table"
    assert lab.parse(["bench", "against-peft", "--repeats", "3"]).rest == ["--repeats", "3"]
    assert {"table", "against-peft", "gpu", "rewards", "learning"} <= lab.BENCHMARKS.keys()

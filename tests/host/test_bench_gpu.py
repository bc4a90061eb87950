"""The benchmarks of benchmarks/gpu run end to end on a CPU at toy shapes, say that it was a rehearsal, and judge nothing."""

from __future__ import annotations

import argparse
import json

import pytest

pytest.importorskip("torch")
pytest.importorskip("comfy.ldm.wan.model", reason="needs ComfyUI on the path")

from reward_lab.benchmarks.gpu import against_peft, block, goals, lora_linear, prfl_step, reward_backprop, run_all, stall  # noqa: E402
from reward_lab.benchmarks.gpu import rig as rigs  # noqa: E402

pytestmark = pytest.mark.host
SMALL = ["--device", "cpu", "--small"]


def rehearse(module, tmp_path, *more):
    out = tmp_path / "result.json"
    assert module.main([*SMALL, "--out", str(out), *more]) == 0
    result = json.loads(out.read_text(encoding="utf-8"))
    assert result["is_rehearsal"] and result["date"] and result["hardware"] and result["torch"]
    assert result["goals"] and all(one["met"] is None and one["goal"] == goals.WORDS[one["key"]] and one["measured"] for one in result["goals"])
    return result


def keys(result):
    return {one["key"] for one in result["goals"]}


def test_lora_linear(tmp_path):
    result = rehearse(lora_linear, tmp_path)
    assert keys(result) == {"lora.exact", "lora.merged", "lora.backward"}
    # What was timed computes the same thing in both exact forms.
    assert all(row["largest_difference"] < 1e-5 for row in result["shapes"])
    assert lora_linear.percents({"forward.base": 2.0, "forward.merge": 0.1, "forward.exact_addmm": 2.5}) == pytest.approx(
        {"forward.merged": 5.0, "forward.exact_addmm": 25.0}
    )


def test_block(tmp_path):
    result = rehearse(block, tmp_path)
    assert {"block.forward.480p", "block.backward.720p"} <= keys(result)
    assert result["milliseconds"]["720p"]["cpu"].keys() == {"rollout", "forward", "backward", "forward_with_gates", "backward_with_gates"}


def test_stall(tmp_path):
    result = rehearse(stall, tmp_path)
    assert keys(result) == {"stall"}
    streamed, resident = (result["sizes"]["480p"][way]["gradient"] for way in ("streamed", "resident"))
    assert streamed["copied_bytes"] > 0 and resident["copied_bytes"] == 0


def test_prfl_step_in_bf16_and_fp8(tmp_path):
    result = rehearse(prfl_step, tmp_path, "--runs", "480p:8:24", "720p:24:24:fp8:65", "720p:0:0")
    assert keys(result) == {"cap24.480p", "peak.480p", "host.fp8", "seconds.720p"}
    first, whole, fp8 = result["runs"]
    assert first["rollout_forwards"] == prfl_step.GRADIENT_STEP and fp8["run"] == "720p:24:24:fp8:65"
    for row in result["runs"]:
        assert row["micro_step_at_19_forwards_s"] == pytest.approx(19 * row["rollout_forward_s"] + row["gradient_and_update_s"])
    # The base in fp8 computes something near, and not the same.
    assert whole["loss"] == pytest.approx(fp8["loss"], rel=0.05) and whole["loss"] != fp8["loss"]


def test_a_run_that_fails_has_missed_its_goals(tmp_path, monkeypatch):
    def fails(*_args):
        raise RuntimeError("out of memory, say")

    monkeypatch.setattr(prfl_step, "step", fails)
    result = prfl_step.measure(rigs.rig_of(rigs.arguments("x", "x").parse_args(SMALL)), ["720p:14:24", "720p:24:24:bf16:82"])
    assert all(row["error"].startswith("RuntimeError: out of memory") for row in result["runs"])
    judged = prfl_step.goals_of(result["runs"])
    assert {one["key"] for one in judged} == {"cap24.720p", "peak.720p", "host.bf16"} and not any(one["met"] for one in judged)


@pytest.mark.parametrize("name", ["1080p:8:24", "480p:8", "480p:8:24:int4", "480p:8:24:bf16:82:1"])
def test_a_run_of_another_form_is_refused(name):
    with pytest.raises(ValueError):
        prfl_step.run_of(name)


def test_against_peft(tmp_path, peft_double):
    result = rehearse(against_peft, tmp_path, "--peft", str(peft_double()))
    assert keys(result) == {"peft.faster", "peft.memory"} and result["size"] == "480p"
    assert result["gradient_norms_apart"] < 1e-4
    assert result["sides"]["streamed"]["knobs"]["resident_blocks"] == 0 or result["sides"]["streamed"]["planned_for_gb"] == pytest.approx(24)


def test_reward_backprop(tmp_path):
    result = rehearse(reward_backprop, tmp_path)
    assert keys(result) == {"backprop"} and min(result["gradient_norms"]) > 0


def test_without_a_card_the_real_shapes_are_refused():
    with pytest.raises(ValueError, match="would take days; add --small"):
        lora_linear.main(["--device", "cpu"])


def test_run_all_goes_on_where_it_stopped(tmp_path, monkeypatch):
    calls = []

    def measured(item, options, limit_s):
        calls.append(item.name)
        if item.name == "block" and calls.count("block") == 1:
            return {"error": "exit status 1", "log_tail": ["boom"], "took_s": 1.0}
        return {"goals": [{"key": "stall", "goal": "g", "measured": "m", "met": None}], "took_s": 1.0}

    monkeypatch.setattr(run_all, "run", measured)
    out = tmp_path / "gpu.json"
    arguments = [*SMALL, "--out", str(out)]
    assert run_all.main([*arguments, "--only", "block"]) == 1
    assert json.loads(out.read_text())["failed"] == {"block": "exit status 1"}
    assert run_all.main(arguments) == 0
    # What failed comes after what was never tried, and what is whole is not run again.
    once = ["lora_linear", "prfl_peaks", "stall", "prfl_seconds", "against_peft", "reward_backprop", "prfl_16gb", "rewards", "prfl_host", "prfl_host_fp8"]
    assert calls == ["block", *once, "block"]
    assert run_all.main(arguments) == 0 and len(calls) == 12
    written = json.loads(out.read_text())
    assert not written["failed"] and not written["missing"] and len(written["goals"]) == 11 and written["is_rehearsal"]


def test_run_all_runs_a_process_and_tells_of_one_that_fails(tmp_path):
    options = argparse.Namespace(device="cpu", small=True, peft=None, ram_gb=0)
    item = run_all.Item(name="x", module="lora_linear", seconds=1)
    assert run_all.is_whole(run_all.run(item, options, 300))
    broken = run_all.run(run_all.Item(name="x", module="lora_linear", seconds=1, arguments=("--no-such",)), options, 300)
    assert broken["error"] == "exit status 2" and any("no-such" in line for line in broken["log_tail"])


def test_what_would_not_end_in_time_is_not_begun(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run_all.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(run_all, "combined", lambda done, options: {"results": done})
    monkeypatch.setattr(run_all, "run", lambda *_args: pytest.fail("was begun"))
    assert run_all.main(["--out", str(tmp_path / "r.json"), "--limit-s", "5"]) == 0
    assert capsys.readouterr().out.count("not begun") == len(run_all.ITEMS)

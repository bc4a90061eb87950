"""The learning bench: its settings are valid, its sums are paired, its goals are judged by the numbers, and a real run of a minute's part fits together."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("comfy.ldm.wan.model", reason="needs ComfyUI on the path")

from reward_lab.lora_train.config import TrainConfig  # noqa: E402
from reward_lab.pocket import learning, learning_experiments, learning_page, learning_report, learning_store  # noqa: E402

pytestmark = pytest.mark.host


def _settings(name, tmp_path):
    experiment = learning_experiments.EXPERIMENTS[name]
    return learning_experiments.settings(experiment, Path("weights"), 3, ["a red circle stays still over a white background"], tmp_path / "real.safetensors")


@pytest.mark.parametrize("name", learning_experiments.EXPERIMENTS)
def test_settings_keep_the_preset_and_are_valid(name, tmp_path):
    config = TrainConfig.from_dict(_settings(name, tmp_path))
    experiment = learning_experiments.EXPERIMENTS[name]
    assert config.video.frames == 17 and config.sampling.guidance == 3.0 and config.optimiser.lr == 2e-3 and config.lora.rank == 16
    if experiment.preset == "videox-fun":
        assert (config.objective.mode, config.objective.strategy, config.sampling.schedule, config.optimiser.clip_norm) == ("chain", "tail", "diffusers", 0.3)
    if name == "hy-video-prfl":
        assert config.prfl.loss == "hinge" and config.prfl.real_weight == 1 and not config.prfl.even_gradient


def test_all_train_on_other_prompts_than_they_are_judged_on(tmp_path):
    from reward_lab.pocket import world
    from reward_lab.pocket.quality import held_out_scenes
    from reward_lab.pocket.stages.loras import training_prompts

    judged = {world.caption(scene) for seed in range(3) for scene in held_out_scenes(64, 40_000 + seed, two_share=0.0)}
    trained = {prompt for seed in range(3) for prompt in training_prompts(128, 500 + seed)}
    assert judged and trained and not judged & trained


def test_plan_runs_seed_by_seed_and_refuses_unknown_names():
    todo = learning_experiments.plan([0, 1])
    assert todo[:2] == [("base", 0), ("rendered", 0)] and ("base", 1) in todo and ("real-clips-only", 0) in todo and ("real-clips-only", 1) not in todo
    assert [seed for _, seed in todo] == sorted(seed for _, seed in todo)
    with pytest.raises(ValueError, match="unknown experiments best; known: base, rendered, reward-lab"):
        learning_experiments.plan([0], ["best"])


def _result(name, seed, shift, forwards=4500.0, looks=()):
    values = {measure: [0.5 + shift, 0.7 + shift, 0.2 + shift] for measure in learning_report.MEASURES}
    curve = [{"step": step, "forwards": step * forwards / 10, "reward": step / 10, "held_out": None} for step in range(1, 11)]
    seen = []
    for step, spent, gain in looks:
        seen.append({"step": step, "forwards": spent, "oracle": {name: [value - shift + gain for value in part] for name, part in values.items()}})
    run = {"forwards": forwards, "updates": 10, "curve": curve, "looks": seen, "reason": "stopped", "detail": ""}
    return {"experiment": name, "seed": seed, "recipe": "0", "oracle": values, **(run if name not in ("base", "rendered") else {})}


def test_report_pairs_sums_and_judges(tmp_path, capsys):
    shifts = {"base": 0.0, "rendered": 0.15, "reward-lab": 0.12, "videox-fun-high": 0.05, "hy-video-prfl": -0.1, learning_experiments.CONTROL: 0.11}
    shifts |= dict(zip(learning_experiments.REPLAYED, (0.09, 0.02), strict=True))
    shifts |= dict(zip(learning_experiments.MISLABELLED, (0.11, 0.05, 0.04, -0.01, 0.02), strict=True))
    looks = [(2, 1000.0, 0.04), (4, 2000.0, 0.08)]
    for name, shift in shifts.items():
        for seed in (0, 1):
            learning_store.write(tmp_path, _result(name, seed, shift, looks=looks if name == "reward-lab" else ()))
    learning_report.write(tmp_path, tmp_path / "out" / "learning.json", tmp_path / "out" / "learning.png", tmp_path / "out" / "learning.md")
    document = json.loads((tmp_path / "out" / "learning.json").read_text(encoding="utf-8"))
    ours = document["experiments"]["reward-lab"]
    assert ours["gain"]["text"]["mean"] == pytest.approx(0.12) and ours["gain"]["text"]["pairs"] == 6
    assert ours["gain"]["text"]["standard_error"] == pytest.approx(0, abs=1e-12)
    assert ours["reward_gain_per_1000_forwards"] == pytest.approx(0.12 / 4.5)
    assert [(look["forwards"], round(look["gain"]["reward"]["mean"], 9)) for look in ours["looks"]] == [(1000.0, 0.04), (2000.0, 0.08)]
    found = {goal["goal"]: goal for goal in document["goals"]}
    met = {words: goal["met"] for words, goal in found.items()}
    assert met["reward gain at the equal budget at least twice that of the better published preset"]
    assert met["colour and shape right: 10 points above the base, and no preset above"]
    cost = found["forwards to 90 % of what the better published preset gains in the end: at most half of what it takes"]
    assert cost["met"] and cost["measured"] == "1125 against 4050 forwards: 3.6 x videox-fun-high"
    (added,) = (goal for words, goal in found.items() if words.startswith("rewards add to what the clips teach"))
    assert added["met"] and added["measured"].startswith("reward +0.0100 ± 0.0000")
    (alike,) = (goal for words, goal in found.items() if words.startswith("without real clips"))
    assert not alike["met"] and alike["measured"].startswith("1.80 x")
    early = found["the same after 1000 forwards, where none is near the ceiling yet"]
    assert not early["met"] and early["measured"].startswith("+0.0400 against +0.0500: 0.8 x videox-fun-high")
    lying = found["the same where the clips' captions lie as often as those of the base did, with real.keep 0.33"]
    assert lying["met"] and lying["measured"].startswith("+0.1100 against +0.0500: 2.2 x videox-fun-high")
    (added,) = (goal for words, goal in found.items() if words.startswith("rewards add to what clips with captions that lie teach"))
    assert added["met"] and added["measured"].startswith("reward +0.1200 ± 0.0000")
    for direction in ("PRFL raises", "a reward of the first frame lowers"):
        assert not met[f"{direction} the dynamic degree (by two standard errors)"]
    assert "videox-fun-low-0" in document["missing"] and "reward-lab-1" not in document["missing"] and "reward-lab-2" in document["missing"]
    assert (tmp_path / "out" / "learning.png").stat().st_size > 1000
    assert "missed   PRFL raises the dynamic degree (by two standard errors): -0.100" in capsys.readouterr().out


def test_guards_and_held_out_rewards_are_judged_with_every_seed():
    def run(seed, text, curve):
        return {"seed": seed, "oracle": {"text": [text]}, "looks": [{"oracle": {"text": [text - 0.1]}}], "reason": "no_gain", "detail": "Why.", "curve": curve}

    curve = {"held_out": [None, 1.0, None, 3.0], "held_out_base": [None, 2.0, None, 2.0]}
    runs, base = {0: run(0, 0.8, curve), 1: run(1, 0.6, curve)}, {seed: {"oracle": {"text": [0.55]}} for seed in (0, 1)}
    judged = learning_report._guarded(runs, base)
    assert not judged["met"] and "seed 0: base 55 %, never below 70 %, in the end 80 %; no_gain. Why. seed 1: base 55 %, never below 50 %" in judged["measured"]
    assert learning_report._guarded({0: runs[0]}, base)["met"] and learning_report._held_out(curve) == (2.0, 3.0)


def test_a_gain_that_is_never_reached_has_no_cost():
    entry = {"looks": [{"forwards": 100.0, "gain": {"reward": {"mean": 0.2}}}], "forwards": 200.0, "gain": {"reward": {"mean": 0.1}}}
    assert learning_report.forwards_to_reach(entry, 0.1) == pytest.approx(50)
    assert learning_report.forwards_to_reach(entry, 0.3) is None


def test_results_are_small_and_read_back(tmp_path):
    result = _result("reward-lab", 3, 0.123456, looks=[(5, 10.0, 0.5)])
    result["curve"] = [{"step": step, "forwards": 3.0 * step, "reward": float(step), "held_out": 0.5 if step == 50 else None} for step in range(1, 101)]
    learning_store.write(tmp_path, result)
    found = learning_store.read(tmp_path)["reward-lab"][3]
    assert found["oracle"]["reward"] == [0.62346, 0.82346, 0.32346] and found["looks"][0]["oracle"]["text"] == [1.0, 1.2, 0.7]
    assert len(found["curve"]["step"]) == 34 and found["curve"]["step"][-1] == 100 and found["curve"]["reward"][0] == 2.0
    assert [value for value in found["curve"]["held_out"] if value is not None] == [0.5]
    assert set(found["made"]) == {"date", "hardware"} and not list(tmp_path.glob("*.partial"))


def test_recipe_knows_settings_and_not_folders(tmp_path):
    values = {"preset": "reward-lab", "models": {"high": "/a/high.safetensors"}, "seed": 1}
    moved = {"preset": "reward-lab", "models": {"high": "/b/high.safetensors"}, "seed": 1}
    assert learning_store.recipe(values, 10, 64) == learning_store.recipe(moved, 10, 64)
    others = [({**values, "seed": 2}, 10), (values, 11), ({**values, "preset": "pocket"}, 10)]
    assert len({learning_store.recipe(*part, 64) for part in (*others, (values, 10))}) == 4


def test_report_without_base_says_so(tmp_path):
    with pytest.raises(ValueError, match="run the base first"):
        learning_report.write(tmp_path, tmp_path / "a.json", tmp_path / "a.png", tmp_path / "a.md")


def test_a_run_is_trained_judged_and_not_repeated(pocket_models, repo, tmp_path, monkeypatch, capsys):
    tiny = learning_experiments.Experiment(preset="reward-lab", budget=24.0, changes={"batch": 1, "expert": "both", "checkpoint_every": 4}, looks=(4, 99))
    monkeypatch.setitem(learning_experiments.EXPERIMENTS, "tiny", tiny)
    monkeypatch.setattr(learning, "REAL_CLIPS", 2)
    results = tmp_path / "results"
    arguments = ["--work", str(tmp_path), "--results", str(results), "--only", "base,rendered,tiny", "--seeds", "9", "--pairs", "2"]
    assert learning.main(arguments) == 0
    result = learning_store.read(results)["tiny"][9]
    assert result["forwards"] == 24 and result["updates"] == 8 and len(result["oracle"]["reward"]) == 2
    assert [(look["step"], look["forwards"]) for look in result["looks"]] == [(4, 12.0)] and 0 < result["oracle"]["pavrm"][0] < 1
    assert min(learning_store.read(results)["rendered"][9]["oracle"]["motion"]) == 1
    capsys.readouterr()
    assert learning.main(arguments) == 0 and capsys.readouterr().out == ""
    monkeypatch.setitem(learning_experiments.EXPERIMENTS, "tiny", replace(tiny, budget=12.0))
    assert learning.main(arguments) == 0 and "tiny-9.json was made with other settings or models and is made again" in capsys.readouterr().out
    assert learning_store.read(results)["tiny"][9]["updates"] == 4


def test_page_is_what_the_summary_says(repo):
    """And every experiment stands on it, under one heading."""
    summary = json.loads((repo / "benchmarks" / "results" / "learning.json").read_text(encoding="utf-8"))
    assert (repo / "docs" / "learning.md").read_text(encoding="utf-8") == learning_page.page(summary), "write it again: lab.py bench learning --report"
    shown = [name for _, rows in learning_page.GROUPS for name, _ in rows]
    assert sorted(shown) == sorted([*learning_experiments.EXPERIMENTS, "rendered"])

"""The learning bench: its settings are valid, its sums are paired, its goals are judged by the numbers, and a real run of a minute's part fits together."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("comfy.ldm.wan.model", reason="needs ComfyUI on the path")

from reward_lab.lora_train.config import TrainConfig  # noqa: E402
from reward_lab.pocket import learning, learning_experiments, learning_report  # noqa: E402

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
    assert todo[0] == ("base", 0) and ("base", 1) in todo and ("guarded-5x", 0) in todo and ("guarded-5x", 1) not in todo
    assert [seed for _, seed in todo] == sorted(seed for _, seed in todo)
    with pytest.raises(ValueError, match="unknown experiments best; known: base, reward-lab"):
        learning_experiments.plan([0], ["best"])


def _result(name, seed, shift, forwards=4500.0):
    values = {measure: [0.5 + shift, 0.7 + shift, 0.2 + shift] for measure in learning_report.MEASURES}
    curve = [{"step": step, "reward": step / 10} for step in range(1, 11)]
    run = {"forwards": forwards, "updates": 10, "curve": curve, "looks": {}, "reason": "stopped", "detail": ""}
    return {"experiment": name, "seed": seed, "oracle": values, **(run if name != "base" else {})}


def test_report_pairs_sums_and_judges(tmp_path, capsys):
    shifts = {"base": 0.0, "reward-lab": 0.12, "videox-fun-high": 0.05, "hy-video-prfl": -0.1}
    for name, shift in shifts.items():
        for seed in (0, 1):
            (tmp_path / f"{name}-{seed}.json").write_text(json.dumps(_result(name, seed, shift)), encoding="utf-8")
    learning_report.write(tmp_path, tmp_path / "out" / "learning.json", tmp_path / "out" / "learning.png")
    document = json.loads((tmp_path / "out" / "learning.json").read_text(encoding="utf-8"))
    ours = document["experiments"]["reward-lab"]
    assert ours["gain"]["text"]["mean"] == pytest.approx(0.12) and ours["gain"]["text"]["pairs"] == 6
    assert ours["gain"]["text"]["standard_error"] == pytest.approx(0, abs=1e-12)
    assert ours["reward_gain_per_1000_forwards"] == pytest.approx(0.12 / 4.5)
    met = {goal["goal"]: goal["met"] for goal in document["goals"]}
    assert met["reward gain per DiT forward at least twice that of the better published preset"]
    assert met["colour and shape right: 10 points above the base, and no preset above"]
    for direction in ("PRFL raises", "a reward of the first frame lowers"):
        assert not met[f"{direction} the dynamic degree (by two standard errors)"]
    assert (tmp_path / "out" / "learning.png").stat().st_size > 1000
    assert "missed   PRFL raises the dynamic degree (by two standard errors): -0.100" in capsys.readouterr().out


def test_report_without_base_says_so(tmp_path):
    with pytest.raises(ValueError, match="run the base first"):
        learning_report.write(tmp_path, tmp_path / "a.json", tmp_path / "a.png")


def test_a_run_is_trained_judged_and_not_repeated(pocket_models, repo, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(learning_experiments.EXPERIMENTS, "tiny", learning_experiments.Experiment(preset="reward-lab", budget=60.0, changes={"batch": 1}))
    monkeypatch.setattr(learning, "REAL_CLIPS", 2)
    arguments = ["--work", str(tmp_path), "--only", "base,tiny", "--seeds", "9", "--pairs", "2"]
    assert learning.main(arguments) == 0
    result = json.loads((tmp_path / "tiny-9.json").read_text(encoding="utf-8"))
    assert result["forwards"] >= 60 and result["curve"][-2]["forwards"] < 60 and len(result["oracle"]["reward"]) == 2
    assert 0 < result["oracle"]["pavrm"][0] < 1
    capsys.readouterr()
    assert learning.main(arguments) == 0 and capsys.readouterr().out == ""

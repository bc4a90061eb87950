"""What the training nodes make of their inputs and of a run's files; the worker itself is tested elsewhere."""

from __future__ import annotations

import json
import os
import queue
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("comfy.sd", reason="needs ComfyUI on the path")

import folder_paths  # noqa: E402
import torch  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

from reward_lab.host import prompt_files, training  # noqa: E402
from reward_lab.nodes.prompts import Prompts  # noqa: E402
from reward_lab.nodes.train import RunResult  # noqa: E402
from reward_lab.reward_models.spec import RewardModelSpec  # noqa: E402

pytestmark = pytest.mark.host

WAN_FILES = {
    "high": "/m/high.safetensors",
    "low": "/m/low.safetensors",
    "text_encoder": "/m/t5.safetensors",
    "vae": "/m/vae.safetensors",
    "weight_dtype": "default",
}
SETTINGS = {
    "name": "mine",
    "expert": "low",
    "preset": "reward-lab",
    "steps": 7,
    "rank": 4,
    "alpha": 2.0,
    "learning_rate": 1e-3,
    "batch": 2,
    "width": 64,
    "height": 64,
    "frames": 17,
    "sampling_steps": 12,
    "guidance": 3.0,
    "seed": 5,
    "advanced": "{}",
}


def config(**changes):
    spec = RewardModelSpec(kind="hpsv2.1", path="/m/hps.pt", options={"antialias": True})
    return training.make_config(WAN_FILES, [{"text": "a cat", "weight": 2.0}], spec, {**SETTINGS, **changes})


def test_held_out_prompts_are_looked_at_ten_times() -> None:
    held_out = [{"text": "a dog"}, {"text": "a fish", "weight": 3.0, "image": "/pictures/fish.png"}]
    made = config(steps=95, held_out=held_out)
    assert made.held_out.every == 9 and [(prompt.text, prompt.image) for prompt in made.held_out.prompts] == [("a dog", ""), ("a fish", "/pictures/fish.png")]
    assert config(steps=4, held_out=held_out, advanced='{"held_out": {"every": 2}}').held_out.every == 2
    assert config(held_out=[]).held_out == config().held_out and config().held_out.every == 0


def test_widgets_reach_the_config() -> None:
    made = config(advanced='{"objective": {"kl_weight": 0.5}, "checkpoint_every": 3}')
    assert (made.steps, made.lora.rank, made.lora.alpha, made.optimiser.lr, made.batch, made.seed) == (7, 4, 2.0, 1e-3, 2, 5)
    assert (made.video.width_px, made.video.frames, made.sampling.steps, made.sampling.guidance) == (64, 17, 12, 3.0)
    assert (made.objective.kl_weight, made.checkpoint_every, made.prompts[0].weight, made.models.vae) == (0.5, 3, 2.0, "/m/vae.safetensors")
    assert made.method == "one_pass" and config(preset="reward-lab-backprop").objective.mode == "x0" and config(preset="videox-fun").objective.mode == "chain"


@pytest.mark.parametrize(
    "changes", [{"advanced": "{"}, {"advanced": "[1]"}, {"advanced": '{"objectiv": {}}'}, {"frames": 16}, {"name": "../x"}, {"preset": "x"}]
)
def test_bad_settings_are_refused(changes: dict) -> None:
    with pytest.raises(ValueError):
        config(**changes)


def test_result_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, repo: Path, pocket_models: list[dict]) -> None:
    monkeypatch.setattr(folder_paths, "get_output_directory", lambda: str(tmp_path))
    monkeypatch.setattr(folder_paths, "get_temp_directory", lambda: str(tmp_path / "temp"))
    runs = training.store()
    run_id = runs.create(config())
    folder = runs.folder(run_id)
    with pytest.raises(ValueError, match="has written no LoRA yet"):
        training.run_result(run_id, False)
    step = {"event": "step", "time": 1.0, "steps": 2, "grad_norm": 1.0, "sigma": 0.5, "seconds": 1.0, "expert": "low"}
    lora = repo / "pocket" / "weights" / "Pocket-Wan2.2-Fun-A14B-low-noise-HPS2.1.safetensors"
    events = [{**step, "step": 1, "reward": 0.2, "loss": -0.2}, {**step, "step": 2, "reward": 0.3, "loss": None}]
    events.append({"event": "finished", "time": 2.0, "step": 2, "files": [str(lora)], "reason": "completed"})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    result = training.run_result(run_id, True)
    assert result.loss_map["reward"] == [0.2, 0.3] and result.loss_map["loss"][0] == -0.2 and result.files == {"low": lora}
    assert result.chart.shape[-1] == 3 and "finished, step 2 of 7" in result.message
    assert "diffusion_model.blocks.0.self_attn.q.lora_up.weight" in result.loras["low"] and "diffusion_model.time_projection.1.alpha" in result.loras["low"]
    assert len(result.loras["low"]) == len(load_file(lora))
    high, low, _, names, _ = RunResult.execute(run_id, False).args
    assert "does not train that one" in high.message and names == str(lora) and len(low) == len(result.loras["low"])
    (folder / "metrics.jsonl").write_text(json.dumps({"event": "failed", "time": 1.0, "error": "out of memory", "log_tail": [], "step": 1}) + "\n")
    (folder / "log.txt").write_text("one\nlast words\n")
    with pytest.raises(RuntimeError, match="out of memory\n.*\n*last words"):
        training.run_result(run_id, True)
    with pytest.raises(ValueError, match="no run id"):
        training.run_result("../x", False)


def test_both_experts_of_a_run_are_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder_paths, "get_output_directory", lambda: str(tmp_path / "out"))
    monkeypatch.setattr(folder_paths, "get_temp_directory", lambda: str(tmp_path / "temp"))
    runs = training.store()
    run_id = runs.create(config(expert="both", name="low_light-both"))
    checkpoints = runs.folder(run_id) / "checkpoints"
    checkpoints.mkdir()

    def save(step: int, expert: str) -> Path:
        path = checkpoints / f"low_light-both-{expert}-noise-HPS2.1-step{step:06d}.safetensors"
        save_file({f"lora_unet__blocks_0_self_attn_q.lora_{side}.weight": torch.full((2, 2), float(step)) for side in ("up", "down")}, path, {"expert": expert})
        os.utime(path, (step, step))
        return path

    files = {(step, expert): save(step, expert) for step in (2, 1) for expert in ("high", "low")}
    high, low, _, names, _ = RunResult.execute(run_id, False).args
    assert names.split("\n") == [str(files[2, "high"]), str(files[2, "low"])]
    for lora in (high, low):
        assert lora["diffusion_model.blocks.0.self_attn.q.lora_up.weight"].unique().tolist() == [2.0]
    (runs.folder(run_id) / "metrics.jsonl").write_text("nonsense\n")
    with pytest.raises(ValueError, match="cannot be read.*line 1 is not JSON"):
        training.run_result(run_id, True)


@pytest.mark.parametrize("experts", ["two", "none"])
def test_the_same_settings_are_not_trained_twice(experts: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder_paths, "get_output_directory", lambda: str(tmp_path / "out"))
    monkeypatch.setattr(training.preflight, "check", lambda *_: None)
    started = []
    monkeypatch.setattr(training.process, "start", lambda folder, *_: started.append(folder))
    monkeypatch.setattr(training, "_follow", lambda *_, **__: None)
    files = {**{role: str(tmp_path / role) for role in ("high", "low", "text_encoder", "vae", "hps")}, "weight_dtype": "default"}
    for role in ("high", "low", "text_encoder", "vae", "hps"):
        (tmp_path / role).write_bytes(b"x")
    if experts == "none":
        files["low"] = ""
    spec = RewardModelSpec(kind="hpsv2.1", path=files["hps"])
    monkeypatch.chdir(tmp_path)

    def start(**changes) -> str:
        return training.start_run(files, [{"text": "a cat"}], spec, {**SETTINGS, **changes}).run_id

    first = start()
    (tmp_path / "something").touch()  # the working folder is none of the files that were trained on
    assert start() == first and len(started) == 1, "it is starting"
    assert start(seed=6) != first and len(started) == 2
    folder = training.store().folder(first)
    (folder / "metrics.jsonl").write_text(json.dumps({"event": "failed", "time": 1.0, "error": "x", "log_tail": [], "step": 1}) + "\n")
    assert start() != first, "a failed run is no result"


def test_a_run_is_out_of_date_when_anything_that_it_reads_is_newer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder_paths, "get_output_directory", lambda: str(tmp_path / "out"))
    monkeypatch.setattr(training.preflight, "check", lambda *_: None)
    monkeypatch.setattr(training.process, "start", lambda *_: None)
    monkeypatch.setattr(training, "_follow", lambda *_, **__: None)
    files = {role: tmp_path / role for role in ("high", "low", "text_encoder", "vae", "hps", "judge", "pavrm", "generator", "image")}
    files["clips"] = tmp_path / "out" / "reward_lab" / "datasets" / "mine" / "dataset.json"
    files["clips"].parent.mkdir(parents=True)
    for file in files.values():
        file.write_bytes(b"x")
        os.utime(file, (1, 1))
    pavrm = {"kind": "pavrm", "path": str(files["pavrm"]), "options": {"generator": str(files["generator"])}}
    held_out = {"every": 2, "prompts": ["b"], "judge": {"kind": "mps", "path": str(files["judge"])}}
    advanced = {"real": {"path": "mine"}, "held_out": held_out, "one_pass": {"pavrm": pavrm}, "sample_prompts": [{"text": "c", "image": str(files["image"])}]}
    wan_files = {**{role: str(files[role]) for role in ("high", "low", "text_encoder", "vae")}, "weight_dtype": "default"}

    def start() -> str:
        settings = {**SETTINGS, "advanced": json.dumps({**advanced, "sample_every": 1})}
        return training.start_run(wan_files, [{"text": "a cat"}], RewardModelSpec(kind="hpsv2.1", path=str(files["hps"])), settings).run_id

    run_id = start()
    assert start() == run_id
    for name, file in files.items():
        os.utime(file, (2**32, 2**32))
        assert start() != run_id, name
        os.utime(file, (1, 1))


def test_names_in_advanced_are_looked_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder_paths, "get_output_directory", lambda: str(tmp_path / "out"))
    monkeypatch.setattr(folder_paths, "get_input_directory", lambda: str(tmp_path / "in"))
    monkeypatch.setattr(folder_paths, "get_folder_paths", lambda folder: [str(tmp_path / folder)])
    monkeypatch.setattr(folder_paths, "get_full_path", lambda folder, name: None if name == "absent" else str(tmp_path / folder / name))
    (tmp_path / "out" / "reward_lab" / "datasets" / "mine").mkdir(parents=True)
    (tmp_path / "in" / "clips").mkdir(parents=True)
    advanced = {
        "real": {"path": "mine"}, "output_folder": "loras/mine",
        "held_out": {"every": 2, "prompts": ["b"], "judge": {"kind": "mps", "path": "mps.pth"}},
        "one_pass": {"pavrm": {"kind": "pavrm", "path": "/whole/p.st", "options": {"generator": "wan.st"}}},
    }  # fmt: skip
    made = config(advanced=json.dumps(advanced))
    assert made.real.path == str(tmp_path / "out" / "reward_lab" / "datasets" / "mine") and made.output_folder == str(tmp_path / "out" / "loras" / "mine")
    assert made.held_out.judge.path == str(tmp_path / "reward_models" / "mps.pth")
    assert (made.one_pass.pavrm.path, made.one_pass.pavrm.options) == ("/whole/p.st", {"generator": str(tmp_path / "diffusion_models" / "wan.st")})
    assert config(advanced='{"real": {"path": "clips"}}').real.path == str(tmp_path / "in" / "clips")
    assert config(advanced='{"output_folder": ""}').output_folder == ""
    (tmp_path / "in" / "start.png").touch()
    shown = [{"text": "a", "image": "start.png"}, "b"]
    lists = {"sample_prompts": shown, "prompts": shown, "held_out": {"every": 2, "prompts": [{"text": "c", "image": "start.png"}]}}
    looked = config(preset="reward-lab-backprop", advanced=json.dumps(lists))
    images = [prompt.image for prompt in (*looked.sample_prompts, *looked.prompts, *looked.held_out.prompts)]
    assert images == [str(tmp_path / "in" / "start.png"), "", str(tmp_path / "in" / "start.png"), "", str(tmp_path / "in" / "start.png")]
    advanced["held_out"]["judge"]["path"] = "absent"
    with pytest.raises(ValueError, match="held_out.judge.path: 'absent' is not among the reward_models files"):
        config(advanced=json.dumps(advanced))


def test_a_long_step_may_end_before_a_stop_becomes_a_kill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder_paths, "get_output_directory", lambda: str(tmp_path / "out"))
    graces_s = queue.Queue()
    monkeypatch.setattr(training.process, "stop", lambda folder, worker, grace_s: graces_s.put(grace_s))
    run_id = training.store().create(config())
    training.stop_run(run_id)
    assert graces_s.get(timeout=10) == training.STOP_GRACE_S
    step = {"event": "step", "time": 1.0, "step": 1, "reward": 0.2, "seconds": 255.0}
    (training.store().folder(run_id) / "metrics.jsonl").write_text(json.dumps(step) + "\n")
    training.stop_run(run_id)
    assert graces_s.get(timeout=10) == 255.0 * training.STOP_GRACE_STEPS
    assert (training.store().folder(run_id) / "stop").exists()


def test_lora_fits_the_hosts_own_loader(shared_fixtures: Path) -> None:
    import comfy.lora
    import comfy.sd

    folder = shared_fixtures / "videoxfun_lora"
    model = comfy.sd.load_diffusion_model(str(folder / "base_low.safetensors"), model_options={"dtype": torch.float32})
    lora = training.host_lora(folder / "Wan2.2-Fun-A14B-InP-low-noise-HPS2.1.safetensors")
    patches = comfy.lora.load_lora(lora, comfy.lora.model_lora_keys_unet(model.model, {}))
    assert len(patches) == 30


def test_prompts_from_text_and_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder_paths, "get_input_directory", lambda: str(tmp_path))
    (tmp_path / "set.txt").write_bytes("\ufeffa dog\r\n\r\na cat\r\n".encode())
    prompts, count, held_out = Prompts.execute("a cat\n", "set.txt").args
    both = [{"text": "a cat", "weight": 2.0, "image": ""}, {"text": "a dog", "weight": 1.0, "image": ""}]
    assert (prompts, count, held_out) == (both, 2, [])
    prompts, count, held_out = Prompts.execute("a cat\n", "set.txt", 0.5, 0).args
    assert count == 1 and sorted([*prompts, *held_out], key=lambda prompt: prompt["text"]) == both
    (tmp_path / "empty.txt").write_text("\n\n")
    (tmp_path / "long.txt").write_text("a" * 10_000_000)
    for file, message in (
        ("empty.txt", "empty|no prompt|nothing"),
        ("long.txt", "characters"),
        ("absent.txt", "does not exist"),
        ("../x.txt", "leaves the input"),
    ):
        with pytest.raises(ValueError, match=message):
            Prompts.execute("", file)
    with pytest.raises(ValueError, match="There are no prompts"):
        Prompts.execute(" \n", "")
    before = prompt_files.fingerprint("", "set.txt")
    (tmp_path / "set.txt").write_text("another")
    assert prompt_files.fingerprint("", "set.txt") != before


def test_non_finite_numbers_do_not_break_the_chart(tmp_path: Path) -> None:
    from reward_lab.host import score_pictures

    assert score_pictures.plot_run([{"reward": None, "loss": None}] * 3, "x").shape[0] == 1
    save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors")
    assert training.host_lora(tmp_path / "x.safetensors") == {}

"""What an update does with gradients: one per window of micro-batches, clipped, averaged; a full disk; seeds."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from reward_lab.lora_train import checkpoint, objectives, run, safetensors_file
from reward_lab.lora_train.evaluation import evaluate
from reward_lab.lora_train.lora.keys import from_file_tensors
from reward_lab.lora_train.lora.linears import install

OBJECTIVE = {"mode": "x0", "strategy": "random", "decode": "all"}


def _train(toy, folder, watch=None, **changes):
    config = toy.config(expert="low", objective=OBJECTIVE, **changes)
    parts, seen = toy.parts(config), []
    toy.events.clear()
    new_trainee = run._new_trainee

    def watched(*arguments):
        trainee = new_trainee(*arguments)
        step = trainee.optimiser.step

        def stepped():
            seen.append([parameter.grad.clone() for parameter in trainee.adapter.parameters()])
            step()
            if watch:
                watch(trainee)

        trainee.optimiser.step = stepped
        return trainee

    run._new_trainee = watched
    try:
        run.train(config, parts, objectives.create(config, parts), folder, resume=folder.exists())
    finally:
        run._new_trainee = new_trainee
    return config, seen


def test_a_window_of_micro_batches_is_one_update_with_their_mean_gradient(toy, tmp_path):
    """Three micro-batches of two: the mean of their gradients, and one step of the optimiser."""
    changes = {"steps": 2, "batch": 2, "optimiser": {"lr": 1e-2, "accumulate": 3, "clip_norm": 0.0}}
    config, seen = _train(toy, tmp_path / "window", **changes)
    assert len(seen) == 2
    parts = toy.parts(config)
    objective = objectives.create(config, parts)
    from contextlib import ExitStack

    with ExitStack() as stack:
        trainee = run._new_trainee(config, parts, "low", stack)
        singles = []
        for micro in range(3):
            objective.add_gradient(trainee, 1, micro)
            singles.append([parameter.grad * 3 for parameter in trainee.adapter.parameters()])
            trainee.optimiser.zero_grad(set_to_none=True)
    for window, *parts_of_it in zip(seen[0], *singles, strict=True):
        torch.testing.assert_close(window, sum(parts_of_it) / 3, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("kind", ["adamw", "adafactor"])
def test_clipping_really_clips(toy, tmp_path, kind):
    """The norm that is reported is that before; the one that the optimiser sees is at most the limit, with the same direction."""
    limit = 1e-3
    _, free = _train(toy, tmp_path / "free", steps=1, optimiser={"kind": kind, "clip_norm": 0.0})
    _, clipped = _train(toy, tmp_path / "clipped", steps=1, optimiser={"kind": kind, "clip_norm": limit})
    (event,) = [event for event in toy.events if event.name == "step"]
    whole, cut = (torch.cat([gradient.flatten() for gradient in seen[0]]) for seen in (free, clipped))
    assert event.grad_norm == pytest.approx(float(whole.norm()), rel=1e-5) and event.grad_norm > 10 * limit
    assert float(cut.norm()) == pytest.approx(limit, rel=1e-3)
    assert float(torch.nn.functional.cosine_similarity(whole, cut, dim=0)) == pytest.approx(1.0, abs=1e-6)


def test_what_is_saved_is_the_moving_average(toy, tmp_path):
    masters = []

    def watch(trainee):
        masters.append({name: tensor.clone() for name, tensor in trainee.adapter.tensors().items()})
        if len(masters) == 1:
            first.update({name: tensor.clone() for name, tensor in trainee.average.items()})

    first: dict = {}
    config, _ = _train(toy, tmp_path / "run", watch, steps=4, optimiser={"lr": 1e-2, "ema_decay": 0.7})
    expected = first  # before the first move: the weights at the start
    for weights in masters:
        expected = {name: 0.7 * tensor + 0.3 * weights[name] for name, tensor in expected.items()}
    saved = load_file(tmp_path / "run" / checkpoint.lora_file_name(config, "low"))
    key = "lora_unet__blocks_0_self_attn_q.lora_up.weight"
    torch.testing.assert_close(saved[key], expected["blocks.0.self_attn.q.up"], rtol=1e-5, atol=1e-8)
    assert not torch.allclose(saved[key], masters[-1]["blocks.0.self_attn.q.up"], rtol=1e-3)


def test_looks_see_the_moving_average_and_training_does_not(toy, tmp_path):
    """The last look's reward is that of the saved file; the updates are those of a run without looks."""
    average = {"optimiser": {"lr": 5e-2, "ema_decay": 0.9}, "steps": 4}
    config, _ = _train(toy, tmp_path / "run", held_out={"every": 2, "prompts": ["x", "a red square"]}, **average)
    told = [event.held_out for event in toy.events if event.name == "step"][-1]
    parts = toy.parts(config)
    linears = parts.experts.backbones["low"].linears()
    adapter = from_file_tensors(load_file(tmp_path / "run" / checkpoint.lora_file_name(config, "low")), linears)
    with install(linears, adapter) as switch:
        trainee = SimpleNamespace(switch=switch)
        assert evaluate(config, parts, {"low": trainee}).mean == pytest.approx(told, rel=1e-5)
    _train(toy, tmp_path / "plain", **average)
    name = checkpoint.lora_file_name(config, "low")
    one, other = (load_file(tmp_path / folder / name) for folder in ("run", "plain"))
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_the_seed_decides_everything(toy, tmp_path):
    files = []
    for name, seed in (("one", 1), ("again", 1), ("other", 2)):
        config, _ = _train(toy, tmp_path / name, steps=2, seed=seed)
        files.append(load_file(tmp_path / name / checkpoint.lora_file_name(config, "low")))
    assert all(torch.equal(files[0][key], files[1][key]) for key in files[0])
    assert not all(torch.equal(files[0][key], files[2][key]) for key in files[0])


def test_a_full_disk_keeps_the_checkpoint_before_and_goes_on_from_it(toy, tmp_path, monkeypatch):
    """The write of the second checkpoint runs out of space: its LoRA first, then (another run) its state."""
    _train(toy, tmp_path / "whole", steps=4, checkpoint_every=1, keep_checkpoints=1)
    real = safetensors_file.os.fsync
    for fails_at in (3, 4):
        calls, folder = [], tmp_path / f"full-{fails_at}"

        def fsync(number, calls=calls, fails_at=fails_at):
            calls.append(number)
            if len(calls) == fails_at:
                raise OSError(28, "No space left on device")
            real(number)

        monkeypatch.setattr(safetensors_file.os, "fsync", fsync)
        with pytest.raises(OSError, match="No space"):
            _train(toy, folder, steps=4, checkpoint_every=1, keep_checkpoints=1)
        assert [path.name for path in checkpoint.states(folder)] == ["step-000001.state.safetensors"]
        assert not list(folder.rglob("*.partial")), "there is room again"
        config, _ = _train(toy, folder, steps=4, checkpoint_every=1, keep_checkpoints=1)
        for name in (checkpoint.lora_file_name(config, "low"), "checkpoints/step-000004.state.safetensors"):
            assert (folder / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
        assert not list(folder.rglob("*.partial"))


def test_an_output_folder_that_fails_at_the_end_costs_nothing(toy, tmp_path):
    """It could be written to when the run began."""
    (tmp_path / "loras").write_text("a file in the folder's place")
    config, _ = _train(toy, tmp_path / "run", steps=1, output_folder=str(tmp_path / "loras"))
    finished, own = toy.events[-1], tmp_path / "run" / checkpoint.lora_file_name(config, "low")
    assert (finished.name, finished.files) == ("finished", [str(own)]) and load_file(own)
    assert f"Not everything could be written to output_folder {tmp_path / 'loras'} (File exists); copy the files from the run's folder." in finished.detail

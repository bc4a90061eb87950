"""PAVRM training on the host's WanModel: recorded losses and gradients, a whole run through the real worker, resuming, what is refused.

Tolerances of recorded numbers are those of the fixtures' README.
"""

from __future__ import annotations

import json
import random
import sys
import time

import pytest

pytest.importorskip("torch")
pytest.importorskip("comfy.ldm.wan.model", reason="needs ComfyUI on the path")

import numpy as np  # noqa: E402
import torch  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

from reward_lab.host import datasets, pavrm, pavrm_training, pavrm_worker  # noqa: E402
from reward_lab.host.training_mode import training_mode  # noqa: E402
from reward_lab.lora_train import checkpoint, safetensors_file  # noqa: E402
from reward_lab.lora_train.objectives.pavrm import PavrmObjective, bt_loss, ce_loss, noised  # noqa: E402
from reward_lab.lora_train.pavrm_config import PavrmConfig  # noqa: E402
from reward_lab.lora_train.pavrm_data import Draws  # noqa: E402
from reward_lab.lora_train.pavrm_run import PavrmParts, train  # noqa: E402
from reward_lab.lora_train.run import NonFiniteError  # noqa: E402
from reward_lab.runs import process  # noqa: E402
from reward_lab.runs.store import RunStore  # noqa: E402

pytestmark = pytest.mark.host
TIMEOUT_S = 300
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(shared_fixtures):
    return shared_fixtures / "pavrm"


@pytest.fixture(scope="module")
def recorded(folder):
    """The recorded PAVRM as something to train."""
    return pavrm_training.load(_recorded_config(folder), device=CPU, autocast=torch.float32)


def _recorded_config(folder, **changes):
    values = {
        "models": {
            "trunk": str(folder / "checkpoints" / "checkpoint-100"),
            "query": str(folder / "mlp" / "query_attention_step_100.ckpt"),
            "head": str(folder / "mlp" / "mlp_step_100.ckpt"),
        },
        "data": {"source": str(folder / "labels" / "temp_data" / "temp_data_480.list"), "missing": "bad", "validation_share": 0.0},
        "shape": {"head": "file"},
    }
    return PavrmConfig.from_dict({**values, **changes})


@pytest.fixture
def pocket_data(tmp_path, repo):
    """Sixteen random latents as HY-Video-PRFL's folder; the bad ones are turned upside down in one channel, so there is something to learn."""
    generator = torch.Generator().manual_seed(3)
    lines = []
    for index in range(16):
        name, good = f"video{index:02d}", index % 2 == 0
        latent = torch.randn(1, 16, 2, 4, 4, generator=generator) * 0.3 + (1.0 if good else -1.0)
        np.save(tmp_path / f"{name}.npy", latent.numpy())
        np.save(tmp_path / f"{name}_text.npy", torch.randn(1, 5, 128, generator=generator).numpy())
        meta = {"source_id": name, "caption": "a thing", "vae_latent_path": f"{name}.npy", "textshort_path": f"{name}_text.npy", "motion_quality": int(good)}
        (tmp_path / f"{name}_meta_v1.json").write_text(json.dumps(meta))
        lines.append(f"{name}_meta_v1.json")
    (tmp_path / "all.list").write_text("\n".join(lines))
    return tmp_path / "all.list"


def _pocket(repo, pocket_data, **changes):
    values = {
        "kind": "pavrm",
        "name": "tiny",
        "models": {"trunk": str(repo / "pocket" / "weights" / "pocket_wan2.2_t2v_low_noise_14B.safetensors")},
        "data": {"source": str(pocket_data), "validation_share": 0.3},
        "shape": {"blocks": 2},
        "optimiser": {"block_lr": 1e-4, "head_lr": 1e-3, "accumulate": 2, "ema_decay": 0.5, "warmup": 2},
        "sigma": {"kind": "uniform", "high": 0.8},
        "steps": 4, "batch": 2, "validate_every": 2, "checkpoint_every": 1, "gradient_checkpointing": False, "save_upstream": True,
    }  # fmt: skip
    for key, value in changes.items():
        values[key] = {**values[key], **value} if isinstance(value, dict) and isinstance(values.get(key), dict) else value
    return PavrmConfig.from_dict(values)


def _parts(config, events, **changes):
    model = pavrm_training.load(config, device=CPU, autocast=torch.float32)
    wiring = {
        "scorer": model, "learnable": pavrm_worker.learnable_of(config), "sink": events.append, "stop_requested": lambda: False, "clock": lambda: 0.0,
        "write": lambda target, step: model.write(target, step, name=config.name),
    }  # fmt: skip
    return PavrmParts(**{**wiring, **changes})


def relative(got, wanted):
    return float((got - wanted).norm() / wanted.norm())


def test_recorded_training_numbers(folder, recorded):
    """Noise, logit, reward, loss and gradients of one training step on HY-Video-PRFL's two labelled samples."""
    expected = load_file(folder / "labels" / "expected.safetensors")
    dataset = datasets.read(folder / "labels" / "temp_data" / "temp_data_480.list")
    learnable = pavrm_worker.learnable_of(_recorded_config(folder))
    sigma, timestep = float(expected["sigma"]), expected["timestep"]
    assert int(sigma * 1000) == int(timestep)
    names = {"queries": "query_attention.queries", "fc3.weight": "mlp.fc3.weight", "blocks.0.self_attn.q.weight": "trunk.blocks.0.self_attn.q.weight"}
    parameters = {**recorded.groups()["blocks"], **recorded.groups()["head"]}
    logits = []
    for index, (sample, example) in enumerate(zip(dataset.samples, learnable.train, strict=True)):
        video = sample.read()
        noisy = noised(video.latent_CFHW, expected["noise"][0], sigma)
        assert relative(noisy, expected[f"sample{index}.noisy_latent"][0]) < 1e-5
        with training_mode():
            logit_B = recorded.logits(noisy[None], timestep, [video], ["short"])
            loss = ce_loss(logit_B, torch.tensor([float(example.label)])).sum()
            gradients = torch.autograd.grad(loss, [parameters[name] for name in names.values()])
        assert example.label == int(expected[f"sample{index}.label"])
        assert logit_B.item() == pytest.approx(expected[f"sample{index}.logit"].item(), abs=1e-3)
        assert logit_B.sigmoid().item() == pytest.approx(expected[f"sample{index}.reward"].item(), abs=2e-4)
        assert loss.item() == pytest.approx(expected[f"sample{index}.ce_loss"].item(), abs=2e-4)
        for name, gradient in zip(names, gradients, strict=True):
            assert relative(gradient, expected[f"sample{index}.ce_grad.{name}"].reshape(gradient.shape)) < 5e-4
        logits.append(logit_B.detach())
    assert bt_loss(*logits).item() == pytest.approx(expected["bt_loss_first_wins"].item(), abs=2e-4)


def test_accumulation_batches_and_checkpointing_change_no_gradient(repo, pocket_data):
    """One window of two micro-batches of two has the gradient of one batch of four; so has one with blocks run again. Only summation orders differ."""
    found = []
    for changes in ({"batch": 4, "optimiser": {"accumulate": 1}}, {}, {"gradient_checkpointing": True}):
        config = _pocket(repo, pocket_data, **changes)
        model = pavrm_training.load(config, device=CPU, autocast=torch.float32)
        objective = PavrmObjective(config, model, Draws(pavrm_worker.learnable_of(config), config.data, config.seed))
        with training_mode():
            for micro in range(config.optimiser.accumulate):
                objective.add_gradient(1, micro)
        found.append(torch.cat([parameter.grad.flatten() for group in model.groups().values() for parameter in group.values()]))
    assert relative(found[1], found[0]) < 1e-5 and torch.equal(found[2], found[1])


def test_clipping_takes_everything_in(repo, pocket_data):
    config = _pocket(repo, pocket_data, optimiser={"clip_norm": 1e-3})
    parts = _parts(config, [])
    from reward_lab.lora_train.pavrm_trainee import new_trainee

    trainee = new_trainee(parts.scorer.groups(), config.optimiser)
    with training_mode():
        PavrmObjective(config, parts.scorer, Draws(parts.learnable, config.data, 0)).add_gradient(1, 0)
    kept = []
    trainee.optimiser.step = lambda: kept.append(torch.cat([parameter.grad.flatten() for parameter in trainee.parameters.values()]).norm())
    assert trainee.update(1) > 1e-3 and float(kept[0]) == pytest.approx(1e-3, rel=1e-3)
    rates = [group["lr"] for group in trainee.optimiser.param_groups]
    assert rates == [pytest.approx(0.5e-4), pytest.approx(0.5e-3)]


@pytest.mark.parametrize("loss", ["ce", "bt", "both"])
def test_it_learns_and_what_is_saved_is_what_was_validated(repo, pocket_data, tmp_path, loss):
    config = _pocket(repo, pocket_data, loss=loss, steps=12, validate_every=12, optimiser={"block_lr": 3e-4, "head_lr": 3e-3, "accumulate": 1}, batch=4)
    events = []
    with training_mode():
        train(config, _parts(config, events), tmp_path / "run")
    steps = [event for event in events if event.name == "step"]
    assert steps[-1].held_out > 0.9 and steps[-1].loss < steps[0].loss / 2
    report = json.loads((tmp_path / "run" / "samples" / "validation-000012.json").read_text())
    assert len(report["buckets"]) == 5 and all(row["count"] and row["auc"] == 1.0 for row in report["buckets"][:3])
    assert sum(entry["count"] for entry in report["calibration"]) == 5 * len(report["videos"]) and report["calibration_error"] < 0.6
    scorer = pavrm.load(tmp_path / "run" / "tiny.safetensors")
    video = next(sample for sample in datasets.read(pocket_data).samples if sample.id == report["videos"][0]["id"]).read()
    with training_mode():
        logit = scorer.score(video.latent_CFHW[None], torch.tensor([100]), [video.texts_PD["short"]]).logit
    assert (logit.item() > report["all"]["best_threshold"]) == (report["videos"][0]["label"] == 1)


def test_an_optimiser_for_matrices_only_is_refused(repo, pocket_data):
    with pytest.raises(ValueError, match="optimiser.kind is 'muon', but it must be one of: adamw, adamw8bit, adafactor"):
        _pocket(repo, pocket_data, optimiser={"kind": "muon"})
    falling = {"optimiser": {"schedule": "linear"}}
    assert _pocket(repo, pocket_data, steps=5).digest() == _pocket(repo, pocket_data, steps=6).digest()
    assert _pocket(repo, pocket_data, steps=5, **falling).digest() != _pocket(repo, pocket_data, steps=6, **falling).digest()


def test_both_file_forms_score_alike(repo, pocket_data, tmp_path):
    model = pavrm_training.load(_pocket(repo, pocket_data), device=CPU, autocast=torch.float32)
    single, *_ = model.write(tmp_path, 7, name="x", with_upstream=False)
    files = pavrm_training.write_upstream(model, tmp_path / "hy", 7, part_bytes=1_000_000)
    assert sum(path.name.startswith("diffusion_pytorch_model-0000") for path in files) > 2
    video = datasets.read(pocket_data).samples[0].read()
    trunk, heads = tmp_path / "hy" / "checkpoints" / "checkpoint-7", tmp_path / "hy" / "mlp"
    loaded = [pavrm.load(single), pavrm.load(trunk, heads / "query_attention_step_7.ckpt", heads / "mlp_step_7.ckpt")]
    with training_mode():
        logits = [scorer.score(video.latent_CFHW[None], torch.tensor([300]), [video.texts_PD["short"]]).logit.item() for scorer in loaded]
        own = model.logits(video.latent_CFHW[None], torch.tensor([300]), [video], ["short"]).item()
    # Weights read from a file lie elsewhere in memory, for which the matrix library may sum in another order.
    assert logits == pytest.approx([own, own], abs=1e-6)
    mean = pavrm_training.load(_pocket(repo, pocket_data, shape={"pooling": "mean"}, save_upstream=False), device=CPU, autocast=torch.float32)
    mean.write(tmp_path, 1, name="mean")
    with training_mode():
        got = pavrm.load(tmp_path / "mean.safetensors").score(video.latent_CFHW[None], torch.tensor([300]), [video.texts_PD["short"]]).logit.item()
        assert got == pytest.approx(mean.logits(video.latent_CFHW[None], torch.tensor([300]), [video], ["short"]).item(), abs=1e-6)


@pytest.mark.parametrize("rule", [{}, {"kind": "adafactor", "schedule": "cosine", "final_lr": 0.1, "accumulate": 2, "warmup": 2, "ema_decay": 0.9}])
def test_resuming_gives_the_same_bytes(repo, pocket_data, tmp_path, rule):
    """Stopped after any update; with accumulation, moving average, warm-up and pairs."""
    config = _pocket(repo, pocket_data, loss="both", validate_every=0, **({"optimiser": rule} if rule else {}))
    with training_mode():
        train(config, _parts(config, []), tmp_path / "whole")
        for stop_after in random.Random(0).sample(range(1, config.steps), 2):
            events = []
            stop = _parts(config, events, stop_requested=lambda: sum(event.name == "step" for event in events) >= stop_after)  # noqa: B023
            assert train(config, stop, tmp_path / f"cut{stop_after}").reason == "stopped"
            train(config, _parts(config, []), tmp_path / f"cut{stop_after}", resume=True)
            for name in ("tiny.safetensors", "checkpoints/step-000004.state.safetensors"):
                assert (tmp_path / f"cut{stop_after}" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_nan_stops_and_keeps_the_checkpoint(repo, pocket_data, tmp_path):
    config = _pocket(repo, pocket_data, validate_every=0)
    events = []
    parts = _parts(config, events)

    def poison(event):
        events.append(event)
        if event.name == "step" and event.step == 2:
            with torch.no_grad():
                next(iter(parts.scorer.groups()["head"].values())).fill_(torch.nan)

    poisoned = PavrmParts(**{**vars(parts), "sink": poison})
    with training_mode(), pytest.raises(NonFiniteError, match=r"step 3 at mean sigma 0\.\d+: loss nan.*last three batch accuracies: .*checkpoint is good"):
        train(config, poisoned, tmp_path / "run")
    state = load_file(checkpoint.states(tmp_path / "run")[0])
    assert all(bool(value.isfinite().all()) for value in state.values())


def test_what_the_last_checkpoint_learned_can_be_used_after_a_failure(repo, pocket_data, tmp_path):
    """Whatever failed, here the reading of a video; the file has the bytes of a run of that many updates."""
    config = _pocket(repo, pocket_data, validate_every=0, checkpoint_every=2, save_upstream=False)
    events = []
    parts = _parts(config, events)
    with training_mode():
        parts.scorer.logits, plain = lambda *given: plain(*given) if sum(event.name == "step" for event in events) < 3 else 1 / 0, parts.scorer.logits
        with pytest.raises(ZeroDivisionError):
            train(config, parts, tmp_path / "run")
        two = _pocket(repo, pocket_data, validate_every=0, checkpoint_every=2, save_upstream=False, steps=2)
        train(two, _parts(two, []), tmp_path / "two")
    assert (tmp_path / "run" / "tiny.safetensors").read_bytes() == (tmp_path / "two" / "tiny.safetensors").read_bytes()


def test_a_full_disk_keeps_the_checkpoint_before(repo, pocket_data, tmp_path, monkeypatch):
    config = _pocket(repo, pocket_data, validate_every=0, keep_checkpoints=1)
    real, calls = safetensors_file.os.fsync, []

    def fsync(number):
        calls.append(number)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")
        real(number)

    monkeypatch.setattr(safetensors_file.os, "fsync", fsync)
    with training_mode():
        with pytest.raises(OSError, match="No space"):
            train(config, _parts(config, []), tmp_path / "run")
        assert [path.name for path in checkpoint.states(tmp_path / "run")] == ["step-000002.state.safetensors"]
        train(config, _parts(config, []), tmp_path / "run", resume=True)
        train(config, _parts(config, []), tmp_path / "whole")
    assert (tmp_path / "run" / "tiny.safetensors").read_bytes() == (tmp_path / "whole" / "tiny.safetensors").read_bytes()
    assert not list((tmp_path / "run").rglob("*.partial"))


def test_a_run_through_the_worker(repo, pocket_data, comfyui, tmp_path):
    store = RunStore(tmp_path / "runs")
    run_id = store.create(_pocket(repo, pocket_data, output_folder=str(tmp_path / "models")))
    worker = process.start(store.folder(run_id), comfyui, sys.executable, niceness=0, environment={"CUDA_VISIBLE_DEVICES": ""})
    assert worker.wait(TIMEOUT_S) == 0, store.log_tail(run_id, 40)
    info, names = store.get(run_id), [event["event"] for event in store.events(run_id)]
    assert info.state == "finished" and info.held_out is not None and info.reward_kind == "pavrm"
    assert names[0] == "started" and names.count("step") == 4 and names.count("checkpoint") == 4 and names.count("sample") == 3
    assert (tmp_path / "models" / "tiny.safetensors").is_file() and (store.folder(run_id) / "tiny-hy" / "mlp" / "mlp_step_4.ckpt").is_file()
    picture = store.folder(run_id) / info.samples[0]
    assert picture.name == "validation-000004.png" and picture.stat().st_size > 5000
    assert "left out" not in "\n".join(store.log_tail(run_id, 40)) and "8 good, 8 bad" in "\n".join(store.log_tail(run_id, 40))


def test_a_killed_worker_resumes_to_the_same_bytes(repo, pocket_data, comfyui, tmp_path):
    """SIGKILL at whatever it is doing after its first checkpoint; the two runs differ in their number of steps, which may change."""
    store = RunStore(tmp_path / "runs")
    config = _pocket(repo, pocket_data, validate_every=0, save_upstream=False)
    started = []

    def launch(run_id, **options):
        started.append(process.start(store.folder(run_id), comfyui, sys.executable, niceness=0, environment={"CUDA_VISIBLE_DEVICES": ""}, **options))
        return started[-1]

    try:
        whole = store.create(config)
        assert launch(whole).wait(TIMEOUT_S) == 0, store.log_tail(whole, 40)
        run_id = store.create(_pocket(repo, pocket_data, validate_every=0, save_upstream=False, steps=1000, keep_checkpoints=40))
        worker, deadline = launch(run_id), time.monotonic() + TIMEOUT_S
        while not any(event["event"] == "checkpoint" for event in store.events(run_id)):
            assert worker.poll() is None and time.monotonic() < deadline, store.log_tail(run_id, 40)
            time.sleep(0.05)
        worker.kill()
        worker.wait()
        folder = store.folder(run_id)
        for state in checkpoint.states(folder)[config.steps - 1 :]:
            state.unlink()
        (folder / "config.json").write_text(json.dumps(config.to_dict()))
        assert launch(run_id, resume=True).wait(TIMEOUT_S) == 0, store.log_tail(run_id, 40)
        for name in ("tiny.safetensors", "checkpoints/step-000004.state.safetensors"):
            assert (folder / name).read_bytes() == (store.folder(whole) / name).read_bytes()
        assert [event["step"] for event in store.events(run_id) if event["event"] == "step"] == [1, 2, 3, 4]
    finally:
        for worker in started:
            if worker.poll() is None:
                worker.kill()
            worker.wait()


def _relabel(pocket_data, change):
    for path in pocket_data.parent.glob("*_meta_v1.json"):
        path.write_text(json.dumps(change(json.loads(path.read_text()))))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda meta: {**meta, "motion_quality": 1}, r"holds \d+ good and 0 bad videos for motion_quality"),
        (lambda meta: {key: value for key, value in meta.items() if key != "motion_quality"}, "holds 0 good and 0 bad"),
        (lambda meta: {**meta, "motion_quality": "meh"}, "a label is 1 or 'good'"),
        (lambda meta: {**meta, "vae_latent_path": "gone.npy"}, "does not exist"),
        (lambda meta: {**meta, "textshort_path": None}, "names no latent or no text"),
    ],
)
def test_bad_datasets(repo, pocket_data, change, message):
    _relabel(pocket_data, change)
    with pytest.raises(ValueError, match=message):
        pavrm_worker.learnable_of(_pocket(repo, pocket_data))


def test_another_width_is_refused_before_training(repo, folder, pocket_data, tmp_path):
    """Text of another encoder, a head of another trunk, a latent of another VAE."""
    foreign = _recorded_config(folder)
    model = pavrm_training.load(_pocket(repo, pocket_data), device=CPU, autocast=torch.float32)
    with training_mode(), pytest.raises(ValueError, match="tokens of width 128"):
        pavrm_worker.check_fit(foreign, model, pavrm_worker.learnable_of(foreign))
    own = _pocket(repo, pocket_data).to_dict()
    models = {**foreign.to_dict()["models"], "trunk": own["models"]["trunk"]}
    mixed = PavrmConfig.from_dict({**own, "models": models, "shape": {"head": "file", "blocks": 2}})
    with pytest.raises(ValueError, match="head reads features of width 96.*is 160 wide"):
        pavrm_training.load(mixed, device=CPU, autocast=torch.float32)
    for path in pocket_data.parent.glob("video??.npy"):
        np.save(path, np.zeros((1, 12, 2, 4, 4), np.float32))
    with pytest.raises(ValueError, match=r"shape \[12, 2, 4, 4\]; latents of Wan VAEs are \[16 or 48, F, H, W\]"):
        datasets.read(pocket_data)
    with pytest.raises(ValueError, match="train_blocks is 9"):
        pavrm_training.load(_pocket(repo, pocket_data, shape={"train_blocks": 9}), device=CPU, autocast=torch.float32)


def test_pairs_and_losers(repo, pocket_data, tmp_path):
    pairs = tmp_path / "pairs.jsonl"
    rows = [(f"video{good:02d}", f"video{bad:02d}", 1.0) for good in range(0, 16, 2) for bad in range(1, 16, 2)] + [("video00", "nobody", 1.0)]
    pairs.write_text("".join(json.dumps({"winner": winner, "loser": loser, "share": share}) + "\n" for winner, loser, share in rows))
    learnable = pavrm_worker.learnable_of(_pocket(repo, pocket_data, loss="bt", data={"pairs": str(pairs), "validation_share": 0.5}))
    held = {pair.winner.id for pair in learnable.held_out_pairs} | {pair.loser.id for pair in learnable.held_out_pairs}
    trained = {pair.winner.id for pair in learnable.given_pairs} | {pair.loser.id for pair in learnable.given_pairs}
    assert trained and not held & trained
    assert any("1 pairs name videos that the dataset lacks" in note for note in learnable.notes)
    losers = pocket_data.with_name("losers.list")
    lines = pocket_data.read_text().splitlines()
    losers.write_text("\n".join(lines[1::2]))
    pocket_data.write_text("\n".join(lines[::2]))
    learnable = pavrm_worker.learnable_of(_pocket(repo, pocket_data, loss="bt", data={"losers": str(losers), "validation_share": 0.0}))
    config = _pocket(repo, pocket_data, loss="bt")
    drawn = Draws(learnable, config.data, 0).pairs(0, 16)
    assert all(int(pair.winner.id[-2:]) % 2 == 0 and int(pair.loser.id[-2:]) % 2 == 1 for pair in drawn) and len({pair.loser.id for pair in drawn}) > 3
    pairs.write_text('{"winner": "a"}\n')
    with pytest.raises(ValueError, match="line 1 is no pair"):
        pavrm_worker.read_pairs(pairs)


def test_the_split_stays_when_the_dataset_grows(pocket_data):
    from reward_lab.lora_train.pavrm_data import split

    samples = datasets.read(pocket_data).samples
    before, after = split(samples[:10], 0.3, 1)[1], split(samples, 0.3, 1)[1]
    assert before <= after and split(samples, 0.3, 2)[1] != after

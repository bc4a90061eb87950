"""The card's memory ends in a step: nothing of the first try stays, the second gives the same bytes, and what cannot go on ends in order."""

from __future__ import annotations

import errno
import json
import re
from contextlib import ExitStack

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

from reward_lab.lora_train import checkpoint, objectives, optimisers, run
from reward_lab.lora_train.planning import choose
from reward_lab.lora_train.planning.memory import gpu_bytes, host_bytes
from reward_lab.lora_train.planning.memory_plan import job_of
from reward_lab.lora_train.planning.shapes import named_shape
from reward_lab.lora_train.protocols import Shrunk
from reward_lab.lora_train.recovery import CardFullError, DamagedError, explain
from reward_lab.lora_train.trainee import Trainee

SMALLER = Shrunk(changes="resident_blocks 40 -> 0", masters_on=torch.device("cpu"))


class Failing:
    """An objective that raises after some of its calls, when their gradient is in the parameters already."""

    def __init__(self, inner, at, error=torch.OutOfMemoryError):
        self.inner, self.at, self.error, self.calls = inner, at, error, 0

    def add_gradient(self, trainee, step, micro):
        outcome = self.inner.add_gradient(trainee, step, micro)
        self.calls += 1
        if self.calls in self.at:
            raise self.error("CUDA out of memory. Tried to allocate 2 GiB\nand so on")
        return outcome

    def measure(self):
        return self.inner.measure()

    def use(self, measured):
        self.inner.use(measured)


def settings(toy, optimiser=None, checkpoint_every=50):
    return toy.config(expert="both", optimiser={"accumulate": 2, "ema_decay": 0.9, "lr": 1e-2, **(optimiser or {})}, checkpoint_every=checkpoint_every)


def train(toy, folder, at=(), shrink=lambda: SMALLER, error=torch.OutOfMemoryError, resume=False, **changes):
    config = settings(toy, **changes)
    parts = toy.parts(config, shrink=shrink)
    return run.train(config, parts, Failing(objectives.create(config, parts), at, error), folder, resume=resume)


def same(folder, other):
    names = [path.relative_to(folder) for path in folder.rglob("*.safetensors")]
    assert len(names) >= 4
    assert all((folder / name).read_bytes() == (other / name).read_bytes() for name in names)


def alloc_failed(text):
    return RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")


FULL = torch.OutOfMemoryError


@pytest.mark.parametrize(("at", "error"), [((1,), FULL), ((2,), alloc_failed), ((6,), FULL), ((1, 9), FULL)])
def test_the_second_try_gives_the_same_bytes(toy, tmp_path, at, error):
    train(toy, tmp_path / "whole")
    toy.events.clear()
    shrunk = []
    train(toy, tmp_path / "other", at, lambda: shrunk.append(1) or SMALLER, error)
    same(tmp_path / "whole", tmp_path / "other")
    told = [event for event in toy.events if event.name == "replanned"]
    assert len(told) == len(shrunk) == len(at)
    assert told[0].detail == f"out of the card's memory; once more with the next smaller plan: {SMALLER.changes}"
    assert [event.step for event in toy.events if event.name == "step"] == [1, 2, 3, 4]


@pytest.mark.parametrize(("at", "shrink", "words"), [((6, 7), lambda: SMALLER, "also with the next smaller plan"), ((6,), lambda: None, "no smaller plan")])
def test_the_end_is_in_order_and_can_be_resumed(toy, tmp_path, at, shrink, words):
    train(toy, tmp_path / "whole")
    with pytest.raises(CardFullError, match=f"step 3: the card's memory is full, .*{words} .*Tried to allocate 2 GiB.*lora.rank"):
        train(toy, tmp_path / "other", at, shrink)
    assert checkpoint.latest_step(tmp_path / "other") == 2
    train(toy, tmp_path / "other", resume=True)
    # The whole run wrote no checkpoint at step 2.
    whole, other = ({path.name: path.read_bytes() for path in (tmp_path / name).glob("*.safetensors")} for name in ("whole", "other"))
    assert whole == other and len(whole) == 2


@pytest.mark.parametrize("what", ["evaluate", "show_samples"])
def test_a_look_that_does_not_fit_loses_no_update(toy, tmp_path, monkeypatch, what):
    def full(config, parts, trainees, *step):
        if parts.experts.count.total > 100:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return own(config, parts, trainees, *step)

    own = getattr(run, what)
    monkeypatch.setattr(run, what, full)
    config = toy.config(checkpoint_every=50, held_out={"every": 3, "prompts": ["x"]}, sample_every=3, steps=9, optimiser={"ema_decay": 0.9})
    parts = toy.parts(config, shrink=lambda: SMALLER, writer=Written())
    with pytest.raises(CardFullError, match="also with the next smaller plan"):
        run.train(config, parts, objectives.create(config, parts), tmp_path)
    (checked,) = [event for event in toy.events if event.name == "checkpoint"]
    assert checked.step >= 3 and checkpoint.latest_step(tmp_path) == checked.step


class Written:
    def write(self, videos, prompts, step):
        return []


def test_other_errors_are_not_tried_again(toy, tmp_path):
    with pytest.raises(RuntimeError, match="Tried to allocate"):
        train(toy, tmp_path, (3,), error=RuntimeError)
    assert not any(event.name in ("replanned", "checkpoint") for event in toy.events)


class FullAt(TorchDispatchMode):
    """The card's memory ends in one operation, before it is done."""

    def __init__(self, at):
        super().__init__()
        self.at, self.calls = at, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += 1
        if self.calls == self.at:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return func(*args, **(kwargs or {}))


def memory_ends_in_update(monkeypatch, step, at):
    """In the `at`-th operation of the first try of update `step`; returns how many operations each update has made."""
    own, made = Trainee.update, {}

    def update(self, number):
        with FullAt(at if number == step and number not in made else 0) as mode:
            made[number] = 0
            try:
                return own(self, number)
            finally:
                made[number] = mode.calls

    monkeypatch.setattr(Trainee, "update", update)
    return made


@pytest.mark.parametrize("kind", ["adamw", "adafactor", "muon"])
@pytest.mark.parametrize("step", [1, 4])
def test_memory_that_ends_anywhere_in_an_update_leaves_the_old_lora_or_ends_at_the_last_checkpoint(toy, tmp_path, monkeypatch, kind, step):
    """Tried again where nothing was changed, also by state that was half made; never saved where something was. Both give the bytes of an undisturbed run."""
    changes = {"optimiser": {"kind": kind, "weight_decay": 0.0}, "checkpoint_every": 1}
    with monkeypatch.context() as patch:
        operations = memory_ends_in_update(patch, step, 0)
        train(toy, tmp_path / "whole", **changes)
    ends = {}
    for at in range(1, operations[step] + 1, max(1, operations[step] // 25)):
        toy.events.clear()
        folder = tmp_path / f"at{at}"
        with monkeypatch.context() as patch:
            memory_ends_in_update(patch, step, at)
            try:
                train(toy, folder, **changes)
                ends[at] = "again"
                assert [event.step for event in toy.events if event.name == "replanned"] == [step]
            except DamagedError as error:
                ends[at] = "ended"
                assert "neither the old nor the new. The last checkpoint is good (" in str(error) and "optimiser_place" in str(error)
                assert checkpoint.latest_step(folder) == step - 1
        if ends[at] == "ended":
            train(toy, folder, resume=True, **changes)
        same(tmp_path / "whole", folder)
    assert set(ends.values()) == {"again", "ended"} and list(ends.values()) == sorted(ends.values())


def test_an_optimiser_that_writes_unseen_is_never_tried_again(toy, tmp_path, monkeypatch):
    """Of kernels that torch does not know of, nobody can tell what they have written."""
    monkeypatch.setattr(optimisers, "WRITE_UNSEEN", ("adamw",))
    with monkeypatch.context() as patch:
        memory_ends_in_update(patch, 2, 1)
        train(toy, tmp_path / "clipping")  # its kernels had not begun

    def full(self, closure=None):
        raise torch.OutOfMemoryError("no room for the moments")

    monkeypatch.setattr(torch.optim.AdamW, "step", full)
    with pytest.raises(DamagedError, match="no room for the moments"):
        train(toy, tmp_path / "kernel")
    assert checkpoint.states(tmp_path / "kernel") == []


def test_an_update_that_never_fits_ends_at_the_last_good_one(toy, tmp_path, monkeypatch):
    def full(parameters, limit):
        raise torch.OutOfMemoryError("no room for the norm")

    train(toy, tmp_path / "whole", checkpoint_every=1)
    own, calls = torch.nn.utils.clip_grad_norm_, []
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *given: calls.append(1) or (full if len(calls) > 2 else own)(*given))
    with pytest.raises(CardFullError, match="step 3: .* also with the next smaller plan .no room for the norm"):
        train(toy, tmp_path / "other")
    assert checkpoint.latest_step(tmp_path / "other") == 2
    name = checkpoint.states(tmp_path / "other")[0].name
    assert (tmp_path / "other" / checkpoint.FOLDER / name).read_bytes() == (tmp_path / "whole" / checkpoint.FOLDER / name).read_bytes()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_moving_a_trainee_keeps_everything(toy, tmp_path, device):
    config = settings(toy)
    parts = toy.parts(config)
    train(toy, tmp_path)
    with ExitStack() as stack:
        trainees = [run._new_trainee(config, parts, expert, stack) for expert in ("high", "low")]
        checkpoint.load_latest(tmp_path, config, trainees)
        for trainee in trainees:
            before, parameters = trainee.state(), trainee.adapter.parameters()
            trainee.to(torch.device(device))
            after = trainee.state()
            assert before.keys() == after.keys() and all(torch.equal(after[name], value) for name, value in before.items())
            # The optimiser and the Linears hold these very parameters.
            assert all(one is other for one, other in zip(parameters, trainee.adapter.parameters(), strict=True))
            kept = [value for state in trainee.optimiser.state.values() for value in state.values() if value.ndim]
            assert {value.device.type for value in (*parameters, *kept, *trainee.average.values())} == {device}


def test_a_state_that_tells_what_is_no_longer_watched_is_resumed(toy, tmp_path):
    config = settings(toy)
    train(toy, tmp_path)
    path = checkpoint.states(tmp_path)[-1]
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    progress = json.loads(metadata["progress"])
    progress["watch"]["judge_base"] = 1.0
    save_file(load_file(path), path, metadata={**metadata, "progress": json.dumps(progress)})
    assert checkpoint.load_latest(tmp_path, config, []).step == checkpoint.latest_step(tmp_path) > 0


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (torch.AcceleratorError("CUDA error: an illegal memory access was encountered"), "the card or its driver failed; the last checkpoint is good"),
        (RuntimeError("CUDA error: device-side assert triggered"), "the card or its driver failed"),
        (RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"), "the card or its driver failed"),
        (torch.OutOfMemoryError("CUDA out of memory"), "OutOfMemoryError: CUDA out of memory. Take a smaller video"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED"), "RuntimeError: CUDA error: CUBLAS_STATUS_ALLOC_FAILED. Take a smaller video"),
        (DamagedError("step 3: the card's memory ended"), "step 3: the card's memory ended"),
        (ValueError("steps is 0"), "steps is 0"),
        (RuntimeError("the size of tensor a"), "RuntimeError: the size of tensor a"),
    ],
)
def test_what_the_user_is_told(error, words, tmp_path):
    assert explain(error, tmp_path).startswith(words)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_says_what_is_kept_and_how_to_go_on(toy, tmp_path, number):
    path = tmp_path / "run" / "checkpoints" / "x.safetensors"
    told = explain(OSError(number, "No room", str(path)), tmp_path / "run")
    assert re.match(rf"{path} could not be written: No room; \d+\.\d\d GB are free there, and there is no checkpoint yet. Make room, or move", told)
    train(toy, tmp_path / "run")
    told = explain(OSError(number, "No room"), tmp_path / "run")
    step = checkpoint.latest_step(tmp_path / "run")
    assert told.startswith(f"{tmp_path / 'run'} could not be written") and f"the checkpoint of update {step} is good. Make room" in told
    assert told.endswith(f"then go on: lab.py train {tmp_path / 'run'}")


@pytest.mark.parametrize("weight_bytes", [2, 1])
def test_every_smaller_plan_needs_less_and_the_last_has_none(toy, weight_bytes):
    config = toy.config(video={"width_px": 1280, "height_px": 720, "frames": 81}, dtype="bf16")
    job = job_of(config, named_shape("wan-14b", weight_bytes))
    present, seen = choose.candidates(job)[0], []
    while present is not None:
        seen.append(gpu_bytes(job, present))
        present = choose.smaller(job, choose.candidates(job), present, 10**12)
    assert len(seen) >= 4 and seen == sorted(seen, reverse=True) and seen[-1] == min(gpu_bytes(job, choice) for choice in choose.candidates(job))
    assert all(one - other > 10**8 for one, other in zip(seen, seen[1:], strict=False))
    # What the host cannot hold is no way out.
    first = choose.candidates(job)[0]
    chosen = choose.smaller(job, choose.candidates(job), first, host_bytes(job, first))
    assert chosen is None or host_bytes(job, chosen) <= host_bytes(job, first)

"""The card's memory ends while a PAVRM is trained: one latent at a time gives the same gradient, and what cannot go on ends at the last update."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")
pytest.importorskip("comfy.ldm.wan.model", reason="needs ComfyUI on the path")

import torch  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

from reward_lab.host import pavrm_training, pavrm_worker  # noqa: E402
from reward_lab.host.training_mode import training_mode  # noqa: E402
from reward_lab.lora_train import checkpoint, optimisers  # noqa: E402
from reward_lab.lora_train.objectives.pavrm import PavrmObjective  # noqa: E402
from reward_lab.lora_train.pavrm_data import Draws  # noqa: E402
from reward_lab.lora_train.pavrm_run import train  # noqa: E402
from reward_lab.lora_train.pavrm_trainee import PavrmTrainee  # noqa: E402
from reward_lab.lora_train.recovery import CardFullError, DamagedError, explain  # noqa: E402

from .test_pavrm_training import CPU, _parts, _pocket, pocket_data, relative  # noqa: E402, F401

pytestmark = pytest.mark.host
FULL = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
STEP = 3


def run(config, folder, *, spoil=lambda parts: None, resume=False):
    """Train; `spoil(parts)` may put failures in. Returns the events."""
    events = []
    parts = _parts(config, events)
    spoil(parts)
    with training_mode():
        train(config, parts, folder, resume=resume)
    return events


def full_in(part, name, at):
    """Calls number `at` of a method raise."""
    own, calls = getattr(part, name), []

    def method(*given, **named):
        calls.append(1)
        if len(calls) in at:
            raise FULL
        return own(*given, **named)

    setattr(part, name, method)
    return calls


@pytest.mark.parametrize("loss", ["ce", "bt", "both"])
def test_one_latent_at_a_time_has_the_same_gradient(repo, pocket_data, loss):  # noqa: F811
    """Of a draw that leaves no unit of the head where ReLU bends: at step 1 of the pairs one of 6144 is at 1e-7, and the order of sums decides its side."""
    config, found, seen = _pocket(repo, pocket_data, loss=loss, batch=3), [], []
    for is_alone in (False, True):
        model = pavrm_training.load(config, device=CPU, autocast=torch.float32)
        parameters = [parameter for group in model.groups().values() for parameter in group.values()]
        objective = PavrmObjective(config, model, Draws(pavrm_worker.learnable_of(config), config.data, config.seed))
        if is_alone:
            own = model.logits
            model.logits = lambda latent, *given, own=own: seen.append((len(latent), torch.is_grad_enabled())) or own(latent, *given)
            assert objective.shrink().changes == "one latent at a time" and objective.shrink() is None
        with training_mode():
            batch = objective.add_gradient(2, 0)
        found.append((torch.cat([parameter.grad.flatten() for parameter in parameters]), batch))
    latents = 3 * {"ce": 1, "bt": 2, "both": 3}[loss]
    assert sorted(seen) == [(1, False)] * latents + [(1, True)] * latents
    (together, batch), (alone, other) = found
    assert relative(alone, together) < 1e-5 and other.loss == pytest.approx(batch.loss, rel=1e-5)
    assert (other.correct, other.sigma) == (batch.correct, batch.sigma)


def test_memory_that_ends_in_a_step_means_one_more_try_with_one_latent_at_a_time(repo, pocket_data, tmp_path):  # noqa: F811
    """Wherever it ended, the same bytes come out; and these are close to an undisturbed run's, whose sums are in another order from there on."""
    config = _pocket(repo, pocket_data, loss="both", validate_every=0)
    run(config, tmp_path / "whole")
    # Two micro-batches an update, each with a pass for labels and one for pairs.
    first = 4 * (STEP - 1)
    places = {
        "first": lambda parts: full_in(parts.scorer, "logits", {first + 1}),
        "last": lambda parts: full_in(parts.scorer, "logits", {first + 4}),
        "backward": lambda parts: full_in(torch.Tensor, "backward", {2 * STEP}),
        "clip": lambda parts: full_in(torch.nn.utils, "clip_grad_norm_", {STEP}),
    }
    files = {}
    for name, spoil in places.items():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.Tensor, "backward", torch.Tensor.backward)
            patch.setattr(torch.nn.utils, "clip_grad_norm_", torch.nn.utils.clip_grad_norm_)
            events = run(config, tmp_path / name, spoil=spoil)
        told = [event for event in events if event.name == "replanned"]
        assert [(event.step, event.detail) for event in told] == [
            (STEP, "out of the card's memory; once more with the next smaller plan: one latent at a time")
        ]
        assert [event.forwards for event in events if event.name == "step"] == [4 * step for step in range(1, config.steps + 1)]
        files[name] = (tmp_path / name / checkpoint.FOLDER / "step-000004.state.safetensors").read_bytes()
    assert len(set(files.values())) == 1
    whole, other = (load_file(tmp_path / name / "tiny.safetensors") for name in ("whole", "first"))
    assert all(relative(other[name].float(), value.float()) < 1e-4 for name, value in whole.items() if value.norm() > 0)


@pytest.mark.parametrize(
    ("changes", "calls", "words"),
    [
        ({"batch": 1}, {2 * STEP}, "and there is no smaller plan"),
        ({"batch": 2}, {2 * STEP, 2 * STEP + 1}, "also with the next smaller plan"),
    ],
)
def test_the_end_is_in_order_and_can_be_resumed(repo, pocket_data, tmp_path, changes, calls, words):  # noqa: F811
    config = _pocket(repo, pocket_data, validate_every=0, checkpoint_every=50, **changes)
    run(config, tmp_path / "whole")
    with pytest.raises(CardFullError, match=f"step {STEP}: the card's memory is full, {words} .*Tried to allocate.*gradient_checkpointing") as error:
        run(config, tmp_path / "other", spoil=lambda parts: full_in(parts.scorer, "logits", calls))
    assert explain(error.value, tmp_path) == str(error.value)
    assert checkpoint.latest_step(tmp_path / "other") == STEP - 1
    run(config, tmp_path / "other", resume=True)
    assert (tmp_path / "other" / "tiny.safetensors").read_bytes() == (tmp_path / "whole" / "tiny.safetensors").read_bytes()


def test_an_update_that_had_begun_to_write_is_never_saved(repo, pocket_data, tmp_path, monkeypatch):  # noqa: F811
    """The moving average comes last: by then all weights are new."""
    config = _pocket(repo, pocket_data, validate_every=0)
    run(config, tmp_path / "whole")
    own = PavrmTrainee.update

    def update(self, step):
        if step != STEP:
            return own(self, step)
        with pytest.MonkeyPatch.context() as patch:
            stepped = self.optimiser.step

            def full():
                stepped()
                raise FULL

            patch.setattr(self.optimiser, "step", full)
            return own(self, step)

    with monkeypatch.context() as patch, pytest.raises(DamagedError, match=f"step {STEP}: .*neither the old nor the new. The last checkpoint is good"):
        patch.setattr(PavrmTrainee, "update", update)
        run(config, tmp_path / "other")
    assert checkpoint.latest_step(tmp_path / "other") == STEP - 1
    run(config, tmp_path / "other", resume=True)
    assert (tmp_path / "other" / "tiny.safetensors").read_bytes() == (tmp_path / "whole" / "tiny.safetensors").read_bytes()


def test_an_optimiser_that_writes_unseen_is_never_tried_again(repo, pocket_data, tmp_path, monkeypatch):  # noqa: F811
    """Of kernels that torch does not know of, nobody can tell what they have written when memory ends in them."""
    monkeypatch.setattr(optimisers, "WRITE_UNSEEN", ("adamw",))
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self, closure=None: (_ for _ in ()).throw(FULL))
    with pytest.raises(DamagedError, match="step 1: .*neither the old nor the new"):
        run(_pocket(repo, pocket_data, validate_every=0), tmp_path)


def test_validation_is_tried_again_as_well(repo, pocket_data, tmp_path):  # noqa: F811
    """While the moving average stands in the weights' place, which come back as they were. What ends there keeps the updates before it."""
    config, made = _pocket(repo, pocket_data, validate_every=4, checkpoint_every=50), []
    run(config, tmp_path / "whole", spoil=lambda parts: made.append(full_in(parts.scorer, "logits", ())))
    last = len(made[0])
    events = run(config, tmp_path / "again", spoil=lambda parts: full_in(parts.scorer, "logits", {last}))
    assert [event.step for event in events if event.name == "replanned"] == [4]
    with pytest.raises(CardFullError, match="step 4: "):
        run(config, tmp_path / "full", spoil=lambda parts: full_in(parts.scorer, "logits", range(last, 10**6)))
    assert checkpoint.latest_step(tmp_path / "full") == 4
    run(config, tmp_path / "full", resume=True)
    files = [(tmp_path / name / "tiny.safetensors").read_bytes() for name in ("whole", "again", "full")]
    assert len(set(files)) == 1

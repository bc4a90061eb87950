"""Whatever raises, at any operation of a pass: the model is as it was before, and nothing is held."""

from __future__ import annotations

import gc
import random
import weakref

import pytest

from .passes import load, run
from .quantised_files import write_fp8

pytestmark = pytest.mark.host


def interrupting(at):
    """A context in which operation number `at` (None: none) raises; counts in `.calls`."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Mode(TorchDispatchMode):
        calls = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.calls += 1
            if self.calls == at:
                raise KeyboardInterrupt
            return func(*args, **(kwargs or {}))

    return Mode()


def state(backbone):
    """Everything that a pass could leave behind."""
    modules = {path: set(module.__dict__) for path, module in backbone.model.named_modules()}
    weights = {name: None if parameter.device.type == "meta" else parameter.data_ptr() for name, parameter in backbone.model.named_parameters()}
    return modules, weights


@pytest.mark.parametrize("knobs", [{}, {"resident_blocks": 0, "keep_place": "host"}, {"resident_blocks": 1, "slots": 3, "ffn_chunk_tokens": 5}], ids=str)
@pytest.mark.parametrize("form", ["plain", "fp8"])
def test_interrupted_at_any_operation(tiny_models, tmp_path, form, knobs):
    import torch

    path = tiny_models["high"]
    if form == "fp8":
        path = tmp_path / "tiny_high_noise.safetensors"
        write_fp8(tiny_models["high"], path, "old")
    backbone = load(path)
    run(backbone, knobs)
    before, numbers = state(backbone), run(backbone, knobs)
    with interrupting(None) as counted:
        run(backbone, knobs)
    made = []
    for at in random.Random(form).sample(range(1, counted.calls), 12):
        watched = interrupting(at)
        try:
            with watched:
                run(backbone, knobs)
        except KeyboardInterrupt:
            made.append(at)
        assert state(backbone) == before, at
    assert len(made) == 12
    found = run(backbone, knobs)
    assert all(torch.equal(found[name], value) for name, value in numbers.items())


def test_what_an_interrupted_pass_held_is_freed(tiny_models):
    from reward_lab.lora_train.offload.executor import BlockExecutor

    backbone, executors = load(tiny_models["high"]), []
    made = BlockExecutor.__init__

    def watched(self, *args, **kwargs):
        executors.append(weakref.ref(self))
        made(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BlockExecutor, "__init__", watched)
        for at in (500, 900, 1300):
            try:
                with interrupting(at):
                    run(backbone, {"resident_blocks": 0})
            except KeyboardInterrupt:
                pass
    gc.collect()
    assert len(executors) == 3 and not any(executor() for executor in executors)

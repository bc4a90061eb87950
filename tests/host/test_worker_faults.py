"""Faults in the middle of a run, through the real worker: the card's memory ends, the card disappears, somebody interrupts."""

from __future__ import annotations

import gc
import json
import random
import re
import signal
import traceback

import pytest
from safetensors.torch import load_file

from reward_lab.lora_train.config import TrainConfig
from reward_lab.runs.store import RunStore

from .quantised_files import write_fp8, write_gguf

pytestmark = pytest.mark.host
# A smaller plan may put Linears into buffers, whose products add in another order; three updates carry it on.
OTHER_ORDER = 1e-3


@pytest.fixture(scope="module")
def settings(tiny_models, repo, tmp_path_factory):
    """Both experts, the high one in fp8; a look at held-out videos and samples, so that faults can hit them too."""
    high = tmp_path_factory.mktemp("fp8") / "tiny_t2v_high_noise_fp8.safetensors"
    write_fp8(tiny_models["high"], high, "old")
    return {
        "models": {**tiny_models, "high": str(high)},
        "reward": {"kind": "hpsv2.1", "path": str(repo / "pocket" / "weights" / "pocket_HPS_v2.1.safetensors")},
        "prompts": [{"text": "a red square moves left over white"}, {"text": "a blue circle moves right over black"}],
        "video": {"width_px": 32, "height_px": 32, "frames": 5},
        "sampling": {"steps": 3, "guidance": 2.0},
        "objective": {"mode": "x0", "strategy": "random", "decode": "first", "kl_weight": 0.1},
        "optimiser": {"accumulate": 2, "lr": 1e-2},
        "lora": {"rank": 2},
        "held_out": {"every": 3, "prompts": ["a red circle moves left over black"]},
        "expert": "both", "name": "tiny", "steps": 3, "batch": 1, "checkpoint_every": 50, "sample_every": 3, "frame_rate": 8.0,
        # Faults are counted from the first look on.
        "engine": {"self_check": False},
    }  # fmt: skip


class Faults:
    """Counts the Linears that blocks run, and raises at chosen ones."""

    def __init__(self) -> None:
        self.calls, self.raises = 0, lambda call: None

    def __call__(self, apply):
        def counted(*args, **kwargs):
            self.calls += 1
            error = self.raises(self.calls)
            if error is not None:
                raise error
            return apply(*args, **kwargs)

        return counted


@pytest.fixture
def faults(monkeypatch):
    from reward_lab.lora_train.offload import block

    made = Faults()
    monkeypatch.setattr(block, "_apply", made(block._apply))
    monkeypatch.setattr(block, "_linear_backward", made(block._linear_backward))
    return made


@pytest.fixture
def work(comfyui, pocket_models, tmp_path, monkeypatch):
    """`work(settings, run_id=None, resume=False)` -> (exit status, store, run id), in this process."""
    from reward_lab.host import worker

    # pytest keeps what is logged, and with an error the frames that hold its tensors.
    monkeypatch.setattr(worker.logger, "exception", lambda message: worker.logger.error("%s\n%s", message, traceback.format_exc()))
    store, handlers = RunStore(tmp_path / "runs"), {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def run(settings, run_id=None, resume=False):
        run_id = run_id or store.create(TrainConfig.from_dict(settings))
        return worker.run(store.folder(run_id), resume=resume), store, run_id

    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)


def out_of_memory():
    import torch

    return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore lines")


def loras(store, run_id):
    return {path.name: load_file(path) for path in store.folder(run_id).glob("tiny-*.safetensors")}


def assert_close(found, wanted):
    assert found.keys() == wanted.keys() and len(wanted) == 2
    for name, tensors in wanted.items():
        for key, value in tensors.items():
            assert float((found[name][key].float() - value.float()).norm()) <= OTHER_ORDER * float(value.float().norm().clamp_min(1e-6)), (name, key)


def live_bytes():
    """Bytes of all tensors of this process."""
    import torch

    gc.collect()
    seen = {}
    for item in gc.get_objects():
        if issubclass(type(item), torch.Tensor) and item.device.type == "cpu":
            storage = item.untyped_storage()
            seen[storage.data_ptr()] = storage.nbytes()
    return sum(seen.values())


def test_out_of_memory_at_any_instant_is_tried_once_more_and_gives_the_same_lora(work, faults, settings):
    settings = {**settings, "save_dtype": "fp32"}
    status, store, whole = work(settings)
    assert status == 0, store.events(whole)[-1]
    wanted, calls, draws = loras(store, whole), faults.calls, random.Random(0)
    rewards, forwards = ([event[name] for event in store.events(whole) if event["event"] == "step"] for name in ("reward", "forwards"))
    before = live_bytes()
    for instant in sorted(draws.sample(range(1, calls), 4)):
        faults.calls, faults.raises = 0, lambda call, instant=instant: out_of_memory() if call == instant else None
        status, store, run_id = work(settings)
        seen = store.events(run_id)
        assert status == 0, seen[-1]
        (replanned,) = [event for event in seen if event["event"] == "replanned"]
        assert "once more with the next smaller plan: " in replanned["detail"] and "->" in replanned["detail"]
        assert [event["reward"] for event in seen if event["event"] == "step"] == pytest.approx(rewards, rel=1e-3)
        assert [event["step"] for event in seen if event["event"] == "step"] == [1, 2, 3]
        # Passes of the try that failed do not count.
        assert [event["forwards"] for event in seen if event["event"] == "step"] == forwards
        assert_close(loras(store, run_id), wanted)
    assert live_bytes() <= before + 100_000


def test_a_second_failure_keeps_what_was_learned_and_says_what_to_do(work, faults, settings):
    settings = {**settings, "save_dtype": "fp32", "held_out": {}, "sample_every": 0}
    status, store, whole = work(settings)
    assert status == 0 and store.get(whole).step == 3
    start = faults.calls * 5 // 6
    faults.calls, faults.raises = 0, lambda call: out_of_memory() if call >= start else None
    before = live_bytes()
    status, store, run_id = work(settings)
    seen, info = store.events(run_id), store.get(run_id)
    assert status == 2 and info.state == "failed"
    assert "step 3: the card's memory is full, also with the next smaller plan (CUDA out of memory. Tried to allocate 2.00 GiB.)" in info.error
    assert "lora.rank" in info.error and "resume" in info.error
    assert [event["event"] for event in seen][-3:] == ["replanned", "checkpoint", "failed"] and info.checkpoint_step == 2
    assert live_bytes() <= before + 100_000
    faults.raises = lambda call: None
    status, store, _ = work(settings, run_id, resume=True)
    assert status == 0
    assert_close(loras(store, run_id), loras(store, whole))


def test_a_card_that_disappears_leaves_the_checkpoint_and_its_reason(work, faults, settings):
    import torch

    settings = {**settings, "checkpoint_every": 1, "held_out": {}, "sample_every": 0}
    status, store, whole = work(settings)
    assert status == 0
    at, before = faults.calls * 5 // 6, live_bytes()
    faults.calls, faults.raises = 0, lambda call: torch.AcceleratorError("CUDA error: unspecified launch failure") if call == at else None
    status, store, run_id = work(settings)
    info = store.get(run_id)
    assert live_bytes() <= before + 100_000
    assert status == 2 and info.state == "failed" and info.checkpoint_step == 2
    assert "the card or its driver failed; the last checkpoint is good" in info.error and "unspecified launch failure" in info.error
    faults.raises = lambda call: None
    assert work(settings, run_id, resume=True)[0] == 0
    for path in store.folder(whole).glob("tiny-*.safetensors"):
        assert path.read_bytes() == (store.folder(run_id) / path.name).read_bytes()


def test_resuming_with_other_settings_is_refused_before_anything_is_cut(work, settings):
    settings = {**settings, "held_out": {}, "sample_every": 0, "checkpoint_every": 1}
    status, store, run_id = work(settings)
    assert status == 0
    history, path = store.events(run_id), store.folder(run_id) / "config.json"
    values = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**values, "seed": 99}), encoding="utf-8")
    assert work(settings, run_id, resume=True)[0] == 2
    seen = store.events(run_id)
    assert seen[: len(history)] == history and "seed was 0 and is 99" in seen[-1]["error"]
    info = store.get(run_id)
    assert (info.state, len(info.files)) == ("finished", 2) and "with other settings" in info.error, "what it made stands"
    path.write_text(json.dumps({**values, "video": 5}), encoding="utf-8")
    assert work(settings, run_id, resume=True)[0] == 2 and store.get(run_id).state == "finished"
    path.write_text(json.dumps(values), encoding="utf-8")
    assert work(settings, run_id)[0] == 2 and store.get(run_id).state == "finished", "it was not asked to go on"
    path.write_text(json.dumps(values), encoding="utf-8")
    assert work(settings, run_id, resume=True)[0] == 0


def test_an_interrupt_leaves_nothing_behind(work, faults, settings):
    """Ctrl-C pressed twice is an exception at any place; here inside of a block."""
    settings = {**settings, "held_out": {}, "sample_every": 0}
    before = live_bytes()
    at = random.Random(1).randrange(50, 400)
    faults.raises = lambda call: KeyboardInterrupt() if call == at else None
    with pytest.raises(KeyboardInterrupt):
        work(settings)
    assert live_bytes() <= before + 100_000


def test_short_memory_is_refused_with_the_number(work, settings):
    status, store, run_id = work({**settings, "engine": {"ram_gb": 0.0001}})
    assert status == 2
    assert re.match(r"this run needs at least 0\.\d\d GB of memory, .+, but 0\.00 GB are free; close other programs\. Would fit: .+", store.get(run_id).error)
    assert not any(event["event"] == "started" for event in store.events(run_id))


@pytest.mark.parametrize("forms", [("old", "new"), ("gguf", "gguf")], ids="-".join)
def test_a_whole_run_through_a_quantised_base_equals_one_through_its_numbers(work, settings, tiny_models, tmp_path, forms):
    """Scaled fp8 of both key generations, and GGUF, against the plain files of the same numbers."""
    plain, models = {}, dict(settings["models"])
    for expert, form in zip(("high", "low"), forms, strict=True):
        target = tmp_path / f"tiny_t2v_{expert}_noise.{'gguf' if form == 'gguf' else 'safetensors'}"
        write = write_gguf(tiny_models[expert], target, lambda key: "q5_0") if form == "gguf" else write_fp8(tiny_models[expert], target, form)
        plain[expert], models[expert] = str(write), str(target)
    settings = {**settings, "models": models, "save_dtype": "fp32", "sample_every": 0, "engine": {"resident_blocks": 0}}
    status, store, quantised = work(settings)
    assert status == 0, store.events(quantised)[-1]
    status, store, whole = work({**settings, "models": {**models, **plain}})
    assert status == 0, store.events(whole)[-1]
    wanted, found = loras(store, whole), loras(store, quantised)
    assert wanted.keys() == found.keys() and len(wanted) == 2
    assert [(name, key) for name, tensors in wanted.items() for key, value in tensors.items() if not value.equal(found[name][key])] == []


def test_formats_that_cannot_be_trained_through_are_refused_before_any_work(settings, tiny_models, tmp_path):
    import torch
    from safetensors import safe_open
    from safetensors.torch import save_file

    from reward_lab.host import preflight

    tensors = load_file(tiny_models["high"])
    tensors["blocks.0.ffn.0.weight"] = torch.zeros(tensors["blocks.0.ffn.0.weight"].shape, dtype=torch.int8)
    with safe_open(tiny_models["high"], "pt") as file:
        save_file(tensors, tmp_path / "high_noise_int8.safetensors", metadata=file.metadata())
    models = {**settings["models"], "high": str(tmp_path / "high_noise_int8.safetensors")}
    with pytest.raises(ValueError, match="high-noise expert .* stores blocks.0.ffn.0.weight as I8, which cannot be trained through; use the bf16"):
        preflight.check(TrainConfig.from_dict({**settings, "models": models}), tmp_path)
    with pytest.raises(ValueError, match="is neither a .safetensors nor a .gguf file"):
        (tmp_path / "x.ckpt").touch()
        preflight.check(TrainConfig.from_dict({**settings, "models": {**models, "high": str(tmp_path / "x.ckpt")}}), tmp_path)

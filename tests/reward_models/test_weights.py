"""Reading weight files: any extension, damage named, hostile pickles inert."""

from __future__ import annotations

import collections
import json
import os
import random
import zipfile

import pytest
import torch
from safetensors.torch import save_file

from reward_lab.reward_models import pickles, weights
from reward_lab.reward_models.loader import load_reward_model

STATE = {"a.weight": torch.arange(6.0).reshape(2, 3), "a.bias": torch.ones(2, dtype=torch.float16)}


def assert_state(state):
    assert set(state) == set(STATE)
    assert all(torch.equal(state[key], value) for key, value in STATE.items())


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"state_dict": s, "epoch": 3}, lambda s: {"module": {"state_dict": s}}])
@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "legacy"])
def test_torch_files_of_both_forms(tmp_path, wrap, is_zip):
    path = tmp_path / "weights.safetensors"  # the extension lies
    torch.save(wrap(STATE), path, _use_new_zipfile_serialization=is_zip)
    read = weights.read_weights(path)
    assert read.form == "pickle"
    assert_state(read.state)


def test_safetensors_under_a_torch_extension(tmp_path):
    save_file(STATE, tmp_path / "weights.pth", metadata={"config": "{}"})
    read = weights.read_weights(tmp_path / "weights.pth")
    assert (read.form, read.metadata) == ("safetensors", {"config": "{}"})
    assert_state(read.state)


@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "legacy"])
def test_whole_module_gives_its_state_dict(tmp_path, is_zip, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    module.register_buffer("hidden", torch.ones(1), persistent=False)
    torch.save(module, tmp_path / "whole.pth", _use_new_zipfile_serialization=is_zip)
    read = weights.read_weights(tmp_path / "whole.pth").state
    assert os.listdir() == ["whole.pth"]
    assert set(read) == set(module.state_dict())
    assert all(torch.equal(read[key], value) for key, value in module.state_dict().items())
    assert not any(value.requires_grad for value in read.values())


class Hostile:
    """Runs a command when unpickled by an ordinary reader."""

    def __init__(self, function, *args):
        self.call = (function, args)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("place", ["beside", "inside", "alone"])
def test_hostile_pickle_is_not_executed(tmp_path, monkeypatch, is_zip, place):
    monkeypatch.chdir(tmp_path)
    calls = [
        Hostile(os.system, "touch executed_system"),
        Hostile(eval, "open('executed_eval', 'w')"),
        Hostile(exec, "open('executed_exec', 'w')"),
        Hostile(os.mkdir, "executed_mkdir"),
        Hostile(torch.load, "executed_elsewhere.pt"),
    ]
    content = {
        "beside": {**STATE, "payload": calls},
        "inside": {"state_dict": collections.OrderedDict({**STATE, "payload": calls[0]}), "more": calls},
        "alone": calls,
    }[place]
    torch.save(content, "hostile.pt", _use_new_zipfile_serialization=is_zip)
    if place == "alone":
        with pytest.raises(ValueError, match="no named tensors"):
            weights.read_weights("hostile.pt")
    else:
        assert_state(weights.read_weights("hostile.pt").state)
    assert not [name for name in os.listdir() if name.startswith("executed")]
    # The same file does run in a reader that trusts it, so this test would notice.
    if place == "beside":
        with pytest.raises((FileNotFoundError, OSError, AttributeError, RuntimeError)):
            torch.load("hostile.pt", weights_only=False)
        assert os.path.exists("executed_system")


def test_a_pickle_cannot_change_the_functions_it_is_given(tmp_path):
    before = torch._utils._rebuild_tensor_v2.__defaults__
    # GLOBAL torch._utils._rebuild_tensor_v2, then BUILD with slot state that sets its __defaults__.
    attack = b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n" + b"N}X\x0c\x00\x00\x00__defaults__K\x01\x85s\x86b."
    with zipfile.ZipFile(tmp_path / "attack.pt", "w") as archive:
        archive.writestr("archive/data.pkl", attack)
        archive.writestr("archive/version", "3\n")
    with pytest.raises(ValueError, match="no named tensors|cannot be read"):
        pickles.read_pickle(tmp_path / "attack.pt")
    assert torch._utils._rebuild_tensor_v2.__defaults__ == before


def test_mutated_files_are_read_or_refused_but_never_break_out(tmp_path):
    """Any byte may be wrong: the reader returns tensors or raises ValueError, nothing else."""
    rng = random.Random(0)
    torch.save({"state_dict": STATE, "module": torch.nn.Linear(2, 2)}, tmp_path / "good.pt")
    with zipfile.ZipFile(tmp_path / "good.pt") as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    refused = 0
    for _ in range(150):
        with zipfile.ZipFile(tmp_path / "bad.pt", "w") as archive:
            for name, content in members.items():
                data = bytearray(content)
                if name.endswith("data.pkl"):
                    for _ in range(rng.randint(1, 3)):
                        data[rng.randrange(len(data))] = rng.randrange(256)
                archive.writestr(name, bytes(data))
        try:
            weights.read_weights(tmp_path / "bad.pt")
        except ValueError:
            refused += 1
    assert refused > 50


def test_a_module_that_contains_itself_ends(tmp_path):
    module = torch.nn.Linear(2, 2)
    module._modules["again"] = module
    torch.save(module, tmp_path / "loop.pth")
    assert set(weights.read_weights(tmp_path / "loop.pth").state) == {"weight", "bias"}


def test_torchscript_is_refused(tmp_path):
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "script.pt")
    with pytest.raises(ValueError, match="TorchScript"):
        weights.read_weights(tmp_path / "script.pt")


@pytest.mark.parametrize("keep", [0.3, 0.9, 0.999])
@pytest.mark.parametrize("form", ["safetensors", "zip", "legacy"])
def test_truncated_files_say_so(tmp_path, form, keep):
    path = tmp_path / "cut.bin"
    state = {f"layer.{i}": torch.rand(50, 40) for i in range(5)}
    if form == "safetensors":
        save_file(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=form == "zip")
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])
    with pytest.raises(ValueError, match="cut.bin.*(truncated|damaged)"):
        weights.read_weights(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "0 bytes"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 1\n", "Git LFS pointer"),
        (b"<!DOCTYPE html><html>Too many requests</html>", "web page"),
        (b"\x00" * 100, "neither safetensors nor a torch checkpoint"),
        (b"GGUF" + b"\x03" * 100, "neither safetensors nor a torch checkpoint"),
    ],
)
def test_other_files_are_named(tmp_path, content, message):
    (tmp_path / "x.pt").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        weights.read_weights(tmp_path / "x.pt")


def test_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match="no file .*nothing.pt"):
        weights.read_weights(tmp_path / "nothing.pt")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_weights_that_are_not_finite_are_named(tmp_path, value, dtype):
    broken = torch.ones(4, 4, dtype=dtype)
    broken[2, 3] = value
    save_file({"good": torch.ones(2), "layer.broken": broken}, tmp_path / "nan.safetensors")
    with pytest.raises(ValueError, match="NaN or infinity in layer.broken;"):
        weights.read_weights(tmp_path / "nan.safetensors")


def test_large_finite_sums_are_no_false_alarm():
    weights.check_finite({"large": torch.full((8,), 3e38)}, "x")


def test_strict_check_names_everything():
    module = torch.nn.Linear(3, 2)
    with pytest.raises(ValueError, match=r"missing: bias; unexpected: extra; wrong shape: weight \(2, 2\) instead of \(2, 3\)"):
        weights.load_into(module, {"weight": torch.zeros(2, 2), "extra": torch.zeros(1)}, "file")


def test_parameters_made_in_inference_mode_can_be_trained_through():
    with torch.inference_mode():
        state = {"weight": torch.ones(2, 3), "bias": torch.zeros(2)}
        module = torch.nn.Linear(3, 2)
        weights.load_into(module, state, "x")
    x = torch.ones(1, 3, requires_grad=True)
    module(x).sum().backward()
    assert x.grad.tolist() == [[2.0, 2.0, 2.0]]


def test_a_model_loaded_in_inference_mode_passes_gradients(scorers):
    with torch.inference_mode():
        models = [
            load_reward_model("hpsv2.1", scorers.folder / "hps" / "hps_tiny.pt", config=scorers.folder / "hps" / "config.json"),
            load_reward_model("mps", scorers.folder / "mps" / "mps_tiny_whole.pth", config=json.loads((scorers.folder / "mps" / "config.json").read_text())),
        ]
    for model in models:
        frames = torch.rand(1, 1, 3, 40, 50, requires_grad=True)
        model.score(frames, ["a fox"]).per_video.sum().backward()
        assert frames.grad.abs().sum() > 0

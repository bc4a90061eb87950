"""Reading weight files: any extension, damage named, hostile pickles inert."""

from __future__ import annotations

import collections
import json
import os
import pickle
import random
import tarfile
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


# --- pickles written by hand, opcode by opcode ---


def text(value: str) -> bytes:
    return b"X" + len(value.encode()).to_bytes(4, "little") + value.encode()


PAYLOADS = {
    "REDUCE": b"\x80\x02cposix\nsystem\n" + text("touch executed") + b"\x85R.",
    "STACK_GLOBAL": b"\x80\x04" + text("posix") + text("system") + b"\x93" + text("touch executed") + b"\x85R.",
    "INST": b"\x80\x02(" + text("touch executed") + b"iposix\nsystem\n.",
    "OBJ": b"\x80\x02(cposix\nsystem\n" + text("touch executed") + b"o.",
    "NEWOBJ": b"\x80\x02cposix\nsystem\n" + text("touch executed") + b"\x85\x81.",
    "NEWOBJ_EX": b"\x80\x04cposix\nsystem\n" + text("touch executed") + b"\x85}\x92.",
    "eval": b"\x80\x02cbuiltins\neval\n" + text("open('executed', 'w')") + b"\x85R.",
    "getattr": b"\x80\x02cbuiltins\ngetattr\ncposix\nsystem\n" + text("__call__") + b"\x86R" + text("touch executed") + b"\x85R.",
    "dotted name": b"\x80\x04" + text("torch") + text("os.system") + b"\x93" + text("touch executed") + b"\x85R.",
    "name of a storage": b"\x80\x02cposix\nsystemStorage\n" + text("touch executed") + b"\x85R.",
    "BUILD of a class": b"\x80\x02cposix\nsystem\n}" + text("__call__") + b"cposix\nsystem\nsb.",
    "BUILD with __setstate__": b"\x80\x02cmodule\nThing\n)\x81}" + text("__setstate__") + b"cposix\nsystem\nsb" + text("touch executed") + b"b.",
    "EXT1": b"\x80\x02\x82\x01.",
    "persistent id": b"\x80\x02" + text("posix") + b"Q.",
    "attribute of a rebuild function": b"\x80\x02ctorch._utils\n_rebuild_parameter\n}" + text("dump_patches") + b"\x88sb.",
    "attribute of OrderedDict": b"\x80\x02ccollections\nOrderedDict\nN}" + text("update") + b"K\x01s\x86b.",
    "1 TB of bytes": b"\x80\x05\x96" + (1 << 40).to_bytes(8, "little") + b".",
    "lists of lists": b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".",
}


@pytest.mark.parametrize("name", PAYLOADS)
@pytest.mark.parametrize("form", ["zip", "legacy", "bare"])
def test_no_opcode_runs_anything(tmp_path, monkeypatch, name, form):
    monkeypatch.chdir(tmp_path)
    write_pickle(tmp_path / "x.pt", PAYLOADS[name], form)
    before = sorted(os.listdir())
    with pytest.raises(ValueError, match=r"cannot be read as a torch checkpoint|holds no named tensors|bytes; it is empty or"):
        weights.read_weights(tmp_path / "x.pt")
    assert sorted(os.listdir()) == before and "update" in dir(collections.OrderedDict) and callable(collections.OrderedDict.update)


def write_pickle(path, content: bytes, form: str) -> None:
    if form == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", content)
            archive.writestr("archive/version", "3\n")
    elif form == "legacy":
        header = [pickle.dumps(value, 2) for value in (0x1950A86A20F9469CFC6C, 1001, {"protocol_version": 1001, "little_endian": True, "type_sizes": {}})]
        path.write_bytes(b"".join(header) + content + pickle.dumps([], 2))
    else:
        path.write_bytes(content)


def test_the_payloads_do_run_in_a_reader_that_trusts_them(tmp_path, monkeypatch):
    """Else the test above would show nothing."""
    monkeypatch.chdir(tmp_path)
    for name in ("REDUCE", "STACK_GLOBAL", "INST", "OBJ", "eval", "dotted name"):
        pickle.loads(PAYLOADS[name])
        assert os.path.exists("executed"), name
        os.remove("executed")


def test_the_older_form_writes_no_patch_files(tmp_path, monkeypatch):
    """torch compares the source of pickled classes, and writes the difference to a file that the pickle names when it differs."""
    monkeypatch.chdir(tmp_path)
    function = b"ctorch._utils\n_rebuild_parameter\nN}" + text("dump_patches") + b"\x88s" + text("__name__") + text("chosen_by_the_pickle") + b"s\x86b"
    plain_function = b"ctorch._utils\n_rebuild_parameter\n"
    for number, container in enumerate((function, plain_function, b"ccollections\nOrderedDict\n")):
        identity = b"(" + text("module") + container + text("source.py") + text("class Other: pass") + b"tQ"
        write_pickle(tmp_path / f"{number}.pt", b"\x80\x02" + identity + b".", "legacy")
        with pytest.raises(ValueError, match=r"cannot be read as a torch checkpoint|holds no named tensors"):
            weights.read_weights(tmp_path / f"{number}.pt")
    assert sorted(os.listdir()) == ["0.pt", "1.pt", "2.pt"]


@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "legacy"])
def test_declared_sizes_beyond_the_file_are_refused(tmp_path, is_zip):
    """A stride of 0 makes a tensor of any size out of four bytes; looking for NaN in it would never end."""
    path = tmp_path / "huge.pt"
    torch.save({"weight": torch.zeros(1).expand(1 << 20, 1 << 20)}, path, _use_new_zipfile_serialization=is_zip)
    assert path.stat().st_size < 3000
    with pytest.raises(ValueError, match=r"a tensor of shape \(1048576, 1048576\) over 1 stored values"):
        weights.read_weights(path)


def test_a_storage_larger_than_its_file_is_refused(tmp_path):
    torch.save({"weight": torch.zeros(77)}, tmp_path / "small.pt", _use_new_zipfile_serialization=False)
    # The storage's number of values, as a one-byte and as a four-byte whole number.
    grown = (tmp_path / "small.pt").read_bytes().replace(b"KMN", b"J\x00\x00\x00\x40N", 1)
    (tmp_path / "grown.pt").write_bytes(grown)
    with pytest.raises(ValueError, match="a storage of 1073741824 values in a file of"):
        weights.read_weights(tmp_path / "grown.pt")


def test_archives_that_unpack_to_more_than_they_are_are_refused(tmp_path):
    torch.save({"weight": torch.zeros(1000)}, tmp_path / "plain.pt")
    with zipfile.ZipFile(tmp_path / "plain.pt") as source, zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as target:
        for entry in source.infolist():
            target.writestr(entry.filename, source.read(entry))
        target.writestr("archive/data/1", bytes(50_000_000))
    with pytest.raises(ValueError, match=r"unpacks to 5\d+, but torch packs nothing"):
        weights.read_weights(tmp_path / "bomb.pt")


def test_modules_that_name_each_other_without_end_are_refused(tmp_path):
    """Sixty modules, each of which has the next one as two children: 2^60 paths."""
    module = torch.nn.Linear(1, 1)
    for _ in range(60):
        parent = torch.nn.Module()
        parent.add_module("one", module)
        parent.add_module("other", module)
        module = parent
    torch.save(module, tmp_path / "double.pt")
    with pytest.raises(ValueError, match="more than 200000 modules"):
        weights.read_weights(tmp_path / "double.pt")


def test_the_tar_form_is_not_opened(tmp_path):
    with tarfile.open(tmp_path / "x.pt", "w", format=tarfile.PAX_FORMAT) as archive:
        link = tarfile.TarInfo("\x80\x02storages")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/hostname"
        archive.addfile(link)
    content = (tmp_path / "x.pt").read_bytes()
    start = content.index(b"\x02storages") if not content.startswith(b"\x80") else 0
    (tmp_path / "x.pt").write_bytes(content[start:])
    with pytest.raises(ValueError, match=r"tar form of before 2017|neither safetensors nor|cannot be read"):
        weights.read_weights(tmp_path / "x.pt")

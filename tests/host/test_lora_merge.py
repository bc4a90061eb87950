"""Merged model files: loaded by the real host they give the numbers that VideoX-Fun recorded; types, shards, interruptions, refusals."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from pathlib import Path

import pytest

pytest.importorskip("torch")
comfy_sd = pytest.importorskip("comfy.sd", reason="needs ComfyUI on the path")

import comfy.model_management  # noqa: E402
import folder_paths  # noqa: E402
import torch  # noqa: E402
from safetensors import safe_open  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

from reward_lab.host import merge_write, stream_file  # noqa: E402
from reward_lab.host.lora_command import main  # noqa: E402
from reward_lab.host.lora_merge import MergeSettings, merge  # noqa: E402
from reward_lab.host.lora_rows import LoraRow, parse_rows  # noqa: E402
from reward_lab.host.weight_source import open_source  # noqa: E402
from reward_lab.lora_train.safetensors_file import TensorSpec, header_bytes  # noqa: E402
from reward_lab.nodes.loras import MergeLoRA  # noqa: E402

pytestmark = pytest.mark.host

TOLERANCE = 1e-4  # norm of the difference over norm of the expected output, from the fixtures' README
# bf16 keeps 2^-9 a rounding, fp16 2^-12, e4m3 2^-5 on average; the network of three blocks adds the roundings of its layers up. Measured: 0.0037, 0.0004
# and 0.033 (0.040 from an fp8 base), by chance 0.0064, 0.0007 and 0.045. Without its LoRA an output is 0.41 away.
RATIO = {"bf16": 0.01, "fp16": 0.0015, "fp32": TOLERANCE, "fp8_scaled": 0.06, "fp8_scaled_old": 0.06}


@pytest.fixture(scope="module")
def fixtures(shared_fixtures: Path) -> Path:
    return shared_fixtures / "videoxfun_lora"


@pytest.fixture(scope="module")
def expected(fixtures: Path) -> dict[str, torch.Tensor]:
    return load_file(fixtures / "expected.safetensors")


@pytest.fixture(scope="module")
def inputs(fixtures: Path) -> dict[str, torch.Tensor]:
    return load_file(fixtures / "inputs.safetensors")


def lora(fixtures: Path, expert: str, reward: str) -> str:
    return str(fixtures / f"Wan2.2-Fun-A14B-InP-{expert}-noise-{reward}.safetensors")


def rows_for(fixtures: Path, expert: str, **strengths: float) -> list[LoraRow]:
    sides = {"high": 0.0, "low": 0.0}
    return [LoraRow(file=lora(fixtures, expert, {"hps": "HPS2.1", "mps": "MPS"}[reward]), **{**sides, expert: value}) for reward, value in strengths.items()]


def predict(path: Path, inputs: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    """Load a model file with the host and return its velocity, computed in fp32."""
    model = comfy_sd.load_diffusion_model(str(path), model_options={} if "fp8" in path.name else {"dtype": torch.float32})
    comfy.model_management.load_models_gpu([model], force_full_load=True)
    dtype = model.model.get_dtype_inference()
    latent = torch.cat([inputs[f"{name}.latent"], inputs[f"{name}.concat"]], dim=1)
    with torch.no_grad():
        return model.model.diffusion_model(latent.to(dtype), inputs[f"{name}.timestep"], inputs[f"{name}.context"].to(dtype)).float()


def ratio(actual: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((actual - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("expert", ["high", "low"])
def test_merged_files_give_the_recorded_outputs(fixtures: Path, tmp_path: Path, inputs, expected, expert: str) -> None:
    for case, strengths in {"none": {}, "hps_0.55": {"hps": 0.55}, "mps_1.0": {"mps": 1.0}, "hps_0.7+mps_0.3": {"hps": 0.7, "mps": 0.3}}.items():
        done = merge(fixtures / f"base_{expert}.safetensors", rows_for(fixtures, expert, **strengths), tmp_path / f"{case}.safetensors", MergeSettings(),
                     expert=expert)  # fmt: skip
        assert done.changed == (30 if strengths else 0) and done.converted == 0
        assert done.warnings == (() if strengths else ("no row acts on this expert: the weights are those of the base",)) or "MPS" in done.warnings[0]
        for number in (0, 1):
            assert ratio(predict(done.path, inputs, f"{expert}.{number}"), expected[f"{expert}.{number}.{case}"]) <= TOLERANCE, case


def test_what_no_row_changes_is_copied_byte_by_byte(fixtures: Path, tmp_path: Path) -> None:
    base = {**load_file(fixtures / "base_high.safetensors"), "some.table": torch.arange(7), "half": torch.full((3,), 0.1, dtype=torch.float16)}
    with safe_open(fixtures / "base_high.safetensors", "pt") as opened:
        save_file(base, tmp_path / "base-high.safetensors", metadata={**opened.metadata(), "note": "kept"})
    done = merge(tmp_path / "base-high.safetensors", rows_for(fixtures, "high", hps=1.0), tmp_path / "out.safetensors", MergeSettings(), expert="high")
    merged = load_file(done.path)
    assert merged.keys() == base.keys()
    assert sum(not torch.equal(merged[key], value) for key, value in base.items()) == 30
    with safe_open(done.path, "pt") as opened:
        metadata = opened.metadata()
    assert metadata["note"] == "kept" and metadata["reward_lab_expert"] == "high" and "config" in metadata
    assert json.loads(metadata["reward_lab_merged"]) == [{"file": Path(lora(fixtures, "high", "HPS2.1")).name, "strengths": [1.0]}]


@pytest.mark.parametrize("dtype", [name for name in RATIO if name != "fp32"])
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_every_type_loads_in_the_host(fixtures: Path, tmp_path: Path, inputs, expected, dtype: str, rounding: str) -> None:
    settings = MergeSettings(dtype=dtype, rounding=rounding)
    done = merge(fixtures / "base_high.safetensors", rows_for(fixtures, "high", hps=1.0), tmp_path / f"{dtype}.safetensors", settings, expert="high")
    header = open_source(done.path).headers[done.path]
    scaled = sorted(key for key, kind in header.dtypes.items() if kind == "F8_E4M3" and key.endswith(".weight"))
    if dtype.startswith("fp8"):
        assert scaled == sorted(key for key in header.shapes if key.startswith("blocks.") and key.endswith(".weight") and len(header.shapes[key]) == 2)
        end = ".weight_scale" if dtype == "fp8_scaled" else ".scale_weight"
        assert sorted(key for key in header.shapes if key.endswith(end)) == sorted(key.replace(".weight", end) for key in scaled)
        assert ("scaled_fp8" in header.shapes) == (dtype == "fp8_scaled_old")
        assert sum(key.endswith(".comfy_quant") for key in header.shapes) == (len(scaled) if dtype == "fp8_scaled" else 0)
    else:
        assert set(header.dtypes.values()) == {"BF16" if dtype == "bf16" else "F16"} and not scaled
    wanted = expected["high.0.hps_1.0"]
    # Stochastic rounding moves single numbers by up to a whole step where the nearest moves them by half of one: root of 2 to twice as much.
    assert ratio(predict(done.path, inputs, "high.0"), wanted) <= RATIO[dtype] * (2 if rounding == "stochastic" else 1)
    assert ratio(expected["high.0.none"], wanted) > 0.25


@pytest.mark.parametrize("generation", ["fp8_scaled", "fp8_scaled_old", "metadata"])
def test_scaled_fp8_bases_of_both_generations(fixtures: Path, tmp_path: Path, inputs, expected, generation: str) -> None:
    base, plain = tmp_path / "fp8-high.safetensors", fixtures / "base_high.safetensors"
    merge(plain, [], base, MergeSettings(dtype="fp8_scaled" if generation == "metadata" else generation), expert="high")
    if generation == "metadata":  # the same markers, all of them in the file's metadata
        tensors = load_file(base)
        with safe_open(base, "pt") as opened:
            metadata = opened.metadata()
        layers = {key.removesuffix(".comfy_quant"): json.loads(bytes(tensors.pop(key).tolist())) for key in list(tensors) if key.endswith(".comfy_quant")}
        save_file(tensors, base, metadata={**metadata, "_quantization_metadata": json.dumps({"layers": layers})})
    source = open_source(base)
    assert len(source.scales) == len(source.shapes) - sum(key not in source.scales for key in source.shapes) == 30
    rows = rows_for(fixtures, "high", hps=1.0)
    for dtype in ("same", "fp32", "bf16", "fp8_scaled", "fp8_scaled_old"):
        done = merge(base, rows, tmp_path / f"{dtype}-fp8.safetensors", MergeSettings(dtype=dtype), expert="high")
        # The roundings of the base stay in the sum, whatever type it is stored in.
        assert ratio(predict(done.path, inputs, "high.0"), expected["high.0.hps_1.0"]) <= RATIO["fp8_scaled"], dtype
        merged = open_source(done.path)
        for weight in ("blocks.0.self_attn.q.weight", "blocks.2.ffn.0.weight"):
            wanted = merge_dense(source.read(weight), fixtures, weight) if "ffn" not in weight else source.read(weight)
            # fp32 sums of 8 products; bf16 keeps 2^-9; e4m3 2^-5 on average and 2^-4 at most.
            allowed = {"fp32": 1e-6, "bf16": 2**-8}.get(dtype, 2**-4) if "ffn" not in weight or dtype in ("bf16",) else 1e-7
            assert ratio(merged.read(weight), wanted) <= allowed, (dtype, weight)
    old_keys = merge_keys(tmp_path / "fp8_scaled_old-fp8.safetensors")
    assert "scaled_fp8" in old_keys and not any(key.endswith((".comfy_quant", ".weight_scale")) for key in old_keys)
    assert not any(key.endswith((".comfy_quant", "scaled_fp8", "scale_weight", "weight_scale")) for key in merge_keys(tmp_path / "bf16-fp8.safetensors"))


def merge_keys(path: Path) -> list[str]:
    with safe_open(path, "pt") as opened:
        return list(opened.keys())


def merge_dense(weight: torch.Tensor, fixtures: Path, name: str) -> torch.Tensor:
    tensors = load_file(lora(fixtures, "high", "HPS2.1"))
    key = "lora_unet__" + name.removesuffix(".weight").replace(".", "_")
    return weight + 0.5 * tensors[f"{key}.lora_up.weight"].float() @ tensors[f"{key}.lora_down.weight"].float()


def test_the_order_of_rows_and_of_runs_changes_no_byte(fixtures: Path, tmp_path: Path) -> None:
    rows = [dataclasses.replace(row, blocks=blocks) for row, blocks in zip(rows_for(fixtures, "low", hps=0.6, mps=0.3), ("0:0.5, rest:0", ""), strict=True)]
    settings = MergeSettings(dtype="bf16", rounding="stochastic", seed=3)
    outputs = []
    for number, order in enumerate((rows, rows[::-1])):
        done = merge(fixtures / "base_low.safetensors", order, tmp_path / f"{number}.safetensors", settings, expert="low")
        outputs.append(done.path.read_bytes())
    assert outputs[0] == outputs[1]
    other = merge(fixtures / "base_low.safetensors", rows, tmp_path / "seed.safetensors", dataclasses.replace(settings, seed=4), expert="low")
    first, second = load_file(tmp_path / "0.safetensors"), load_file(other.path)
    assert not torch.equal(first["blocks.1.self_attn.q.weight"], second["blocks.1.self_attn.q.weight"])


@pytest.mark.parametrize("settings", [MergeSettings(dtype="bf16", rounding="stochastic"), MergeSettings(dtype="fp8_scaled")], ids=lambda one: one.dtype)
def test_large_weights_go_in_pieces(fixtures: Path, tmp_path: Path, monkeypatch, settings: MergeSettings) -> None:
    """All kinds row by row, but DoRA over the inputs whole; the same numbers as in one piece."""
    shapes = {"q": (96, 96), "k": (96, 96), "v": (96, 96), "o": (96, 96)}
    parts = {
        "q": {"hada_w1_a": (96, 2), "hada_w1_b": (2, 96), "hada_w2_a": (96, 3), "hada_w2_b": (3, 96)},
        "k": {"lokr_w1_a": (8, 2), "lokr_w1_b": (2, 8), "lokr_w2": (12, 12), "alpha": ()},
        "v": {"lora_A.weight": (4, 96), "lora_B.weight": (96, 4), "dora_scale": (96, 1)},
        "o": {"diff": shapes["o"], "diff_b": (96,)},
    }
    generator = torch.Generator().manual_seed(1)
    tensors = {f"blocks.1.self_attn.{layer}.{part}": torch.rand(shape, generator=generator) for layer, names in parts.items() for part, shape in names.items()}
    tensors |= {f"blocks.1.cross_attn.q.{part}": torch.rand(shape, generator=generator) for part, shape in parts["v"].items()}
    tensors["blocks.1.cross_attn.q.dora_scale"] = torch.rand(1, 96, generator=generator)
    save_file({**tensors, "patch_embedding.diff": torch.rand(96, 36, 1, 2, 2, generator=generator)}, tmp_path / "kinds.safetensors")
    rows = [*rows_for(fixtures, "high", hps=0.5), LoraRow(file=str(tmp_path / "kinds.safetensors"), high=0.3, low=0.0)]
    whole = merge(fixtures / "base_high.safetensors", rows, tmp_path / "whole.safetensors", settings, expert="high")
    monkeypatch.setattr(merge_write, "PIECE_NUMBERS", 1000)
    sizes = []
    original = merge_write.WeightSource.read
    monkeypatch.setattr(merge_write.WeightSource, "read", lambda self, weight, rows=None: sizes.append((weight, rows)) or original(self, weight, rows))
    pieces = merge(fixtures / "base_high.safetensors", rows, tmp_path / "pieces.safetensors", settings, expert="high")
    wholes = {weight for weight, size in sizes if size is None}
    assert "blocks.1.cross_attn.q.weight" in wholes and not any(f"blocks.1.self_attn.{layer}.weight" in wholes for layer in "qkvo")
    assert pieces.lost == pytest.approx(whole.lost, rel=1e-3)
    first, second = load_file(whole.path), load_file(pieces.path)
    for key, value in first.items():
        # Sums of another size may differ in the last bit of fp32, which seldom moves a rounding.
        assert float((value.float() != second[key].float()).float().mean()) < 0.01, key


class Stop(Exception):
    pass


def stop_after(count: int):
    calls = []

    def progress(_done: int, _of: int) -> None:
        calls.append(1)
        if len(calls) == count:
            raise Stop

    return progress


@pytest.mark.parametrize("shard_bytes", [0, 400_000])
@pytest.mark.parametrize("is_killed", [False, True])
def test_an_interrupted_merge_is_taken_up(fixtures: Path, tmp_path: Path, monkeypatch, shard_bytes: int, is_killed: bool) -> None:
    base, rows = fixtures / "base_high.safetensors", rows_for(fixtures, "high", hps=0.5)
    settings = MergeSettings(dtype="fp8_scaled", rounding="stochastic", shard_bytes=shard_bytes)
    whole = merge(base, rows, tmp_path / "whole.safetensors", settings, expert="high")
    monkeypatch.setattr(stream_file, "SYNC_BYTES", 50_000)
    target = tmp_path / "out.safetensors"
    if is_killed:  # nothing is brought to the disk any more, and the last write is torn
        monkeypatch.setattr(stream_file.StreamFile, "pause", lambda self: self._file.close())
    with pytest.raises(Stop):
        merge(base, rows, target, settings, expert="high", progress=stop_after(60))
    assert not target.exists() and not target.with_name("out.safetensors.index.json").exists()
    (partial,) = tmp_path.glob("out*.partial")
    if is_killed:
        with partial.open("ab") as file:
            file.write(b"torn")
    read = []
    original = merge_write.WeightSource.read
    monkeypatch.setattr(merge_write.WeightSource, "read", lambda self, weight, rows=None: read.append(weight) or original(self, weight, rows))
    done = merge(base, rows, target, settings, expert="high")
    assert done.resumed > 20 and 0 < len(read) < 60 and not list(tmp_path.glob("*partial*"))
    for mine, theirs in zip(done.files, whole.files, strict=True):
        assert mine.read_bytes() == theirs.read_bytes()
    read.clear()
    assert merge(base, rows, target, settings, expert="high").was_there and not read


def test_a_partial_file_of_other_rows_is_not_continued(fixtures: Path, tmp_path: Path) -> None:
    base, target = fixtures / "base_high.safetensors", tmp_path / "out.safetensors"
    with pytest.raises(Stop):
        merge(base, rows_for(fixtures, "high", hps=0.5), target, MergeSettings(), expert="high", progress=stop_after(60))
    done = merge(base, rows_for(fixtures, "high", hps=0.6), target, MergeSettings(), expert="high")
    straight = merge(base, rows_for(fixtures, "high", hps=0.6), tmp_path / "straight.safetensors", MergeSettings(), expert="high")
    assert done.resumed == 0 and done.path.read_bytes() == straight.path.read_bytes()


def test_a_file_that_is_there_stays_whole_until_the_new_one_is(fixtures: Path, tmp_path: Path) -> None:
    base, target = fixtures / "base_high.safetensors", tmp_path / "out.safetensors"
    shutil.copy(base, target)
    with pytest.raises(ValueError, match="is there already"):
        merge(base, rows_for(fixtures, "high", hps=0.5), target, MergeSettings(), expert="high")
    with pytest.raises(Stop):
        merge(base, rows_for(fixtures, "high", hps=0.5), target, MergeSettings(overwrite=True), expert="high", progress=stop_after(60))
    assert target.read_bytes() == base.read_bytes()
    assert merge(base, rows_for(fixtures, "high", hps=0.5), target, MergeSettings(overwrite=True), expert="high").resumed > 0
    assert target.read_bytes() != base.read_bytes()


def test_a_full_disk_is_told_before_the_start(fixtures: Path, tmp_path: Path, monkeypatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(merge_write.shutil, "disk_usage", lambda _folder: usage._replace(free=64_000_000))
    with pytest.raises(ValueError, match="needs 0.07 GB more"):
        merge(fixtures / "base_high.safetensors", rows_for(fixtures, "high", hps=0.5), tmp_path / "out.safetensors", MergeSettings(), expert="high")
    assert list(tmp_path.iterdir()) == []


def test_shards_with_an_index_are_written_and_joined(fixtures: Path, tmp_path: Path) -> None:
    base, rows = fixtures / "base_low.safetensors", rows_for(fixtures, "low", mps=1.0)
    straight = merge(base, rows, tmp_path / "straight.safetensors", MergeSettings(), expert="low")
    sharded = merge(base, rows, tmp_path / "part.safetensors", MergeSettings(shard_bytes=500_000), expert="low")
    assert len(sharded.files) > 2 and all(path.stat().st_size < 520_000 for path in sharded.files) and sharded.index.name == "part.safetensors.index.json"
    index = json.loads(sharded.index.read_text(encoding="utf-8"))
    wanted = load_file(straight.path)
    assert index["weight_map"].keys() == wanted.keys() and index["metadata"]["total_size"] == sum(value.nbytes for value in wanted.values())
    found = {key: value for path in sharded.files for key, value in load_file(path).items()}
    assert all(torch.equal(found[key], value) for key, value in wanted.items())
    joined = merge(sharded.index, [], tmp_path / "joined.safetensors", MergeSettings(), expert="low")
    assert all(torch.equal(value, wanted[key]) for key, value in load_file(joined.path).items())
    with safe_open(joined.path, "pt") as opened:
        assert "config" in opened.metadata()  # so that the host builds the right model


def test_a_model_larger_than_the_memory_is_read(fixtures: Path, tmp_path: Path) -> None:
    """The safetensors library maps the whole file for each tensor, which Linux refuses when it is larger than the memory."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    weights = load_file(fixtures / "base_high.safetensors")
    specs = [TensorSpec(key=key, dtype="F32", shape=tuple(value.shape)) for key, value in weights.items()]
    specs.append(TensorSpec(key="filler", dtype="U8", shape=(3 * memory,)))
    with (tmp_path / "large.safetensors").open("wb") as file:
        file.write(header_bytes(specs, {}))
        for value in weights.values():
            file.write(value.numpy().tobytes())
        file.truncate(file.tell() + 3 * memory)  # a hole, which takes no room
    source = open_source(tmp_path / "large.safetensors")
    assert all(torch.equal(source.read(weight), value) for weight, value in weights.items())
    assert torch.equal(source.read("blocks.0.ffn.0.weight", slice(3, 70)), weights["blocks.0.ffn.0.weight"][3:70])


def test_refusals_leave_nothing_behind(fixtures: Path, tmp_path: Path) -> None:
    base, out = fixtures / "base_high.safetensors", tmp_path / "out.safetensors"
    save_file({**load_file(base), "blocks.0.self_attn.q.weight": torch.zeros(96, 48, dtype=torch.uint8)}, tmp_path / "packed.safetensors")
    q = "blocks.0.self_attn.q.weight"
    save_file({**load_file(base), q: torch.zeros(96, 96).to(torch.float8_e4m3fn), f"{q}_scale": torch.ones(96, 3)}, tmp_path / "blocks.safetensors")
    broken = {**load_file(base)}
    broken["blocks.0.self_attn.q.weight"] = torch.full((96, 96), float("nan"))
    save_file(broken, tmp_path / "broken.safetensors")
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + bytes(100))
    row = rows_for(fixtures, "high", hps=1.0)
    curve = parse_rows(json.dumps([{"file": lora(fixtures, "high", "HPS2.1"), "high": 1.0, "curve": "ramp", "application": "bypass"}]))
    before = sorted(tmp_path.iterdir())
    for model, rows, target, told in (
        (base, curve, out, "strength over sigma"),
        (base, row, base, "is one of the files that are merged"),
        (base, row, tmp_path / "no" / "out.safetensors", "does not exist"),
        (base, row, tmp_path / "out.gguf", "must end in .safetensors"),
        (tmp_path / "model.gguf", row, out, "GGUF"),
        (tmp_path / "packed.safetensors", row, out, "does not fit|quantised in a format"),
        (tmp_path / "blocks.safetensors", row, out, "quantised in a format"),
        (fixtures / Path(lora(fixtures, "high", "HPS2.1")).name, row, out, "no blocks of a Wan model"),
        (base, [dataclasses.replace(row[0], file=str(tmp_path / "absent.safetensors"))], out, "does not exist"),
        (base, [dataclasses.replace(row[0], blocks="7:1")], out, "blocks that are not there"),
    ):
        with pytest.raises(ValueError, match=told):
            merge(model, rows, target, MergeSettings(overwrite=True), expert="high")
        assert sorted(tmp_path.iterdir()) == before, told
    with pytest.raises(ValueError, match="blocks.0.self_attn.q.weight cannot be merged: it holds NaN"):
        merge(tmp_path / "broken.safetensors", row, out, MergeSettings(), expert="high")
    assert not out.exists()
    for settings in ({"dtype": "int4"}, {"rounding": "up"}, {"shard_bytes": -1}):
        with pytest.raises(ValueError, match=next(iter(settings))):
            MergeSettings(**settings)


def test_the_command(fixtures: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    arguments = ["merge", "--base", str(fixtures / "base_high.safetensors"), "--row", f"{lora(fixtures, 'high', 'HPS2.1')}:0.5", "--dtype", "bf16",
                 "--out", str(tmp_path / "out.safetensors"), "--json"]  # fmt: skip
    status = main(arguments)
    data = json.loads(capsys.readouterr().out)
    assert (status, data["verdict"], data["changed"], data["was_there"]) == (0, "ok", 30, False) and 0 < data["lost"] < 0.1
    assert main(arguments) == 0 and json.loads(capsys.readouterr().out)["was_there"]
    status = main([*arguments[:-1], "--rounding", "stochastic", "--json"])
    assert status == 2 and "is there already" in json.loads(capsys.readouterr().out)["reason"]


def test_the_node(fixtures: Path, tmp_path: Path, monkeypatch) -> None:
    for name in ("diffusion_models", "loras"):
        monkeypatch.setitem(folder_paths.folder_names_and_paths, name, ([str(fixtures)], {".safetensors"}))
    monkeypatch.setattr(folder_paths, "get_output_directory", lambda: str(tmp_path))
    settings = {"rounding": "nearest", "seed": 0, "shard_gb": 0.0, "name": "", "overwrite": False, "dtype": "same"}
    rows = json.dumps([{"file": Path(lora(fixtures, "low", "HPS2.1")).name, "high": 0.9, "low": 0.5}])
    result = MergeLoRA.execute("base_low.safetensors", rows, "auto", **settings)
    assert Path(result.args[0]) == tmp_path / "diffusion_models" / "base_low-merged.safetensors" and Path(result.args[0]).is_file()
    assert "at 0.5: applied 90 of 90 keys" in result.args[1] and result.ui["text"] == [result.args[1]]
    assert "curve" in MergeLoRA.validate_inputs('[{"file": "x", "curve": 5}]')
    for name in ("../x", "a/b", ".hidden", 'a"b'):
        with pytest.raises(ValueError, match="no file name"):
            MergeLoRA.execute("base_low.safetensors", rows, "low", **{**settings, "name": name})
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "diffusion_models", ([str(tmp_path)], {".safetensors"}))
    shutil.copy(fixtures / "base_low.safetensors", tmp_path / "silent.safetensors")
    with pytest.raises(ValueError, match="Set expert to high or low"):
        MergeLoRA.execute("silent.safetensors", rows, "auto", **settings)

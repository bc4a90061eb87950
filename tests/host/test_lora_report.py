"""Reports, sizes of changes, heat maps and extraction: against dense arithmetic and against the numbers of VideoX-Fun."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

pytest.importorskip("torch")
comfy_sd = pytest.importorskip("comfy.sd", reason="needs ComfyUI on the path")

import numpy as np  # noqa: E402
import torch  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

from reward_lab.host.lora_base import base_from_file, base_from_model  # noqa: E402
from reward_lab.host.lora_extract import extract, low_rank  # noqa: E402
from reward_lab.host.lora_file import read_lora  # noqa: E402
from reward_lab.host.lora_heatmap import change_map, colour, draw  # noqa: E402
from reward_lab.host.lora_inspect import inspect_files  # noqa: E402
from reward_lab.host.lora_reasons import other_model  # noqa: E402
from reward_lab.host.lora_report import difference, inspect  # noqa: E402
from reward_lab.host.lora_slots import repeat_warnings, slot_warnings  # noqa: E402
from reward_lab.host.weight_source import open_source  # noqa: E402

pytestmark = pytest.mark.host

HIGH_HPS, LOW_MPS = "Wan2.2-Fun-A14B-InP-high-noise-HPS2.1.safetensors", "Wan2.2-Fun-A14B-InP-low-noise-MPS.safetensors"


@pytest.fixture(scope="module")
def fixtures(shared_fixtures: Path) -> Path:
    return shared_fixtures / "videoxfun_lora"


@pytest.fixture(scope="module")
def manifest(fixtures: Path) -> dict:
    return json.loads((fixtures / "manifest.json").read_text(encoding="utf-8"))["loras"]


@pytest.fixture(scope="module")
def bases(fixtures: Path):
    return {expert: base_from_file(fixtures / f"base_{expert}.safetensors") for expert in ("high", "low")}


def write(folder: Path, name: str, tensors: dict[str, torch.Tensor], **metadata: str) -> Path:
    save_file(tensors, folder / name, metadata=metadata or None)
    return folder / name


def pair(layer: str, *, width: int = 96, rank: int = 4) -> dict[str, torch.Tensor]:
    return {f"{layer}.lora_A.weight": torch.randn(rank, width), f"{layer}.lora_B.weight": torch.randn(width, rank)}


def test_every_recorded_file(fixtures: Path, manifest: dict, bases) -> None:
    for name, recorded in manifest.items():
        report = inspect(fixtures / name, bases[recorded["expert"]]).to_dict()
        assert {key: report[key] for key in ("expert", "rank", "alpha", "modules_applied", "modules_total", "keys_applied", "verdict", "layout")} == {
            "expert": recorded["expert_by_file_name"],
            "rank": recorded["rank"],
            "alpha": recorded["alpha"],
            "modules_applied": recorded["modules"],
            "modules_total": recorded["modules"],
            "keys_applied": recorded["tensors"],
            "verdict": "ok",
            "layout": "videox-fun",
        }
        # The manifest gives six digits.
        assert report["relative_norm"] == pytest.approx(recorded["relative_change"], abs=1e-6)
        assert report["warnings"] == ([] if "low-noise-MPS" not in name else report["warnings"])


def test_without_a_base_the_file_is_judged_by_itself(fixtures: Path) -> None:
    report = inspect(fixtures / HIGH_HPS)
    assert (report.verdict, report.modules_applied, report.relative_norm, report.base) == ("ok", 30, None, "")
    assert report.change_norm > 0 and report.memory_bytes == sum(value.nbytes for value in load_file(fixtures / HIGH_HPS).values())
    assert "layers: 30 of 30 applied; keys: 90 of 90" in report.text() and "rank 8, alpha 4" in report.text()


def test_sizes_of_all_adapter_kinds_against_dense_arithmetic(bases, tmp_path: Path) -> None:
    layers = [f"blocks.0.self_attn.{name}" for name in "qkvo"]
    low = pair(layers[0]) | {f"{layers[0]}.alpha": torch.tensor(2.0)}
    loha = {f"{layers[1]}.hada_{name}": torch.randn(*shape) for name, shape in (("w1_a", (96, 2)), ("w1_b", (2, 96)), ("w2_a", (96, 3)), ("w2_b", (3, 96)))}
    lokr = {f"{layers[2]}.lokr_w1": torch.randn(4, 6), f"{layers[2]}.lokr_w2": torch.randn(24, 16)}
    dora = pair(layers[3]) | {f"{layers[3]}.dora_scale": torch.rand(96, 1) + 0.5}
    diff = {"blocks.1.norm3.diff": torch.randn(96), "blocks.1.modulation.diff": torch.randn(1, 6, 96), "blocks.1.ffn.0.diff_b": torch.randn(224)}
    path = write(tmp_path, "all.safetensors", {f"diffusion_model.{key}": value for key, value in (low | loha | lokr | dora | diff).items()})
    base = bases["high"]
    weight = base.read(f"diffusion_model.{layers[3]}.weight")
    changed = weight + dora[f"{layers[3]}.lora_B.weight"] @ dora[f"{layers[3]}.lora_A.weight"]
    expected = {
        f"{layers[0]}.weight": (low[f"{layers[0]}.lora_B.weight"] @ low[f"{layers[0]}.lora_A.weight"]) * 0.5,
        f"{layers[1]}.weight": (loha[f"{layers[1]}.hada_w1_a"] @ loha[f"{layers[1]}.hada_w1_b"])
        * (loha[f"{layers[1]}.hada_w2_a"] @ loha[f"{layers[1]}.hada_w2_b"]),
        f"{layers[2]}.weight": torch.kron(lokr[f"{layers[2]}.lokr_w1"], lokr[f"{layers[2]}.lokr_w2"]),
        f"{layers[3]}.weight": changed * (dora[f"{layers[3]}.dora_scale"] / weight.norm(dim=1, keepdim=True)) - weight,
        "blocks.1.norm3.weight": diff["blocks.1.norm3.diff"],
        "blocks.1.modulation": diff["blocks.1.modulation.diff"],
        "blocks.1.ffn.0.bias": diff["blocks.1.ffn.0.diff_b"],
    }
    report = inspect(path, base)
    assert {change.weight.removeprefix("diffusion_model.") for change in report.changes} == set(expected)
    for change in report.changes:
        name = change.weight.removeprefix("diffusion_model.")
        # fp32 arithmetic of the host against fp32 here: 1e-5 is a hundred roundings.
        assert change.change == pytest.approx(float(expected[name].norm()), rel=1e-5), name
        assert change.base == pytest.approx(float(base.read(change.weight).norm()), rel=1e-5), name
    assert dict(report.kinds) == {"diff": 3, "loha": 1, "lokr": 1, "lora": 2}
    alone = inspect(path)
    assert [change.change is None for change in alone.changes if "self_attn.o" in change.weight] == [True]
    assert any("DoRA" in warning for warning in alone.warnings)


def test_difference_of_two_files(fixtures: Path, tmp_path: Path, bases) -> None:
    same = difference(fixtures / HIGH_HPS, fixtures / HIGH_HPS)
    # The square of the distance is a difference of float64 numbers: its root is exact to 1e-8 of the norm.
    assert max(entry.difference / entry.first for entry in same) < 1e-7 and min(entry.cosine for entry in same) == pytest.approx(1.0)
    first, second = load_file(fixtures / HIGH_HPS), load_file(fixtures / LOW_MPS)
    name = "lora_unet__blocks_1_cross_attn_v"
    dense = [0.5 * file[f"{name}.lora_up.weight"].float() @ file[f"{name}.lora_down.weight"].float() for file in (first, second)]
    entry = next(entry for entry in difference(fixtures / HIGH_HPS, fixtures / LOW_MPS) if entry.weight.endswith("blocks.1.cross_attn.v.weight"))
    assert entry.difference == pytest.approx(float((dense[0] - dense[1]).norm()), rel=1e-5)
    assert entry.cosine == pytest.approx(float((dense[0] * dense[1]).sum() / dense[0].norm() / dense[1].norm()), abs=1e-5)
    one = write(tmp_path, "one.safetensors", pair("blocks.0.self_attn.q"))
    other = write(tmp_path, "other.safetensors", pair("blocks.0.self_attn.k"))
    assert [entry.cosine for entry in difference(one, other)] == [None, None]
    wide = write(tmp_path, "wide.safetensors", pair("blocks.0.self_attn.q", width=128))
    with pytest.raises(ValueError, match="different size"):
        difference(one, wide)
    assert "cannot be compared" in inspect_files([one, wide]).text()


def test_harmless_and_fatal_keys_are_told_apart(bases, tmp_path: Path) -> None:
    tensors = pair("diffusion_model.blocks.0.self_attn.q")
    for layer in ("blocks.0.cross_attn.k_img", "blocks.0.cross_attn.v_img", "img_emb.proj.1"):
        tensors |= pair(f"diffusion_model.{layer}")
    tensors |= pair("text_encoders.t5.block.0") | pair("diffusion_model.blocks.0.new_layer")
    report = inspect(write(tmp_path, "i2v.safetensors", tensors), bases["high"])
    assert (report.verdict, report.keys_applied, dict(report.left_out)) == ("ok", 2, {"image_branch": 6, "text_encoder": 2, "unknown": 2})
    assert any("nothing is lost" in warning for warning in report.warnings) and any("unknown keys left out" in warning for warning in report.warnings)


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        (["lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight"], "Flux"),
        (["transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight"], "Flux"),
        (["diffusion_model.double_blocks.0.img_mod.linear.lora_A.weight"], "HunyuanVideo"),
        (["lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_down.weight", "lora_unet_input_blocks_4_1_proj_in.lora_down.weight"], "SDXL"),
        (["lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight"], "Stable Diffusion"),
        (["transformer.transformer_blocks.0.img_mlp.net.2.lora_A.weight"], "Qwen-Image"),
        (["transformer.transformer_blocks.0.attn1.to_q.lora_A.weight"], "LTX-Video"),
        (["diffusion_model.blocks.0.adaln_modulation_self_attn.1.lora_A.weight"], "Cosmos"),
        (["joint_blocks.0.x_block.attn.qkv.lora_A.weight"], "Stable Diffusion 3"),
    ],
)
def test_other_models_are_named(keys: list[str], told: str, bases, tmp_path: Path) -> None:
    assert told in other_model(keys)
    report = inspect(write(tmp_path, "other.safetensors", {key: torch.ones(2, 2) for key in keys}), bases["high"])
    assert report.verdict == "refused" and told in report.reason and f"0 of {len(keys)} keys" in report.reason


def test_other_refusals_say_why(fixtures: Path, bases, tmp_path: Path) -> None:
    whole_model = inspect(fixtures / "base_high.safetensors", bases["high"])
    assert whole_model.verdict == "refused" and "merged already" in whole_model.reason
    small = inspect(write(tmp_path, "small.safetensors", pair("blocks.0.self_attn.q", width=1536)), bases["high"])
    assert small.verdict == "refused" and "1536 (Wan2.1 1.3B)" in small.reason
    alone = inspect(write(tmp_path, "5b.safetensors", pair("blocks.0.self_attn.q", width=3072)))
    assert alone.verdict == "ok" and any("Wan2.2 5B" in warning for warning in alone.warnings)
    text = inspect(write(tmp_path, "te.safetensors", pair("text_encoders.t5.block.0")), bases["high"])
    assert "for a text encoder" in text.reason
    # A key that is as long as a book must not become the message.
    long = inspect(write(tmp_path, "long.safetensors", pair("blocks.0.self_attn.q") | {"x" * 50_000: torch.ones(1)}), bases["high"])
    assert long.verdict == "ok" and max(map(len, long.warnings)) < 1000
    assert inspect(tmp_path / "absent.safetensors").reason.startswith(f"the LoRA {tmp_path}")


def test_warnings_about_the_slot_and_the_identity(bases, tmp_path: Path) -> None:
    high = write(tmp_path, "x-high-noise.safetensors", pair("blocks.0.self_attn.q"))
    assert any("the base is the low-noise expert" in warning for warning in inspect(high, bases["low"]).warnings)
    by_metadata = write(tmp_path, "x-high.safetensors", pair("blocks.0.self_attn.q"), reward_lab_expert="low")
    assert (inspect(by_metadata).expert, inspect(by_metadata).expert_source) == ("low", "metadata")
    silent = inspect(write(tmp_path, "x.safetensors", pair("blocks.0.self_attn.q")))
    assert silent.expert is None and "not known" in silent.text()
    zero = {key: value * ("lora_A" in key) for key, value in pair("blocks.0.self_attn.q").items()}
    assert any("changes nothing" in warning for warning in inspect(write(tmp_path, "zero.safetensors", zero)).warnings)
    linked = inspect(write(tmp_path, "Wan2.1-Fun-14B-InP-MPS.safetensors", pair("blocks.0.self_attn.q")))
    assert any("once linked" in warning for warning in linked.warnings)
    # The same file, saved under the name that the page promised: its feed-forward layers give it away.
    disguised = inspect(write(tmp_path, LOW_MPS, pair("blocks.0.self_attn.q") | pair("blocks.0.ffn.0")))
    assert any("probably the Wan2.1 file" in warning for warning in disguised.warnings)


def test_strengths_on_the_wrong_expert(tmp_path: Path) -> None:
    low = read_lora(write(tmp_path, "x-low-noise.safetensors", pair("blocks.0.self_attn.q")))
    silent = read_lora(write(tmp_path, "x.safetensors", pair("blocks.0.self_attn.q")))
    assert slot_warnings(low, {"high": 0.0, "low": 1.0}) == slot_warnings(silent, {"high": 1.0, "low": 0.0}) == []
    assert "swap the two strengths" in slot_warnings(low, {"high": 1.0, "low": 0.0})[0]
    assert "acts on both experts" in slot_warnings(low, {"high": 1.0, "low": 1.0})[0]
    assert "both experts are given this same file" in slot_warnings(silent, {"high": 1.0, "low": 1.0})[0]
    high, low = {"high": 1.0, "low": 0.0}, {"high": 0.0, "low": 1.0}
    assert repeat_warnings([("a", high), ("b", low)]) == []
    assert "given to both experts" in repeat_warnings([("a", high), ("a", low)])[0]
    assert "strengths add up" in repeat_warnings([("a", high), ("a", high)])[0]


def test_report_of_a_loaded_model_ignores_what_is_merged_into_it(fixtures: Path, bases) -> None:
    import comfy.model_management
    import folder_paths

    from reward_lab.host.lora_patch import apply_rows
    from reward_lab.host.lora_rows import LoraRow

    before = folder_paths.folder_names_and_paths["loras"]
    folder_paths.folder_names_and_paths["loras"] = ([str(fixtures)], {".safetensors"})
    try:
        models = [
            comfy_sd.load_diffusion_model(str(fixtures / f"base_{expert}.safetensors"), model_options={"dtype": torch.float32}) for expert in ("high", "low")
        ]
        model = apply_rows(*models, [LoraRow(file=HIGH_HPS, high=1.0, low=0.0)]).model_high
    finally:
        folder_paths.folder_names_and_paths["loras"] = before
    comfy.model_management.load_models_gpu([model], force_full_load=True)
    from_model = inspect(fixtures / HIGH_HPS, base_from_model(model, "the high-noise expert", "high"))
    assert from_model.relative_norm == pytest.approx(inspect(fixtures / HIGH_HPS, bases["high"]).relative_norm, rel=1e-6)


def test_heat_map_shows_each_change_in_its_place(tmp_path: Path, bases) -> None:
    tensors = {f"blocks.1.cross_attn.k.{part}": value for part, value in (("lora_A.weight", torch.eye(4, 96)), ("lora_B.weight", torch.eye(96, 4)))}
    tensors |= {f"blocks.2.self_attn.q.{part}": value for part, value in (("lora_A.weight", torch.eye(4, 96)), ("lora_B.weight", 0.5 * torch.eye(96, 4)))}
    report = inspect(write(tmp_path, "two.safetensors", tensors))
    panel = change_map("x", report.changes)
    assert panel.kinds == ("self_attn.q", "cross_attn.k") and panel.blocks == 3 and panel.unit == "norm"
    assert dict(panel.values) == {("cross_attn.k", 1): pytest.approx(2.0), ("self_attn.q", 2): pytest.approx(1.0)}
    picture = np.asarray(draw([panel]))
    seen = {tuple(pixel) for pixel in picture.reshape(-1, 3)}
    assert colour(1.0) in seen and colour(0.5) in seen
    relative = change_map("x", inspect(tmp_path / "two.safetensors", bases["high"]).changes)
    assert relative.unit == "share"
    with pytest.raises(ValueError, match="nothing to draw"):
        draw([])


def test_colours_grow_brighter_with_the_value() -> None:
    brightness = [sum(weight * part for weight, part in zip((0.299, 0.587, 0.114), colour(step / 50), strict=True)) for step in range(51)]
    assert brightness == sorted(brightness) and colour(-1) == colour(0) and colour(2) == colour(1)


def test_panels_per_expert_and_difference(fixtures: Path, bases) -> None:
    both = inspect_files([fixtures / HIGH_HPS, fixtures / LOW_MPS], list(bases.values()))
    assert [(report.expert, report.base) for report in both.reports] == [("high", "base_high.safetensors"), ("low", "base_low.safetensors")]
    data = json.loads(json.dumps(both.to_dict(), allow_nan=False))
    assert data["file"] == HIGH_HPS and data["others"][0]["file"] == LOW_MPS and -1 <= data["difference"]["cosine"] <= 1
    assert data["difference"]["norm"] == pytest.approx(math.hypot(*data["difference"]["norms"]), rel=0.2)


@pytest.mark.parametrize("shape", [(40, 30), (1400, 1100)])
def test_low_rank_gives_back_a_matrix_of_that_rank(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(shape[0], 5, generator=generator) @ torch.randn(5, shape[1], generator=generator)
    up, down = low_rank(matrix, 5)
    # fp32 decompositions are good to about the square root of the side times 6e-8.
    assert float((up @ down - matrix).norm() / matrix.norm()) < 1e-5
    up, down = low_rank(matrix, 2)
    best = torch.linalg.svdvals(matrix)[2:].norm()
    assert float((up @ down - matrix).norm()) == pytest.approx(float(best), rel=1e-3)


def test_extraction_gives_back_the_lora_that_was_merged(fixtures: Path, tmp_path: Path) -> None:
    base, lora = load_file(fixtures / "base_high.safetensors"), load_file(fixtures / HIGH_HPS)
    full = dict(base)
    for key, up in lora.items():
        if key.endswith("lora_up.weight"):
            name = key.removeprefix("lora_unet__").removesuffix(".lora_up.weight")
            weight = next(weight for weight in base if weight.removesuffix(".weight").replace(".", "_") == name)
            full[weight] = base[weight] + 0.5 * up.float() @ lora[key.replace("lora_up", "lora_down")].float()
    full["blocks.0.norm3.weight"] = base["blocks.0.norm3.weight"] + 1.0
    # As sharded checkpoints with other prefixes, which is how full models are published.
    half = len(full) // 2
    shards = {"model-00001-of-00002.safetensors": dict(list(full.items())[:half]), "model-00002-of-00002.safetensors": dict(list(full.items())[half:])}
    for name, tensors in shards.items():
        save_file({f"model.diffusion_model.{key}": value for key, value in tensors.items()}, tmp_path / name)
    index = {"weight_map": {f"model.diffusion_model.{key}": name for name, tensors in shards.items() for key in tensors}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    done = extract(tmp_path, fixtures / "base_high.safetensors", tmp_path / "out-high-noise.safetensors", rank=8, dtype="fp32")
    # Rank 8 is what was merged; what is lost is the rounding of fp32.
    assert done.error < 1e-5 and (done.layers, done.whole, done.missing) == (30, 1, ())
    report = inspect(done.path, base_from_file(fixtures / "base_high.safetensors"))
    assert (report.layout, report.expert, report.modules_applied, report.ranks) == ("videox-fun", "high", 31, (8,))
    apart = {entry.weight: entry for entry in difference(done.path, fixtures / HIGH_HPS)}
    assert max(entry.difference / entry.second for entry in apart.values() if entry.second) < 1e-4
    rough = extract(tmp_path, fixtures / "base_high.safetensors", tmp_path / "rough.safetensors", rank=2, layout_name="peft")
    assert 0.1 < rough.error < 1.0 and inspect(rough.path).layout == "peft"
    assert f"{100 * rough.error:.3g} % of that difference is lost" in rough.text()


def test_extraction_refuses_before_it_works(fixtures: Path, tmp_path: Path) -> None:
    high = fixtures / "base_high.safetensors"
    out = tmp_path / "out.safetensors"
    wide = write(tmp_path, "wide.safetensors", {"blocks.0.self_attn.q.weight": torch.zeros(8, 8)})
    foreign = write(tmp_path, "sd.safetensors", {"input_blocks.0.0.weight": torch.zeros(8, 8)})
    for arguments, told in (
        ({"full": high, "base": high, "rank": 4}, "hold the same weights"),
        ({"full": wide, "base": high, "rank": 4}, r"has shape \(8, 8\)"),
        ({"full": foreign, "base": high, "rank": 4}, "no blocks of a Wan model"),
        ({"full": high, "base": high, "rank": 0}, "rank is 0"),
        ({"full": high, "base": high, "rank": 4, "dtype": "fp8"}, "dtype is"),
        ({"full": tmp_path, "base": high, "rank": 4}, "Name the file"),
    ):
        with pytest.raises(ValueError, match=told):
            extract(target=out, **arguments)
    assert not out.exists()


def test_scaled_fp8_bases_are_read_in_their_own_scale(fixtures: Path, tmp_path: Path) -> None:
    base = load_file(fixtures / "base_high.safetensors")
    scaled = {}
    for key, value in base.items():
        if key.endswith("self_attn.q.weight"):
            scale = value.abs().max() / 448
            scaled[key], scaled[key.replace(".weight", ".scale_weight")] = (value / scale).to(torch.float8_e4m3fn), scale
        else:
            scaled[key] = value
    source = open_source(write(tmp_path, "fp8.safetensors", scaled))
    found, expected = source.read("blocks.0.self_attn.q.weight"), base["blocks.0.self_attn.q.weight"]
    # e4m3 has three bits behind the point: relative rounding at most 1/16 of each number.
    assert float((found - expected).norm() / expected.norm()) < 1 / 16
    assert len(source.shapes) == len(base)

"""The recorded numbers of VideoX-Fun in every key layout and adapter form, through the real node and the real host model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("torch")
comfy_sd = pytest.importorskip("comfy.sd", reason="needs ComfyUI on the path")

import folder_paths  # noqa: E402
import torch  # noqa: E402
from safetensors import safe_open  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

from reward_lab.host.lora_convert import convert  # noqa: E402
from reward_lab.host.lora_keys import LAYOUTS  # noqa: E402
from reward_lab.nodes.loras import LoadLoRAs  # noqa: E402

pytestmark = pytest.mark.host

TOLERANCE = 1e-4  # norm of the difference over norm of the expected output, from the fixtures' README
FILES = {
    (expert, reward): f"Wan2.2-Fun-A14B-InP-{expert}-noise-{name}.safetensors"
    for expert in ("high", "low")
    for reward, name in (("hps", "HPS2.1"), ("mps", "MPS"))
}
Q = "blocks.0.self_attn.q"


@pytest.fixture(scope="module")
def fixtures(shared_fixtures: Path) -> Path:
    return shared_fixtures / "videoxfun_lora"


@pytest.fixture(scope="module")
def models(fixtures: Path):
    """Both tiny experts, loaded by the host in fp32."""
    return {
        expert: comfy_sd.load_diffusion_model(str(fixtures / f"base_{expert}.safetensors"), model_options={"dtype": torch.float32})
        for expert in ("high", "low")
    }


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder that the host takes for its LoRA folder."""
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "loras", ([str(tmp_path)], {".safetensors"}))
    return tmp_path


def apply(models, *rows: tuple[str, float, float]):
    return LoadLoRAs.execute(models["high"], models["low"], json.dumps([{"file": file, "high": high, "low": low} for file, high, low in rows]))


def predict(model, inputs: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    """Return the velocity of a MODEL, weights patched by the host."""
    import comfy.model_management

    comfy.model_management.load_models_gpu([model], force_full_load=True)
    with torch.no_grad():
        latent = torch.cat([inputs[f"{name}.latent"], inputs[f"{name}.concat"]], dim=1)
        return model.model.diffusion_model(latent, inputs[f"{name}.timestep"], inputs[f"{name}.context"])


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


def patched_weight(models, row: tuple[str, float, float], layer: str = Q) -> torch.Tensor:
    """Weight of one layer with a LoRA merged by the host."""
    model = apply(models, row).args[0]
    key = f"diffusion_model.{layer}.weight"
    return model.patch_weight_to_device(key, torch.device("cpu"), return_weight=True)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_every_recorded_output_in_every_layout(fixtures: Path, models, folder: Path, layout) -> None:
    inputs, expected = load_file(fixtures / "inputs.safetensors"), load_file(fixtures / "expected.safetensors")
    assert len(expected) == 24
    for file in FILES.values():
        done = convert(fixtures / file, folder / file, layout.name)
        assert (done.keys, done.source_layout) == (90 if layout.has_alpha else 60, "videox-fun")
    for expert, case in sorted({(expert, case) for expert, _, case in (name.split(".", 2) for name in expected)}):
        rows = [(part.split("_")[0], float(part.split("_")[1])) for part in case.split("+")] if case != "none" else []
        result = apply(
            models, *((FILES[expert, reward], strength if expert == "high" else 0.0, strength if expert == "low" else 0.0) for reward, strength in rows)
        )
        assert [row[f"applied_{expert}"] for row in result.ui["reward_lab_rows"]] == [90 if layout.has_alpha else 60] * len(rows)
        for number in (0, 1):
            actual = predict(result.args[0 if expert == "high" else 1], inputs, f"{expert}.{number}")
            assert relative_error(actual, expected[f"{expert}.{number}.{case}"]) <= TOLERANCE, (case, number)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_there_and_back_is_bit_equal(fixtures: Path, tmp_path: Path, layout) -> None:
    source = fixtures / FILES["low", "mps"]
    convert(source, tmp_path / "there.safetensors", layout.name)
    convert(tmp_path / "there.safetensors", tmp_path / "back.safetensors", "videox-fun")
    before, after = load_file(source), load_file(tmp_path / "back.safetensors")
    assert before.keys() == after.keys()
    for key, value in before.items():
        if layout.has_alpha or not key.endswith(("alpha", "lora_up.weight")):
            assert torch.equal(after[key], value) and after[key].dtype == value.dtype
    if not layout.has_alpha:
        # alpha 4 at rank 8 is folded in as a factor of exactly one half, so the product loses nothing.
        up = "lora_unet__blocks_0_self_attn_q.lora_up.weight"
        assert torch.equal(after[up], before[up] * 0.5) and float(after[up.replace("lora_up.weight", "alpha")]) == 8.0


def test_metadata_survive_a_conversion_and_tell_the_expert(fixtures: Path, tmp_path: Path) -> None:
    convert(fixtures / FILES["high", "hps"], tmp_path / "renamed.safetensors", "diffusers")
    with safe_open(tmp_path / "renamed.safetensors", "pt") as opened:
        metadata = opened.metadata()
    assert metadata["reward_lab_expert"] == "high" and metadata["reward_lab_layout"] == "diffusers"
    assert "sshs_model_hash" not in metadata


def test_refused_conversions_leave_nothing_behind(fixtures: Path, tmp_path: Path) -> None:
    source, there = fixtures / FILES["high", "hps"], tmp_path / "there.safetensors"
    there.write_bytes(b"mine")
    for target, layout, told in (
        (there, "peft", "is there already"),
        (tmp_path / "x.safetensors", "kohya", "There is no layout"),
        (tmp_path / "x.pt", "peft", "must end in .safetensors"),
        (tmp_path / "no" / "x.safetensors", "peft", "does not exist"),
    ):
        with pytest.raises(ValueError, match=told):
            convert(source, target, layout)
    save_file({"lora_unet_input_blocks_1_0.lora_up.weight": torch.ones(2, 2)}, tmp_path / "sd.safetensors")
    with pytest.raises(ValueError, match="Stable Diffusion"):
        convert(tmp_path / "sd.safetensors", tmp_path / "x.safetensors", "peft")
    assert there.read_bytes() == b"mine" and sorted(path.name for path in tmp_path.iterdir()) == ["sd.safetensors", "there.safetensors"]
    assert convert(source, there, "peft", overwrite=True).keys == 60


def base_weight(models, layer: str = Q) -> torch.Tensor:
    return models["high"].model.state_dict()[f"diffusion_model.{layer}.weight"].clone()


# fp32 sums of up to 96 products in another order: 1e-5 of the change is 100 times the rounding of one sum.
CLOSE = {"rtol": 1e-5, "atol": 1e-6}


def test_loha(models, folder: Path) -> None:
    w1_a, w1_b, w2_a, w2_b = torch.randn(96, 4), torch.randn(4, 96), torch.randn(96, 4), torch.randn(4, 96)
    tensors = {"hada_w1_a": w1_a, "hada_w1_b": w1_b, "hada_w2_a": w2_a, "hada_w2_b": w2_b, "alpha": torch.tensor(2.0)}
    save_file({f"lycoris_blocks_0_self_attn_q.{part}": value for part, value in tensors.items()}, folder / "loha.safetensors")
    expected = base_weight(models) + 0.3 * (2.0 / 4) * (w1_a @ w1_b) * (w2_a @ w2_b)
    torch.testing.assert_close(patched_weight(models, ("loha.safetensors", 0.3, 0.0)), expected, **CLOSE)


def test_lokr(models, folder: Path) -> None:
    w1, w2_a, w2_b = torch.randn(8, 8), torch.randn(12, 3), torch.randn(3, 12)
    tensors = {"lokr_w1": w1, "lokr_w2_a": w2_a, "lokr_w2_b": w2_b, "alpha": torch.tensor(1.5)}
    save_file({f"lycoris_blocks_0_attn1_to_q.{part}": value for part, value in tensors.items()}, folder / "lokr.safetensors")
    expected = base_weight(models) + 0.3 * (1.5 / 3) * torch.kron(w1, w2_a @ w2_b)
    torch.testing.assert_close(patched_weight(models, ("lokr.safetensors", 0.3, 0.0)), expected, **CLOSE)


@pytest.mark.parametrize(("key", "shape"), [("dora_scale", (96, 1)), ("lora_magnitude_vector.default.weight", (96,))])
def test_dora_as_the_host_computes_it(models, folder: Path, key: str, shape: tuple[int, ...]) -> None:
    down, up, scale = torch.randn(4, 96), torch.randn(96, 4), torch.rand(96) + 0.5
    name = "base_model.model.blocks.0.self_attn.q"
    save_file({f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up, f"{name}.{key}": scale.reshape(shape)}, folder / "dora.safetensors")
    base = base_weight(models)
    expected = (base + up @ down) * (scale[:, None] / (base.norm(dim=1, keepdim=True) + torch.finfo(torch.float32).eps))
    torch.testing.assert_close(patched_weight(models, ("dora.safetensors", 1.0, 0.0)), expected, **CLOSE)


def test_differences_of_weights_biases_and_modulation(fixtures: Path, models, folder: Path) -> None:
    """The host passes over bare parameters such as a block's modulation when it merges, so what counts is what the model computes."""
    changes = {
        "blocks.0.norm3.weight": ("diffusion_model.blocks.0.norm3.diff", torch.randn(96)),
        "blocks.0.self_attn.q.bias": ("diffusion_model.blocks.0.self_attn.q.diff_b", torch.randn(96)),
        "blocks.0.modulation": ("diffusion_model.blocks.0.diff_m", torch.randn(1, 6, 96)),
        "head.modulation": ("transformer.scale_shift_table.diff", torch.randn(1, 2, 96)),
        "patch_embedding.weight": ("diffusion_model.patch_embedding.diff", torch.randn(96, 36, 1, 2, 2)),
    }
    save_file(dict(changes.values()), folder / "diff.safetensors")
    result = apply(models, ("diff.safetensors", 0.5, 0.0))
    assert result.ui["reward_lab_rows"][0]["applied_high"] == 5
    base = load_file(fixtures / "base_high.safetensors")
    with safe_open(fixtures / "base_high.safetensors", "pt") as opened:
        metadata = opened.metadata()
    inputs = load_file(fixtures / "inputs.safetensors")
    plain = predict(models["high"], inputs, "high.1")
    actual = predict(result.args[0], inputs, "high.1")
    base.update({weight: base[weight] + 0.5 * change for weight, (_, change) in changes.items()})
    save_file(base, folder / "changed.safetensors", metadata=metadata)
    changed = comfy_sd.load_diffusion_model(str(folder / "changed.safetensors"), model_options={"dtype": torch.float32})
    expected = predict(changed, inputs, "high.1")
    assert relative_error(plain, expected) > 0.01
    assert relative_error(actual, expected) <= TOLERANCE


def test_alpha_absent_whole_number_per_key_and_in_the_metadata(models, folder: Path) -> None:
    down, up = torch.randn(4, 96), torch.randn(96, 4)
    pair = {f"blocks.0.self_attn.q.{part}": value for part, value in (("lora_A.weight", down), ("lora_B.weight", up))}
    adapter = {"transformer.lora_alpha": 2, "transformer.r": 4}
    cases = {
        "absent": (pair, None, 1.0),
        "whole": ({**pair, "blocks.0.self_attn.q.alpha": torch.tensor(8)}, None, 2.0),
        "shaped": ({**pair, "blocks.0.self_attn.q.alpha": torch.tensor([[1.0]])}, None, 0.25),
        "metadata": (pair, {"lora_adapter_metadata": json.dumps(adapter)}, 0.5),
        "rslora": (pair, {"lora_adapter_metadata": json.dumps({**adapter, "transformer.use_rslora": True})}, 1.0),
        "broken": (pair, {"lora_adapter_metadata": "{"}, 1.0),
    }
    for name, (tensors, metadata, scale) in cases.items():
        save_file(tensors, folder / f"{name}.safetensors", metadata=metadata)
        patched = patched_weight(models, (f"{name}.safetensors", 1.0, 0.0))
        torch.testing.assert_close(patched, base_weight(models) + scale * (up @ down), **CLOSE)


def test_rank_per_key(models, folder: Path) -> None:
    tensors = {}
    for rank, layer in ((2, "self_attn.q"), (16, "cross_attn.o")):
        tensors |= {f"blocks.0.{layer}.lora_A.weight": torch.randn(rank, 96), f"blocks.0.{layer}.lora_B.weight": torch.randn(96, rank)}
    save_file(tensors, folder / "ranks.safetensors")
    assert "rank 2–16" in apply(models, ("ranks.safetensors", 1.0, 0.0)).args[2]


@pytest.mark.parametrize(
    ("tensors", "told"),
    [
        ({"hada_w1_a": (96, 4), "hada_w1_b": (4, 96)}, "four matrices"),
        ({"hada_w1_a": (96, 4), "hada_w1_b": (3, 96), "hada_w2_a": (96, 4), "hada_w2_b": (4, 96)}, "ranks 4 and 3"),
        ({"lokr_w1": (8, 8), "lokr_w2": (12, 13)}, "104 inputs"),
        ({"lokr_w1": (8, 8)}, "two factors"),
        ({"lora_A.weight": (4, 96)}, "a down weight only"),
        ({"lora_A.weight": (4, 96), "lora_B.weight": (96, 5)}, "rank 4 in its down weight and 5"),
        ({"lora_A.weight": (4, 96), "lora_B.weight": (96, 4), "alpha": (2,)}, "alpha of shape"),
        ({"lora_A.weight": (4, 96), "lora_B.weight": (96, 4), "dora_scale": (5,)}, "DoRA scale"),
        ({"diff": (96, 95)}, "difference of shape"),
        ({"alpha": ()}, "nothing to apply but alpha"),
        ({"lora_A.weight": (4, 5120), "lora_B.weight": (5120, 4)}, r"5120 \(Wan 14B\) inputs"),
    ],
)
def test_shapes_that_the_host_would_pass_over_in_silence(models, folder: Path, tensors: dict[str, tuple[int, ...]], told: str) -> None:
    save_file({f"{Q}.{part}": torch.ones(shape) for part, shape in tensors.items()}, folder / "odd.safetensors")
    with pytest.raises(ValueError, match=told):
        apply(models, ("odd.safetensors", 1.0, 0.0))

"""LoRAs on GGUF weights: beside the weights, equal to dense arithmetic on the unpacked numbers.

The loader of GGUF files is another pack's (ComfyUI-GGUF, not shipped here). The stand-in below packs real Q8_0 blocks and plugs in where that pack does:
tensors with `tensor_type` and `tensor_shape`, linear layers that unpack in use, given to the host as `custom_operations`, and a model patcher of its own.
With REWARD_LAB_GGUF_PACK (that pack's folder) and the packages `gguf` and `tqdm` importable, all tests run on the real pack and a real file as well.
"""

from __future__ import annotations

import enum
import gc
import importlib
import importlib.util
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("torch")
comfy_sd = pytest.importorskip("comfy.sd", reason="needs ComfyUI on the path")

import comfy.lora  # noqa: E402
import comfy.model_management  # noqa: E402
import comfy.model_patcher  # noqa: E402
import comfy.ops  # noqa: E402
import comfy.utils  # noqa: E402
import folder_paths  # noqa: E402
import torch  # noqa: E402
from safetensors import safe_open  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

from reward_lab.host.lora_base import base_from_model  # noqa: E402
from reward_lab.host.lora_bypass import quantised_kind  # noqa: E402
from reward_lab.host.lora_command import main  # noqa: E402
from reward_lab.host.lora_report import inspect  # noqa: E402
from reward_lab.nodes.loras import LoadLoRAs  # noqa: E402

pytestmark = pytest.mark.host

LORA = "Wan2.2-Fun-A14B-InP-high-noise-HPS2.1.safetensors"
BLOCK = 32  # numbers that share a scale in Q8_0
REAL_PACK = os.environ.get("REWARD_LAB_GGUF_PACK", "")


class TensorType(enum.Enum):
    F32 = 0
    Q8_0 = 8


class Stored(torch.Tensor):
    """Numbers or Q8_0 bytes that keep their type and their real shape through what the host does with tensors."""

    tensor_type = TensorType.F32

    def __new__(cls, data: torch.Tensor, shape: tuple[int, ...], kind: TensorType) -> Stored:
        made = torch.Tensor._make_subclass(cls, data)
        made.tensor_shape, made.tensor_type, made.patches = torch.Size(shape), kind, []
        return made

    @property
    def shape(self) -> torch.Size:
        return getattr(self, "tensor_shape", self.size())

    def to(self, *args, **kwargs) -> Stored:
        made = super().to(*args, **kwargs)
        made.tensor_type, made.tensor_shape = self.tensor_type, self.shape
        made.patches = list(getattr(self, "patches", []))
        return made

    def detach(self) -> Stored:
        return self

    def clone(self, **_kwargs) -> Stored:
        return self


def pack(weight: torch.Tensor) -> Stored:
    """Pack a matrix: per 32 numbers one fp16 scale and 32 bytes."""
    blocks = weight.reshape(-1, BLOCK)
    scale = (blocks.abs().amax(dim=1, keepdim=True) / 127).half()
    numbers = torch.where(scale > 0, blocks / scale.float(), 0).round().clamp(-127, 127).to(torch.int8)
    data = torch.cat([scale.view(torch.uint8), numbers.view(torch.uint8)], dim=1)
    return Stored(data.reshape(weight.shape[0], -1), tuple(weight.shape), TensorType.Q8_0)


def unpack(packed: torch.Tensor) -> torch.Tensor:
    """Return the numbers, fp32."""
    if packed.tensor_type is not TensorType.Q8_0:
        return packed.as_subclass(torch.Tensor)
    data = packed.as_subclass(torch.Tensor).reshape(-1, 2 + BLOCK)
    scale, numbers = data[:, :2].contiguous().view(torch.float16).float(), data[:, 2:].contiguous().view(torch.int8).float()
    return (scale * numbers).reshape(packed.tensor_shape)


def is_packed(weight: object) -> bool:
    """Tell whether a tensor is packed bytes, of the stand-in or of the real pack."""
    return getattr(getattr(weight, "tensor_type", None), "name", "F32") not in ("F32", "F16")


class Operations(comfy.ops.manual_cast):
    class Linear(comfy.ops.manual_cast.Linear):
        def __init__(self, in_features, out_features, bias=True, device=None, dtype=None) -> None:
            torch.nn.Module.__init__(self)
            self.in_features, self.out_features, self.weight, self.bias = in_features, out_features, None, None

        def _load_from_state_dict(self, state_dict, prefix, *_args) -> None:
            for name in ("weight", "bias"):
                if f"{prefix}{name}" in state_dict:
                    setattr(self, name, torch.nn.Parameter(state_dict[f"{prefix}{name}"], requires_grad=False))

        def _save_to_state_dict(self, destination, prefix, _keep_vars) -> None:
            # As that pack does for the host's estimate of memory: no numbers, and a key that no layer has.
            destination[f"{prefix}weight"] = torch.zeros_like(self.weight, device="meta")
            destination[f"{prefix}temp.weight"] = torch.empty(self.out_features, self.in_features, device="meta")
            if self.bias is not None:
                destination[f"{prefix}bias"] = torch.zeros_like(self.bias, device="meta")

        def forward(self, inputs):
            weight = unpack(self.weight).to(inputs)
            for patches, key in self.weight.patches:
                weight = comfy.lora.calculate_weight(patches, weight.clone(), key)
            return torch.nn.functional.linear(inputs, weight, unpack(self.bias).to(inputs))


class Patcher(comfy.model_patcher.ModelPatcher):
    """Hangs the patches on packed weights, to be added after they are unpacked; always patches at once, also in low VRAM."""

    def patch_weight_to_device(self, key, device_to=None, inplace_update=False):
        weight = comfy.utils.get_attr(self.model, key)
        if key in self.patches and is_packed(weight):
            changed = weight.to(device_to)
            changed.patches = [(self.patches[key], key)]
            comfy.utils.set_attr_param(self.model, key, changed)
        else:
            super().patch_weight_to_device(key, device_to, inplace_update)

    def unpatch_model(self, device_to=None, unpatch_weights=True):
        for parameter in self.model.parameters() if unpatch_weights else ():
            if is_packed(parameter):
                parameter.patches = []
        return super().unpatch_model(device_to, unpatch_weights)

    def load(self, *args, force_patch_weights=False, **kwargs):
        super().load(*args, force_patch_weights=True, **kwargs)


@pytest.fixture(scope="module")
def fixtures(shared_fixtures: Path) -> Path:
    return shared_fixtures / "videoxfun_lora"


@pytest.fixture(autouse=True)
def folder(fixtures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "loras", ([str(fixtures)], {".safetensors"}))


def metadata_of(fixtures: Path) -> dict[str, str]:
    """Sizes of the base, which a GGUF file cannot carry; real ones need none, the host knows their sizes."""
    with safe_open(fixtures / "base_high.safetensors", "pt") as opened:
        return opened.metadata()


def load(tensors: dict[str, torch.Tensor], fixtures: Path, **options):
    return comfy_sd.load_diffusion_model_state_dict(dict(tensors), model_options={"dtype": torch.float32, **options}, metadata=metadata_of(fixtures))


def can_be_packed(key: str, value: torch.Tensor) -> bool:
    return value.ndim == 2 and value.shape[1] % BLOCK == 0 and key.endswith(".weight")


def load_stand_in(base: dict[str, torch.Tensor], fixtures: Path, _folder: Path):
    """Load with the stand-in; also return the numbers that the weights stand for."""
    kept = {key: pack(value) if can_be_packed(key, value) else Stored(value, tuple(value.shape), TensorType.F32) for key, value in base.items()}
    model = load(kept, fixtures, custom_operations=Operations)
    model.__class__ = Patcher
    return model, {key: unpack(value) for key, value in kept.items()}


def load_real(base: dict[str, torch.Tensor], fixtures: Path, folder: Path):
    """Write a real file and load it with the real pack's loader node; also return the numbers that the weights stand for."""
    import gguf

    if "reward_lab_real_gguf" not in sys.modules:
        spec = importlib.util.spec_from_file_location("reward_lab_real_gguf", Path(REAL_PACK) / "__init__.py", submodule_search_locations=[REAL_PACK])
        sys.modules["reward_lab_real_gguf"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules["reward_lab_real_gguf"])
    writer = gguf.GGUFWriter(folder / "base.gguf", "wan")
    for key, value in base.items():
        kind = gguf.GGMLQuantizationType.Q8_0 if can_be_packed(key, value) else gguf.GGMLQuantizationType.F32
        writer.add_tensor(key, gguf.quants.quantize(value.numpy(), kind), raw_dtype=kind)
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(folder_paths.folder_names_and_paths, "diffusion_models", ([str(folder)], {".gguf"}))
        host_load = comfy_sd.load_diffusion_model_state_dict
        options = {"dtype": torch.float32}
        patch.setattr(
            comfy_sd,
            "load_diffusion_model_state_dict",
            lambda tensors, model_options: host_load(tensors, model_options={**model_options, **options}, metadata=metadata_of(fixtures)),
        )
        (model,) = sys.modules["reward_lab_real_gguf"].NODE_CLASS_MAPPINGS["UnetLoaderGGUF"]().load_unet("base.gguf")
    # Unpacked as that pack's layers do it, whose products are rounded to fp16.
    dequantize = importlib.import_module("reward_lab_real_gguf.dequant").dequantize_tensor
    return model, {key: torch.Tensor(dequantize(comfy.utils.get_attr(model.model.diffusion_model, key), torch.float32)) for key in base}


LOADERS: dict[str, Callable] = {"stand-in": load_stand_in, **({"ComfyUI-GGUF": load_real} if REAL_PACK else {})}


@pytest.fixture(params=list(LOADERS))
def loaded(request, fixtures: Path, tmp_path: Path):
    """A model whose linear layers are packed where their width allows it, and its numbers."""
    return LOADERS[request.param](load_file(fixtures / "base_high.safetensors"), fixtures, tmp_path)


@pytest.fixture
def packed(loaded):
    return loaded[0]


def predict(model, fixtures: Path) -> torch.Tensor:
    comfy.model_management.load_models_gpu([model, *model.get_nested_additional_models()], force_full_load=True)
    return forward(model, fixtures)


def forward(model, fixtures: Path) -> torch.Tensor:
    inputs = load_file(fixtures / "inputs.safetensors")
    with torch.no_grad():
        latent = torch.cat([inputs["high.1.latent"], inputs["high.1.concat"]], dim=1)
        return model.model.diffusion_model(latent, inputs["high.1.timestep"], inputs["high.1.context"]).clone()


def stored_bytes(model) -> dict[str, torch.Tensor]:
    """Return the packed weights as they lie in memory."""
    return {key: value.as_subclass(torch.Tensor).clone() for key, value in model.model.named_parameters() if is_packed(value)}


def changed_weights(fixtures: Path) -> list[str]:
    """Return the weights that the LoRA changes."""
    report = inspect(fixtures / LORA)
    return [change.weight.removeprefix("diffusion_model.") for change in report.changes]


def ratio(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


def rows(strength: float = 0.8, **others: str) -> str:
    return json.dumps([{"file": LORA, "high": strength, **others}])


# fp32 on both sides; sums in another order.
CLOSE = 3e-6


def test_rows_run_beside_packed_weights(loaded, fixtures: Path) -> None:
    packed, dense = loaded
    before = stored_bytes(packed)
    assert quantised_kind(packed) == "GGUF" and len(before) > 25
    result = LoadLoRAs.execute(packed, None, rows())
    row = result.ui["reward_lab_rows"][0]
    assert (row["applied_high"], row["unmerged"]) == (90, ["high"])
    # Only layers whose width Q8_0 cannot pack have numbers that are at hand.
    open_layers = sum(f"diffusion_model.{key}" not in before for key in changed_weights(fixtures))
    assert 0 < open_layers < 5 and row["shares"]["high"]["text"].endswith(f"(measured on {open_layers} of 30)")
    assert "GGUF" in result.args[2] and not result.args[0].patches
    plain, changed = predict(packed, fixtures), predict(result.args[0], fixtures)
    assert ratio(plain, predict(load(dense, fixtures), fixtures)) < CLOSE
    expected = predict(LoadLoRAs.execute(load(dense, fixtures), None, rows(), "merged").args[0], fixtures)
    assert ratio(changed, expected) < CLOSE and ratio(plain, expected) > 0.1
    assert torch.equal(predict(packed, fixtures), plain)  # the base beside it
    comfy.model_management.unload_all_models()
    after = stored_bytes(packed)
    assert after.keys() == before.keys() and all(torch.equal(after[key], value) for key, value in before.items())


def test_merged_rows_are_left_to_the_pack_of_these_weights(loaded, fixtures: Path) -> None:
    packed, dense = loaded
    before = stored_bytes(packed)
    result = LoadLoRAs.execute(packed, None, rows(), "merged")
    expected = predict(LoadLoRAs.execute(load(dense, fixtures), None, rows(), "merged").args[0], fixtures)
    assert ratio(predict(result.args[0], fixtures), expected) < CLOSE
    del result
    gc.collect()
    comfy.model_management.unload_all_models()
    plain = predict(packed, fixtures)
    assert ratio(plain, predict(load(dense, fixtures), fixtures)) < CLOSE
    assert all(torch.equal(stored_bytes(packed)[key], value) for key, value in before.items())


def test_low_vram_gives_the_same_numbers(packed, fixtures: Path) -> None:
    model = LoadLoRAs.execute(packed, None, rows()).args[0]
    expected = predict(model, fixtures)
    comfy.model_management.unload_all_models()
    patchers = [model, *model.get_nested_additional_models()]
    try:
        for patcher in patchers:
            patcher.patch_model(device_to=patcher.load_device, lowvram_model_memory=1)
            assert patcher.model.model_lowvram
        assert ratio(forward(model, fixtures), expected) < CLOSE
    finally:
        for patcher in patchers:
            patcher.detach()


def test_a_strength_over_sigma_works_on_packed_weights(packed, fixtures: Path) -> None:
    timestep = float(load_file(fixtures / "inputs.safetensors")["high.1.timestep"].max())
    curve = f"1:0.25, {timestep / 1000:.6f}:0.25, 0:1"
    outputs = [predict(LoadLoRAs.execute(packed, None, text).args[0], fixtures) for text in (rows(curve=curve), rows(0.2))]
    assert ratio(outputs[0], outputs[1]) < CLOSE and ratio(outputs[0], predict(packed, fixtures)) > 0.01


def test_inspect_compares_layers_and_says_that_numbers_are_not_read(packed, fixtures: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    report = inspect(fixtures / LORA, base_from_model(packed, "the high-noise expert", "high"))
    assert (report.verdict, report.modules_applied, report.relative_norm) == ("ok", 30, None) and report.change_norm > 0
    assert any("are GGUF" in warning for warning in report.warnings)
    (tmp_path / "base.gguf").write_bytes(b"GGUF" + bytes(64))
    assert main(["inspect", str(fixtures / LORA), "--base", str(tmp_path / "base.gguf"), "--json"]) == 2
    data = json.loads(capsys.readouterr().out)
    assert data["verdict"] == "refused" and "GGUF" in data["reason"] and "safetensors" in data["reason"]

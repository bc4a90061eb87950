"""LoRAs on GGUF weights: beside the weights, equal to dense arithmetic on the unpacked numbers.

The loader of GGUF files is another pack's (ComfyUI-GGUF, not shipped here). The stand-in below packs real Q8_0 blocks and plugs in where that pack does:
tensors with `tensor_type` and `tensor_shape`, and linear layers that unpack in use, given to the host as `custom_operations`.
"""

from __future__ import annotations

import enum
import json
from pathlib import Path

import pytest

pytest.importorskip("torch")
comfy_sd = pytest.importorskip("comfy.sd", reason="needs ComfyUI on the path")

import comfy.model_management  # noqa: E402
import comfy.ops  # noqa: E402
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


class TensorType(enum.Enum):
    Q8_0 = 8


class Packed(torch.Tensor):
    """Q8_0 bytes that keep their type and their real shape through what the host does with tensors."""

    tensor_type = TensorType.Q8_0

    def __new__(cls, data: torch.Tensor, shape: tuple[int, ...]) -> Packed:
        made = torch.Tensor._make_subclass(cls, data)
        made.tensor_shape = torch.Size(shape)
        return made

    @property
    def shape(self) -> torch.Size:
        return self.tensor_shape

    def to(self, *_args, **_kwargs) -> Packed:
        return self  # one device here; another type would make the bytes meaningless

    def detach(self) -> Packed:
        return self

    def clone(self, **_kwargs) -> Packed:
        return self


def pack(weight: torch.Tensor) -> Packed:
    """Pack a matrix: per 32 numbers one fp16 scale and 32 bytes."""
    blocks = weight.reshape(-1, BLOCK)
    scale = (blocks.abs().amax(dim=1, keepdim=True) / 127).half()
    numbers = torch.where(scale > 0, blocks / scale.float(), 0).round().clamp(-127, 127).to(torch.int8)
    data = torch.cat([scale.view(torch.uint8), numbers.view(torch.uint8)], dim=1)
    return Packed(data.reshape(weight.shape[0], -1), tuple(weight.shape))


def unpack(packed: Packed) -> torch.Tensor:
    """Return the numbers, fp32."""
    data = packed.as_subclass(torch.Tensor).reshape(-1, 2 + BLOCK)
    scale, numbers = data[:, :2].contiguous().view(torch.float16).float(), data[:, 2:].contiguous().view(torch.int8).float()
    return (scale * numbers).reshape(packed.tensor_shape)


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
            destination[f"{prefix}weight"] = torch.zeros(self.weight.size(), device="meta", dtype=self.weight.dtype)
            destination[f"{prefix}temp.weight"] = torch.empty(self.out_features, self.in_features, device="meta")
            if self.bias is not None:
                destination[f"{prefix}bias"] = self.bias

        def forward(self, inputs):
            weight = unpack(self.weight) if isinstance(self.weight, Packed) else self.weight
            return torch.nn.functional.linear(inputs, weight.to(inputs), self.bias.to(inputs))


@pytest.fixture(scope="module")
def fixtures(shared_fixtures: Path) -> Path:
    return shared_fixtures / "videoxfun_lora"


@pytest.fixture(autouse=True)
def folder(fixtures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "loras", ([str(fixtures)], {".safetensors"}))


def load(tensors: dict[str, torch.Tensor], fixtures: Path, **options):
    with safe_open(fixtures / "base_high.safetensors", "pt") as opened:
        metadata = opened.metadata()
    return comfy_sd.load_diffusion_model_state_dict(dict(tensors), model_options={"dtype": torch.float32, **options}, metadata=metadata)


@pytest.fixture(scope="module")
def tensors(fixtures: Path) -> dict[str, torch.Tensor]:
    """The weights of a base, those of its linear layers packed where their width allows it."""
    base = load_file(fixtures / "base_high.safetensors")
    return {key: pack(value) if value.ndim == 2 and value.shape[1] % BLOCK == 0 and key.endswith(".weight") else value for key, value in base.items()}


@pytest.fixture
def packed(tensors: dict[str, torch.Tensor], fixtures: Path):
    return load(tensors, fixtures, custom_operations=Operations)


def predict(model, fixtures: Path) -> torch.Tensor:
    inputs = load_file(fixtures / "inputs.safetensors")
    comfy.model_management.load_models_gpu([model, *model.get_nested_additional_models()], force_full_load=True)
    with torch.no_grad():
        latent = torch.cat([inputs["high.1.latent"], inputs["high.1.concat"]], dim=1)
        return model.model.diffusion_model(latent, inputs["high.1.timestep"], inputs["high.1.context"]).clone()


def changed_weights(fixtures: Path) -> list[str]:
    """Return the weights that the LoRA changes."""
    report = inspect(fixtures / LORA)
    return [change.weight.removeprefix("diffusion_model.") for change in report.changes]


def ratio(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


def test_rows_run_beside_packed_weights(packed, tensors, fixtures: Path) -> None:
    count = sum(isinstance(value, Packed) for value in tensors.values())
    assert quantised_kind(packed) == "GGUF" and count > 25
    result = LoadLoRAs.execute(packed, None, json.dumps([{"file": LORA, "high": 0.8}]))
    row = result.ui["reward_lab_rows"][0]
    assert (row["applied_high"], row["unmerged"]) == (90, ["high"])
    # Only layers whose width Q8_0 cannot pack have numbers that are at hand.
    open_layers = sum(not isinstance(tensors[key], Packed) for key in changed_weights(fixtures))
    assert 0 < open_layers < 5 and row["shares"]["high"]["text"].endswith(f"(measured on {open_layers} of 30)")
    assert "GGUF" in result.args[2] and not result.args[0].patches
    plain, changed = predict(packed, fixtures), predict(result.args[0], fixtures)
    dense = {key: unpack(value) if isinstance(value, Packed) else value for key, value in tensors.items()}
    assert ratio(plain, predict(load(dense, fixtures), fixtures)) < 3e-6
    merged = LoadLoRAs.execute(load(dense, fixtures), None, json.dumps([{"file": LORA, "high": 0.8}]), "merged").args[0]
    expected = predict(merged, fixtures)
    # fp32 on both sides; sums in another order.
    assert ratio(changed, expected) < 3e-6 and ratio(plain, expected) > 0.1
    comfy.model_management.unload_all_models()
    for key, value in tensors.items():
        if isinstance(value, Packed):
            kept = packed.model.diffusion_model.get_parameter(key)
            assert torch.equal(kept.as_subclass(torch.Tensor), value.as_subclass(torch.Tensor)), key


def test_a_strength_over_sigma_works_on_packed_weights(packed, fixtures: Path) -> None:
    timestep = float(load_file(fixtures / "inputs.safetensors")["high.1.timestep"].max())
    curve = f"1:0.25, {timestep / 1000:.6f}:0.25, 0:1"
    rows = [{"file": LORA, "high": 0.8, "curve": curve}], [{"file": LORA, "high": 0.2}]
    outputs = [predict(LoadLoRAs.execute(packed, None, json.dumps(row)).args[0], fixtures) for row in rows]
    assert ratio(outputs[0], outputs[1]) < 3e-6 and ratio(outputs[0], predict(packed, fixtures)) > 0.01


def test_inspect_compares_layers_and_says_that_numbers_are_not_read(packed, fixtures: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    report = inspect(fixtures / LORA, base_from_model(packed, "the high-noise expert", "high"))
    assert (report.verdict, report.modules_applied, report.relative_norm) == ("ok", 30, None) and report.change_norm > 0
    assert any("are GGUF" in warning for warning in report.warnings)
    (tmp_path / "base.gguf").write_bytes(b"GGUF" + bytes(64))
    assert main(["inspect", str(fixtures / LORA), "--base", str(tmp_path / "base.gguf"), "--json"]) == 2
    data = json.loads(capsys.readouterr().out)
    assert data["verdict"] == "refused" and "GGUF" in data["reason"] and "safetensors" in data["reason"]

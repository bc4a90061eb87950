"""LoRA rows under the host's memory management: low VRAM, partial loading and unloading, dynamic VRAM. All on the CPU, with the host's own code.

What a CPU cannot show: copies on streams, pinned memory, and dynamic VRAM's pages on a card (comfy-aimdo). There the host's `ModelPatcherDynamic` runs
with stand-ins for its two buffers that need a driver; merged rows are left out of that, for the host adds patches only while it copies a weight to a card.
"""

from __future__ import annotations

import gc
import json
from pathlib import Path

import pytest

pytest.importorskip("torch")
comfy_sd = pytest.importorskip("comfy.sd", reason="needs ComfyUI on the path")

import comfy.model_management  # noqa: E402
import comfy.model_patcher  # noqa: E402
import folder_paths  # noqa: E402
import torch  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

from reward_lab.nodes.loras import LoadLoRAs  # noqa: E402

pytestmark = pytest.mark.host

TOLERANCE = 1e-4  # norm of the difference over norm of the expected output, from the fixtures' README
CLOSE = 3e-6  # fp32 on both sides, sums in another order
FILES = {reward: f"Wan2.2-Fun-A14B-InP-high-noise-{name}.safetensors" for reward, name in (("hps", "HPS2.1"), ("mps", "MPS"))}
CASE, ROWS = "hps_0.7+mps_0.3", ({"file": FILES["hps"], "high": 0.7}, {"file": FILES["mps"], "high": 0.3})


@pytest.fixture(scope="module")
def fixtures(shared_fixtures: Path) -> Path:
    return shared_fixtures / "videoxfun_lora"


@pytest.fixture(autouse=True)
def folder(fixtures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "loras", ([str(fixtures), str(tmp_path)], {".safetensors"}))
    yield
    comfy.model_management.unload_all_models()


def load(fixtures: Path, dtype: torch.dtype = torch.float32):
    return comfy_sd.load_diffusion_model(str(fixtures / "base_high.safetensors"), model_options={"dtype": dtype})


def all_of(model) -> list:
    """The model and the models of its rows, as the host's samplers load them."""
    return [model, *model.get_nested_additional_models()]


def forward(model, fixtures: Path) -> torch.Tensor:
    inputs = load_file(fixtures / "inputs.safetensors")
    with torch.no_grad():
        latent = torch.cat([inputs["high.1.latent"], inputs["high.1.concat"]], dim=1)
        return model.model.diffusion_model(latent, inputs["high.1.timestep"], inputs["high.1.context"]).clone()


def expected_of(fixtures: Path, case: str = CASE) -> torch.Tensor:
    return load_file(fixtures / "expected.safetensors")[f"high.1.{case}"]


def ratio(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


def apply(model, application: str, *rows: dict):
    return LoadLoRAs.execute(model, None, json.dumps(rows or ROWS), application).args[0]


def hooks_of(model) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.model.modules())


def weights_of(model) -> dict[str, torch.Tensor]:
    return {key: value.detach().clone() for key, value in model.model.named_parameters()}


def load_on_card(model, state: str, free_bytes: int = 0) -> None:
    """Load as the samplers do, with a host that takes the CPU for a card with so much free memory."""
    management = comfy.model_management
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(management, "is_device_cpu", lambda _device: False)
        patch.setattr(management, "get_free_memory", lambda *_args, **_kwargs: free_bytes)
        patch.setattr(management, "minimum_inference_memory", lambda: 0)
        patch.setattr(management, "extra_reserved_memory", lambda: 0)
        patch.setattr(management, "vram_state", management.VRAMState[state])
        management.load_models_gpu(all_of(model))


def offloaded(model) -> int:
    """How many modules of a model are cast when they are used."""
    return sum(hasattr(module, "prev_comfy_cast_weights") for module in model.model.modules())


@pytest.mark.parametrize("application", ["merged", "bypass"])
@pytest.mark.parametrize("state", ["NO_VRAM", "LOW_VRAM", "NORMAL_VRAM"])
def test_loaded_in_part_or_not_at_all(fixtures: Path, application: str, state: str) -> None:
    base = load(fixtures)
    before = weights_of(base)
    model = apply(base, application)
    load_on_card(model, state, free_bytes=base.model_size() // 2)
    linears = sum(hasattr(module, "comfy_cast_weights") for module in model.model.modules())
    assert base.model.model_lowvram and (offloaded(model) == linears if state == "NO_VRAM" else 0 < offloaded(model) < linears)
    assert (base.model.lowvram_patch_counter > 0) == (application == "merged")
    assert ratio(forward(model, fixtures), expected_of(fixtures)) <= TOLERANCE
    # A new strength on a model that is half on the card, then the base alone.
    other = apply(base, application, {"file": FILES["hps"], "high": 0.55})
    load_on_card(other, state, free_bytes=base.model_size() // 2)
    assert ratio(forward(other, fixtures), expected_of(fixtures, "hps_0.55")) <= TOLERANCE
    load_on_card(base, state, free_bytes=base.model_size() // 2)
    assert ratio(forward(base, fixtures), expected_of(fixtures, "none")) <= TOLERANCE and not hooks_of(base)
    comfy.model_management.unload_all_models()
    assert all(torch.equal(value, before[key]) for key, value in weights_of(base).items())


@pytest.mark.parametrize("application", ["merged", "bypass"])
def test_unloaded_and_loaded_again_piece_by_piece(fixtures: Path, application: str) -> None:
    """What the host does when another model needs room: it takes part of this one off the card, and brings it back later."""
    model = apply(load(fixtures), application)
    load_on_card(model, "NORMAL_VRAM", free_bytes=1 << 40)
    assert not offloaded(model) and ratio(forward(model, fixtures), expected_of(fixtures)) <= TOLERANCE
    outputs = []
    for share in (0.3, 0.6, 1.0):
        for patcher in all_of(model):
            patcher.partially_unload(patcher.offload_device, int(share * patcher.model_size()))
        assert offloaded(model) > 0
        outputs.append(forward(model, fixtures))
    for patcher in all_of(model):
        patcher.partially_load(patcher.load_device, 1e32)
    outputs.append(forward(model, fixtures))
    assert [ratio(output, expected_of(fixtures)) <= TOLERANCE for output in outputs] == [True] * 4
    assert hooks_of(model) == (0 if application == "merged" else 30)


class Buffer:
    """Stands in for the driver's pinned memory."""

    def __init__(self, *_sizes: int) -> None:
        self.size = 0


class Pages:
    """Stands in for the card's address space: hands out places, holds nothing."""

    def __init__(self, *_args: int) -> None:
        self.given_bytes = self.freed_bytes = 0

    def prioritize(self) -> None:
        pass

    def alloc(self, size: int) -> tuple:
        self.given_bytes += size
        return (self, 0, size)

    def loaded_size(self) -> int:
        return 0

    def free_memory(self, size: float) -> int:
        self.freed_bytes += min(size, self.given_bytes)
        return 0


@pytest.fixture
def dynamic(monkeypatch: pytest.MonkeyPatch) -> type:
    """The host's dynamic patcher on the device `cpu:0`, which it does not take for the CPU."""
    patcher_class = comfy.model_patcher.ModelPatcherDynamic
    monkeypatch.setattr(patcher_class, "__new__", lambda cls, *_args, **_kwargs: object.__new__(cls))
    monkeypatch.setattr(comfy.model_patcher.comfy_aimdo.host_buffer, "HostBuffer", Buffer)
    monkeypatch.setattr(comfy.model_patcher.comfy_aimdo.model_vbar, "ModelVBAR", Pages)
    monkeypatch.setattr(comfy.model_patcher.comfy_aimdo.model_vbar, "vbar_unpin", lambda _place: None)
    monkeypatch.setattr(comfy.model_patcher, "CoreModelPatcher", patcher_class)
    device = torch.device("cpu", 0)
    monkeypatch.setattr(comfy.model_management, "get_torch_device", lambda: device)
    return patcher_class


def write_large_rows(folder: Path, model) -> dict:
    """Write a LoRA whose matrices are large enough (over 16 kB) for dynamic VRAM to leave them where they are until they are used."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for layer in (f"blocks.{number}.{part}_attn.{name}" for number in range(3) for part in ("self", "cross") for name in "qkvo"):
        for part, shape in (("lora_down.weight", (64, 96)), ("lora_up.weight", (96, 64))):
            tensors[f"diffusion_model.{layer}.{part}"] = torch.randn(shape, generator=generator) * 0.1
        tensors[f"diffusion_model.{layer}.diff_b"] = torch.randn(96, generator=generator)
    for key in ("blocks.1.modulation", "head.modulation"):
        shape = model.model.diffusion_model.get_parameter(key).shape
        tensors[f"diffusion_model.{key}.diff"] = torch.randn(shape, generator=generator) * 0.1
    save_file(tensors, folder / "large.safetensors")
    return {"file": "large.safetensors", "high": 0.4, "curve": "1:0.5, 0:1"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float8_e4m3fn], ids=["fp32", "fp8"])
def test_dynamic_vram(fixtures: Path, tmp_path: Path, dynamic: type, dtype: torch.dtype) -> None:
    base = load(fixtures, dtype)
    row = write_large_rows(tmp_path, base)
    comfy.model_management.load_models_gpu([base])
    plain = forward(base, fixtures)
    before = {key: value.view(torch.uint8) for key, value in weights_of(base).items()}  # the host casts bare parameters at the first load
    model = apply(base, "bypass", *ROWS, row)
    assert len(all_of(model)) == 4 and all(isinstance(patcher, dynamic) for patcher in all_of(model))
    comfy.model_management.load_models_gpu(all_of(model))
    large = next(patcher.model for patcher in all_of(model)[1:] if len(patcher.model.keys) == 50)
    assert sum(hasattr(module, "_v") for module in large.modules()) == 48 and any(hasattr(module, "_v") for module in base.model.modules())
    first = forward(model, fixtures)
    assert ratio(first, plain) > 0.1
    # Memory is asked for while the model is in use: what lies on the card goes back, and the next step fetches it again.
    for patcher in all_of(model):
        patcher.partially_unload(None, 1e32)
    assert torch.equal(forward(model, fixtures), first)
    # Another strength and back: nothing of the one is left in the other.
    other = apply(base, "bypass", {"file": FILES["mps"], "high": 0.3})
    comfy.model_management.load_models_gpu(all_of(other))
    assert ratio(forward(other, fixtures), first) > 0.1
    comfy.model_management.load_models_gpu(all_of(model))
    assert torch.equal(forward(model, fixtures), first)
    del model, other, patcher
    gc.collect()
    comfy.model_management.load_models_gpu([base])
    assert hooks_of(base) == 0 and torch.equal(forward(base, fixtures), plain)
    comfy.model_management.unload_all_models()
    assert all(torch.equal(value.view(torch.uint8), before[key]) for key, value in weights_of(base).items())


def test_dynamic_vram_gives_the_same_numbers(fixtures: Path, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    usual = load(fixtures)
    row = write_large_rows(tmp_path, usual)
    model = apply(usual, "bypass", *ROWS, row)
    comfy.model_management.load_models_gpu(all_of(model), force_full_load=True)
    expected = forward(model, fixtures)
    comfy.model_management.unload_all_models()
    request.getfixturevalue("dynamic")
    model = apply(load(fixtures), "bypass", *ROWS, row)
    comfy.model_management.load_models_gpu(all_of(model))
    assert ratio(forward(model, fixtures), expected) < CLOSE
    recorded = apply(load(fixtures), "bypass")
    comfy.model_management.load_models_gpu(all_of(recorded))
    assert ratio(forward(recorded, fixtures), expected_of(fixtures)) <= TOLERANCE

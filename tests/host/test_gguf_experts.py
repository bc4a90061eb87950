"""GGUF experts chosen in Load Wan2.2 Models: listed, checked, planned, trained through, and sampled only where ComfyUI-GGUF is there to load them.

That pack's loader is a stand-in here; tests/host/test_lora_gguf.py runs LoRAs on the real one.
"""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("torch")
pytest.importorskip("comfy.sd", reason="needs ComfyUI on the path")

import folder_paths  # noqa: E402
import nodes  # noqa: E402

from reward_lab.host import paths, pavrm_nodes, wan_files  # noqa: E402
from reward_lab.labtools.client import PromptFailed  # noqa: E402

from .quantised_files import gguf_bytes, write_gguf  # noqa: E402
from .test_memory_plan_node import prompt as plan_prompt  # noqa: E402

pytestmark = pytest.mark.host
POCKET = "pocket_wan2.2_t2v_{}_noise_14B.safetensors"
EXPERTS = {"high": "quantised_high_noise.gguf", "low": "quantised_low_noise.gguf"}
SAMPLING = {"seed": 1, "steps": 2, "shift": 5.0, "guidance_high": 1.0, "guidance_low": 1.0, "boundary": 0.875, "sampler_name": "euler", "scheduler": "simple"}


def tensors(kind: int = 0, size: int = 4 * 4 * 64, *, without: str = "") -> list:
    """The keys that tell a Wan transformer; the block's weight of some type."""
    found = [("patch_embedding.weight", (64, 64), 0, bytes(4 * 64 * 64)), ("text_embedding.0.weight", (64, 32), 0, bytes(4 * 64 * 32)),
             ("blocks.0.ffn.0.weight", (4, 64), kind, bytes(size)), ("head.head.weight", (64, 64), 0, bytes(4 * 64 * 64))]  # fmt: skip
    return [tensor for tensor in found if tensor[0] != without]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that the host takes for all its model folders, with two small experts."""
    from safetensors.torch import save_file
    from torch import zeros

    monkeypatch.setitem(folder_paths.folder_names_and_paths, paths.EXPERT_FOLDER, ([str(tmp_path)], {".safetensors"}))
    for name in ("text_encoders", "vae"):
        monkeypatch.setitem(folder_paths.folder_names_and_paths, name, ([str(tmp_path)], {".safetensors"}))
    monkeypatch.delitem(folder_paths.folder_names_and_paths, paths.GGUF_FOLDER, raising=False)
    paths.register_model_folders()
    (tmp_path / "deep").mkdir()
    for name in ("high_noise.gguf", "deep/low_noise.gguf"):
        (tmp_path / name).write_bytes(gguf_bytes(tensors(), {"general.architecture": "wan"}))
    save_file({"shared.weight": zeros(4, 32)}, tmp_path / "t5.safetensors")
    save_file({"decoder.head.0.gamma": zeros(4)}, tmp_path / "vae.safetensors")
    return tmp_path


def resolve(high: str = "high_noise.gguf", low: str = "deep/low_noise.gguf") -> dict:
    return wan_files.resolve(high, low, "t5.safetensors", "vae.safetensors")


def test_they_are_listed_and_found(folder: Path) -> None:
    assert paths.expert_files() == [*paths.model_files("diffusion_models"), "deep/low_noise.gguf", "high_noise.gguf"]
    assert resolve()["low"] == str(folder / "deep" / "low_noise.gguf")
    # A folder that is added later counts as well, and what ComfyUI-GGUF registered is left alone.
    other = folder / "other"
    other.mkdir()
    shutil.copy(folder / "high_noise.gguf", other / "more.gguf")
    folder_paths.add_model_folder_path("diffusion_models", str(other))
    assert paths.expert_path("more.gguf") == other / "more.gguf"
    folder_paths.folder_names_and_paths[paths.GGUF_FOLDER] = ([str(other)], {".gguf"})
    paths.register_model_folders()
    assert paths.expert_files()[-1] == "more.gguf" and "high_noise.gguf" not in paths.expert_files()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (gguf_bytes(tensors(), {"general.architecture": "flux"}), "architecture 'flux'; of these only Wan diffusion models"),
        (gguf_bytes(tensors(without="head.head.weight"), {"general.architecture": "wan"}), "is not a Wan diffusion model but something else"),
        (gguf_bytes(tensors(), {"general.architecture": "wan"})[:-70], "the high-noise expert .* is truncated: it should have"),
        (b"GGML" + bytes(100), "is not a GGUF file, although its name says so"),
    ],
)
def test_what_is_wrong_is_named_before_anything_is_loaded(folder: Path, content: bytes, words: str) -> None:
    (folder / "wrong_high_noise.gguf").write_bytes(content)
    with pytest.raises(ValueError, match=words):
        resolve(high="wrong_high_noise.gguf")
    with pytest.raises(ValueError, match="swapped"):
        resolve(high="deep/low_noise.gguf", low="high_noise.gguf")


def test_with_comfyui_gguf_its_loader_makes_the_models(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the name that it knows a file by; each carries its role, as those of the host's own loader do."""
    loaded, attached = [], []

    class Loader:
        def load_unet(self, unet_name):
            loaded.append(unet_name)
            return (SimpleNamespace(set_attachments=lambda *told: attached.append(told)),)

    monkeypatch.setattr(wan_files, "load_text_encoder", lambda *_, **__: "clip")
    monkeypatch.setattr(wan_files.comfy.utils, "load_torch_file", lambda *_, **__: ({}, {}))
    monkeypatch.setattr(wan_files.comfy.sd, "VAE", lambda **_: SimpleNamespace(throw_exception_if_invalid=lambda: None))
    monkeypatch.setitem(nodes.NODE_CLASS_MAPPINGS, wan_files.GGUF_LOADER, Loader)
    made = wan_files.load(resolve())
    assert loaded == ["high_noise.gguf", "deep/low_noise.gguf"] and [told[1] for told in attached] == ["high", "low"]
    assert made.model_high is not made.model_low


def test_they_are_no_trunk_of_a_pavrm(folder: Path) -> None:
    with pytest.raises(ValueError, match="The trunk would be high_noise.gguf, a GGUF file, whose weights cannot be learned"):
        pavrm_nodes.make_config(resolve(), "dataset", {"trunk": pavrm_nodes.TRUNKS[1]})


@pytest.fixture(scope="module")
def experts(pocket_server) -> dict[str, str]:
    """Names of both pocket experts in GGUF, in the server's model folder."""
    folder = pocket_server.base / "models" / "diffusion_models"
    for expert, name in EXPERTS.items():
        write_gguf(str(folder / POCKET.format(expert)), folder / name, lambda key: "q8_0")
        (folder / f"plain_{Path(name).stem}.safetensors").unlink()
    return EXPERTS


def prompt(experts: dict[str, str], *kinds: str, **changes) -> dict:
    """Memory Plan of the files, and further nodes."""
    files = {"shape": "these files", "card_gb": 8.0, "preset": "pocket", "width": 64, "height": 64, "frames": 5, "rank": 4, "steps": 1, **changes}
    made = plan_prompt(**files)
    made["1"]["inputs"] |= {"high_noise_model": experts["high"], "low_noise_model": experts["low"]}
    settings = made["4"]["inputs"]
    run = {name: value for name, value in settings.items() if name not in ("shape", "card", "card_gb", "ram_gb")}
    sampler = {"model_high": ["1", 0], "model_low": ["1", 1], "positive": ["20", 0], "negative": ["20", 0], "latent": ["21", 0]}
    more = {
        "train": {
            "10": {"class_type": "RewardLabTrainLoRA", "inputs": run},
            "11": {"class_type": "RewardLabRunResult", "inputs": {"run": ["10", 0], "wait": True}},
        },
        "sample": {
            "20": {"class_type": "CLIPTextEncode", "inputs": {"text": "a red square", "clip": ["1", 2]}},
            "21": {"class_type": "EmptyHunyuanLatentVideo", "inputs": {"width": 64, "height": 64, "length": 5, "batch_size": 1}},
            "22": {"class_type": "RewardLabSampleWan22", "inputs": {**SAMPLING, **sampler}},
            "23": {"class_type": "SaveLatent", "inputs": {"samples": ["22", 0], "filename_prefix": "x"}},
        },
    }  # fmt: skip
    return {key: node for name, group in {"plan": made, **more}.items() if name in kinds for key, node in group.items()} | {key: made[key] for key in "123"}


def test_they_are_offered_planned_and_trained_through(pocket_server, experts: dict[str, str]) -> None:
    client = pocket_server.client()
    offered = client.get("/object_info/RewardLabWanModels")["RewardLabWanModels"]["input"]["required"]
    assert set(experts.values()) <= set(offered["high_noise_model"][1]["options"]) and "pocket_umt5.gguf" not in offered["text_encoder"][1]["options"]
    outputs = client.run(prompt(experts, "plan", "train"))
    plan, plain = json.loads(outputs["7"]["text"][0]), json.loads(client.run(prompt({e: POCKET.format(e) for e in EXPERTS}, "plan"))["7"]["text"][0])
    assert plan["fits"] and plan["experts"]["high"]["parameters"] == plain["experts"]["high"]["parameters"]
    # 34 bytes for 32 numbers in place of two for each.
    assert plan["host_before_bytes"]["loading"] < plain["host_before_bytes"]["loading"]
    assert plan["experts"]["high"]["file_bytes"] < 0.6 * plain["experts"]["high"]["file_bytes"]
    run_id = outputs["10"]["reward_lab_run"][0]
    run = pocket_server.base / "output" / "reward_lab" / "runs" / run_id
    assert [Path(json.loads((run / "config.json").read_text())["models"][expert]).name for expert in EXPERTS] == list(experts.values())
    assert list(run.glob("*.safetensors")) and '"reason":"completed"' in (run / "metrics.jsonl").read_text()


def test_sampling_without_comfyui_gguf_says_what_to_do(pocket_server, experts: dict[str, str]) -> None:
    words = "RewardLabSampleWan22.*quantised_high_noise.gguf can be trained, but .* install the custom node ComfyUI-GGUF.* or choose the safetensors"
    with pytest.raises(PromptFailed, match=words):
        pocket_server.client().run(prompt(experts, "sample"))


def test_a_format_that_cannot_be_trained_through_is_named_by_plan_and_training(pocket_server, experts: dict[str, str]) -> None:
    """IQ4_XS can be chosen: with ComfyUI-GGUF it can be sampled."""
    folder = pocket_server.base / "models" / "diffusion_models"
    data = (folder / experts["high"]).read_bytes()
    place = data.index(b"blocks.0.ffn.0.weight") + len(b"blocks.0.ffn.0.weight") + 4 + 2 * 8
    (folder / "odd_high_noise.gguf").write_bytes(data[:place] + struct.pack("<I", 23) + data[place + 4 :])
    for kind in ("plan", "train"):
        with pytest.raises(PromptFailed, match="stores blocks.0.ffn.0.weight as IQ4_XS, which cannot be trained through; use the bf16.* GGUF file in Q8_0"):
            pocket_server.client().run(prompt({**experts, "high": "odd_high_noise.gguf"}, kind))

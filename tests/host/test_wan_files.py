"""Finding and checking the files of a Wan model before any of them is loaded."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("comfy.sd", reason="needs ComfyUI on the path")

import folder_paths  # noqa: E402
import torch  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

from reward_lab.host import wan_files  # noqa: E402
from reward_lab.host.experts import guess_expert  # noqa: E402

pytestmark = pytest.mark.host


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that the host takes for all its model folders, with one small file of each kind."""
    for name in ("diffusion_models", "text_encoders", "vae"):
        monkeypatch.setitem(folder_paths.folder_names_and_paths, name, ([str(tmp_path)], {".safetensors"}))
    write_expert(tmp_path / "wan_high_noise.safetensors")
    write_expert(tmp_path / "wan_low_noise.safetensors")
    save_file({"shared.weight": torch.zeros(4, 4)}, tmp_path / "t5.safetensors")
    save_file({"decoder.head.0.gamma": torch.zeros(4)}, tmp_path / "vae.safetensors")
    return tmp_path


def write_expert(path: Path, width: int = 8, metadata: dict | None = None) -> None:
    save_file({"head.head.weight": torch.zeros(4, width), "patch_embedding.weight": torch.zeros(width, 16, 1, 2, 2)}, path, metadata)


def resolve(high: str = "wan_high_noise", low: str = "wan_low_noise", text_encoder: str = "t5", vae: str = "vae", dtype: str = "default") -> dict:
    return wan_files.resolve(f"{high}.safetensors", f"{low}.safetensors", f"{text_encoder}.safetensors", f"{vae}.safetensors", dtype)


def test_files_are_found(folder: Path) -> None:
    assert resolve()["high"] == str(folder / "wan_high_noise.safetensors") and resolve()["weight_dtype"] == "default"


def test_swapped_experts(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ValueError, match="swapped"):
        resolve(high="wan_low_noise", low="wan_high_noise")
    write_expert(folder / "mine.safetensors", metadata={"expert": "high"})
    with pytest.raises(ValueError, match="high-noise expert by its metadata"):
        resolve(low="mine")
    with pytest.raises(ValueError, match="high-noise expert by its file name"):
        resolve(low="wan_high_noise")
    write_expert(folder / "nameless.safetensors")
    resolve(high="nameless", low="nameless")
    assert "both experts are the same file" in caplog.text


def test_broken_and_foreign_files(folder: Path) -> None:
    data = (folder / "wan_low_noise.safetensors").read_bytes()
    (folder / "cut.safetensors").write_bytes(data[:-3])
    write_expert(folder / "wide.safetensors", width=16)
    with pytest.raises(ValueError, match="the low-noise expert .* is truncated"):
        resolve(low="cut")
    with pytest.raises(ValueError, match="not among the diffusion_models files"):
        resolve(low="absent")
    with pytest.raises(ValueError, match="not a Wan VAE but a umT5 text encoder"):
        resolve(vae="t5")
    with pytest.raises(ValueError, match="differ in width"):
        resolve(low="wide")
    with pytest.raises(ValueError, match="weight_dtype is 'int4'"):
        resolve(dtype="int4")


@pytest.mark.parametrize(
    ("name", "expert"),
    [
        ("wan2.2_t2v_high_noise_14B_fp8_scaled.safetensors", "high"),
        ("Wan2_2-I2V-A14B-LOW_fp8.safetensors", "low"),
        ("Wan2.2-Fun-A14B-InP-high-noise-HPS2.1.safetensors", "high"),
        ("loras/wan22-HighNoise-style.safetensors", "high"),
        ("wan2.1_t2v_1.3B.safetensors", None),
        ("high_and_low.safetensors", None),
        ("slowmotion_highres_yellow.safetensors", None),
    ],
)
def test_expert_by_name(name: str, expert: str | None) -> None:
    assert guess_expert(name).expert == expert
    assert guess_expert(name, {"expert": "low"}).expert == "low"

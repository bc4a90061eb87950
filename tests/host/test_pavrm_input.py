"""What `lab.py score-latent` and the PAVRM's loader refuse, and what they say."""

from __future__ import annotations

import json
import re
import shutil

import pytest

pytest.importorskip("torch")
pytest.importorskip("comfy.ldm.wan.model", reason="needs ComfyUI on the path")

import comfy.ldm.wan.model  # noqa: E402
import torch  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

from reward_lab.host import pavrm, pavrm_files, score_command  # noqa: E402

pytestmark = pytest.mark.host


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x.update(latent=torch.rand(1, 3, 8, 8)), "a mask|pixels"),
        (lambda x: x.update(latent=torch.rand(1, 1, 3, 8, 8)), "that is a mask"),
        (lambda x: x.update(latent=torch.zeros(1, 48, 3, 8, 8)), "the Wan2.2 5B VAE"),
        (lambda x: x.update(latent=torch.zeros(1, 4, 3, 8, 8)), "an SD or SDXL VAE"),
        (lambda x: x.update(latent=torch.full((1, 16, 3, 8, 8), float("nan"))), "NaN"),
        (lambda x: x.update(text=torch.zeros(7, 47)), "tokens of width 48"),
        (lambda x: x.update(text=torch.zeros(0, 48)), "1 to 512 tokens"),
        (lambda x: x.update(text=torch.full((7, 48), float("nan"))), "The text .* holds NaN"),
        (lambda x: x.pop("text"), "has no text"),
        (lambda x: x.pop("timestep"), "has no timestep"),
        (lambda x: x.update(timestep=torch.tensor([1001])), "timestep holds 1001; one number from 0 to 1000"),
        (lambda x: x.update(timestep=torch.tensor([1, 2])), "timestep holds 1, 2; one number .* or one for each of 1 latents"),
        (lambda x: x.update(latent=torch.tensor(1.0)), "something else"),
        (lambda x: x.update(latent=x["latent"] * 1e30), "its numbers overflow"),
        (lambda x: x.pop("latent"), "holds no latent"),
    ],
)
def test_bad_tensors_are_named(pavrm_folder, pavrm_heads, tmp_path, capsys, change, message):
    inputs = load_file(pavrm_folder / "inputs.safetensors")
    tensors = {name: inputs[f"case0.{name}"] for name in ("latent", "text", "timestep")}
    change(tensors)
    save_file(tensors, tmp_path / "in.safetensors")
    job = {"input": str(tmp_path / "in.safetensors"), "trunk": str(pavrm_folder / "trunk_comfyui.safetensors"), **pavrm_heads}
    assert score_command.main(["score-latent", json.dumps({**job, "json": True})]) == score_command.REFUSED
    assert re.search(message, json.loads(capsys.readouterr().out)["reason"])


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({}, {"sigma": "0.2"}, "has a timestep, so its latent is noisy already"),
        ({"timestep": None, "two.feature_layers": torch.tensor([2])}, {"sigma": "0.2"}, "feature_layers, which are not read with --sigma"),
        ({}, {"num_heads": 0}, "width 96 is not a multiple of 0 heads"),
        ({}, {"generator": "x.safetensors"}, "query, head would not be read"),
        ({}, {"generator": "x.safetensors", "query": None, "head": None, "num_heads": 4}, "num_heads would not be read"),
    ],
)
def test_what_would_not_be_read_is_refused(pavrm_folder, pavrm_heads, tmp_path, capsys, change, options, message):
    inputs = load_file(pavrm_folder / "inputs.safetensors")
    tensors = {**{name: inputs[f"case0.{name}"] for name in ("latent", "text", "timestep")}, **change}
    save_file({name: value for name, value in tensors.items() if value is not None}, tmp_path / "in.safetensors")
    job = {"input": str(tmp_path / "in.safetensors"), "trunk": str(pavrm_folder / "trunk_comfyui.safetensors"), **pavrm_heads, **options, "json": True}
    assert score_command.main(["score-latent", json.dumps(job)]) == score_command.REFUSED
    assert message in json.loads(capsys.readouterr().out)["reason"]


def test_every_case_is_checked_before_one_is_scored(pavrm_folder, pavrm_heads, tmp_path, capsys, monkeypatch):
    """The second case fits the file's rules and not this trunk; a score of the first would be lost with it."""
    inputs = load_file(pavrm_folder / "inputs.safetensors")
    cases = {f"{case}.{name}": inputs[f"case0.{name}"].clone() for case in ("a", "b") for name in ("latent", "text", "timestep")}
    save_file({**cases, "b.text": torch.zeros(7, 47)}, tmp_path / "in.safetensors")
    forwards = []
    forward = comfy.ldm.wan.model.WanModel.forward
    monkeypatch.setattr(comfy.ldm.wan.model.WanModel, "forward", lambda *args, **kwargs: forwards.append(1) or forward(*args, **kwargs))
    job = {"input": str(tmp_path / "in.safetensors"), "trunk": str(pavrm_folder / "trunk_comfyui.safetensors"), **pavrm_heads, "json": True}
    assert score_command.main(["score-latent", json.dumps(job)]) == score_command.REFUSED
    assert json.loads(capsys.readouterr().out)["reason"].startswith("b: The text has shape (7, 47)") and not forwards
    save_file(cases, tmp_path / "in.safetensors")
    assert score_command.main(["score-latent", json.dumps(job)]) == 0 and len(forwards) == 2


def test_text_beyond_the_context_is_cut_with_a_warning(pavrm_folder, pavrm_heads, score_latent, tmp_path):
    inputs = load_file(pavrm_folder / "inputs.safetensors")
    long = torch.randn(1, 520, 48, generator=torch.Generator().manual_seed(4))
    found = []
    for index, text in enumerate((long, long[:, :512].contiguous())):
        save_file({"latent": inputs["case0.latent"], "timestep": inputs["case0.timestep"], "text": text}, tmp_path / f"{index}.safetensors")
        found.append(score_latent(input=str(tmp_path / f"{index}.safetensors"), trunk=str(pavrm_folder / "trunk_comfyui.safetensors"), **pavrm_heads))
    assert found[0]["videos"] == found[1]["videos"]
    assert found[0]["warnings"] == ["The text has 520 tokens, the PAVRM reads 512: the last 8 are cut off."] and found[1]["warnings"] == []


def test_damaged_checkpoint_folders_are_named(pavrm_folder, pavrm_heads, tmp_path):
    copy = tmp_path / "checkpoint"
    shutil.copytree(pavrm_folder / "checkpoints" / "checkpoint-100", copy)
    (copy / "diffusion_pytorch_model-00002-of-00003.safetensors").rename(tmp_path / "away")
    with pytest.raises(ValueError, match="lacks diffusion_pytorch_model-00002-of-00003.safetensors"):
        pavrm.load(copy, **pavrm_heads)
    with pytest.raises(ValueError, match="holds no .safetensors"):
        pavrm_files.read_trunk(tmp_path)
    state = load_file(pavrm_folder / "trunk_comfyui.safetensors")
    state.pop("blocks.1.ffn.2.bias")
    save_file(state, tmp_path / "gap.safetensors", metadata={"config": json.dumps({"transformer": {"num_heads": 4}})})
    with pytest.raises(ValueError, match="missing: blocks.1.ffn.2.bias"):
        pavrm.load(tmp_path / "gap.safetensors", **pavrm_heads)
    with pytest.raises(ValueError, match="does not tell its number of heads"):
        save_file(state, tmp_path / "gap.safetensors")
        pavrm.load(tmp_path / "gap.safetensors", **pavrm_heads)

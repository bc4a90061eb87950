"""`lab.py score-latent` on random tiny PAVRMs of many shapes, against the same arithmetic written out anew (plain_wan.py): logits and gradients."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("comfy.ldm.wan.model", reason="needs ComfyUI on the path")

import torch  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

from reward_lab.host import score_command  # noqa: E402
from reward_lab.tests.host import plain_wan  # noqa: E402
from reward_lab.tests.host.test_pavrm_full_size import full_size_trunk_keys  # noqa: E402

pytestmark = pytest.mark.host
LOGIT, GRADIENT = 1e-3, 5e-4


def trunk_shapes(width: int, feed: int, text: int, frequencies: int, blocks: int, channels: int, has_image: bool) -> dict[str, tuple[int, ...]]:
    """Names and shapes as HY-Video-PRFL saves them."""
    full = {5120: width, 13824: feed, 4096: text, 256: frequencies, 6 * 5120: 6 * width}
    keys = full_size_trunk_keys(blocks, channels, has_image)
    return {key: tuple(full.get(size, size) for size in shape) for key, shape in keys.items()}


def random_state(shapes: dict[str, tuple[int, ...]], generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Numbers that keep the size of what flows through."""
    state = {}
    for key, shape in shapes.items():
        is_gain = len(shape) == 1 and key.endswith("weight")
        fan = torch.Size(shape[1:]).numel() if len(shape) > 1 and "modulation" not in key and key != "queries" else 9
        state[key] = (1.0 if is_gain else 0.0) + torch.randn(shape, generator=generator) * (0.2 if is_gain else fan**-0.5)
    return state


def head_shapes(width: int) -> tuple[dict[str, tuple[int, ...]], dict[str, tuple[int, ...]]]:
    query = {"queries": (1, width), "multihead_attn.in_proj_weight": (3 * width, width), "multihead_attn.in_proj_bias": (3 * width,)}
    query |= {"multihead_attn.out_proj.weight": (width, width), "multihead_attn.out_proj.bias": (width,)}
    mlp = {"fc1.weight": (1024, width), "fc1.bias": (1024,), "fc2.weight": (512, 1024), "fc2.bias": (512,), "fc3.weight": (1, 512), "fc3.bias": (1,)}
    return query, mlp


def make(folder: Path, seed: int) -> dict[str, Any]:
    """A random PAVRM as a checkpoint folder with heads, and latents to score; returns the pieces in float64 and what the file's names stand for."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    heads, per_head = rng.choice([2, 4]), rng.choice([12, 16, 20, 24])
    width, blocks = heads * per_head, rng.choice([1, 2, 5, 18])
    width += -width % 8
    while width % heads or (width // heads) % 2:
        width += 8
    has_image = seed % 2 == 1
    sizes = {"dim": width, "ffn_dim": rng.choice([40, 64]), "text_dim": rng.choice([24, 40]), "freq_dim": rng.choice([32, 64]), "num_heads": heads, "eps": 1e-6}
    channels = 36 if has_image else 16
    shapes = trunk_shapes(width, sizes["ffn_dim"], sizes["text_dim"], sizes["freq_dim"], blocks, channels, has_image)
    trunk, (query, mlp) = random_state(shapes, generator), (random_state(shapes, generator) for shapes in head_shapes(width))
    checkpoint, heads_folder = folder / "checkpoints" / "checkpoint-7", folder / "mlp"
    checkpoint.mkdir(parents=True)
    heads_folder.mkdir()
    config = {"_class_name": "WanModel", "num_layers": 40, "in_dim": channels, "out_dim": 16, "text_len": 512, "model_type": "t2v", **sizes}
    (checkpoint / "config.json").write_text(json.dumps({key: value for key, value in config.items() if key != "text_dim"}))
    wrapper = rng.choice(["", "_fsdp_wrapped_module."])
    save_file({wrapper + key: value for key, value in trunk.items()}, checkpoint / "diffusion_pytorch_model.safetensors")
    torch.save(query, heads_folder / "query_attention_step_7.ckpt")
    torch.save(mlp, heads_folder / "mlp_step_7.ckpt")
    cases = {}
    for index in range(3):
        frames, height, breadth, tokens = rng.choice([1, 3]), *rng.sample([4, 6, 8], 2), rng.choice([1, 9, 30])
        case = {"latent": torch.randn(1, 16, frames, height, breadth, generator=generator), "timestep": torch.tensor([rng.randrange(1001)])}
        case["text"] = torch.randn(1, tokens, sizes["text_dim"], generator=generator)
        if has_image:
            case["img_clip"] = torch.randn(1, 257, 1280, generator=generator)
            case["f1_black"] = torch.randn(1, 16, frames, height, breadth, generator=generator)
        cases[f"case{index}"] = case
    save_file({f"{name}.{key}": value for name, case in cases.items() for key, value in case.items()}, folder / "in.safetensors")
    return {"sizes": sizes, "trunk": doubled(trunk), "query": doubled(query), "mlp": doubled(mlp), "cases": cases, "blocks": blocks, "checkpoint": checkpoint}


def doubled(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: value.double() for key, value in state.items()}


def plain_logit(made: dict[str, Any], case: dict[str, torch.Tensor], leaf: torch.Tensor, taps: list[int]) -> torch.Tensor:
    """Logit of a case by plain_wan.py; `leaf` is its latent."""
    latent, clip = leaf[0], None
    if "f1_black" in case:
        first = case["f1_black"][0].double()
        mask = torch.zeros(4, *first.shape[1:], dtype=torch.float64)
        mask[:, 0] = 1
        latent, clip = torch.cat([latent, mask, first]), case["img_clip"][0].double()
    outputs = plain_wan.block_outputs(made["trunk"], made["sizes"], latent, int(case["timestep"]), case["text"][0].double(), clip)
    return plain_wan.logit(made["query"], made["mlp"], [outputs[tap - 1] for tap in taps])


@pytest.mark.parametrize("seed", range(6))
def test_random_pavrms(tmp_path, capsys, seed):
    made, out = make(tmp_path, seed), tmp_path / "out.safetensors"
    taps = [made["blocks"]] if seed % 3 else sorted({1, made["blocks"]})
    options = {"input": str(tmp_path / "in.safetensors"), "trunk": str(made["checkpoint"]), "tensors": str(out), "json": True}
    if seed % 2:
        options |= {"query": str(tmp_path / "mlp" / "query_attention_step_7.ckpt"), "head": str(tmp_path / "mlp" / "mlp_step_7.ckpt")}
    if not seed % 3:
        options["layers"] = ",".join(map(str, taps))
    assert score_command.main(["score-latent", json.dumps(options)]) == 0, capsys.readouterr().err
    videos = {video["name"]: video for video in json.loads(capsys.readouterr().out)["videos"]}
    found = load_file(out)
    assert sorted(videos) == sorted(made["cases"])
    for name, case in made["cases"].items():
        leaf = case["latent"].double().requires_grad_()
        expected = plain_logit(made, case, leaf, taps)
        (gradient,) = torch.autograd.grad(expected, leaf)
        assert videos[name]["logit"] == pytest.approx(expected.item(), abs=LOGIT)
        assert videos[name]["probability"] == pytest.approx(expected.sigmoid().item(), abs=2e-4) and videos[name]["layers"] == taps
        assert float((found[f"{name}.logit_grad_latent"].double() - gradient).norm() / gradient.norm()) < GRADIENT


def test_latents_of_one_tensor_have_their_own_noise_levels_and_texts(tmp_path, capsys):
    made, generator = make(tmp_path, 2), torch.Generator().manual_seed(9)
    latents, texts = torch.randn(3, 16, 3, 4, 6, generator=generator), torch.randn(3, 5, made["sizes"]["text_dim"], generator=generator)
    times = torch.tensor([10, 500, 990])
    save_file({"latent": latents, "text": texts, "timestep": times}, tmp_path / "many.safetensors")
    options = {"input": str(tmp_path / "many.safetensors"), "trunk": str(made["checkpoint"]), "json": True}
    assert score_command.main(["score-latent", json.dumps(options)]) == 0
    videos = json.loads(capsys.readouterr().out)["videos"]
    assert [(video["name"], video["timestep"]) for video in videos] == [("[0]", 10), ("[1]", 500), ("[2]", 990)]
    for index, video in enumerate(videos):
        case = {"text": texts[index : index + 1], "timestep": times[index]}
        expected = plain_logit(made, case, latents[index : index + 1].double(), [made["blocks"]])
        assert video["logit"] == pytest.approx(expected.item(), abs=LOGIT)


def test_heads_are_found_or_asked_for(tmp_path, capsys):
    made = make(tmp_path, 4)
    options = {"input": str(tmp_path / "in.safetensors"), "json": True}

    def run(**more: str) -> dict:
        score_command.main(["score-latent", json.dumps({**options, **more})])
        return json.loads(capsys.readouterr().out)

    beside, folder = run(trunk=str(made["checkpoint"])), str(tmp_path / "mlp")
    assert beside["verdict"] == "ok"
    for more in ({"trunk": str(tmp_path / "checkpoints")}, {"trunk": str(made["checkpoint"]), "query": folder, "head": folder}):
        assert run(**more)["videos"] == beside["videos"]
    (tmp_path / "mlp" / "mlp_step_8.ckpt").write_bytes((tmp_path / "mlp" / "mlp_step_7.ckpt").read_bytes())
    assert "holds 2 files mlp_step_N.ckpt" in run(trunk=str(made["checkpoint"]), query=folder, head=folder)["reason"]
    assert "the query attention only" in run(trunk=str(made["checkpoint"]), query=folder)["reason"]
    (tmp_path / "mlp" / "query_attention_step_7.ckpt").unlink()
    assert "needs both heads" in run(trunk=str(made["checkpoint"]))["reason"]
    (tmp_path / "checkpoints" / "checkpoint-8").mkdir()
    assert "holds 2 checkpoints (checkpoint-7, checkpoint-8)" in run(trunk=str(tmp_path / "checkpoints"))["reason"]

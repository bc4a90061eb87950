"""`lab.py score` on random tiny HPSv2.1 and MPS models in all their file forms, against the same arithmetic written out anew (plain_scorers.py).

Sizes, heads, activation, pictures, prompts, preparation, condition, threshold and normalisation are drawn from a seed.
"""

from __future__ import annotations

import json
import random
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file

from reward_lab.host import score_command
from reward_lab.reward_models import mps as own_mps
from reward_lab.tests.host import plain_scorers as plain

COSINE, RAW, GRADIENT = 1e-5, 2e-4, 1e-4
WORDS = ["a", "red", "fox,", "two", "dogs", "THE", "cat's", "café", "naïve", "3 o'clock", "—", "日本", "&", "sea...", "un-believable", "100%", '#1 "quoted"']
END_ID = 49407


def prompt_of(rng: random.Random) -> str:
    kind = rng.random()
    return "" if kind < 0.08 else " ".join(rng.choice(WORDS) for _ in range(90 if kind < 0.2 else rng.randrange(1, 15)))


def picture_of(rng: random.Random) -> Image.Image:
    """Noise over a gradient, of any shape."""
    width, height = (rng.choice([rng.randrange(20, 330), 224]) for _ in range(2))
    rows, columns = np.mgrid[0:height, 0:width]
    slope = np.stack([rows / height, columns / width, (rows + columns) / (height + width)], -1) * rng.uniform(60, 200)
    noise = np.random.default_rng(rng.randrange(10**9)).uniform(0, rng.choice([20, 120]), (height, width, 3))
    return Image.fromarray((slope + noise).clip(0, 255).astype(np.uint8))


def sizes_of(rng: random.Random) -> dict[str, Any]:
    def tower(widths: list[int]) -> tuple[int, int, int]:
        heads = rng.choice([1, 2, 3])
        return heads * rng.choice(widths), heads, rng.choice([1, 2, 3])

    sizes = {"embed": rng.choice([8, 24]), "vision": tower([8, 12]), "text": tower([4, 6])}
    return {**sizes, "patch": rng.choice([32, 56]), "is_quick": rng.random() < 0.4, "mlp": rng.choice([2, 4])}


def open_clip_config(sizes: dict[str, Any]) -> dict[str, Any]:
    (width, heads, layers), (text_width, text_heads, text_layers) = sizes["vision"], sizes["text"]
    vision = {"image_size": 224, "layers": layers, "width": width, "head_width": width // heads, "patch_size": sizes["patch"], "mlp_ratio": sizes["mlp"]}
    text = {"context_length": 77, "vocab_size": 49408, "width": text_width, "heads": text_heads, "layers": text_layers, "mlp_ratio": sizes["mlp"]}
    return {"embed_dim": sizes["embed"], "quick_gelu": sizes["is_quick"], "vision_cfg": vision, "text_cfg": text}


def hugging_face_config(sizes: dict[str, Any]) -> dict[str, Any]:
    (width, heads, layers), (text_width, text_heads, text_layers) = sizes["vision"], sizes["text"]
    common = {"hidden_act": "quick_gelu" if sizes["is_quick"] else "gelu", "layer_norm_eps": 1e-5}
    vision = {"hidden_size": width, "intermediate_size": sizes["mlp"] * width, "num_hidden_layers": layers, "num_attention_heads": heads, "image_size": 224}
    text = {"hidden_size": text_width, "intermediate_size": sizes["mlp"] * text_width, "num_hidden_layers": text_layers, "num_attention_heads": text_heads}
    return {
        "projection_dim": sizes["embed"],
        "vision_config": {**vision, "patch_size": sizes["patch"], **common},
        "text_config": {**text, "vocab_size": 49408, "max_position_embeddings": 77, "eos_token_id": 2, **common},
    }


def tower_state(sizes: dict[str, Any], generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Random half-precision weights of both towers in Hugging Face's names."""

    def draw(*shape: int, spread: float = 1.0) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) * spread).half()

    embed, state = sizes["embed"], {}
    for tower, (width, _, layers) in (("vision_model", sizes["vision"]), ("text_model", sizes["text"])):
        for index in range(layers):
            name = f"{tower}.encoder.layers.{index}"
            for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
                state |= {f"{name}.self_attn.{part}.weight": draw(width, width, spread=width**-0.5), f"{name}.self_attn.{part}.bias": draw(width, spread=0.2)}
            for part, rows, columns in (("fc1", sizes["mlp"] * width, width), ("fc2", width, sizes["mlp"] * width)):
                state |= {f"{name}.mlp.{part}.weight": draw(rows, columns, spread=columns**-0.5), f"{name}.mlp.{part}.bias": draw(rows, spread=0.2)}
            for part in ("layer_norm1", "layer_norm2"):
                state |= {f"{name}.{part}.weight": 1 + draw(width, spread=0.2), f"{name}.{part}.bias": draw(width, spread=0.2)}
    (width, _, _), (text_width, _, _), patch = sizes["vision"], sizes["text"], sizes["patch"]
    for name, size in (("vision_model.pre_layrnorm", width), ("vision_model.post_layernorm", width), ("text_model.final_layer_norm", text_width)):
        state |= {f"{name}.weight": 1 + draw(size, spread=0.2), f"{name}.bias": draw(size, spread=0.2)}
    state["vision_model.embeddings.class_embedding"] = draw(width)
    state["vision_model.embeddings.patch_embedding.weight"] = draw(width, 3, patch, patch, spread=(3 * patch**2) ** -0.5 * 4)
    state["vision_model.embeddings.position_embedding.weight"] = draw((224 // patch) ** 2 + 1, width, spread=0.5)
    state["text_model.embeddings.token_embedding.weight"] = draw(49408, text_width)
    state["text_model.embeddings.position_embedding.weight"] = draw(77, text_width, spread=0.5)
    state["text_projection.weight"], state["visual_projection.weight"] = draw(embed, text_width), draw(embed, width)
    state["logit_scale"] = torch.tensor(3.1).half()
    return state


def to_open_clip(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The names of HPSv2's files; the inverse of `plain.from_open_clip`, found by trying it on the names themselves."""
    result = {"logit_scale": state["logit_scale"], "text_projection": state["text_projection.weight"].T, "visual.proj": state["visual_projection.weight"].T}
    plainly = {
        "token_embedding.weight": "text_model.embeddings.token_embedding.weight", "positional_embedding": "text_model.embeddings.position_embedding.weight",
        "visual.class_embedding": "vision_model.embeddings.class_embedding", "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
        "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    }  # fmt: skip
    result |= {new: state[old] for new, old in plainly.items()}
    norms = {"ln_final": "text_model.final_layer_norm", "visual.ln_pre": "vision_model.pre_layrnorm", "visual.ln_post": "vision_model.post_layernorm"}
    parts = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "attn.out_proj": "self_attn.out_proj", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
    for kind in ("weight", "bias"):
        result |= {f"{new}.{kind}": state[f"{old}.{kind}"] for new, old in norms.items()}
        for tower, new in (("vision_model", "visual.transformer.resblocks"), ("text_model", "transformer.resblocks")):
            index = 0
            while f"{tower}.encoder.layers.{index}.layer_norm1.weight" in state:
                name = f"{tower}.encoder.layers.{index}"
                result |= {f"{new}.{index}.{part}.{kind}": state[f"{name}.{old}.{kind}"] for part, old in parts.items()}
                result[f"{new}.{index}.attn.in_proj_{kind}"] = torch.cat([state[f"{name}.self_attn.{part}_proj.{kind}"] for part in "qkv"])
                index += 1
    return {key: value.contiguous() for key, value in result.items()}


def wide(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: value.double() if value.is_floating_point() else value for key, value in state.items()}


@pytest.fixture
def run(capsys):
    """Run `score`; returns its document."""

    def call(paths: list[Path], *, status: int = 0, **options: Any) -> dict:
        found = score_command.main(["score", json.dumps({"paths": [str(path) for path in paths], "json": True, **options})])
        printed = capsys.readouterr()
        assert found == status, printed.err
        return json.loads(printed.out)

    return call


def pictures_in(folder: Path, rng: random.Random, count: int) -> list[tuple[Path, Image.Image]]:
    found = []
    for index in range(count):
        picture = picture_of(rng)
        picture.save(folder / f"{index}.png")
        found.append((folder / f"{index}.png", picture))
    return found


def as_float(picture: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255.0


def save_hps(state: dict[str, torch.Tensor], form: str, folder: Path) -> Path:
    path = folder / {"official": "hps.pt", "safetensors": "hps.safetensors", "imscore": "model.safetensors", "hugging_face": "hf.safetensors"}[form]
    named = to_open_clip(state)
    if form == "official":
        torch.save({"state_dict": named}, path)
    elif form == "hugging_face":
        save_file({key: value.contiguous() for key, value in state.items()}, path)
    else:
        save_file({f"model.{key}" if form == "imscore" else key: value.float() for key, value in named.items()}, path)
    return path


@pytest.mark.parametrize("seed", range(4))
def test_random_hps(tmp_path, run, seed):
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    sizes = sizes_of(rng)
    state, form = tower_state(sizes, generator), ("official", "safetensors", "imscore", "hugging_face")[seed % 4]
    (tmp_path / "config.json").write_text(json.dumps(hugging_face_config(sizes) if form == "hugging_face" else open_clip_config(sizes)))
    (tmp_path / "images").mkdir()
    pictures, prompts = pictures_in(tmp_path / "images", rng, 3), [prompt_of(rng) for _ in range(3)]
    (tmp_path / "prompts.json").write_text(json.dumps(prompts))
    heads, doubled = (sizes["vision"][1], sizes["text"][1]), wide(state)
    common = {"kind": "hpsv2", "weights": str(save_hps(state, form, tmp_path)), "config": str(tmp_path / "config.json")}
    common |= {"prompts": str(tmp_path / "prompts.json"), "gradients": str(tmp_path / "g.safetensors")}
    renamed = plain.from_open_clip(to_open_clip(state))
    assert all(torch.equal(renamed[key], value) for key, value in state.items() if key != "logit_scale")
    ids = own_ids(prompts)
    for resize in ("letterbox", "squash"):
        for antialias in (True, False):
            found = run([path for path, _ in pictures], **common, resize=resize, antialias="on" if antialias else "off")
            gradients = load_file(tmp_path / "g.safetensors")
            for video, (path, picture), own in zip(found["videos"], pictures, ids, strict=True):
                leaf = as_float(picture).requires_grad_()
                expected = plain.hps(doubled, heads, sizes["is_quick"], plain.prepared(leaf, resize, antialias)[None], own)
                assert video["per_video"] == pytest.approx(expected.item(), abs=COSINE), (resize, antialias, picture.size)
                (gradient,) = torch.autograd.grad(expected.sum(), leaf)
                assert (gradients[path.name][0] - gradient).abs().max() < GRADIENT * gradient.abs().max()


def own_ids(prompts: list[str]) -> torch.Tensor:
    import open_clip

    return open_clip.get_tokenizer("ViT-H-14")(prompts)


def mps_state(sizes: dict[str, Any], cross: dict[str, int], generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Random MPS in the published names."""

    def draw(rows: int, columns: int) -> torch.Tensor:
        return (torch.randn(rows, columns, generator=generator) * columns**-0.5).half()

    state = {f"model.{key}": value for key, value in tower_state(sizes, generator).items()}
    dim, inner, head, feed = sizes["embed"], cross["heads"] * cross["dim_head"], cross["dim_head"], cross["ff_mult"] * sizes["embed"]
    for index in range(cross["layer_num"]):
        name, block = f"cross_model.layers.{index}.0.fn", f"cross_model.layers.{index}.1.fn"
        state |= {f"{part}.norm.weight": 1 + draw(1, dim)[0] * 0.3 for part in (name, block)}
        state |= {f"{part}.norm.bias": torch.zeros(dim).half() for part in (name, block)}
        state |= {f"{name}.to_q.weight": draw(inner, dim), f"{name}.to_kv.weight": draw(2 * head, dim), f"{name}.to_out.weight": draw(dim, inner)}
        state |= {f"{name}.ff.0.weight": draw(2 * feed, dim), f"{name}.ff.2.weight": draw(dim, feed)}
        state |= {f"{block}.fused_attn_ff_proj.weight": draw(inner + 2 * head + 2 * feed, dim), f"{block}.attn_out.weight": draw(dim, inner)}
        state[f"{block}.ff_out.1.weight"] = draw(dim, feed)
        state[f"{block}.rotary_emb.inv_freq"] = (1.0 / 10000 ** (torch.arange(0, head, 2) / head)).half()
    return state


def whole_module(state: dict[str, torch.Tensor], monkeypatch) -> torch.nn.Module:
    """A module tree that gives this state dict, of classes in a package that is gone when the file is read, with a cached table as a used model has."""
    package = {name: types.ModuleType(name) for name in ("trainer", "trainer.models", "trainer.models.clip_model")}
    for name, module in package.items():
        monkeypatch.setitem(sys.modules, name, module)
    kind = type("CLIPModel", (torch.nn.Module,), {"__module__": "trainer.models.clip_model"})
    package["trainer.models.clip_model"].CLIPModel = kind
    root = kind()
    for key, value in state.items():
        *folders, leaf = key.split(".")
        place = root
        for folder in folders:
            if folder not in place._modules:
                place.add_module(folder, kind())
            place = place._modules[folder]
        if leaf in ("inv_freq", "position_ids") or key.endswith("norm.bias") and "cross_model" in key:
            place.register_buffer(leaf, value)
        else:
            place.register_parameter(leaf, torch.nn.Parameter(value))
        if leaf == "inv_freq":
            place.register_buffer("pos_emb", torch.randn(5, 5), persistent=False)
    return root


def save_mps(state: dict[str, torch.Tensor], form: str, folder: Path, monkeypatch) -> Path:
    path = folder / {"whole": "mps.pth", "state_dict": "mps_state.pth", "safetensors": "mps.safetensors", "imscore": "model.safetensors"}[form]
    positions = {f"model.{tower}.embeddings.position_ids": torch.arange(77)[None] for tower in ("text_model", "vision_model")}
    if form == "whole":
        with monkeypatch.context() as patch:
            torch.save(whole_module({**state, **positions}, patch), path)
    elif form == "state_dict":
        torch.save({**state, **positions}, path)
    else:
        save_file({f"mps.{key}" if form == "imscore" else key: value.contiguous() for key, value in state.items()}, path)
    return path


def mps_ids(prompts: list[str], comfyui: Path) -> torch.Tensor:
    """Ids of transformers' own CLIP tokenizer with the vocabulary that the host brings."""
    tokenizer = transformers.CLIPTokenizerFast.from_pretrained(str(comfyui / "comfy" / "sd1_tokenizer"))
    found = tokenizer(prompts, max_length=77, truncation=True)["input_ids"]
    return torch.tensor([[*ids, *[END_ID] * (77 - len(ids))] for ids in found])


@pytest.mark.parametrize("seed", range(4))
def test_random_mps(tmp_path, run, comfyui, monkeypatch, seed):
    rng, generator = random.Random(seed + 100), torch.Generator().manual_seed(seed + 100)
    sizes = sizes_of(rng)
    cross = {"layer_num": rng.choice([1, 2, 4]), "dim_head": rng.choice([4, 8]), "heads": rng.choice([1, 3]), "ff_mult": rng.choice([2, 4])}
    state, form = mps_state(sizes, cross, generator), ("whole", "state_dict", "safetensors", "imscore")[seed % 4]
    config = {**hugging_face_config(sizes), **({} if seed % 2 else {"cross_config": {"dim": sizes["embed"], **cross}})}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "images").mkdir()
    pictures, prompts = pictures_in(tmp_path / "images", rng, 3), [prompt_of(rng) for _ in range(3)]
    (tmp_path / "prompts.json").write_text(json.dumps(prompts))
    common = {"kind": "mps", "weights": str(save_mps(state, form, tmp_path, monkeypatch)), "config": str(tmp_path / "config.json")}
    common["prompts"] = str(tmp_path / "prompts.json")
    heads, doubled, ids = (sizes["vision"][1], sizes["text"][1], cross["heads"]), wide(state), mps_ids(prompts, comfyui)
    crops = torch.stack([plain.prepared_by_pillow(picture) for _, picture in pictures])
    squashed = torch.stack([plain.prepared(as_float(picture), "squash") for _, picture in pictures])
    for condition in ("overall", "quality", rng.choice(WORDS)):
        condition_ids = mps_ids([own_mps.CONDITIONS.get(condition, condition)], comfyui)[0]
        for normalise in ("sample", "batch"):
            threshold, resize = rng.choice([0.01, 0.3, round(rng.uniform(0, 0.9), 2)]), rng.choice(["crop", "squash"])
            options = {**common, "condition": condition, "normalise": normalise, "threshold": threshold, "resize": resize}
            batch = ids if normalise == "batch" else ()
            expected = plain.mps(doubled, heads, sizes["is_quick"], crops if resize == "crop" else squashed, ids, condition_ids, threshold, batch)
            is_masked = expected.isnan()
            if is_masked.all():
                assert "masks every position of the prompt" in run([path for path, _ in pictures], status=score_command.REFUSED, **options)["reason"]
                continue
            found = run([path for path, _ in pictures], status=score_command.INCOMPLETE if is_masked.any() else 0, **options)
            assert [error["name"] for error in found["errors"]] == [path.name for (path, _), is_left in zip(pictures, is_masked, strict=True) if is_left]
            assert all("masks every position of the prompt" in error["reason"] for error in found["errors"])
            expected = expected[~is_masked]
            got = [video["per_video"] for video in found["videos"]]
            assert got == pytest.approx(expected.tolist(), abs=RAW), (condition, normalise, threshold, resize, [p.size for _, p in pictures])
            cosines = [video["parts"]["mps_cosine"]["per_video"] for video in found["videos"]]
            assert cosines == pytest.approx((expected / doubled["model.logit_scale"].exp()).tolist(), abs=COSINE)


def test_mps_gradient_of_a_squashed_picture(tmp_path, run, comfyui, monkeypatch):
    rng, generator = random.Random(7), torch.Generator().manual_seed(7)
    sizes, cross = sizes_of(rng), {"layer_num": 2, "dim_head": 8, "heads": 2, "ff_mult": 2}
    state = mps_state(sizes, cross, generator)
    (tmp_path / "config.json").write_text(json.dumps({**open_clip_config(sizes), "cross_config": cross}))
    ((path, picture),) = pictures_in(tmp_path, rng, 1)
    options = {"kind": "mps", "weights": str(save_mps(state, "safetensors", tmp_path, monkeypatch)), "config": str(tmp_path / "config.json")}
    run([path], **options, prompt="a red fox", threshold=0.3, resize="squash", gradients=str(tmp_path / "g.safetensors"))
    leaf = as_float(picture).requires_grad_()
    ids = mps_ids(["a red fox", own_mps.CONDITIONS["overall"]], comfyui)
    heads = (sizes["vision"][1], sizes["text"][1], 2)
    expected = plain.mps(wide(state), heads, sizes["is_quick"], plain.prepared(leaf, "squash")[None], ids[:1], ids[1], 0.3)
    (gradient,) = torch.autograd.grad(expected.sum(), leaf)
    assert (load_file(tmp_path / "g.safetensors")[path.name][0] - gradient).abs().max() < GRADIENT * gradient.abs().max()


@pytest.mark.parametrize("seed", range(2))
def test_random_pickscore_and_aesthetic(tmp_path, run, comfyui, seed):
    rng, generator = random.Random(seed + 200), torch.Generator().manual_seed(seed + 200)
    sizes = sizes_of(rng)
    state = tower_state(sizes, generator)
    save_file({key: value.contiguous() for key, value in state.items()}, tmp_path / "clip.safetensors")
    (tmp_path / "clip.json").write_text(json.dumps(hugging_face_config(sizes)))
    (tmp_path / "images").mkdir()
    pictures, prompt = pictures_in(tmp_path / "images", rng, 3), prompt_of(rng)
    crops, doubled = torch.stack([plain.prepared_by_pillow(picture) for _, picture in pictures]), wide(state)
    expected = plain.hps(doubled, (sizes["vision"][1], sizes["text"][1]), sizes["is_quick"], crops, mps_ids([prompt], comfyui)[0])
    paths = [path for path, _ in pictures]
    found = run(paths, kind="pickscore", weights=str(tmp_path / "clip.safetensors"), prompt=prompt)
    assert [video["per_video"] for video in found["videos"]] == pytest.approx((expected * doubled["logit_scale"].exp()).tolist(), abs=RAW)
    assert [video["parts"]["pickscore_cosine"]["per_video"] for video in found["videos"]] == pytest.approx(expected.tolist(), abs=COSINE)

    widths, places = (sizes["embed"], 1024, 128, 64, 16, 1), (0, 2, 4, 6, 7)
    shapes = list(zip(widths[1:], widths[:-1], strict=True))
    layers = [(torch.randn(rows, columns, generator=generator) * columns**-0.5, torch.randn(rows, generator=generator)) for rows, columns in shapes]
    head = {f"layers.{place}.{kind}": value for place, pair in zip(places, layers, strict=True) for kind, value in zip(("weight", "bias"), pair, strict=True)}
    torch.save(head, tmp_path / "head.pth")
    found = run(paths, kind="aesthetic", weights=str(tmp_path / "head.pth"), clip=str(tmp_path / "clip.safetensors"))
    x = plain.picture_vectors(doubled, sizes["vision"][1], sizes["is_quick"], crops)
    for weight, bias in layers:
        x = x @ weight.double().T + bias.double()
    assert [video["per_video"] for video in found["videos"]] == pytest.approx(x[:, 0].tolist(), abs=RAW)

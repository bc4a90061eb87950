"""PickScore and the LAION aesthetic predictor against straightforward readings of their published code, both layouts, strict keys."""

from __future__ import annotations

import gc
import json
import weakref

import pytest
import torch
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional

from reward_lab.reward_models import clip, hpsv2, layouts, mps, pickscore, preprocess, published
from reward_lab.reward_models.loader import load_reward_model
from reward_lab.tests.reward_models.conftest import TINY_MPS, randomise

TINY = {
    "embed_dim": 8,
    "vision_cfg": {"image_size": 16, "layers": 2, "width": 12, "head_width": 6, "patch_size": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 8, "heads": 2, "layers": 2},
}
PROMPTS = ["a red square", "two green circles &amp; a dog"]


def plain_clip(config: dict, seed: int) -> CLIP:
    """open_clip's own model, not built by the pack."""
    torch.manual_seed(seed)
    text, vision = CLIPTextCfg(**config["text_cfg"]), CLIPVisionCfg(**config["vision_cfg"])
    model = CLIP(config["embed_dim"], vision, text, quick_gelu=config.get("quick_gelu", False)).eval()
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape) * 0.4
    return model


@pytest.fixture
def clip_files(tmp_path):
    """A random CLIP and its file in both layouts."""
    model = plain_clip(TINY, 3)
    state = {key: value.contiguous() for key, value in model.state_dict().items() if key != "attn_mask"}
    paths = {"open_clip": tmp_path / "open_clip.safetensors", "hf": tmp_path / "hf.safetensors"}
    save_file(state, paths["open_clip"])
    save_file({key: value.clone() for key, value in layouts.open_clip_to_hf(state).items()}, paths["hf"])
    return model, paths


@pytest.mark.parametrize("layout", ["open_clip", "hf"])
@pytest.mark.parametrize("scale", ["raw", "cosine"])
def test_pickscore_is_the_published_formula(clip_files, make_frames, layout, scale):
    model, paths = clip_files
    frames = make_frames(2, 3)
    output = load_reward_model("pickscore", paths[layout], config=TINY, scale=scale).score(frames, PROMPTS)
    pixels = preprocess.normalise(preprocess.crop_as_pillow(frames.flatten(0, 1), 16))
    with torch.no_grad():
        pictures = functional.normalize(model.encode_image(pixels), dim=-1).unflatten(0, (2, 3))
        texts = functional.normalize(model.encode_text(clip.tokenize(PROMPTS, is_plain=True)), dim=-1)
        cosine = (pictures * texts[:, None]).sum(-1)
        raw = cosine * model.logit_scale.exp()
    torch.testing.assert_close(output.per_frame, raw if scale == "raw" else cosine, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(output.parts["pickscore_cosine"], cosine, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(output.per_video, output.per_frame.mean(1))


def test_pickscore_does_not_repair_text_as_hps_does(clip_files, make_frames):
    _, paths = clip_files
    frames = make_frames(1, 1)
    pick, hps = (load_reward_model(kind, paths["open_clip"], config=TINY, resize="crop", antialias=False) for kind in ("pickscore", "hpsv2"))
    pick.scale = "cosine"
    same, other = ["a red square"], [PROMPTS[1]]
    torch.testing.assert_close(pick.score(frames, same).per_video, hps.score(frames, same).per_video, rtol=0, atol=1e-6)
    assert abs(float(pick.score(frames, other).per_video - hps.score(frames, other).per_video)) > 1e-4


@pytest.fixture
def aesthetic_files(tmp_path):
    """A random vision tower with OpenAI's activation in both layouts, and the published predictor as its authors build and save it."""
    config = {**TINY, "quick_gelu": True}
    tower = plain_clip(config, 5)
    torch.manual_seed(6)
    head = nn.Module()
    sizes = (8, 1024, 128, 64, 16, 1)
    linears = [nn.Linear(sizes[i], sizes[i + 1]) for i in range(5)]
    head.layers = nn.Sequential(linears[0], nn.Dropout(0.2), linears[1], nn.Dropout(0.2), linears[2], nn.Dropout(0.1), linears[3], linears[4]).eval()
    for linear in linears:
        linear.bias.data += 0.3
    torch.save(head.state_dict(), tmp_path / "head.pth")
    state = {key: value.contiguous() for key, value in tower.state_dict().items() if key != "attn_mask"}
    save_file(state, tmp_path / "clip.safetensors")
    hf = layouts.open_clip_to_hf(state)
    save_file({key: value.clone() for key, value in hf.items() if key.startswith(("vision_model.", "visual_projection."))}, tmp_path / "vision.safetensors")
    return config, tower, head, tmp_path


@pytest.mark.parametrize("towers", ["clip.safetensors", "vision.safetensors"])
def test_aesthetic_is_the_published_predictor(aesthetic_files, make_frames, towers):
    config, tower, head, folder = aesthetic_files
    frames = make_frames(2, 2)
    model = load_reward_model("aesthetic", folder / "head.pth", clip=folder / towers, config=config)
    output = model.score(frames, ["", ""])
    with torch.no_grad():
        vectors = tower.encode_image(preprocess.normalise(preprocess.crop_as_pillow(frames.flatten(0, 1), 16)))
        expected = head.layers(vectors / vectors.norm(dim=-1, keepdim=True))[:, 0].unflatten(0, (2, 2))
    torch.testing.assert_close(output.per_frame, expected, rtol=1e-5, atol=1e-5)
    leaf = frames.clone().requires_grad_()
    model.score(leaf, ["", ""]).per_video.sum().backward()
    assert leaf.grad.abs().sum() > 0


def test_aesthetic_names_what_is_missing_or_wrong(aesthetic_files, clip_files, scorers):
    config, _, _, folder = aesthetic_files
    with pytest.raises(ValueError, match="holds the head alone"):
        load_reward_model("aesthetic", folder / "head.pth")
    with pytest.raises(ValueError, match="Load it with kind mps"):
        load_reward_model("aesthetic", scorers.folder / "mps" / "mps_tiny.safetensors")
    with pytest.raises(ValueError, match="but a CLIP ViT-L/14 is needed"):
        load_reward_model("aesthetic", folder / "head.pth", clip=scorers.folder / "mps" / "mps_tiny.safetensors", config=config)
    with pytest.raises(ValueError, match="Load it with kind aesthetic"):
        load_reward_model("hpsv2", folder / "head.pth")
    damaged = torch.load(folder / "head.pth", weights_only=True)
    damaged.pop("layers.4.bias")
    torch.save(damaged, folder / "damaged.pth")
    with pytest.raises(ValueError, match="missing: layers.4.bias"):
        load_reward_model("aesthetic", folder / "damaged.pth", clip=folder / "clip.safetensors", config=config)
    with pytest.raises(ValueError, match="threshold cannot be set for aesthetic"):
        load_reward_model("aesthetic", folder / "head.pth", clip=folder / "clip.safetensors", config=config, threshold=0.1)


def test_a_published_file_is_known_by_its_size(tmp_path):
    path = tmp_path / "HPS_v2.1_compressed.pt"
    path.write_bytes(b"")
    for size, what, kind in ((1_972_484_501, "v2.0", "mps"), (1_972_490_005, "HPS v2.1", "pickscore")):
        with path.open("r+b") as file:
            file.truncate(size)  # a hole: takes no room on disk
        assert what in published.known_file(path).what
        with pytest.raises(ValueError, match="load it with kind hpsv2.1, or choose"):
            load_reward_model(kind, path)
        assert ("not comparable" in published.file_warning("hpsv2.1", path)) == (what == "v2.0")


def test_an_empty_file_is_no_published_one(tmp_path):
    path = tmp_path / "MPS_overall.pth"
    path.touch()
    assert any(entry.size_bytes == 0 for entry in published.FILES) and published.known_file(path) is None
    for kind in ("hpsv2.1", "mps", "pickscore"):
        with pytest.raises(ValueError, match="has 0 bytes; it is empty"):
            load_reward_model(kind, path)


def test_config_of_metadata_is_used(clip_files, tmp_path, make_frames):
    model, _ = clip_files
    state = {key: value.contiguous() for key, value in model.state_dict().items() if key != "attn_mask"}
    save_file(state, tmp_path / "own.safetensors", metadata={"config": json.dumps(TINY)})
    assert isinstance(load_reward_model("hpsv2", tmp_path / "own.safetensors"), hpsv2.HPSv2Reward)


@pytest.mark.parametrize("kind", ["hps", "mps", "pickscore"])
def test_a_dropped_scorer_frees_its_weights_at_once(kind):
    """Without waiting for the garbage collector: the next model needs the memory now."""
    network = randomise(mps.build(TINY_MPS) if kind == "mps" else hpsv2.build(TINY), 1)
    model = {"hps": hpsv2.HPSv2Reward, "mps": mps.MPSReward, "pickscore": pickscore.PickScoreReward}[kind](network)
    model.score(torch.rand(1, 1, 3, 20, 20), ["a cat"])
    weights = weakref.ref(network)
    gc.collect()
    gc.disable()
    try:
        del network, model
        assert weights() is None
    finally:
        gc.enable()

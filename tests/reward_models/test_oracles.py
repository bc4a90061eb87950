"""Random tiny configs against independent code: open_clip's own model, imscore's HPSv2 and MPS cross model, transformers' CLIP.

imscore and transformers are test-only and optional (pip install --no-deps imscore==0.0.11, and transformers, loguru); without them their tests skip.
imscore's whole MPS class cannot run: it loads the full-size CLIP by name and halves pixels and mask, which CPU kernels refuse; its parts are joined here as
its forward does.
"""

from __future__ import annotations

import pytest
import torch
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
from torch.nn import functional

from reward_lab.reward_models import clip, hpsv2, layouts, mps, preprocess
from reward_lab.reward_models.weights import load_into

PROMPTS = ["a red square moves left", "two dogs, oil painting"]
# Head widths, layers and sizes that differ from each other, so that a mix-up of any two shows.
CONFIGS = [
    {"embed": 8, "vision": (16, 2, 12, 6, 8), "text": (8, 2, 2)},
    {"embed": 12, "vision": (32, 1, 24, 8, 16), "text": (16, 4, 3)},
    {"embed": 24, "vision": (28, 3, 20, 10, 14), "text": (12, 3, 1)},
]


def open_clip_config(sizes: dict) -> dict:
    image, layers, width, head, patch = sizes["vision"]
    text_width, heads, text_layers = sizes["text"]
    return {
        "embed_dim": sizes["embed"],
        "vision_cfg": {"image_size": image, "layers": layers, "width": width, "head_width": head, "patch_size": patch},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": text_width, "heads": heads, "layers": text_layers},
    }


def plain_clip(config: dict, **options) -> CLIP:
    """open_clip's own model with random weights."""
    model = CLIP(config["embed_dim"], CLIPVisionCfg(**config["vision_cfg"]), CLIPTextCfg(**config["text_cfg"]), **options).eval()
    generator = torch.Generator().manual_seed(9)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.4
    return model


def own_hps(config: dict, oracle: CLIP, **options) -> hpsv2.HPSv2Reward:
    network = hpsv2.build(config)
    load_into(network, {key: value for key, value in oracle.state_dict().items() if key != "attn_mask"}, "oracle")
    return hpsv2.HPSv2Reward(network, **options)


@pytest.mark.parametrize("sizes", CONFIGS)
def test_hps_is_open_clips_cosine_with_gradient(sizes, make_frames):
    config = open_clip_config(sizes)
    oracle = plain_clip(config)
    model = own_hps(config, oracle)
    frames = make_frames(2, 2, 33, 47).requires_grad_()
    found = model.score(frames, PROMPTS).per_frame
    pixels = preprocess.normalise(preprocess.letterbox(frames.flatten(0, 1), config["vision_cfg"]["image_size"]))
    picture, text = oracle.encode_image(pixels, normalize=True), oracle.encode_text(clip.tokenize(PROMPTS), normalize=True)
    expected = (picture.unflatten(0, (2, 2)) * text[:, None]).sum(-1)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    one, other = (torch.autograd.grad(value.sum(), frames, retain_graph=True)[0] for value in (found, expected))
    assert float((one - other).norm() / other.norm()) < 1e-4


@pytest.mark.parametrize("sizes", CONFIGS)
def test_hps_is_imscores(sizes, make_frames):
    hps = pytest.importorskip("imscore.hps.model", reason="imscore is not installed")
    config = {**open_clip_config(sizes)}
    # imscore's preparation is fixed to 224 pixels.
    config["vision_cfg"] = {**config["vision_cfg"], "image_size": 224, "patch_size": 56}
    tower = plain_clip(config, output_dict=True)
    oracle = hps.HPSv2.__new__(hps.HPSv2)
    torch.nn.Module.__init__(oracle)
    oracle.model, oracle.tokenizer = tower, clip._tokenizer(False)
    oracle.resize = hps.ResizeMaxSize(224)
    oracle.normalize = hps.torchvision.transforms.Normalize(mean=preprocess.CLIP_MEAN, std=preprocess.CLIP_STD)
    frames = make_frames(2, 1, 180, 301)
    with torch.no_grad():
        expected = oracle.score(frames[:, 0], PROMPTS)
    found = own_hps(config, tower).score(frames, PROMPTS).per_frame[:, 0]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def hf_clip(transformers, sizes: dict):
    """transformers' CLIP of these sizes with random weights, exact GELU."""
    image, layers, width, head, patch = sizes["vision"]
    text_width, heads, text_layers = sizes["text"]
    vision = {
        "image_size": image, "num_hidden_layers": layers, "hidden_size": width, "num_attention_heads": width // head, "patch_size": patch,
        "intermediate_size": 4 * width, "hidden_act": "gelu",
    }  # fmt: skip
    text = {
        "num_hidden_layers": text_layers, "hidden_size": text_width, "num_attention_heads": heads, "intermediate_size": 4 * text_width,
        "hidden_act": "gelu", "vocab_size": 49408, "eos_token_id": 2,
    }  # fmt: skip
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=sizes["embed"])
    model = transformers.CLIPModel(config).eval()
    generator = torch.Generator().manual_seed(4)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.4
    return model, config.to_dict()


@pytest.mark.parametrize("sizes", CONFIGS)
@pytest.mark.parametrize("threshold", [0.01, 0.3])
def test_mps_is_imscores_cross_model_on_transformers_clip(sizes, threshold):
    cross = pytest.importorskip("imscore.mps.cross", reason="imscore is not installed")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    towers, config = hf_clip(transformers, sizes)
    shape = {"layer_num": 2, "dim_head": 4, "heads": 3, "ff_mult": 2}
    oracle = cross.CrossModel(dim=sizes["embed"], **shape).eval()
    generator = torch.Generator().manual_seed(5)
    for parameter in oracle.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    published = {f"model.{key}": value for key, value in towers.state_dict().items()}
    published |= {f"cross_model.{key}": value for key, value in oracle.state_dict().items()}
    network = mps.build({**config, "cross_config": {"dim": sizes["embed"], **shape}})
    load_into(network, layouts.mps_to_own(published), "oracle")
    pixels = torch.randn(2, 3, sizes["vision"][0], sizes["vision"][0], generator=generator).requires_grad_()
    ids, condition = mps.tokenize(PROMPTS), mps.tokenize([mps.CONDITIONS["overall"]])
    found = network.image_text_score(pixels, ids, condition, threshold=threshold)

    def states(tokens):
        return towers.text_projection(towers.text_model(input_ids=tokens).last_hidden_state)

    text, likeness = states(ids), states(ids) @ states(condition).transpose(1, 2)
    ratio = likeness.amax(-1) / likeness.amax(-1).amax(-1, keepdim=True)
    hidden = torch.zeros_like(ratio).masked_fill(ratio <= threshold, float("-inf"))
    image = towers.visual_projection(towers.vision_model(pixel_values=pixels).last_hidden_state)
    picture = oracle(image, text, hidden[:, None].expand(-1, image.shape[1], -1))[:, 0]
    end = text[torch.arange(2), (ids == clip.END_ID).int().argmax(-1)]
    expected = towers.logit_scale.exp() * functional.cosine_similarity(end, picture)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    one, other = (torch.autograd.grad(value.sum(), pixels, retain_graph=True)[0] for value in (found, expected))
    assert float((one - other).norm() / other.norm()) < 1e-3


@pytest.mark.parametrize("sizes", CONFIGS)
def test_pickscore_is_transformers_clip(sizes, make_frames):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    from reward_lab.reward_models import pickscore

    towers, config = hf_clip(transformers, sizes)
    network = hpsv2.build(clip.from_hf_config(config))
    load_into(network, layouts.hf_to_open_clip(towers.state_dict()), "oracle")
    frames = make_frames(2, 1, 40, 30)
    found = pickscore.PickScoreReward(network).score(frames, PROMPTS).per_frame[:, 0]
    pixels = preprocess.normalise(preprocess.crop_as_pillow(frames[:, 0], sizes["vision"][0]))
    with torch.no_grad():
        picture = towers.visual_projection(towers.vision_model(pixel_values=pixels).pooler_output)
        text = towers.text_projection(towers.text_model(input_ids=clip.tokenize(PROMPTS, is_plain=True)).pooler_output)
        expected = towers.logit_scale.exp() * functional.cosine_similarity(picture, text)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)

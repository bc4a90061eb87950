"""The full-size PAVRMs on the meta device: every key of the published layouts finds its place."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("torch")
pytest.importorskip("comfy.ldm.wan.model", reason="needs ComfyUI on the path")

import torch  # noqa: E402

from reward_lab.host import pavrm, pavrm_files  # noqa: E402
from reward_lab.reward_models.pavrm import build_head  # noqa: E402
from reward_lab.reward_models.weights import check_keys  # noqa: E402

pytestmark = pytest.mark.host


def full_size_trunk_keys(blocks: int = 8, in_channels: int = 16, has_image: bool = False) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a Wan2.1 14B trunk, written from the published layout (Wan-AI/Wan2.1-T2V-14B and -I2V-14B) and not from the host's code."""
    width, feed, text, frequencies, image = 5120, 13824, 4096, 256, 1280

    def linear(name: str, inputs: int, outputs: int) -> dict[str, tuple[int, ...]]:
        return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}

    keys = {"patch_embedding.weight": (width, in_channels, 1, 2, 2), "patch_embedding.bias": (width,)}
    keys |= linear("text_embedding.0", text, width) | linear("text_embedding.2", width, width)
    keys |= linear("time_embedding.0", frequencies, width) | linear("time_embedding.2", width, width) | linear("time_projection.1", width, 6 * width)
    for index in range(blocks):
        block = f"blocks.{index}"
        for part in ("self_attn", "cross_attn"):
            for name in ("q", "k", "v", "o"):
                keys |= linear(f"{block}.{part}.{name}", width, width)
            keys |= {f"{block}.{part}.norm_{name}.weight": (width,) for name in ("q", "k")}
        if has_image:
            keys |= linear(f"{block}.cross_attn.k_img", width, width) | linear(f"{block}.cross_attn.v_img", width, width)
            keys |= {f"{block}.cross_attn.norm_k_img.weight": (width,)}
        keys |= {f"{block}.norm3.weight": (width,), f"{block}.norm3.bias": (width,), f"{block}.modulation": (1, 6, width)}
        keys |= linear(f"{block}.ffn.0", width, feed) | linear(f"{block}.ffn.2", feed, width)
    if has_image:
        keys |= {f"img_emb.proj.{place}.{kind}": (size,) for place, size in ((0, image), (4, width)) for kind in ("weight", "bias")}
        keys |= linear("img_emb.proj.1", image, image) | linear("img_emb.proj.3", image, width)
    return keys


FULL_SIZE_HEADS = {
    "query": {
        "queries": (1, 5120), "multihead_attn.in_proj_weight": (15360, 5120), "multihead_attn.in_proj_bias": (15360,),
        "multihead_attn.out_proj.weight": (5120, 5120), "multihead_attn.out_proj.bias": (5120,),
    },
    "head": {
        "fc1.weight": (1024, 5120), "fc1.bias": (1024,), "fc2.weight": (512, 1024), "fc2.bias": (512,), "fc3.weight": (1, 512), "fc3.bias": (1,),
    },
}  # fmt: skip


def test_the_written_list_is_that_of_the_published_checkpoint_folder(shared_fixtures):
    """The same names, of another width and number of blocks, are in the folder that the published code wrote."""
    (index,) = (shared_fixtures / "pavrm" / "checkpoints" / "checkpoint-100").glob("*.safetensors.index.json")
    names = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    assert set(names) == set(full_size_trunk_keys(blocks=3))


@pytest.mark.parametrize(("model_type", "in_channels", "parameters"), [("t2v", 16, 3.04e9), ("i2v", 36, 3.47e9)])
def test_every_key_of_the_full_size_layouts_finds_its_place(model_type, in_channels, parameters):
    """HY-Video-PRFL's trunks of eight blocks, and the heads, on the meta device: sizes read off the shapes, strict load into the host's model."""
    keys = full_size_trunk_keys(in_channels=in_channels, has_image=model_type == "i2v")
    state = {key: torch.empty(shape, device="meta") for key, shape in keys.items()}
    sizes = pavrm_files._sizes("trunk", state, {}, 8)
    assert (sizes["model_type"], sizes["num_heads"], sizes["in_dim"]) == (model_type, 40, in_channels)
    trunk = pavrm_files.Trunk(state=state, sizes=sizes, taps=(8,))
    model = pavrm.build_trunk(trunk, "trunk")
    assert sum(value.numel() for key, value in model.state_dict().items() if key in keys) == pytest.approx(parameters, rel=0.01)
    with torch.device("meta"):
        head = build_head(5120)
    for part, shapes in ((head.query_attention, FULL_SIZE_HEADS["query"]), (head.mlp, FULL_SIZE_HEADS["head"])):
        check_keys(part, {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}, "head")
    del state["blocks.7.ffn.2.bias"]
    with pytest.raises(ValueError, match="missing: blocks.7.ffn.2.bias"):
        pavrm.build_trunk(trunk, "trunk")

"""Every LoRA key layout, one test per row of the table. Needs neither torch nor the host."""

from __future__ import annotations

import pytest

from reward_lab.host.lora_keys import PREFIXES, normalise, split_key

LAYERS = [
    *(f"blocks.{block}.{name}" for block in (0, 11) for name in ("self_attn.q", "cross_attn.k", "cross_attn.o", "ffn.0", "ffn.2", "norm3")),
    *("text_embedding.0", "time_embedding.2", "time_projection.1", "head.head", "patch_embedding"),
]


@pytest.mark.parametrize(
    ("key", "layer", "part"),
    [
        ("lora_unet__blocks_0_self_attn_q.lora_down.weight", "blocks.0.self_attn.q", "lora_down.weight"),
        ("lora_unet__blocks_11_cross_attn_k.alpha", "blocks.11.cross_attn.k", "alpha"),
        ("lora_unet_blocks_0_ffn_0.lora_up.weight", "blocks.0.ffn.0", "lora_up.weight"),
        ("lora_unet__text_embedding_0.lora_up.weight", "text_embedding.0", "lora_up.weight"),
        ("lora_unet__head_head.lora_down.weight", "head.head", "lora_down.weight"),
        ("lycoris_blocks_0_self_attn_q.lokr_w1", "blocks.0.self_attn.q", "lokr_w1"),
        ("lycoris_blocks_0_self_attn_q.hada_w2_b", "blocks.0.self_attn.q", "hada_w2_b"),
        ("diffusion_model.blocks.0.self_attn.q.lora_A.weight", "blocks.0.self_attn.q", "lora_down.weight"),
        ("diffusion_model.blocks.0.self_attn.q.lora_B.weight", "blocks.0.self_attn.q", "lora_up.weight"),
        ("diffusion_model.blocks.0.self_attn.q.lora_down.weight", "blocks.0.self_attn.q", "lora_down.weight"),
        ("diffusion_model.blocks.0.norm3.diff", "blocks.0.norm3", "diff"),
        ("diffusion_model.blocks.0.self_attn.q.diff_b", "blocks.0.self_attn.q", "diff_b"),
        ("diffusion_model.patch_embedding.diff", "patch_embedding", "diff"),
        ("base_model.model.blocks.0.self_attn.q.lora_A.default.weight", "blocks.0.self_attn.q", "lora_down.weight"),
        ("base_model.model.diffusion_model.blocks.0.ffn.2.lora_B.default.weight", "blocks.0.ffn.2", "lora_up.weight"),
        ("base_model.model.blocks.0.self_attn.q.lora_magnitude_vector.default.weight", "blocks.0.self_attn.q", "dora_scale"),
        ("pipe.dit.blocks.11.cross_attn.o.lora_B.default.weight", "blocks.11.cross_attn.o", "lora_up.weight"),
        ("blocks.11.cross_attn.o.lora_A.weight", "blocks.11.cross_attn.o", "lora_down.weight"),
        ("blocks.11.cross_attn.o.lora_A.default", "blocks.11.cross_attn.o", "lora_down.weight"),
        ("transformer.blocks.0.attn1.to_q.lora_A.weight", "blocks.0.self_attn.q", "lora_down.weight"),
        ("transformer.blocks.0.attn2.to_k.lora_B.weight", "blocks.0.cross_attn.k", "lora_up.weight"),
        ("transformer.blocks.0.attn2.to_out.0.lora_B.weight", "blocks.0.cross_attn.o", "lora_up.weight"),
        ("transformer.blocks.11.ffn.net.0.proj.lora_A.weight", "blocks.11.ffn.0", "lora_down.weight"),
        ("transformer.blocks.11.ffn.net.2.lora_A.weight", "blocks.11.ffn.2", "lora_down.weight"),
        ("transformer.condition_embedder.text_embedder.linear_1.lora_A.weight", "text_embedding.0", "lora_down.weight"),
        ("transformer.condition_embedder.time_embedder.linear_2.lora_A.weight", "time_embedding.2", "lora_down.weight"),
        ("transformer.condition_embedder.time_proj.lora_A.weight", "time_projection.1", "lora_down.weight"),
        ("transformer.proj_out.lora_A.weight", "head.head", "lora_down.weight"),
        ("lora_transformer_blocks_0_attn1_to_q.lora_down.weight", "blocks.0.self_attn.q", "lora_down.weight"),
        ("unet.blocks.0.self_attn.q_lora.up.weight", "blocks.0.self_attn.q", "lora_up.weight"),
        ("blocks.0.self_attn.q.lora_linear_layer.down.weight", "blocks.0.self_attn.q", "lora_down.weight"),
    ],
)
def test_layout(key: str, layer: str, part: str) -> None:
    assert normalise([key], LAYERS).layers == {layer: {part: key}}


@pytest.mark.parametrize("prefix", PREFIXES)
def test_every_prefix(prefix: str) -> None:
    name = "blocks_0_self_attn_q" if prefix.endswith("_") else "blocks.0.self_attn.q"
    assert split_key(f"{prefix}{name}.lora_up.weight") == ("blocks_0_self_attn_q", "lora_up.weight")


def test_kinds_of_keys_that_are_left_out() -> None:
    found = normalise(
        [
            "lora_unet__blocks_0_cross_attn_k_img.lora_up.weight",
            "transformer.blocks.0.attn2.add_k_proj.lora_A.weight",
            "diffusion_model.img_emb.proj.1.lora_A.weight",
            "lora_te1_text_model_encoder_layers_0_mlp_fc1.alpha",
            "text_encoders.umt5xxl.shared.lora_A.weight",
            "lora_unet_input_blocks_1_0.lora_up.weight",
            "something else",
            "blocks.0.self_attn.q.lora_A.weight",
            "diffusion_model.blocks.0.self_attn.q.lora_A.weight",
        ],
        LAYERS,
    )
    assert (len(found.image_branch), len(found.text_encoder), len(found.unknown), len(found.duplicates)) == (3, 2, 2, 1)
    assert list(found.layers) == ["blocks.0.self_attn.q"]

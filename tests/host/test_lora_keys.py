"""Every LoRA key layout: one test per row of each table. Needs neither torch nor the host."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reward_lab.host.lora_keys import DIFFUSERS_NAMES, LAYOUTS, PARTS, PREFIXES, TO_DIFFUSERS, detect_layout, layout_named, normalise, split_key, wan_layers

LAYERS = [
    *(f"blocks.{block}.{name}" for block in (0, 11) for name in ("self_attn.q", "cross_attn.k", "cross_attn.o", "ffn.0", "ffn.2", "norm3", "modulation")),
    *("text_embedding.0", "time_embedding.2", "time_projection.1", "head.head", "head.modulation", "patch_embedding"),
]
# A key that each layout's programs write; read in their source, or in threads that quote their files.
EXAMPLES = {
    "videox-fun": "lora_unet__blocks_0_self_attn_q.lora_down.weight",
    "musubi-tuner": "lora_unet_blocks_0_self_attn_q.lora_down.weight",
    "diffusion-pipe": "diffusion_model.blocks.0.self_attn.q.lora_A.weight",
    "comfyui": "diffusion_model.blocks.0.self_attn.q.lora_down.weight",
    "diffusion-pipe-default": "diffusion_model.blocks.0.self_attn.q.lora_A.default.weight",
    "diffusers": "transformer.blocks.0.attn1.to_q.lora_A.weight",
    "onetrainer": "transformer.blocks.0.attn1.to_q.lora_down.weight",
    "diffusers-kohya": "lora_transformer_blocks_0_attn1_to_q.lora_down.weight",
    "transformer": "transformer.blocks.0.self_attn.q.lora_A.weight",
    "peft": "base_model.model.blocks.0.self_attn.q.lora_A.weight",
    "peft-default": "base_model.model.blocks.0.self_attn.q.lora_A.default.weight",
    "diffsynth": "blocks.0.self_attn.q.lora_A.default.weight",
    "diffsynth-pipe": "pipe.dit.blocks.0.self_attn.q.lora_A.default.weight",
    "bare": "blocks.0.self_attn.q.lora_A.weight",
    "lycoris": "lycoris_blocks_0_self_attn_q.lora_down.weight",
    "lycoris-diffusers": "lycoris_blocks_0_attn1_to_q.lora_down.weight",
    "hy-video-prfl": "lora_blocks_0_self_attn_q.lora_down.weight",
}


@pytest.mark.parametrize(
    ("key", "layer", "part"),
    [
        ("lora_unet__blocks_0_self_attn_q.lora_down.weight", "blocks.0.self_attn.q", "lora_down.weight"),
        ("lora_unet__blocks_11_cross_attn_k.alpha", "blocks.11.cross_attn.k", "alpha"),
        ("lora_unet_blocks_0_ffn_0.lora_up.weight", "blocks.0.ffn.0", "lora_up.weight"),
        ("lora_unet_blocks_0.self_attn.q.lora_up.weight", "blocks.0.self_attn.q", "lora_up.weight"),  # mixed, as in kijai's wrapper #869
        ("lora_unet__text_embedding_0.lora_up.weight", "text_embedding.0", "lora_up.weight"),
        ("lora_unet__head_head.lora_down.weight", "head.head", "lora_down.weight"),
        ("lora_blocks_0_cross_attn_k.lora_up.weight", "blocks.0.cross_attn.k", "lora_up.weight"),
        ("lycoris_blocks_0_self_attn_q.lokr_w1", "blocks.0.self_attn.q", "lokr_w1"),
        ("lycoris_blocks_0_self_attn_q.hada_w2_b", "blocks.0.self_attn.q", "hada_w2_b"),
        ("lycoris_blocks_0_ffn_net_0_proj.lokr_w2_a", "blocks.0.ffn.0", "lokr_w2_a"),
        ("lycoris_blocks_0_cross_attn_to_out_0.lokr_w2_b", "blocks.0.cross_attn.o", "lokr_w2_b"),
        ("diffusion_model.blocks.0.self_attn.q.lora_A.weight", "blocks.0.self_attn.q", "lora_down.weight"),
        ("diffusion_model.blocks.0.self_attn.q.lora_B.weight", "blocks.0.self_attn.q", "lora_up.weight"),
        ("diffusion_model.blocks.0.self_attn.q.lora_down.weight", "blocks.0.self_attn.q", "lora_down.weight"),
        ("diffusion_model.blocks.0.norm3.diff", "blocks.0.norm3", "diff"),
        ("diffusion_model.blocks.0.self_attn.q.diff_b", "blocks.0.self_attn.q", "diff_b"),
        ("diffusion_model.blocks.0.diff_m", "blocks.0.modulation", "diff"),  # lightx2v, ComfyUI #8922
        ("diffusion_model.patch_embedding.diff", "patch_embedding", "diff"),
        ("base_model.model.blocks.0.self_attn.q.lora_A.default.weight", "blocks.0.self_attn.q", "lora_down.weight"),
        ("base_model.model.diffusion_model.blocks.0.ffn.2.lora_B.default.weight", "blocks.0.ffn.2", "lora_up.weight"),
        ("base_model.model.blocks.0.self_attn.q.lora_magnitude_vector.default.weight", "blocks.0.self_attn.q", "dora_scale"),
        ("pipe.dit.blocks.11.cross_attn.o.lora_B.default.weight", "blocks.11.cross_attn.o", "lora_up.weight"),
        ("pipe.dit2.blocks.11.cross_attn.o.lora_B.default.weight", "blocks.11.cross_attn.o", "lora_up.weight"),
        ("blocks.11.cross_attn.o.lora_A.weight", "blocks.11.cross_attn.o", "lora_down.weight"),
        ("blocks.11.cross_attn.o.lora_A.default", "blocks.11.cross_attn.o", "lora_down.weight"),
        ("base_model.model.blocks.0.self_attn.q.lora_B.default_0.weight", "blocks.0.self_attn.q", "lora_up.weight"),  # PEFT's name of the adapter
        ("blocks.0.self_attn.q.lora_A.reward", "blocks.0.self_attn.q", "lora_down.weight"),
        ("base_model.model._orig_mod.blocks.0._fsdp_wrapped_module.ffn.0.lora_A.weight", "blocks.0.ffn.0", "lora_down.weight"),
        ("_orig_mod.blocks.0._checkpoint_wrapped_module.ffn.0.lora_B.default.weight", "blocks.0.ffn.0", "lora_up.weight"),
        ("lycoris_blocks_0_norm3.w_norm", "blocks.0.norm3", "diff"),
        ("lycoris_blocks_0_norm3.b_norm", "blocks.0.norm3", "diff_b"),
        ("transformer.blocks.0.attn1.to_q.lora_A.weight", "blocks.0.self_attn.q", "lora_down.weight"),
        ("transformer.blocks.0.attn2.to_k.lora_B.weight", "blocks.0.cross_attn.k", "lora_up.weight"),
        ("transformer_2.blocks.0.attn2.to_out.0.lora_B.weight", "blocks.0.cross_attn.o", "lora_up.weight"),
        ("transformer.blocks.0.norm2.diff", "blocks.0.norm3", "diff"),
        ("transformer.blocks.11.ffn.net.0.proj.lora_A.weight", "blocks.11.ffn.0", "lora_down.weight"),
        ("transformer.blocks.11.ffn.net.2.lora_A.weight", "blocks.11.ffn.2", "lora_down.weight"),
        ("transformer.condition_embedder.text_embedder.linear_1.lora_A.weight", "text_embedding.0", "lora_down.weight"),
        ("transformer.condition_embedder.time_embedder.linear_2.lora_A.weight", "time_embedding.2", "lora_down.weight"),
        ("transformer.condition_embedder.time_proj.lora_A.weight", "time_projection.1", "lora_down.weight"),
        ("transformer.proj_out.lora_A.weight", "head.head", "lora_down.weight"),
        ("transformer.scale_shift_table.diff", "head.modulation", "diff"),
        ("transformer.blocks.11.scale_shift_table.diff", "blocks.11.modulation", "diff"),
        ("lora_transformer_blocks_0_attn1_to_q.lora_down.weight", "blocks.0.self_attn.q", "lora_down.weight"),
        ("unet.blocks.0.self_attn.q_lora.up.weight", "blocks.0.self_attn.q", "lora_up.weight"),
        ("blocks.0.self_attn.q.lora_linear_layer.down.weight", "blocks.0.self_attn.q", "lora_down.weight"),
    ],
)
def test_key(key: str, layer: str, part: str) -> None:
    assert normalise([key], LAYERS).layers == {layer: {part: key}}


@pytest.mark.parametrize("prefix", PREFIXES)
def test_every_prefix(prefix: str) -> None:
    name = "blocks_0_self_attn_q" if prefix.endswith("_") else "blocks.0.self_attn.q"
    assert split_key(f"{prefix}{name}.lora_up.weight") == ("blocks_0_self_attn_q", "lora_up.weight")


@pytest.mark.parametrize(("suffix", "part"), PARTS.items())
def test_every_part(suffix: str, part: str) -> None:
    assert split_key(f"diffusion_model.blocks.3.ffn.0{suffix}") == ("blocks_3_ffn_0", part)


def is_sampled(layer: str) -> bool:
    """The first, the last of the 14B model and the last possible block stand for all of them."""
    parts = layer.split(".")
    return not parts[0].endswith("blocks") or parts[1] in ("0", "39", "63")


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_every_layout(layout) -> None:
    assert layout.key("blocks.0.self_attn.q", "lora_down.weight") == EXAMPLES[layout.name]
    assert layout_named(layout.name) is layout
    # Every layer of every Wan, and every part, comes back from what the layout writes; the layout is recognised by its keys alone.
    parts = dict.fromkeys(PARTS.values())
    written = {layout.key(layer, part): (layer, part) for layer in wan_layers() if is_sampled(layer) for part in parts}
    found = normalise(written, wan_layers())
    assert {key: (layer, part) for layer, names in found.layers.items() for part, key in names.items()} == written
    low_rank = [layout.key(layer, part) for layer in LAYERS for part in ("lora_down.weight", "lora_up.weight", "alpha")[: 3 if layout.has_alpha else 2]]
    assert detect_layout(normalise(low_rank, wan_layers())) is layout


@pytest.mark.parametrize(("pattern", "native"), DIFFUSERS_NAMES, ids=[pattern.pattern for pattern, _ in DIFFUSERS_NAMES])
def test_every_diffusers_name_is_needed(pattern, native) -> None:
    diffusers = layout_named("diffusers")
    names = [diffusers.key(layer, "diff").removeprefix("transformer.").removesuffix(".diff").replace(".", "_") for layer in wan_layers()]
    intermediate = set(names)
    for other, replacement in DIFFUSERS_NAMES:
        if other is pattern:
            assert any(pattern.search(name) for name in intermediate)
            return
        intermediate = {other.sub(replacement, name) for name in intermediate}


@pytest.mark.parametrize(("pattern", "name"), TO_DIFFUSERS, ids=[pattern.pattern for pattern, _ in TO_DIFFUSERS])
def test_every_native_name_has_a_layer(pattern, name) -> None:
    assert any(pattern.search(layer) for layer in wan_layers())


def test_the_help_page_lists_every_layout(repo: Path) -> None:
    page = (repo / "web" / "docs" / "RewardLabInspectLoRA.md").read_text(encoding="utf-8")
    table = page.split("<!-- layouts -->\n")[1].split("\n<!-- end of layouts -->")[0]
    rows = [f"| `{layout.name}` | {layout.made_by} | `{layout.key('blocks.0.self_attn.q', 'lora_down.weight')}` |" for layout in LAYOUTS]
    assert table == "\n".join(rows), "the table of the page should be:\n" + "\n".join(rows)


def test_kinds_of_keys_that_are_left_out() -> None:
    found = normalise(
        [
            "lora_unet__blocks_0_cross_attn_k_img.lora_up.weight",
            "transformer.blocks.0.attn2.add_k_proj.lora_A.weight",
            "diffusion_model.img_emb.proj.1.lora_A.weight",
            "diffusion_model.blocks.0.cross_attn.norm_k_img.diff",
            "lora_te1_text_model_encoder_layers_0_mlp_fc1.alpha",
            "text_encoders.umt5xxl.shared.lora_A.weight",
            "lora_unet_input_blocks_1_0.lora_up.weight",
            "something else",
            "blocks.0.self_attn.q.lora_A.weight",
            "diffusion_model.blocks.0.self_attn.q.lora_A.weight",
        ],
        LAYERS,
    )
    assert (len(found.image_branch), len(found.text_encoder), len(found.unknown), len(found.duplicates)) == (4, 2, 2, 1)
    assert list(found.layers) == ["blocks.0.self_attn.q"]


def test_layout_of_mixed_and_foreign_files() -> None:
    mixed = [layout.key(layer, "lora_down.weight") for layout, layer in zip(LAYOUTS, LAYERS, strict=False)]
    assert detect_layout(normalise(mixed, wan_layers())) is None
    assert detect_layout(normalise(["lora_unet_input_blocks_1_0.lora_up.weight"], wan_layers())) is None
    with pytest.raises(ValueError, match="There is no layout 'kohya'.*videox-fun"):
        layout_named("kohya")


@given(st.lists(st.text(max_size=60), max_size=20))
def test_any_text_is_sorted_somewhere(keys: list[str]) -> None:
    found = normalise(keys, LAYERS)
    assert sum(map(len, (found.image_branch, found.text_encoder, found.unknown, found.duplicates))) + sum(map(len, found.layers.values())) == len(keys)

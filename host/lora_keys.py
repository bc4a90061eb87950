"""Names in LoRA files: one table that turns every known layout into (layer of the Wan model, part of the LoRA).

All comparing is done on flattened names (dots become underscores), because half of the layouts are flattened already and cannot be
turned back without knowing the model. No tensors here, so that one test per row of the table is cheap.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

# Stripped again and again until none fits: real files stack them, for example `base_model.model.diffusion_model.`.
PREFIXES = (
    "base_model.model.",
    "base_model.",
    "model.diffusion_model.",
    "diffusion_model.",
    "transformer.",
    "transformer_2.",
    "pipe.dit2.",
    "pipe.dit.",
    "pipe.",
    "dit.",
    "unet.",
    "module.",
    "lora_unet__",
    "lora_unet_",
    "lora_transformer_",
    "lycoris_",
)

# Suffix of a key -> part of the LoRA, in the names that the host's weight adapters read.
PARTS = {
    ".lora_down.weight": "lora_down.weight",
    ".lora_up.weight": "lora_up.weight",
    ".lora_A.weight": "lora_down.weight",
    ".lora_B.weight": "lora_up.weight",
    ".lora_A": "lora_down.weight",
    ".lora_B": "lora_up.weight",
    ".lora_down": "lora_down.weight",
    ".lora_up": "lora_up.weight",
    ".lora.down.weight": "lora_down.weight",
    ".lora.up.weight": "lora_up.weight",
    "_lora.down.weight": "lora_down.weight",
    "_lora.up.weight": "lora_up.weight",
    ".lora_linear_layer.down.weight": "lora_down.weight",
    ".lora_linear_layer.up.weight": "lora_up.weight",
    ".lora_mid.weight": "lora_mid.weight",
    ".alpha": "alpha",
    ".lora_alpha": "alpha",
    ".dora_scale": "dora_scale",
    ".lora_magnitude_vector.weight": "dora_scale",
    ".lora_magnitude_vector": "dora_scale",
    ".magnitude_vector": "dora_scale",
    ".diff": "diff",
    ".diff_b": "diff_b",
    ".hada_w1_a": "hada_w1_a",
    ".hada_w1_b": "hada_w1_b",
    ".hada_w2_a": "hada_w2_a",
    ".hada_w2_b": "hada_w2_b",
    ".hada_t1": "hada_t1",
    ".hada_t2": "hada_t2",
    ".lokr_w1": "lokr_w1",
    ".lokr_w1_a": "lokr_w1_a",
    ".lokr_w1_b": "lokr_w1_b",
    ".lokr_w2": "lokr_w2",
    ".lokr_w2_a": "lokr_w2_a",
    ".lokr_w2_b": "lokr_w2_b",
    ".lokr_t2": "lokr_t2",
}
_PARTS_LONGEST_FIRST = tuple(sorted(PARTS.items(), key=lambda item: -len(item[0])))

# Diffusers' Wan names, flattened -> native, in order. Source: diffusers' convert_wan_to_diffusers.py (Apache-2.0), read backwards.
# Differs from kijai's wrapper, which sends attn1 and attn2 both to cross_attn.
DIFFUSERS_NAMES = (
    (re.compile(r"^condition_embedder_time_embedder_linear_1$"), "time_embedding_0"),
    (re.compile(r"^condition_embedder_time_embedder_linear_2$"), "time_embedding_2"),
    (re.compile(r"^condition_embedder_text_embedder_linear_1$"), "text_embedding_0"),
    (re.compile(r"^condition_embedder_text_embedder_linear_2$"), "text_embedding_2"),
    (re.compile(r"^condition_embedder_time_proj$"), "time_projection_1"),
    (re.compile(r"^proj_out$"), "head_head"),
    (re.compile(r"_attn1_"), "_self_attn_"),
    (re.compile(r"_attn2_"), "_cross_attn_"),
    (re.compile(r"_attn_(add_)?to_"), r"_attn_\1"),
    (re.compile(r"_attn_out_0$"), "_attn_o"),
    (re.compile(r"_attn_add_([kv])_proj$"), r"_attn_\1_img"),
    (re.compile(r"_ffn_net_0_proj$"), "_ffn_0"),
    (re.compile(r"_ffn_net_2$"), "_ffn_2"),
)

# Layers that a Wan2.1 image-to-video LoRA has and Wan2.2 does not: nothing is lost when they are left out.
IMAGE_BRANCH = re.compile(r"(?:^|_)(?:img_emb|k_img|v_img|norm_k_img|condition_embedder_image_embedder)(?:_|$)")
TEXT_ENCODER = re.compile(r"^(?:lora_te\d?_|text_encoders?[._])")


@dataclass(frozen=True, kw_only=True)
class NormalisedKeys:
    """A LoRA file's keys, sorted by what they mean.

    Attributes:
        layers: Model weight name (`blocks.0.self_attn.q`) -> part (`lora_down.weight`) -> key in the file.
        image_branch: Keys of the image branch of Wan2.1, absent here and harmless.
        text_encoder: Keys for a text encoder, which this pack leaves alone.
        unknown: Keys that fit no layer of this model or no known layout.
        duplicates: Keys that name a layer and part which another key named already.
    """

    layers: dict[str, dict[str, str]] = field(default_factory=dict)
    image_branch: list[str] = field(default_factory=list)
    text_encoder: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    duplicates: list[str] = field(default_factory=list)


def split_key(key: str) -> tuple[str, str] | None:
    """Split a key of a LoRA file into its flattened layer name and its part.

    Args:
        key: For example `lora_unet__blocks_0_self_attn_q.lora_down.weight`.

    Returns:
        For example `("blocks_0_self_attn_q", "lora_down.weight")`; None when the key's end is not known.
    """
    plain = key.replace(".default.", ".").removesuffix(".default")
    for suffix, part in _PARTS_LONGEST_FIRST:
        if plain.endswith(suffix):
            return _native_name(plain[: -len(suffix)]), part
    return None


def normalise(keys: Iterable[str], model_layers: Iterable[str]) -> NormalisedKeys:
    """Sort the keys of a LoRA file by the layers of a model.

    Args:
        keys: The file's keys.
        model_layers: Dotted names of the model's layers, without `diffusion_model.` and `.weight`.

    Returns:
        The sorted keys.
    """
    by_flat_name: Mapping[str, str] = {name.replace(".", "_"): name for name in model_layers}
    result = NormalisedKeys()
    for key in keys:
        split = None if TEXT_ENCODER.match(key) else split_key(key)
        layer = by_flat_name.get(split[0]) if split else None
        if layer is not None:
            parts = result.layers.setdefault(layer, {})
            if split[1] in parts:
                result.duplicates.append(key)
            else:
                parts[split[1]] = key
        elif TEXT_ENCODER.match(key):
            result.text_encoder.append(key)
        elif split and IMAGE_BRANCH.search(split[0]):
            result.image_branch.append(key)
        else:
            result.unknown.append(key)
    return result


def _native_name(name: str) -> str:
    """Strip prefixes, flatten, and turn diffusers' names into native ones."""
    stripped = True
    while stripped:
        stripped = False
        for prefix in PREFIXES:
            if name.startswith(prefix) and len(name) > len(prefix):
                name, stripped = name[len(prefix) :], True
    flat = name.replace(".", "_").lstrip("_")
    for pattern, native in DIFFUSERS_NAMES:
        flat = pattern.sub(native, flat)
    return flat

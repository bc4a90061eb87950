"""Says why a LoRA does not fit a model, and which other model it was made for. Names and sizes only, no tensors."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

# Flattened key -> model, first match counts; more telling patterns stand first.
OTHER_MODELS = (
    (re.compile(r"individual_token_refiner|double_blocks_\d+_(img|txt)_mod_linear\b|double_blocks_\d+_(img|txt)_mlp_fc[12]"), "HunyuanVideo"),
    (re.compile(r"double_blocks_\d+_(img|txt)_(attn|mlp|mod)|double_stream|single_transformer_blocks_\d+_(attn|proj)"), "Flux (or HunyuanVideo)"),
    (re.compile(r"lora_te2_|down_blocks_2_attentions_\d_transformer_blocks_[2-9]|input_blocks_[78]_1_transformer_blocks_[2-9]|add_embedding"), "SDXL"),
    (re.compile(r"(^|_)(down_blocks|up_blocks|mid_block|input_blocks|output_blocks|middle_block)_"), "Stable Diffusion (a UNet)"),
    (re.compile(r"joint_blocks_\d+_(x|context)_block"), "Stable Diffusion 3"),
    (re.compile(r"transformer_blocks_\d+_(img_mlp|txt_mlp|img_mod|txt_mod)"), "Qwen-Image"),
    (re.compile(r"layers_\d+_(attention_(qkv|to_q|out)|feed_forward_w[123])"), "Lumina or Z-Image"),
    (re.compile(r"blocks_\d+_attn_qkv_[xy]"), "Mochi"),
    (re.compile(r"(^|_)transformer_blocks_\d+_(attn1|attn2|ff)_"), "LTX-Video, CogVideoX or another diffusers transformer"),
    (re.compile(r"blocks_\d+_adaln_modulation|net_blocks_block\d+"), "Cosmos"),
)
WAN_WIDTHS = {1536: "Wan2.1 1.3B", 3072: "Wan2.2 5B", 5120: "Wan 14B"}


def other_model(keys: Iterable[str]) -> str:
    """Name the model whose layers the keys name; empty when it is not known.

    Args:
        keys: Keys of a LoRA file.
    """
    flat = [key.replace(".", "_").lower() for key in keys]
    for pattern, name in OTHER_MODELS:
        if any(pattern.search(key) for key in flat):
            return name
    return ""


def width_name(width: int) -> str:
    """Describe a width by the Wan model that has it, for example `5120 (Wan 14B)`."""
    return f"{width} ({WAN_WIDTHS[width]})" if width in WAN_WIDTHS else str(width)


def is_full_model(keys: Sequence[str]) -> bool:
    """Tell whether the keys are those of a whole model: weights and biases, no low-rank part."""
    ends = (".weight", ".bias", ".modulation", ".scale_shift_table")
    plain = [key for key in keys if key.endswith(ends) and "lora" not in key.lower() and "dora" not in key.lower()]
    return len(plain) * 2 > len(keys)


def nothing_fits(keys: Sequence[str], text_encoder: Sequence[str], image_branch: Sequence[str], misfits: Sequence[str]) -> str:
    """Explain why nothing of a file could be applied.

    Args:
        keys: All keys of the file.
        text_encoder: Those for a text encoder.
        image_branch: Those for Wan2.1's image branch.
        misfits: Layers that the model has in another size, as sentences.
    """
    if misfits:
        return f"Its layers have other sizes: {misfits[0]}."
    if len(text_encoder) == len(keys):
        return "All of them are for a text encoder."
    if len(image_branch) == len(keys):
        return "All of them are for the image branch of Wan2.1, which Wan2.2 does not have."
    if is_full_model(keys):
        return f"It is a whole model, not a LoRA (key {keys[0][:120]}): what it was trained to do is merged already. Load it as a diffusion model."
    model = other_model(keys)
    if model:
        return f"It was made for {model}, not for Wan (key {keys[0][:120]}). Choose a LoRA that was made for Wan."
    return f"It was made for another model (key {keys[0][:120]}). Choose a LoRA that was made for Wan."

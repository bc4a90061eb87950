"""Key names of published CLIP-like checkpoints and the exact conversions between them.

Layouts: open_clip (HPSv2), Hugging Face CLIP (PickScore, HPSv2-hf), MPS (`model.` + Hugging Face, `cross_model.`), imscore wrappers (`mps.`, `model.`),
data-parallel wrappers (`module.`), our own PAVRM file (`trunk.`, `query_attention.`, `mlp.`). Conversions only rename, concatenate, split and transpose:
no value changes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

StateDict = dict[str, Tensor]

_OPEN_CLIP_SENTINEL = "visual.conv1.weight"
_HF_SENTINEL = "vision_model.embeddings.patch_embedding.weight"
_MPS_SENTINEL = "cross_model.layers.0.0.fn.to_q.weight"

_HF_TO_OPEN_CLIP = {
    "logit_scale": "logit_scale",
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm.weight": "ln_final.weight",
    "text_model.final_layer_norm.bias": "ln_final.bias",
    "vision_model.embeddings.class_embedding": "visual.class_embedding",
    "vision_model.embeddings.patch_embedding.weight": "visual.conv1.weight",
    "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
    "vision_model.pre_layrnorm.weight": "visual.ln_pre.weight",
    "vision_model.pre_layrnorm.bias": "visual.ln_pre.bias",
    "vision_model.post_layernorm.weight": "visual.ln_post.weight",
    "vision_model.post_layernorm.bias": "visual.ln_post.bias",
}
# Linear weights in Hugging Face files, plain right-hand matrices in open_clip ones.
_TRANSPOSED = {"text_projection.weight": "text_projection", "visual_projection.weight": "visual.proj"}
_TOWERS = {"text_model.encoder.layers": "transformer.resblocks", "vision_model.encoder.layers": "visual.transformer.resblocks"}
_LAYER = {
    "self_attn.out_proj": "attn.out_proj",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}
_HF_LAYER_KEY = re.compile(r"(text_model\.encoder\.layers|vision_model\.encoder\.layers)\.(\d+)\.(.+)\.(weight|bias)")
_OPEN_CLIP_LAYER_KEY = re.compile(r"(transformer\.resblocks|visual\.transformer\.resblocks)\.(\d+)\.(.+)")
_QKV = ("q_proj", "k_proj", "v_proj")


def identify(state: Mapping[str, object]) -> str:
    """Name what a state dict (without wrapper prefixes) is: one of the keys of `DESCRIPTIONS`."""
    if _MPS_SENTINEL in state:
        return "mps"
    if _OPEN_CLIP_SENTINEL in state:
        return "open_clip"
    if _HF_SENTINEL in state:
        return "hf_clip"
    if "layers.0.weight" in state and "layers.7.weight" in state:
        return "aesthetic_head"
    if "conv1.weight" in state and "layer1.0.bn1.weight" in state and "features.weight" in state:
        return "arcface"
    if "query_attention.queries" in state and any(key.startswith("lora.") for key in state):
        return "pavrm_lora"
    if "mlp.fc1.weight" in state and ("query_attention.queries" in state or "trunk.patch_embedding.weight" in state):
        return "pavrm"
    if "queries" in state and "multihead_attn.in_proj_weight" in state:
        return "pavrm_query"
    if {"fc1.weight", "fc2.weight", "fc3.weight"} <= set(state):
        return "pavrm_mlp"
    if any(".lora_" in key for key in state):
        return "lora"
    if any(key.endswith("blocks.0.self_attn.q.weight") for key in state):
        return "wan"
    return "unknown"


DESCRIPTIONS = {
    "mps": "an MPS model (CLIP with a cross model)",
    "open_clip": "a CLIP in open_clip's layout (HPSv2-like, no cross model)",
    "hf_clip": "a CLIP in Hugging Face's layout (no cross model)",
    "aesthetic_head": "the head of the LAION aesthetic predictor",
    "arcface": "an ArcFace recogniser",
    "pavrm": "a PAVRM file",
    "pavrm_lora": "a PAVRM stored as a LoRA over a generator's first blocks",
    "pavrm_query": "the query attention of a PAVRM",
    "pavrm_mlp": "the score head of a PAVRM",
    "lora": "a LoRA",
    "wan": "a Wan video model",
    "unknown": "not a model known here",
}


def strip_wrappers(state: Mapping[str, Tensor]) -> StateDict:
    """Remove what wrappers put before every key: `module.` (data parallel), `mps.` (imscore), `model.` before a bare CLIP (imscore HPSv2)."""
    result = dict(state)
    while result:
        for prefix in ("module.", "mps."):
            if all(key.startswith(prefix) for key in result):
                result = {key.removeprefix(prefix): value for key, value in result.items()}
                break
        else:
            break
    if f"model.{_OPEN_CLIP_SENTINEL}" in result or (f"model.{_HF_SENTINEL}" in result and _MPS_SENTINEL not in result):
        result = {key.removeprefix("model."): value for key, value in result.items()}
    return result


def hf_to_open_clip(state: Mapping[str, Tensor]) -> StateDict:
    """Rename Hugging Face CLIP weights to open_clip names; q, k, v are joined, the two projections transposed, `position_ids` dropped.

    Keys that are not Hugging Face CLIP keys come back unchanged, so that a strict check names them.
    """
    result: StateDict = {}
    for key, value in state.items():
        layer = _HF_LAYER_KEY.fullmatch(key)
        if key.endswith(".embeddings.position_ids"):
            continue
        if key in _HF_TO_OPEN_CLIP:
            result[_HF_TO_OPEN_CLIP[key]] = value
        elif key in _TRANSPOSED:
            result[_TRANSPOSED[key]] = value.t().contiguous()
        elif layer is None:
            result[key] = value
        else:
            tower, index, name, kind = layer.groups()
            if name == "self_attn.q_proj":
                parts = [f"{tower}.{index}.self_attn.{part}.{kind}" for part in _QKV]
                if all(part in state for part in parts):
                    result[f"{_TOWERS[tower]}.{index}.attn.in_proj_{kind}"] = torch.cat([state[part] for part in parts])
            elif name not in ("self_attn.k_proj", "self_attn.v_proj"):
                result[f"{_TOWERS[tower]}.{index}.{_LAYER.get(name, name)}.{kind}"] = value
    return result


def open_clip_to_hf(state: Mapping[str, Tensor]) -> StateDict:
    """The way back: open_clip names to Hugging Face CLIP names."""
    names = {new: old for old, new in _HF_TO_OPEN_CLIP.items()}
    transposed = {new: old for old, new in _TRANSPOSED.items()}
    towers = {new: old for old, new in _TOWERS.items()}
    parts = {new: old for old, new in _LAYER.items()}
    result: StateDict = {}
    for key, value in state.items():
        layer = _OPEN_CLIP_LAYER_KEY.fullmatch(key)
        if key in names:
            result[names[key]] = value
        elif key in transposed:
            result[transposed[key]] = value.t().contiguous()
        elif layer is None:
            result[key] = value
        else:
            tower, index, name = layer.groups()
            prefix = f"{towers[tower]}.{index}"
            if name in ("attn.in_proj_weight", "attn.in_proj_bias"):
                kind = name.removeprefix("attn.in_proj_")
                for part, piece in zip(_QKV, value.chunk(3), strict=True):
                    result[f"{prefix}.self_attn.{part}.{kind}"] = piece.contiguous()
            else:
                stem, kind = name.rsplit(".", 1)
                result[f"{prefix}.{parts.get(stem, stem)}.{kind}"] = value
    return result


def mps_to_own(state: Mapping[str, Tensor]) -> StateDict:
    """Published MPS names (`model.` + Hugging Face, `cross_model.`) to the names of `mps.MPS` (`clip.` + open_clip, `cross_model.`).

    Stored rotary frequencies are dropped: they are computed.
    """
    clip = {key.removeprefix("model."): value for key, value in state.items() if key.startswith("model.")}
    own = {f"clip.{key}": value for key, value in hf_to_open_clip(clip).items()}
    for key, value in state.items():
        if not key.startswith("model.") and not key.endswith(".rotary_emb.inv_freq"):
            own[key] = value
    return own


def own_to_mps(state: Mapping[str, Tensor]) -> StateDict:
    """The way back, without the rotary frequencies (`mps.export_state_dict` adds them)."""
    clip = {key.removeprefix("clip."): value for key, value in state.items() if key.startswith("clip.")}
    published = {f"model.{key}": value for key, value in open_clip_to_hf(clip).items()}
    published.update({key: value for key, value in state.items() if not key.startswith("clip.")})
    return published

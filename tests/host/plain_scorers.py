"""HPSv2.1 and MPS written out anew in plain arithmetic on the published files' own tensors, to compare with: towers, cross model, preparation, mask.

Source of the formulas: tgxs002/HPSv2@866735e (Apache-2.0), Kwai-Kolors/MPS@be9027f (MIT), as told in shared/reference/scorers.md. Nothing of the pack is used;
token ids come from outside.

Everything is float64. Shape letters: B pictures, C H W pixels, P prompt positions, T image tokens, W tower width, D shared width, N heads.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

State = Mapping[str, Tensor]
SIZE_PX, END_ID = 224, 49407
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def normalised(pixels_CHW: Tensor) -> Tensor:
    mean, std = (torch.tensor(values, dtype=torch.float64).view(3, 1, 1) for values in (MEAN, STD))
    return (pixels_CHW.double() - mean) / std


def _resized(pixels_CHW: Tensor, height: int, width: int, antialias: bool) -> Tensor:
    return functional.interpolate(pixels_CHW[None], (height, width), mode="bicubic", antialias=antialias, align_corners=False)[0]


def prepared(pixels_CHW: Tensor, resize: str, antialias: bool = True) -> Tensor:
    """A float picture in [0,1] to what HPSv2's tower reads: letterbox as published, squash as VideoX-Fun."""
    height, width = pixels_CHW.shape[1:]
    if resize == "squash":
        return normalised(_resized(pixels_CHW, SIZE_PX, SIZE_PX, antialias))
    scale = SIZE_PX / max(height, width)
    rows, columns = round(height * scale), round(width * scale)
    top, left = (SIZE_PX - rows) // 2, (SIZE_PX - columns) // 2
    canvas = functional.pad(_resized(pixels_CHW, rows, columns, antialias), (left, SIZE_PX - columns - left, top, SIZE_PX - rows - top))
    return normalised(canvas)


def prepared_by_pillow(picture: Image.Image) -> Tensor:
    """What CLIPImageProcessor makes of a picture: 8-bit resize of the shorter side with Pillow, centre crop."""
    width, height = picture.size
    short = min(width, height)
    size = (SIZE_PX, SIZE_PX * height // short) if width == short else (SIZE_PX * width // short, SIZE_PX)
    pixels = np.array(picture.convert("RGB").resize(size, Image.Resampling.BICUBIC))
    top, left = (size[1] - SIZE_PX) // 2, (size[0] - SIZE_PX) // 2
    return normalised(torch.from_numpy(pixels[top : top + SIZE_PX, left : left + SIZE_PX]).permute(2, 0, 1) / 255.0)


def _gelu(x: Tensor, is_quick: bool) -> Tensor:
    return x * torch.sigmoid(1.702 * x) if is_quick else x * 0.5 * (1 + torch.erf(x / 2**0.5))


def _norm(state: State, name: str, x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * state[f"{name}.weight"] + state[f"{name}.bias"]


def _linear(state: State, name: str, x: Tensor) -> Tensor:
    bias = state.get(f"{name}.bias")
    return x @ state[f"{name}.weight"].T + (0 if bias is None else bias)


def _softmax_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | float = 0.0) -> Tensor:
    """Of heads in front: [..., N, T, K]."""
    return (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5 + bias).softmax(-1) @ v


def _layers(state: State, prefix: str, x_BTW: Tensor, heads: int, is_quick: bool, bias: Tensor | float) -> Tensor:
    """The residual blocks of a tower in Hugging Face's names."""
    index = 0
    while f"{prefix}.{index}.layer_norm1.weight" in state:
        name = f"{prefix}.{index}"
        h = _norm(state, f"{name}.layer_norm1", x_BTW)
        q, k, v = (_linear(state, f"{name}.self_attn.{part}_proj", h).unflatten(-1, (heads, -1)).transpose(1, 2) for part in "qkv")
        x_BTW = x_BTW + _linear(state, f"{name}.self_attn.out_proj", _softmax_attention(q, k, v, bias).transpose(1, 2).flatten(2))
        h = _norm(state, f"{name}.layer_norm2", x_BTW)
        x_BTW = x_BTW + _linear(state, f"{name}.mlp.fc2", _gelu(_linear(state, f"{name}.mlp.fc1", h), is_quick))
        index += 1
    return x_BTW


def text_states(state: State, ids_BP: Tensor, heads: int, is_quick: bool) -> Tensor:
    """All text states after the final norm, projected [B, P, D]."""
    positions = state["text_model.embeddings.position_embedding.weight"]
    x = state["text_model.embeddings.token_embedding.weight"][ids_BP] + positions
    causal = torch.full((len(positions), len(positions)), float("-inf"), dtype=torch.float64).triu(1)
    x = _layers(state, "text_model.encoder.layers", x, heads, is_quick, causal)
    return _linear(state, "text_projection", _norm(state, "text_model.final_layer_norm", x))


def image_states(state: State, pixels_BCHW: Tensor, heads: int, is_quick: bool) -> Tensor:
    """All image tokens before the last norm [B, T, W]."""
    weight = state["vision_model.embeddings.patch_embedding.weight"]
    patches = functional.conv2d(pixels_BCHW, weight, stride=weight.shape[-1]).flatten(2).transpose(1, 2)
    first = state["vision_model.embeddings.class_embedding"].expand(len(patches), 1, -1)
    x = torch.cat([first, patches], dim=1) + state["vision_model.embeddings.position_embedding.weight"]
    return _layers(state, "vision_model.encoder.layers", _norm(state, "vision_model.pre_layrnorm", x), heads, is_quick, 0.0)


def from_open_clip(state: State) -> dict[str, Tensor]:
    """Hugging Face's names for a file in open_clip's."""
    result = {
        "text_model.embeddings.token_embedding.weight": state["token_embedding.weight"],
        "text_model.embeddings.position_embedding.weight": state["positional_embedding"],
        "text_projection.weight": state["text_projection"].T,
        "vision_model.embeddings.class_embedding": state["visual.class_embedding"],
        "vision_model.embeddings.patch_embedding.weight": state["visual.conv1.weight"],
        "vision_model.embeddings.position_embedding.weight": state["visual.positional_embedding"],
        "visual_projection.weight": state["visual.proj"].T,
    }
    norms = {"ln_final": "text_model.final_layer_norm", "visual.ln_pre": "vision_model.pre_layrnorm", "visual.ln_post": "vision_model.post_layernorm"}
    parts = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "attn.out_proj": "self_attn.out_proj", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
    for kind in ("weight", "bias"):
        result |= {f"{new}.{kind}": state[f"{old}.{kind}"] for old, new in norms.items()}
        for key, value in state.items():
            for tower, new in (("visual.transformer.resblocks.", "vision_model.encoder.layers."), ("transformer.resblocks.", "text_model.encoder.layers.")):
                if key.startswith(tower):
                    index, part = key.removeprefix(tower).split(".", 1)
                    if part == f"attn.in_proj_{kind}":
                        result |= {f"{new}{index}.self_attn.{name}_proj.{kind}": piece for name, piece in zip("qkv", value.chunk(3), strict=True)}
                    elif part.endswith(f".{kind}"):
                        result[f"{new}{index}.{parts[part.removesuffix(f'.{kind}')]}.{kind}"] = value
    return result


def picture_vectors(state: State, heads: int, is_quick: bool, pixels_BCHW: Tensor) -> Tensor:
    """Unit vectors [B, D] of prepared pictures."""
    picture = _norm(state, "vision_model.post_layernorm", image_states(state, pixels_BCHW, heads, is_quick)[:, 0])
    return functional.normalize(_linear(state, "visual_projection", picture), dim=-1)


def hps(state: State, heads: tuple[int, int], is_quick: bool, pixels_BCHW: Tensor, ids_P: Tensor) -> Tensor:
    """HPS [B]: cosine of every prepared picture with one prompt; `heads` of vision and text tower."""
    text = text_states(state, ids_P[None], heads[1], is_quick)[0, int((ids_P == END_ID).int().argmax())]
    return picture_vectors(state, heads[0], is_quick, pixels_BCHW) @ functional.normalize(text, dim=-1)


def _swiglu(x: Tensor) -> Tensor:
    value, gate = x.chunk(2, -1)
    return value * gate * torch.sigmoid(gate)


def _turned(x_NTK: Tensor) -> Tensor:
    half = x_NTK.shape[-1] // 2
    angles = torch.arange(x_NTK.shape[-2], dtype=torch.float64)[:, None] * 10000 ** -(torch.arange(half, dtype=torch.float64) / half)
    low, high = x_NTK[..., :half], x_NTK[..., half:]
    return torch.cat([low * angles.cos() - high * angles.sin(), high * angles.cos() + low * angles.sin()], -1)


def cross(state: State, x_TD: Tensor, text_PD: Tensor, keep_P: Tensor, heads: int) -> Tensor:
    """Image tokens of one picture after the cross model."""
    hidden = torch.where(keep_P, 0.0, float("-inf")).double()
    index = 0
    while f"cross_model.layers.{index}.0.fn.to_q.weight" in state:
        name, block = f"cross_model.layers.{index}.0.fn", f"cross_model.layers.{index}.1.fn"
        h = _norm(state, f"{name}.norm", x_TD)
        q = _linear(state, f"{name}.to_q", h).unflatten(-1, (heads, -1)).transpose(0, 1)
        k, v = _linear(state, f"{name}.to_kv", text_PD).chunk(2, -1)
        seen = _softmax_attention(q, k, v, hidden).transpose(0, 1).flatten(1)
        x_TD = x_TD + _linear(state, f"{name}.to_out", seen) + _linear(state, f"{name}.ff.2", _swiglu(_linear(state, f"{name}.ff.0", h)))
        width = k.shape[-1]
        fused = _linear(state, f"{block}.fused_attn_ff_proj", _norm(state, f"{block}.norm", x_TD))
        q, k, v, feed = fused.split([heads * width, width, width, fused.shape[-1] - (heads + 2) * width], -1)
        q = _turned(q.unflatten(-1, (heads, -1)).transpose(0, 1))
        seen = _softmax_attention(q, _turned(k), v).transpose(0, 1).flatten(1)
        x_TD = x_TD + _linear(state, f"{block}.attn_out", seen) + _linear(state, f"{block}.ff_out.1", _swiglu(feed))
        index += 1
    return x_TD


def mps(
    state: State, heads: tuple[int, int, int], is_quick: bool, pixels_BCHW: Tensor, ids_BP: Tensor, condition_ids_P: Tensor, threshold: float, batch=()
) -> Tensor:
    """Raw MPS [B] of picture i with prompt i.

    Args:
        state: published names, without what wrappers put before them.
        heads: of vision tower, text tower and cross model.
        batch: ids of all prompts over which the mask is normalised; none: every prompt on its own.
    """
    towers = {key.removeprefix("model."): value for key, value in state.items() if key.startswith("model.")}
    condition = text_states(towers, condition_ids_P[None], heads[1], is_quick)[0]
    text_BPD = text_states(towers, ids_BP, heads[1], is_quick)
    everything = text_states(towers, torch.stack(list(batch)), heads[1], is_quick) if len(batch) else text_BPD
    image_BTD = _linear(towers, "visual_projection", image_states(towers, pixels_BCHW, heads[0], is_quick))
    scores = []
    for ids, text, image in zip(ids_BP, text_BPD, image_BTD, strict=True):
        similar = (text @ condition.T).amax(-1)
        largest = (everything @ condition.T).max() if len(batch) else similar.max()
        picture = cross(state, image, text, (similar / largest > threshold).detach(), heads[2])[0]
        end = text[int((ids == END_ID).int().argmax())]
        scores.append(functional.cosine_similarity(end, picture, dim=0) * towers["logit_scale"].exp())
    return torch.stack(scores)

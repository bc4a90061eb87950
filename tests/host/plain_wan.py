"""A PAVRM written out anew in plain float64 arithmetic on named tensors, to compare with: trunk, pooling and head, for one latent at a time.

Source of the formulas: Wan-Video/Wan2.1:wan/modules/model.py and Tencent-Hunyuan/HY-Video-PRFL@59ab9d7:scripts/pavrm/train_pavrm.py (both Apache-2.0), as
told in shared/reference/prfl.md. Nothing of the pack or the host is used.

Shape letters: C F H W latent, P prompt tokens, D width, L video tokens, N heads, K head width.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional

State = Mapping[str, Tensor]
TEXT_LENGTH = 512


def _linear(state: State, name: str, x: Tensor) -> Tensor:
    return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def _layer_norm(x: Tensor, eps: float) -> Tensor:
    centred = x - x.mean(dim=-1, keepdim=True)
    return centred / (centred.square().mean(dim=-1, keepdim=True) + eps).sqrt()


def _rms_norm(state: State, name: str, x: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean(dim=-1, keepdim=True) + eps).sqrt() * state[f"{name}.weight"]


def _attend(q_LD: Tensor, k_SD: Tensor, v_SD: Tensor, heads: int) -> Tensor:
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(0, 1) for x in (q_LD, k_SD, v_SD))
    weights = (q @ k.transpose(1, 2) / q.shape[-1] ** 0.5).softmax(dim=-1)
    return (weights @ v).transpose(0, 1).flatten(1)


def _rotations(grid: tuple[int, int, int], head_width: int) -> Tensor:
    """Complex rotation [L, K/2] of every token: the first pairs turn with the frame, the next with the row, the last with the column."""
    share = head_width // 6
    widths = (head_width - 4 * share, 2 * share, 2 * share)
    places = torch.meshgrid(*(torch.arange(length, dtype=torch.float64) for length in grid), indexing="ij")
    angles = [
        place.flatten()[:, None] * 10000 ** -(torch.arange(0, width, 2, dtype=torch.float64) / width) for place, width in zip(places, widths, strict=True)
    ]
    whole = torch.cat(angles, dim=1)
    return torch.polar(torch.ones_like(whole), whole)


def _rotated(x_LD: Tensor, rotation_LK: Tensor, heads: int) -> Tensor:
    pairs = torch.view_as_complex(x_LD.unflatten(-1, (heads, -1, 2)).contiguous())
    return torch.view_as_real(pairs * rotation_LK[:, None]).flatten(1)


def _block(state: State, name: str, x_LD: Tensor, time_6D: Tensor, text_PD: Tensor, image_PD: Tensor | None, rotation: Tensor, sizes: Mapping) -> Tensor:
    eps, heads = sizes["eps"], sizes["num_heads"]
    shift, scale, gate, shift_ff, scale_ff, gate_ff = state[f"{name}.modulation"][0] + time_6D
    h = _layer_norm(x_LD, eps) * (1 + scale) + shift
    q, k = (_rms_norm(state, f"{name}.self_attn.norm_{part}", _linear(state, f"{name}.self_attn.{part}", h), eps) for part in "qk")
    seen = _attend(_rotated(q, rotation, heads), _rotated(k, rotation, heads), _linear(state, f"{name}.self_attn.v", h), heads)
    x_LD = x_LD + _linear(state, f"{name}.self_attn.o", seen) * gate
    h = _layer_norm(x_LD, eps) * state[f"{name}.norm3.weight"] + state[f"{name}.norm3.bias"]
    cross = f"{name}.cross_attn"
    q = _rms_norm(state, f"{cross}.norm_q", _linear(state, f"{cross}.q", h), eps)
    seen = _attend(q, _rms_norm(state, f"{cross}.norm_k", _linear(state, f"{cross}.k", text_PD), eps), _linear(state, f"{cross}.v", text_PD), heads)
    if image_PD is not None:
        keys = _rms_norm(state, f"{cross}.norm_k_img", _linear(state, f"{cross}.k_img", image_PD), eps)
        seen = seen + _attend(q, keys, _linear(state, f"{cross}.v_img", image_PD), heads)
    x_LD = x_LD + _linear(state, f"{cross}.o", seen)
    h = _layer_norm(x_LD, eps) * (1 + scale_ff) + shift_ff
    return x_LD + _linear(state, f"{name}.ffn.2", functional.gelu(_linear(state, f"{name}.ffn.0", h), approximate="tanh")) * gate_ff


def block_outputs(state: State, sizes: Mapping, latent_CFHW: Tensor, timestep: int, text_PD: Tensor, clip_PD: Tensor | None = None) -> list[Tensor]:
    """Output [L, D] of every block in the state.

    Args:
        state: Wan's names, float64.
        sizes: eps, num_heads, freq_dim.
        latent_CFHW: all input channels: of an image-to-video trunk the mask and the first frame's latents follow the noisy ones.
        timestep: whole number.
        text_PD: unpadded.
        clip_PD: vision tokens [257, 1280].
    """
    weight = state["patch_embedding.weight"]
    patches = functional.conv3d(latent_CFHW[None], weight, state["patch_embedding.bias"], stride=weight.shape[2:])[0]
    x_LD = patches.flatten(1).T
    half = sizes["freq_dim"] // 2
    angles = timestep * 10000 ** -(torch.arange(half, dtype=torch.float64) / half)
    time = torch.cat([angles.cos(), angles.sin()])
    time = _linear(state, "time_embedding.2", functional.silu(_linear(state, "time_embedding.0", time)))
    time_6D = _linear(state, "time_projection.1", functional.silu(time)).unflatten(0, (6, -1))
    padded = functional.pad(text_PD, (0, 0, 0, TEXT_LENGTH - len(text_PD)))
    text = _linear(state, "text_embedding.2", functional.gelu(_linear(state, "text_embedding.0", padded), approximate="tanh"))
    image = None if clip_PD is None else _image_tokens(state, clip_PD)
    rotation = _rotations(tuple(patches.shape[1:]), len(x_LD[0]) // sizes["num_heads"])
    outputs = []
    while f"blocks.{len(outputs)}.modulation" in state:
        x_LD = _block(state, f"blocks.{len(outputs)}", x_LD, time_6D, text, image, rotation, sizes)
        outputs.append(x_LD)
    return outputs


def _image_tokens(state: State, clip_PD: Tensor) -> Tensor:
    x = _layer_norm(clip_PD, 1e-5) * state["img_emb.proj.0.weight"] + state["img_emb.proj.0.bias"]
    x = _linear(state, "img_emb.proj.3", functional.gelu(_linear(state, "img_emb.proj.1", x)))
    return _layer_norm(x, 1e-5) * state["img_emb.proj.4.weight"] + state["img_emb.proj.4.bias"]


def logit(query: State, mlp: State, features: list[Tensor], heads: int = 8) -> Tensor:
    """The score before the sigmoid of one latent; `features` are the tapped blocks' outputs."""
    weights, biases = query["multihead_attn.in_proj_weight"].chunk(3), query["multihead_attn.in_proj_bias"].chunk(3)
    pooled = []
    for x_LD in features:
        q, k, v = (source @ w.T + b for source, w, b in zip((query["queries"], x_LD, x_LD), weights, biases, strict=True))
        pooled.append(_linear(query, "multihead_attn.out_proj", _attend(q, k, v, heads)) + query["queries"])
    x = torch.stack(pooled).mean(dim=0)
    for name in ("fc1", "fc2"):
        x = functional.relu(_linear(mlp, name, x))
    return _linear(mlp, "fc3", x)[0, 0]

"""The one CLIP implementation of the pack: open_clip, built from a config, with a fixed number policy and its tokenizers.

Does: build a CLIP from an open_clip model config (real sizes, tiny test sizes, or on the meta device), convert Hugging Face CLIP
configs to that form, cast the towers to half precision while norms and positions stay wide, give all text states and all image tokens
(MPS needs them), and turn text into token ids in the two ways that the published scorers use.
Does not: read files (weights.py), rename keys (layouts.py), resize pictures (preprocess.py), score (hpsv2.py, mps.py).

Shape letters: B pictures or prompts, P prompt positions (77), T image tokens (1 + patches), W tower width, D shared width.
"""

from __future__ import annotations

import functools
import logging
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
from open_clip.tokenizer import SimpleTokenizer
from torch import Tensor, nn
from torch.nn import functional

# Sizes of laion2B ViT-H/14, on which HPSv2, HPSv2.1, MPS and PickScore stand.
# Source: open_clip 3.3.0, model_configs/ViT-H-14.json (MIT).
VIT_H_14: Mapping[str, Any] = {
    "embed_dim": 1024,
    "vision_cfg": {"image_size": 224, "layers": 32, "width": 1280, "head_width": 80, "patch_size": 14},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 1024, "heads": 16, "layers": 24},
}

# Sizes of OpenAI's ViT-L/14, on which the LAION aesthetic predictor stands; OpenAI's towers use quick GELU.
# Source: open_clip 3.3.0, model_configs/ViT-L-14-quickgelu.json (MIT).
VIT_L_14: Mapping[str, Any] = {
    "embed_dim": 768,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 224, "layers": 24, "width": 1024, "patch_size": 14},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 768, "heads": 12, "layers": 12},
}

_LOG = logging.getLogger("reward_lab")

# Far above every published CLIP.
_MOST_LAYERS, _MOST_SIZE, _MOST_RATIO = 1000, 1_000_000, 100
_SIZES = {
    "vision_cfg": ("image_size", "layers", "width", "head_width", "patch_size"),
    "text_cfg": ("context_length", "vocab_size", "width", "heads", "layers"),
}

END_ID = 49407
CONTEXT_LENGTH = 77


class WideLayerNorm(nn.LayerNorm):
    """Layer norm computed in the dtype of its own weights and returned in the dtype of its input.

    Its weights stay in float32 when a tower is cast to half precision; in a float64 model they are float64.
    """

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        wide = functional.layer_norm(x.to(self.weight.dtype), self.normalized_shape, self.weight, self.bias, self.eps)
        return wide.to(x.dtype)


def build_clip(config: Mapping[str, Any]) -> CLIP:
    """Build an open_clip CLIP with random weights, in train mode and with gradients on.

    Args:
        config: open_clip model config: `embed_dim`, `vision_cfg`, `text_cfg`, optionally `quick_gelu`.

    Returns:
        The model, float32, on the current default device (the meta device included).

    Raises:
        ValueError: a key is missing or unknown, or a size is impossible.
    """
    _check_config(config)
    model = CLIP(
        embed_dim=config["embed_dim"],
        vision_cfg=CLIPVisionCfg(**config["vision_cfg"]),
        text_cfg=CLIPTextCfg(**config["text_cfg"]),
        quick_gelu=bool(config.get("quick_gelu", False)),
    )
    _widen_norms(model)
    return model


def _check_config(config: Mapping[str, Any]) -> None:
    missing = [key for key in ("embed_dim", "vision_cfg", "text_cfg") if key not in config]
    if missing:
        raise ValueError(f"CLIP config lacks {', '.join(missing)}; give an open_clip model config like open_clip/model_configs/ViT-H-14.json.")
    unknown = sorted(set(config) - {"embed_dim", "vision_cfg", "text_cfg", "quick_gelu"})
    for part, allowed in (("vision_cfg", CLIPVisionCfg), ("text_cfg", CLIPTextCfg)):
        if not isinstance(config[part], Mapping):
            raise ValueError(f"CLIP config: {part} is {config[part]!r}; it must be an object with sizes.")
        names = {field.name for field in fields(allowed)}
        unknown += [f"{part}.{key}" for key in config[part] if key not in names]
    if unknown:
        raise ValueError(f"CLIP config has unknown entries {', '.join(unknown)}; open_clip 3.3 does not know them.")
    _check_numbers(config)
    vision, text = CLIPVisionCfg(**config["vision_cfg"]), CLIPTextCfg(**config["text_cfg"])
    if vision.timm_model_name or text.hf_model_name or not isinstance(vision.layers, int):
        raise ValueError("CLIP config names a timm, Hugging Face or ResNet tower; the scorers here are plain ViT + text transformer models.")
    if vision.width % vision.head_width or text.width % text.heads:
        raise ValueError(
            f"CLIP config: width {vision.width} must be a multiple of head_width {vision.head_width}, "
            f"and text width {text.width} a multiple of heads {text.heads}."
        )


def check_sizes(sizes: Mapping[str, Any], what: str) -> None:
    """Sizes of a config must be whole numbers that a model can have: building one of a million layers would never end.

    Raises:
        ValueError: names the first that is not.
    """
    for name, value in sizes.items():
        most = _MOST_LAYERS if "layer" in name else _MOST_SIZE
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
            raise ValueError(f"{what}: {name} is {value!r}; it must be a whole number from 1 to {most}.")


def _check_numbers(config: Mapping[str, Any]) -> None:
    sizes = {"embed_dim": config["embed_dim"]}
    for part, names in _SIZES.items():
        sizes |= {f"{part}.{name}": config[part][name] for name in names if name in config[part]}
    check_sizes(sizes, "CLIP config")
    for part in ("vision_cfg", "text_cfg"):
        ratio = config[part].get("mlp_ratio", 4.0)
        if not isinstance(ratio, (int, float)) or not 0 < ratio <= _MOST_RATIO:
            raise ValueError(f"CLIP config: {part}.mlp_ratio is {ratio!r}; it must be a number above 0 and up to {_MOST_RATIO}.")
    if config["text_cfg"].get("context_length", CONTEXT_LENGTH) != CONTEXT_LENGTH:
        raise ValueError(f"CLIP config: text_cfg.context_length is {config['text_cfg']['context_length']}; the scorers' prompts have {CONTEXT_LENGTH} ids.")


def _widen_norms(module: nn.Module) -> None:
    for name, child in module.named_children():
        if isinstance(child, nn.LayerNorm):
            wide = WideLayerNorm(child.normalized_shape, eps=child.eps, device=child.weight.device, dtype=child.weight.dtype)
            setattr(module, name, wide)
        else:
            _widen_norms(child)


def restore_causal_mask(model: CLIP) -> None:
    """Put the text tower's causal mask back: it is not in state dicts, so a model built on the meta device lacks it."""
    mask = torch.full((model.context_length, model.context_length), float("-inf")).triu_(1)
    model.register_buffer("attn_mask", mask, persistent=False)


def cast_towers(module: nn.Module, dtype: torch.dtype) -> None:
    """Cast matrices to `dtype`; layer norms, positions and the logit scale stay in float32 unless `dtype` is wider.

    Casting everything moves HPS by more than the differences it must tell apart (reference: open_clip `convert_weights_to_lp`, MIT,
    which keeps the same tensors wide).
    """
    wide = torch.promote_types(dtype, torch.float32)
    for child in module.modules():
        is_norm = isinstance(child, nn.LayerNorm)
        for name, parameter in child.named_parameters(recurse=False):
            keep_wide = is_norm or name in ("positional_embedding", "logit_scale") or getattr(child, "keeps_wide_parameters", False)
            target = wide if keep_wide else dtype
            if parameter.dtype != target:
                setattr(child, name, nn.Parameter(parameter.detach().to(target), requires_grad=parameter.requires_grad))
        for name, buffer in child.named_buffers(recurse=False):
            if buffer.is_floating_point() and buffer.dtype != wide:
                setattr(child, name, buffer.to(wide))


def config_from_shapes(state: Mapping[str, Tensor]) -> Mapping[str, Any] | None:
    """The config of ViT-H/14 when open_clip-named weights have exactly its sizes, else None: numbers of heads cannot be read off weights."""
    vision, text = VIT_H_14["vision_cfg"], VIT_H_14["text_cfg"]
    shapes = {
        "visual.conv1.weight": (vision["width"], 3, vision["patch_size"], vision["patch_size"]),
        "visual.positional_embedding": ((vision["image_size"] // vision["patch_size"]) ** 2 + 1, vision["width"]),
        "visual.proj": (vision["width"], VIT_H_14["embed_dim"]),
        "token_embedding.weight": (text["vocab_size"], text["width"]),
        "text_projection": (text["width"], VIT_H_14["embed_dim"]),
    }
    if any(key not in state or tuple(state[key].shape) != shape for key, shape in shapes.items()):
        return None
    for prefix, layers in (("transformer", text["layers"]), ("visual.transformer", vision["layers"])):
        indices = {int(key.split(".resblocks.")[1].split(".")[0]) for key in state if key.startswith(f"{prefix}.resblocks.")}
        if indices != set(range(layers)):
            return None
    return VIT_H_14


def is_vit_l_14(state: Mapping[str, Tensor]) -> bool:
    """Whether the image tower of open_clip-named weights has exactly the sizes of ViT-L/14."""
    vision = VIT_L_14["vision_cfg"]
    patches = (vision["image_size"] // vision["patch_size"]) ** 2
    shapes = {
        "visual.conv1.weight": (vision["width"], 3, vision["patch_size"], vision["patch_size"]),
        "visual.positional_embedding": (patches + 1, vision["width"]),
        "visual.proj": (vision["width"], VIT_L_14["embed_dim"]),
    }
    return all(key in state and tuple(state[key].shape) == shape for key, shape in shapes.items())


def tower_dtype(model: CLIP) -> torch.dtype:
    """Dtype of the matrices of the image tower, in which prepared pictures must arrive."""
    return model.visual.conv1.weight.dtype


def move(network: nn.Module, device: torch.device | str, dtype: torch.dtype | None = None) -> None:
    """Move a frozen network and, with `dtype`, cast it as `cast_towers` does; also where the caller runs in inference mode."""
    with torch.inference_mode(False):
        if dtype is not None:
            cast_towers(network, dtype)
        network.to(device)


def wide(x: Tensor) -> Tensor:
    """The tensor in float32, or as it is where it is wider: a cosine in half precision cannot tell frames apart."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def picture_vectors(model: CLIP, prepared_MCHW: Tensor) -> Tensor:
    """Unit picture vectors [M, D], at least float32, of prepared pictures."""
    return functional.normalize(wide(model.encode_image(prepared_MCHW.to(tower_dtype(model)))), dim=-1)


def prompt_vectors(model: CLIP, prompts: Sequence[str], *, is_plain: bool = False) -> Tensor:
    """Unit prompt vectors [B, D], at least float32; warns about prompts that are empty or too long. `is_plain` is that of `tokenize`."""
    warn_about(prompts, is_plain=is_plain)
    ids_BP = tokenize(prompts, is_plain=is_plain).to(model.logit_scale.device)
    return functional.normalize(wide(model.encode_text(ids_BP)), dim=-1)


def frame_cosines(picture_MD: Tensor, text_BD: Tensor) -> Tensor:
    """Cosine [B, F] of every frame's unit vector with its video's; M = B*F."""
    return torch.einsum("bfd,bd->bf", picture_MD.unflatten(0, (len(text_BD), -1)), text_BD)


def image_tokens(model: CLIP, pixels_BCHW: Tensor) -> Tensor:
    """All image tokens before the final norm, projected to the shared width, class token first.

    This is what MPS attends over (HF: `visual_projection(vision_model(...).last_hidden_state)`); the final norm is skipped on purpose.

    Args:
        pixels_BCHW: normalised pictures in the model's size, dtype of the tower.

    Returns:
        [B, T, D], dtype of the tower.
    """
    output = model.visual.forward_intermediates(
        pixels_BCHW, indices=1, output_fmt="NLC", output_extra_tokens=True, normalize_intermediates=False, intermediates_only=True
    )
    tokens_BTW = torch.cat([output["image_intermediates_prefix"][0], output["image_intermediates"][0]], dim=1)
    return tokens_BTW @ model.visual.proj


def text_states(model: CLIP, ids_BP: Tensor) -> Tensor:
    """All text states after the final norm, projected to the shared width.

    Args:
        ids_BP: token ids, int64.

    Returns:
        [B, P, D], dtype of the tower.
    """
    output = model.forward_intermediates(text=ids_BP, text_indices=1, normalize_intermediates=True, intermediates_only=True)
    return output["text_intermediates"][0] @ model.text_projection


def from_hf_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Turn a Hugging Face CLIP config into an open_clip one.

    Raises:
        ValueError: an activation other than exact or quick GELU, a norm epsilon other than 1e-5, or a missing entry.
    """
    try:
        vision, text = config["vision_config"], config["text_config"]
        acts = {vision.get("hidden_act", "quick_gelu"), text.get("hidden_act", "quick_gelu")}
        if not acts <= {"gelu"} and not acts <= {"quick_gelu"}:
            raise ValueError(f"CLIP config: hidden_act {sorted(acts)} is not supported; both towers must use gelu or both quick_gelu.")
        eps = {float(vision.get("layer_norm_eps", 1e-5)), float(text.get("layer_norm_eps", 1e-5))}
        if eps != {1e-5}:
            raise ValueError(f"CLIP config: layer_norm_eps {sorted(eps)} is not supported; open_clip towers use 1e-05.")
        return {
            "embed_dim": config["projection_dim"],
            "quick_gelu": acts == {"quick_gelu"},
            "vision_cfg": {
                "image_size": vision["image_size"],
                "layers": vision["num_hidden_layers"],
                "width": vision["hidden_size"],
                "head_width": vision["hidden_size"] // vision["num_attention_heads"],
                "patch_size": vision["patch_size"],
                "mlp_ratio": vision["intermediate_size"] / vision["hidden_size"],
            },
            "text_cfg": {
                "context_length": text.get("max_position_embeddings", CONTEXT_LENGTH),
                "vocab_size": text.get("vocab_size", 49408),
                "width": text["hidden_size"],
                "heads": text["num_attention_heads"],
                "layers": text["num_hidden_layers"],
                "mlp_ratio": text["intermediate_size"] / text["hidden_size"],
            },
        }
    except KeyError as error:
        raise ValueError(f"CLIP config lacks {error.args[0]!r}; give a Hugging Face CLIPConfig or an open_clip model config.") from error
    except (TypeError, AttributeError, ZeroDivisionError) as error:
        raise ValueError(f"CLIP config: a size is no number that it can be ({error}); give a Hugging Face CLIPConfig or an open_clip one.") from error


@functools.lru_cache(maxsize=2)
def _tokenizer(is_plain: bool) -> SimpleTokenizer:
    tokenizer = SimpleTokenizer()
    if is_plain:
        # What transformers' CLIPTokenizerFast does before BPE: NFC, blanks merged, lower case; no ftfy, no HTML entities.
        tokenizer.clean_fn = lambda text: " ".join(unicodedata.normalize("NFC", text).lower().split())
    return tokenizer


def tokenize(prompts: Sequence[str], *, is_plain: bool = False, pad_id: int = 0) -> Tensor:
    """Token ids of prompts, cut to 77 with the end id last.

    Args:
        prompts: texts.
        is_plain: False repairs characters and decodes HTML entities first (open_clip, HPSv2); True does neither (Hugging Face, MPS).
        pad_id: id after the end id: 0 for HPSv2 (not read there), 49407 for MPS (where padding takes part in the score).

    Returns:
        int64 [B, 77].
    """
    ids_BP = _tokenizer(is_plain)(list(prompts), context_length=CONTEXT_LENGTH)
    if pad_id:
        is_padding = (ids_BP == END_ID).cumsum(dim=1) - (ids_BP == END_ID).long() > 0
        ids_BP = ids_BP.masked_fill(is_padding, pad_id)
    return ids_BP


def warn_about(prompts: Sequence[str], *, is_plain: bool = False) -> None:
    """Log what `prompt_warnings` says."""
    for message in prompt_warnings(prompts, is_plain=is_plain):
        _LOG.warning("%s", message)


def prompt_warnings(prompts: Sequence[str], *, is_plain: bool = False) -> list[str]:
    """A sentence for every empty prompt, and for every one that does not fit 77 ids, with the words where it is cut."""
    tokenizer, room = _tokenizer(is_plain), CONTEXT_LENGTH - 2
    messages = []
    for prompt in prompts:
        if not prompt.strip():
            messages.append("A prompt is empty: its scores compare the frames with no text at all and mean little.")
        ids = tokenizer.encode(prompt)
        if len(ids) > room:
            before, after = tokenizer.decode(ids[:room])[-40:].strip(), tokenizer.decode(ids[room:])[:40].strip()
            messages.append(f"Prompt needs {len(ids)} tokens, {room} fit: it is cut after '...{before}', before '{after}...'.")
    return messages

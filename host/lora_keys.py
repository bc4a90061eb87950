"""Names in LoRA files: tables that turn every known layout into (layer of the Wan model, part of the LoRA), and back.

All comparing is done on flattened names (dots become underscores), because half of the layouts are flattened already and cannot be
turned back without knowing the model. No tensors here, so that one test per row of each table is cheap. Who writes which layout:
web/docs/RewardLabInspectLoRA.md.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

# Stripped again and again until none fits: real files stack them, for example `base_model.model.diffusion_model.`.
PREFIXES = (
    "base_model.model.",
    "base_model.",
    "model.diffusion_model.",
    "model.",
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
    "lora_",
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
    ".w_norm": "diff",  # LyCORIS' names for the changes of a norm
    ".b_norm": "diff_b",
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
# Names that compiling and sharding put into the path of a module, and PEFT's name of the adapter (`lora_A.default.weight`).
_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_ADAPTER_NAME = re.compile(r"\.(lora_[AB]|lora_magnitude_vector)\.(?!weight$)[^.]+(?=\.weight$|$)")
_PARTS_LONGEST_FIRST = tuple(sorted(PARTS.items(), key=lambda item: -len(item[0])))

# Diffusers' Wan names, flattened -> native, in order. Source: diffusers' convert_wan_to_diffusers.py (Apache-2.0), read backwards.
# Differs from kijai's wrapper, which sends attn1 and attn2 both to cross_attn. Diffusers' norm2 is the native norm3: the other two have no weights.
DIFFUSERS_NAMES = (
    (re.compile(r"^condition_embedder_time_embedder_linear_1$"), "time_embedding_0"),
    (re.compile(r"^condition_embedder_time_embedder_linear_2$"), "time_embedding_2"),
    (re.compile(r"^condition_embedder_text_embedder_linear_1$"), "text_embedding_0"),
    (re.compile(r"^condition_embedder_text_embedder_linear_2$"), "text_embedding_2"),
    (re.compile(r"^condition_embedder_time_proj$"), "time_projection_1"),
    (re.compile(r"^condition_embedder_image_embedder_norm1$"), "img_emb_proj_0"),
    (re.compile(r"^condition_embedder_image_embedder_ff_net_0_proj$"), "img_emb_proj_1"),
    (re.compile(r"^condition_embedder_image_embedder_ff_net_2$"), "img_emb_proj_3"),
    (re.compile(r"^condition_embedder_image_embedder_norm2$"), "img_emb_proj_4"),
    (re.compile(r"^proj_out$"), "head_head"),
    (re.compile(r"^scale_shift_table$"), "head_modulation"),
    (re.compile(r"_scale_shift_table$"), "_modulation"),
    (re.compile(r"(blocks_\d+)_norm2$"), r"\1_norm3"),
    (re.compile(r"_attn1_"), "_self_attn_"),
    (re.compile(r"_attn2_"), "_cross_attn_"),
    (re.compile(r"_attn_(add_)?to_"), r"_attn_\1"),
    (re.compile(r"_attn_out_0$"), "_attn_o"),
    (re.compile(r"_attn_add_([kv])_proj$"), r"_attn_\1_img"),
    (re.compile(r"_attn_norm_added_k$"), "_attn_norm_k_img"),
    (re.compile(r"_ffn_net_0_proj$"), "_ffn_0"),
    (re.compile(r"_ffn_net_2$"), "_ffn_2"),
)

# Native -> diffusers, on dotted names; the same facts in the other direction.
TO_DIFFUSERS = (
    (re.compile(r"^time_embedding\.([02])$"), lambda found: f"condition_embedder.time_embedder.linear_{1 + int(found[1]) // 2}"),
    (re.compile(r"^text_embedding\.([02])$"), lambda found: f"condition_embedder.text_embedder.linear_{1 + int(found[1]) // 2}"),
    (re.compile(r"^time_projection\.1$"), "condition_embedder.time_proj"),
    (re.compile(r"^img_emb\.proj\.0$"), "condition_embedder.image_embedder.norm1"),
    (re.compile(r"^img_emb\.proj\.1$"), "condition_embedder.image_embedder.ff.net.0.proj"),
    (re.compile(r"^img_emb\.proj\.3$"), "condition_embedder.image_embedder.ff.net.2"),
    (re.compile(r"^img_emb\.proj\.4$"), "condition_embedder.image_embedder.norm2"),
    (re.compile(r"^head\.head$"), "proj_out"),
    (re.compile(r"^head\.modulation$"), "scale_shift_table"),
    (re.compile(r"\.modulation$"), ".scale_shift_table"),
    (re.compile(r"\.norm3$"), ".norm2"),
    (re.compile(r"_attn\.norm_k_img$"), "_attn.norm_added_k"),
    (re.compile(r"_attn\.([kv])_img$"), r"_attn.add_\1_proj"),
    (re.compile(r"_attn\.([qkv])$"), r"_attn.to_\1"),
    (re.compile(r"_attn\.o$"), "_attn.to_out.0"),
    (re.compile(r"\.self_attn\."), ".attn1."),
    (re.compile(r"\.cross_attn\."), ".attn2."),
    (re.compile(r"\.ffn\.0$"), ".ffn.net.0.proj"),
    (re.compile(r"\.ffn\.2$"), ".ffn.net.2"),
)

# Layers that a Wan2.1 image-to-video LoRA has and Wan2.2 does not: nothing is lost when they are left out.
IMAGE_BRANCH = re.compile(r"(?:^|_)(?:img_emb|k_img|v_img|norm_k_img|condition_embedder_image_embedder)(?:_|$)")
TEXT_ENCODER = re.compile(r"^(?:lora_te\d?_|text_encoders?[._])")

SAMPLED_KEYS = 400
MAX_BLOCKS = 64  # the largest Wan has 40
_ATTENTION = ("q", "k", "v", "o", "norm_q", "norm_k")
_BLOCK_LAYERS = (
    *(f"self_attn.{name}" for name in _ATTENTION),
    *(f"cross_attn.{name}" for name in (*_ATTENTION, "k_img", "v_img", "norm_k_img")),
    *("ffn.0", "ffn.2", "norm3", "modulation", "before_proj", "after_proj"),
)
_OTHER_LAYERS = (
    *("patch_embedding", "vace_patch_embedding", "text_embedding.0", "text_embedding.2", "time_embedding.0", "time_embedding.2"),
    *("time_projection.1", "head.head", "head.modulation", "img_emb.proj.0", "img_emb.proj.1", "img_emb.proj.3", "img_emb.proj.4", "ref_conv"),
)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """One way of writing the keys of a LoRA file.

    Attributes:
        name: How the command line calls it.
        made_by: Who writes it.
        prefix: What stands before the layer.
        is_flat: Whether the dots of the layer are underscores.
        is_diffusers: Whether the layers have diffusers' names.
        down, up: The ends of the two matrices' keys.
        has_alpha: Whether alpha is stored in the file. Where it is not, loaders take alpha = rank.
    """

    name: str
    made_by: str
    prefix: str
    is_flat: bool = False
    is_diffusers: bool = False
    down: str = "lora_A.weight"
    up: str = "lora_B.weight"
    has_alpha: bool = False

    def key(self, layer: str, part: str) -> str:
        """Write a key, for example `lora_unet__blocks_0_self_attn_q.lora_down.weight`, from `blocks.0.self_attn.q` and `lora_down.weight`."""
        if self.is_diffusers:
            for pattern, name in TO_DIFFUSERS:
                layer = pattern.sub(name, layer)
        end = {"lora_down.weight": self.down, "lora_up.weight": self.up}.get(part, part)
        if part == "dora_scale" and ".weight" in self.down and self.down.startswith("lora_A"):
            end = self.down.replace("lora_A", "lora_magnitude_vector")
        return f"{self.prefix}{layer.replace('.', '_') if self.is_flat else layer}.{end}"


_KOHYA = {"is_flat": True, "down": "lora_down.weight", "up": "lora_up.weight", "has_alpha": True}
_DEFAULT = {"down": "lora_A.default.weight", "up": "lora_B.default.weight"}

# Every layout that is written as well as read; reading knows more mixtures than these. The first row with a name is the one a file is said to have.
LAYOUTS = (
    Layout(name="videox-fun", made_by="VideoX-Fun, Reward Lab", prefix="lora_unet__", **_KOHYA),
    Layout(name="musubi-tuner", made_by="musubi-tuner, sd-scripts", prefix="lora_unet_", **_KOHYA),
    Layout(name="diffusion-pipe", made_by="diffusion-pipe, ai-toolkit, HY-Video-PRFL (diffusers file)", prefix="diffusion_model."),
    Layout(name="comfyui", made_by="ComfyUI, lightx2v, Kijai's conversions", prefix="diffusion_model.", **{**_KOHYA, "is_flat": False}),
    Layout(name="diffusion-pipe-default", made_by="PEFT adapters saved under their name", prefix="diffusion_model.", **_DEFAULT),
    Layout(name="diffusers", made_by="diffusers, finetrainers", prefix="transformer.", is_diffusers=True),
    Layout(name="onetrainer", made_by="OneTrainer", prefix="transformer.", is_diffusers=True, **{**_KOHYA, "is_flat": False}),
    Layout(name="diffusers-kohya", made_by="kohya-style trainers on diffusers' model", prefix="lora_transformer_", is_diffusers=True, **_KOHYA),
    Layout(name="transformer", made_by="trainers that keep the native names", prefix="transformer."),
    Layout(name="peft", made_by="PEFT, HY-Video-PRFL (transformers file)", prefix="base_model.model."),
    Layout(name="peft-default", made_by="PEFT state dicts with the adapter's name", prefix="base_model.model.", **_DEFAULT),
    Layout(name="diffsynth", made_by="DiffSynth-Studio", prefix="", **_DEFAULT),
    Layout(name="diffsynth-pipe", made_by="DiffSynth-Studio, UniAnimate-DiT", prefix="pipe.dit.", **_DEFAULT),
    Layout(name="bare", made_by="trainers that write the layer alone", prefix=""),
    Layout(name="lycoris", made_by="LyCORIS", prefix="lycoris_", **_KOHYA),
    Layout(name="lycoris-diffusers", made_by="LyCORIS on diffusers' model, ai-toolkit (LoKr)", prefix="lycoris_", is_diffusers=True, **_KOHYA),
    Layout(name="hy-video-prfl", made_by="HY-Video-PRFL (kohya file)", prefix="lora_", **_KOHYA),
)


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
    plain = _ADAPTER_NAME.sub(r".\1", _WRAPPERS.sub("", key.replace(".default.", ".").removesuffix(".default")))
    if plain.endswith(".diff_m"):  # lightx2v's name for the change of a block's modulation
        plain = plain.removesuffix(".diff_m") + ".modulation.diff"
    for suffix, part in _PARTS_LONGEST_FIRST:
        if plain.endswith(suffix):
            return flat_name(plain[: -len(suffix)]), part
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
        is_text_encoder = TEXT_ENCODER.match(key)
        split = None if is_text_encoder else split_key(key)
        layer = by_flat_name.get(split[0]) if split else None
        if layer is not None:
            parts = result.layers.setdefault(layer, {})
            if split[1] in parts:
                result.duplicates.append(key)
            else:
                parts[split[1]] = key
        elif is_text_encoder:
            result.text_encoder.append(key)
        elif split and IMAGE_BRANCH.search(split[0]):
            result.image_branch.append(key)
        else:
            result.unknown.append(key)
    return result


@functools.lru_cache(maxsize=1)
def wan_layers() -> tuple[str, ...]:
    """Return the layers of every Wan variant, for reading names without a model: text, image, VACE, up to 64 blocks."""
    blocks = (f"{kind}.{number}.{layer}" for kind in ("blocks", "vace_blocks") for number in range(MAX_BLOCKS) for layer in _BLOCK_LAYERS)
    return (*blocks, *_OTHER_LAYERS)


def detect_layout(keys: NormalisedKeys) -> Layout | None:
    """Tell which layout a file's keys have.

    Args:
        keys: The file's keys, sorted by `wan_layers()` or a model's layers.

    Returns:
        The layout that writes most of the keys letter by letter; None when none writes half of them.
    """
    written = [(layer, part, key) for layer, parts in keys.layers.items() for part, key in parts.items()]
    if len(written) > SAMPLED_KEYS:  # the two ends tell as much as all, and a file may have thousands
        written = written[: SAMPLED_KEYS // 2] + written[-SAMPLED_KEYS // 2 :]
    counts = [sum(key == layout.key(layer, part) for layer, part, key in written) for layout in LAYOUTS]
    # Keys of norms and biases look the same with A/B and down/up; where alpha decides nothing, the first row wins.
    best = max(counts, default=0)
    return LAYOUTS[counts.index(best)] if best * 2 > len(written) > 0 else None


def layout_named(name: str) -> Layout:
    """Return a layout by its name. Raises ValueError that lists the names."""
    for layout in LAYOUTS:
        if layout.name == name:
            return layout
    raise ValueError(f"There is no layout {name!r}. Choose one of {', '.join(layout.name for layout in LAYOUTS)}.")


def flat_name(name: str) -> str:
    """Strip prefixes from a layer's name, flatten it, and turn diffusers' names into native ones."""
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

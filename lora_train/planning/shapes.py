"""Sizes of a Wan transformer, from a file's header or by name."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from ..safetensors_file import Header, read_header

# name: width, ffn width, blocks, heads, text width, input channels, latent channels
_NAMED = {
    "wan-14b": (5120, 13824, 40, 40, 4096, 16, 16),
    "wan-14b-i2v": (5120, 13824, 40, 40, 4096, 36, 16),
    "wan-5b": (3072, 14336, 30, 24, 4096, 48, 48),
    "wan-1.3b": (1536, 8960, 30, 12, 4096, 16, 16),
}
NAMES = tuple(_NAMED)
_PREFIXES = ("model.diffusion_model.", "diffusion_model.")
_HEAD_WIDTH = 128


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """A transformer. `weight_bytes`: bytes per element of a block's Linears as stored: 2 for bf16, 1 for fp8, less for most GGUF blocks."""

    width: int
    ffn: int
    blocks: int
    heads: int
    text_width: int = 4096
    in_channels: int = 16
    latent_channels: int = 16
    frequency: int = 256
    weight_bytes: float = 2

    @property
    def is_quantised(self) -> bool:
        """Whether a block's Linears stay packed and are unpacked in a slot where they run."""
        return self.weight_bytes < 2

    @property
    def block_linears(self) -> dict[str, tuple[int, int]]:
        """(out, in) of a block's Linears."""
        square = {f"{part}_attn.{name}": (self.width, self.width) for part in ("self", "cross") for name in "qkvo"}
        return {**square, "ffn.0": (self.ffn, self.width), "ffn.2": (self.width, self.ffn)}

    @property
    def outer_linears(self) -> dict[str, tuple[int, int]]:
        """(out, in) of the Linears around the blocks."""
        width = self.width
        return {
            "text_embedding.0": (width, self.text_width),
            "text_embedding.2": (width, width),
            "time_embedding.0": (width, self.frequency),
            "time_embedding.2": (width, width),
            "time_projection.1": (6 * width, width),
            "head.head": (4 * self.latent_channels, width),
        }

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """All of them by path, in the model's order."""
        inner = {f"blocks.{index}.{name}": size for index in range(self.blocks) for name, size in self.block_linears.items()}
        outer = self.outer_linears
        return {**{name: size for name, size in outer.items() if name != "head.head"}, **inner, "head.head": outer["head.head"]}

    @property
    def block_parameters(self) -> int:
        """Elements of a block: Linears with biases, four RMS norms, the affine norm of cross-attention, modulation."""
        return sum(out * size + out for out, size in self.block_linears.values()) + (4 + 2 + 6) * self.width

    @property
    def outer_parameters(self) -> int:
        patch = self.width * self.in_channels * 4 + self.width
        return sum(out * size + out for out, size in self.outer_linears.values()) + patch + 2 * self.width

    @property
    def parameters(self) -> int:
        return self.blocks * self.block_parameters + self.outer_parameters


def named_shape(name: str, weight_bytes: int = 2) -> ModelShape:
    """A published model.

    Raises:
        ValueError: an unknown name.
    """
    if name not in _NAMED:
        raise ValueError(f"no model shape is called {name!r}; use {', '.join(_NAMED)}, or the path of a safetensors file")
    width, ffn, blocks, heads, text_width, in_channels, latent_channels = _NAMED[name]
    return ModelShape(
        width=width, ffn=ffn, blocks=blocks, heads=heads, text_width=text_width, in_channels=in_channels, latent_channels=latent_channels,
        weight_bytes=weight_bytes,
    )  # fmt: skip


def shape_of(source: str) -> ModelShape:
    """The shape of a named model or of a file.

    Raises:
        ValueError: neither; or the file is not a Wan transformer.
    """
    return named_shape(source) if source in _NAMED or not source.endswith((".safetensors", ".sft")) else header_shape(read_header(source), source)


def header_shape(header: Header, name: str = "the file") -> ModelShape:
    """Read sizes from a transformer's header.

    Raises:
        ValueError: no Wan transformer.
    """
    shapes = {}
    for key, shape in header.shapes.items():
        for prefix in _PREFIXES:
            key = key.removeprefix(prefix)
        shapes[key] = shape
    stored = [key for key, size in header.shapes.items() if key.endswith(".weight") and len(size) == 2 and "blocks." in key]
    indices = [int(key.split(".")[1]) for key in shapes if key.startswith("blocks.") and key.split(".")[1].isdigit()]
    wanted = ("patch_embedding.weight", "text_embedding.0.weight", "blocks.0.ffn.0.weight", "head.head.weight")
    missing = [key for key in wanted if key not in shapes]
    if missing:
        raise ValueError(f"{name} has no {missing[0]}: it is not a Wan transformer; pick a Wan2.2 expert")
    width, in_channels = shapes["patch_embedding.weight"][:2]
    return ModelShape(
        width=width,
        ffn=shapes["blocks.0.ffn.0.weight"][0],
        blocks=max(indices) + 1,
        heads=max(1, width // _HEAD_WIDTH),
        text_width=shapes["text_embedding.0.weight"][1],
        in_channels=in_channels,
        latent_channels=shapes["head.head.weight"][0] // 4,
        frequency=shapes.get("time_embedding.0.weight", (0, 256))[1],
        weight_bytes=sum(header.bytes_of[key] for key in stored) / sum(prod(header.shapes[key]) for key in stored),
    )


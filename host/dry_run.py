"""One pass with gradient and one without, of the real executor through the host's WanModel, on fake tensors of the real size.

Nothing is computed and nothing of size allocated: a 14B step at 720p is watched in seconds on any machine. Tells operations and bytes by device.
What kernels allocate inside of themselves, allocator and driver do not show; `planning/memory.py` adds them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import comfy.ldm.wan.model
import comfy.ops
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ..lora_train.lora.adapter import LoraAdapter, LoraLayer
from ..lora_train.lora.linears import install
from ..lora_train.lora.targets import select_targets
from ..lora_train.offload.knobs import Knobs
from ..lora_train.offload.timeline import MemoryTimeline
from ..lora_train.planning.shapes import ModelShape
from .training_mode import training_mode
from .wan import WanBackbone

# The device that stands for the card; the host is `cpu`.
CARD = torch.device("meta")


@dataclass(frozen=True, kw_only=True)
class Watched:
    """One phase: operations, and the most bytes alive on card and host."""

    flops: int
    card_bytes: int
    host_bytes: int
    samples: tuple[tuple[int, int], ...]


def dry_run(
    shape: ModelShape, latent_FHW: tuple[int, int, int], knobs: Knobs, *, rank: int, batch: int = 1, skip: Sequence[str] = (), text_tokens: int = 512
) -> dict[str, Watched]:
    """Run it.

    Args:
        latent_FHW: frames, height and width of the latent.
        rank: of a LoRA on every Linear that `skip` leaves.

    Returns:
        `rollout`, `forward`, `backward`; compute type bf16, masters on the host.
    """
    found = {}
    with FakeTensorMode(), training_mode(), MemoryTimeline(CARD.type) as timeline:
        model = comfy.ldm.wan.model.WanModel(
            dim=shape.width, ffn_dim=shape.ffn, num_heads=shape.heads, num_layers=shape.blocks, in_dim=shape.in_channels, out_dim=shape.latent_channels,
            text_dim=shape.text_width, freq_dim=shape.frequency, device="cpu", dtype=torch.bfloat16, operations=comfy.ops.disable_weight_init,
        )  # fmt: skip
        backbone = WanBackbone(model, dtype=torch.bfloat16, device=CARD)
        adapter = _fake_adapter(backbone.linears(), rank, skip)
        with install(backbone.linears(), adapter) as switch, backbone.engine(knobs):
            latent = torch.empty(batch, shape.latent_channels, *latent_FHW, device=CARD)
            context = torch.empty(batch, text_tokens, shape.text_width, device=CARD, dtype=torch.bfloat16)

            def watched() -> Watched:
                peaks = timeline.peak_bytes
                result = Watched(flops=timeline.flops, card_bytes=peaks[CARD.type], host_bytes=peaks["cpu"], samples=tuple(timeline.samples))
                timeline.flops = 0
                timeline.samples.clear()
                peaks.update(timeline.alive_bytes)
                return result

            watched()
            with torch.no_grad(), switch.merged():
                backbone.velocity(latent, 0.5, context)
            found["rollout"] = watched()
            out = backbone.velocity(latent, 0.5, context)
            found["forward"] = watched()
            out.backward(torch.empty_like(out))
            found["backward"] = watched()
    return found


def _fake_adapter(linears, rank: int, skip: Sequence[str]) -> LoraAdapter:
    layers = {}
    for path in select_targets(linears, (), skip):
        out_features, in_features = linears[path].weight.shape
        layers[path] = LoraLayer(
            down_RI=torch.nn.Parameter(torch.empty(rank, in_features)), up_OR=torch.nn.Parameter(torch.empty(out_features, rank)), factor=0.5
        )
    return LoraAdapter(layers=layers, rank=rank, alpha=rank / 2)

"""One pass with gradient and one without, of the real executor through the host's WanModel, on fake tensors of the real size.

Nothing is computed and nothing of size allocated: a 14B step at 720p is watched in seconds on any machine. Tells operations and bytes by device.
What kernels allocate inside of themselves, allocator and driver do not show; `planning/memory.py` adds them.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace

import comfy.ldm.modules.diffusionmodules.model
import comfy.ldm.wan.model
import comfy.ldm.wan.vae
import comfy.ldm.wan.vae2_2
import comfy.ops
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ..lora_train.input_config import LATENTS
from ..lora_train.lora.adapter import LoraAdapter, LoraLayer
from ..lora_train.lora.linears import install
from ..lora_train.lora.targets import select_targets
from ..lora_train.offload.executor import BlockExecutor, Shared
from ..lora_train.offload.knobs import Knobs
from ..lora_train.offload.timeline import MemoryTimeline
from ..lora_train.planning.shapes import ModelShape
from .training_mode import training_mode
from .vae import WanDecoder
from .wan import WanBackbone

# The device that stands for the card; the host is `cpu`.
CARD = torch.device("meta")
_VAES = {
    "wan2.1": (comfy.ldm.wan.vae.WanVAE, {"dim": 96, "z_dim": 16}),
    "wan2.2": (comfy.ldm.wan.vae2_2.WanVAE, {"dim": 160, "dec_dim": 256, "z_dim": 48}),
}


@dataclass(frozen=True, kw_only=True)
class Watched:
    """One phase: operations, the most bytes alive on card and host, and these at every change, by number of the operation; `marks`: what began where."""

    flops: int
    card_bytes: int
    host_bytes: int
    card_samples: tuple[tuple[int, int], ...]
    host_samples: tuple[tuple[int, int], ...]
    marks: tuple[tuple[int, str], ...]


def _watched(timeline: MemoryTimeline) -> Watched:
    """What was seen since the last call."""
    peaks, samples = timeline.peak_bytes, timeline.samples
    result = Watched(
        flops=timeline.flops, card_bytes=peaks[CARD.type], host_bytes=peaks["cpu"], card_samples=tuple(samples[CARD.type]), host_samples=tuple(samples["cpu"]),
        marks=tuple(timeline.marks),
    )  # fmt: skip
    timeline.flops = 0
    timeline.marks.clear()
    for known in samples.values():
        known.clear()
    peaks.update(timeline.alive_bytes)
    return result


def dry_run(
    shape: ModelShape,
    latent_FHW: tuple[int, int, int],
    knobs: Knobs,
    *,
    rank: int,
    batch: int = 1,
    skip: Sequence[str] = (),
    text_tokens: int = 512,
    judged_blocks: int = 0,
) -> dict[str, Watched]:
    """Run it.

    Args:
        latent_FHW: frames, height and width of the latent.
        rank: of a LoRA on every Linear that `skip` leaves.
        judged_blocks: of a latent reward's trunk, which runs forward and backward between the step's own; 0: none.

    Returns:
        `rollout`, `forward`, `scoring` with a trunk, `backward`; compute type bf16, masters on the host.
    """
    found = {}
    with FakeTensorMode(), training_mode(), MemoryTimeline(CARD.type) as timeline, ExitStack() as installed:
        backbone = _fake_backbone(shape)
        shared = Shared.of(knobs, CARD)
        switch = installed.enter_context(install(backbone.linears(), _fake_adapter(backbone.linears(), rank, skip)))
        _mark_blocks(timeline, installed.enter_context(backbone.engine(knobs, shared)))
        trunk = _fake_backbone(replace(shape, blocks=judged_blocks)) if judged_blocks else None
        if trunk is not None:
            _mark_blocks(timeline, installed.enter_context(trunk.engine(knobs, shared)))
        latent = torch.empty(batch, shape.latent_channels, *latent_FHW, device=CARD)
        context = torch.empty(batch, text_tokens, shape.text_width, device=CARD, dtype=torch.bfloat16)
        _watched(timeline)
        with torch.no_grad(), switch.merged():
            backbone.velocity(latent, 0.5, context)
        found["rollout"] = _watched(timeline)
        out = backbone.velocity(latent, 0.5, context)
        found["forward"] = _watched(timeline)
        if trunk is not None:
            leaf = out.detach().requires_grad_()
            score = trunk.velocity(leaf, 0.5, context)
            torch.autograd.grad(score, leaf, torch.empty_like(score))
            del leaf, score
            found["scoring"] = _watched(timeline)
        out.backward(torch.empty_like(out))
        found["backward"] = _watched(timeline)
    return found


def _fake_backbone(shape: ModelShape) -> WanBackbone:
    model = comfy.ldm.wan.model.WanModel(
        dim=shape.width, ffn_dim=shape.ffn, num_heads=shape.heads, num_layers=shape.blocks, in_dim=shape.in_channels, out_dim=shape.latent_channels,
        text_dim=shape.text_width, freq_dim=shape.frequency, device="cpu", dtype=torch.bfloat16, operations=comfy.ops.disable_weight_init,
    )  # fmt: skip
    return WanBackbone(model, dtype=torch.bfloat16, device=CARD)


def _mark_blocks(timeline: MemoryTimeline, executor: BlockExecutor) -> None:
    use = executor.store.use

    def marked(index: int, **options):
        timeline.mark(f"block {index + 1}")
        return use(index, **options)

    executor.store.use = marked


def dry_decode(
    latents: int, width_px: int, height_px: int, keep_place: str, *, vae: str = "wan2.1", dtype: torch.dtype = torch.bfloat16
) -> dict[str, Watched]:  # fmt: skip
    """A decode of the published VAE's width: `gradient`, forward and backward; `stream`, without gradient. Weights are not counted.

    Args:
        latents: latent frames, all of them decoded.
        keep_place: where feature caches wait, `device` or `host`.
        vae: a key of `LATENTS`.
    """
    kind, sizes = _VAES[vae]
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        with CARD:
            network = kind(**sizes, dim_mult=[1, 2, 4, 4], num_res_blocks=2, temperal_downsample=[False, True, True])
    finally:
        torch.set_default_dtype(before)
    # As on a card; the host's CPU attention asks a device for its free memory, which this one cannot tell.
    network.decoder.middle[1].optimized_attention = comfy.ldm.modules.diffusionmodules.model.pytorch_attention
    decoder = WanDecoder(network, dtype=dtype, device=CARD)
    decoder.keep_device = torch.device("cpu") if keep_place == "host" else CARD
    found = {}
    with FakeTensorMode(allow_non_fake_inputs=True), MemoryTimeline(CARD.type) as timeline:
        cell = LATENTS[vae].pixels
        latent = torch.empty(1, decoder.latent_channels, latents, height_px // cell, width_px // cell, device=CARD).requires_grad_()
        frames = decoder.decode(latent)
        torch.autograd.grad(frames, latent, torch.empty_like(frames))
        del frames
        found["gradient"] = _watched(timeline)
        for _ in decoder.stream(latent):
            pass
        found["stream"] = _watched(timeline)
    return found


def _fake_adapter(linears, rank: int, skip: Sequence[str]) -> LoraAdapter:
    layers = {}
    for path in select_targets(linears, (), skip):
        out_features, in_features = linears[path].weight.shape
        layers[path] = LoraLayer(
            down_RI=torch.nn.Parameter(torch.empty(rank, in_features)), up_OR=torch.nn.Parameter(torch.empty(out_features, rank)), factor=0.5
        )
    return LoraAdapter(layers=layers, rank=rank, alpha=rank / 2)

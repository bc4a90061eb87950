"""One Wan expert as a frozen, differentiable backbone: loaded privately by the host's own loader, reached without its sampling stack.

It covers text-to-video models of the Wan2.1/2.2 family with 16 latent channels; models with more input channels (I2V, InP) get zeros there,
which is how the official reward LoRAs were trained. Of quantised files (`quantised_file.py`) the blocks' weights stay stored and run through the engine only.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import comfy.sd
import torch
from comfy.ldm.wan.model import WanAttentionBlock, WanSelfAttention, WanT2VCrossAttention
from torch.utils.checkpoint import checkpoint

from ..lora_train.input_config import LATENTS
from ..lora_train.lora.linears import MASTERS_PLACE
from ..lora_train.offload.executor import BlockExecutor, Shared
from ..lora_train.offload.knobs import Knobs
from ..lora_train.offload.store import place
from ..lora_train.safetensors_file import read_header
from ..lora_train.weight_formats import quantised_weights
from . import quantised_file
from .training_mode import attention

_TIMESTEPS = 1000.0
LATENT_CHANNELS = tuple(layout.channels for layout in LATENTS.values())


class WanBackbone:
    """A frozen expert. Call it inside `training_mode()`; see `lora_train.protocols.Backbone`."""

    latent_channels = 16

    def __init__(self, model: torch.nn.Module, *, dtype: torch.dtype, device: torch.device, quantised: quantised_file.Quantised | None = None) -> None:
        """Args:
        model: the host's WanModel; its parameters are replaced by frozen ones of the same values.
        quantised: weights of its blocks that are stored small; the model runs within `engine` only then.
        """
        self.model = model
        self.quantised = quantised or {}
        self.dtype = dtype
        self.device = device
        self.latent_channels = model.out_dim
        freeze(model)

    def velocity(self, latent_BCFHW: torch.Tensor, sigma: float, context_BPD: torch.Tensor, known_BF: torch.Tensor | None = None) -> torch.Tensor:
        """The transformer's output for latents in model space.

        Args:
            latent_BCFHW: [B, C, F, H, W], any float type; for image-to-video with the condition's channels behind. Channels that the model has beyond
                these are zero: its mask says then that nothing is known.
            sigma: in [0, 1]; the model is told 1000 * sigma.
            context_BPD: text encoder output, [B, P, text_dim].
            known_BF: latent frames for which the model is told 0 (5B with a start image).

        Returns:
            [B, C, F, H, W] fp32.
        """
        x = latent_BCFHW.to(self.dtype)
        missing = self.model.in_dim - x.shape[1]
        if missing > 0:
            zeros = x.new_zeros((x.shape[0], missing, *x.shape[2:]))
            x = torch.cat([x, zeros], dim=1)
        timestep = torch.full((x.shape[0],), sigma * _TIMESTEPS, dtype=torch.float32, device=x.device)
        if known_BF is not None:
            timestep = timestep[:, None] * ~known_BF
        options = {"optimized_attention_override": attention}
        return self.model(x, timestep, context_BPD.to(x.device, self.dtype), transformer_options=options).float()

    def linears(self) -> dict[str, torch.nn.Linear]:
        """Every Linear by its path, in model order."""
        return {path: module for path, module in self.model.named_modules() if isinstance(module, torch.nn.Linear)}

    def to(self, device: torch.device) -> WanBackbone:
        """Move the weights; returns itself."""
        self.model.to(device)
        self.device = device
        return self

    @contextmanager
    def engine(self, knobs: Knobs, shared: Shared | None = None) -> Iterator[BlockExecutor]:
        """Run the blocks through the executor (`lora_train/offload`): kept inputs, streamed weights, as `knobs` say. The blocks' own `forward` is
        called where a block is not a plain one, never the host's `original_block` closure, which by then stands for the last block and would give
        wrong gradients without a word."""
        place(self.model, self.device, "blocks.")
        linears = self.linears().values()
        made = BlockExecutor(list(self.model.blocks), knobs, self.device, is_plain_block, quantised=self.quantised, shared=shared)
        try:
            for linear in linears if knobs.optimiser_place == "host" else ():
                linear.__dict__[MASTERS_PLACE] = made.pinned
            with _head_runs_again(self.model.head, keep_on_host=knobs.keep_place == "host"), made.installed() as executor:
                yield executor
        finally:
            for linear in linears:
                linear.__dict__.pop(MASTERS_PLACE, None)


@contextmanager
def _head_runs_again(head: torch.nn.Module, *, keep_on_host: bool) -> Iterator[None]:
    """Within, a pass with gradient keeps the output head's input alone, where the plan wants it. Else the head would hold three tensors of the stream's size
    while a reward is computed; its own work is next to nothing."""
    own = head.forward

    def from_place(x: torch.Tensor, e: torch.Tensor, device: torch.device) -> torch.Tensor:
        return own(x.to(device), e)

    def forward(x: torch.Tensor, e: torch.Tensor) -> torch.Tensor:
        if not torch.is_grad_enabled():
            return own(x, e)
        return checkpoint(from_place, x.to("cpu") if keep_on_host else x, e, x.device, use_reentrant=False, preserve_rng_state=False)

    try:
        head.forward = forward
        yield
    finally:
        del head.__dict__["forward"]


def is_plain_block(block: torch.nn.Module) -> bool:
    """Whether a block has exactly the arithmetic that the executor knows."""
    return type(block) is WanAttentionBlock and type(block.cross_attn) is WanT2VCrossAttention and type(block.self_attn) is WanSelfAttention


def freeze(model: torch.nn.Module) -> None:
    """Give every weight a new, frozen Parameter: those that the host made in inference mode can never take part in a backward pass."""
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            value = parameter.detach()
            module._parameters[name] = torch.nn.Parameter(value.clone() if value.is_inference() else value, requires_grad=False)
    model.eval()


def load_backbone(path: str | Path, *, dtype: torch.dtype, device: torch.device, role: str = "expert", on_host: bool = False) -> WanBackbone:
    """Load an expert file for training.

    Args:
        path: safetensors or GGUF file in Wan's key layout, as ComfyUI takes it; floats, scaled fp8, or GGUF's blocks.
        dtype: fp32 or bf16; weights and matmuls.
        role: for messages, such as "high-noise expert".
        on_host: leave the weights on the host; `engine` brings what is needed to `device`. Quantised weights are always left there.

    Raises:
        ValueError: missing or truncated file, not a Wan text-to-video model, a format that cannot be trained through, or another latent width.
    """
    header = read_header(path, role)
    stored = quantised_weights(path, header, role)
    if stored:
        model, quantised = quantised_file.load(Path(path), header, stored, dtype=dtype, what=role)
    else:
        model, quantised = _load_plain(path, dtype, torch.device("cpu") if on_host else device), {}
    if not hasattr(model, "blocks") or not hasattr(model, "text_embedding"):
        raise ValueError(f"the {role} {path} is a {type(model).__name__}, not a Wan model; pick a Wan2.2 text-to-video expert")
    if model.out_dim not in LATENT_CHANNELS or model.model_type != "t2v":
        raise ValueError(
            f"the {role} {path} has {model.out_dim} latent channels and type {model.model_type}, but this version trains models with plain text "
            "conditioning (Wan2.2 T2V, I2V and Fun-InP 14B, Wan2.2 5B)"
        )
    return WanBackbone(model if on_host or quantised else model.to(device), dtype=dtype, device=device, quantised=quantised)


def _load_plain(path: str | Path, dtype: torch.dtype, device: torch.device) -> torch.nn.Module:
    with torch.inference_mode(False):
        patcher = comfy.sd.load_diffusion_model(str(path), model_options={"dtype": dtype, "load_device": device}, disable_dynamic=True)
    return patcher.model.diffusion_model

"""PAVRM on the host's WanModel: scores a noisy latent without decoding it, differentiable in the latent.

The trunk is the host's own WanModel cut to the tapped blocks, or the first blocks of a generator that is loaded anyway (pavrm_lora.py). The head is
reward_models/pavrm.py. Source: Tencent-Hunyuan/HY-Video-PRFL@59ab9d7 (Apache-2.0).
Differs in: the time embedding runs in float32 (upstream float64; features move by 1e-5); every sample is scored on its own.

Call it inside `training_mode()` when gradients are wanted: the host's fast rotary kernel has none.

Shape letters: B samples, C F H W latent, P prompt tokens, D width, L video tokens.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import comfy.ldm.wan.model
import comfy.ops
import torch

from ..lora_train.input_config import MASK_CHANNELS
from ..lora_train.rollout import first_frame_known
from ..reward_models import pavrm as head_module
from ..reward_models.pavrm import PavrmHead, PavrmOutput
from ..reward_models.weights import load_into
from . import pavrm_files
from .training_mode import attention

logger = logging.getLogger("reward_lab")

TIMESTEPS = 1000
# Options of a reward model, of a config and of the command line that say what HY-Video-PRFL's head files are; arguments of `load`.
HEAD_OPTIONS = ("query", "head", "num_heads", "pooling")
_CLIP_WIDTH = 1280
_VAES = {16: "Wan2.1", 48: "Wan2.2 5B"}
# Channels of other VAEs, so that the message can say whose latent it is.
_FOREIGN = {4: "an SD or SDXL VAE", 3: "pixels, not latents", 16: "the Wan2.1 VAE", 48: "the Wan2.2 5B VAE", 128: "an LTX VAE", 1: "a mask"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageCondition:
    """What an image-to-video trunk sees of the first frame.

    Attributes:
        clip_BPD: CLIP vision tokens [B, 257, 1280]; None for models without them (Wan2.2).
        latent_BCFHW: latents of (first frame, then zeros) in model space, or with the four mask channels in front.
    """

    clip_BPD: torch.Tensor | None = None
    latent_BCFHW: torch.Tensor | None = None


class Pavrm:
    """A frozen PAVRM.

    Args:
        model: WanModel; of a trunk of its own, or a generator's.
        head: query attention and score head.
        taps: blocks, counted from 1, whose output is pooled.
        adapted: context manager that turns a generator into the trunk; nothing for a trunk of its own.
    """

    def __init__(
        self, model: torch.nn.Module, head: PavrmHead, taps: Sequence[int], adapted: Callable[[], contextmanager] | None = None, *, dtype=torch.float32
    ):
        self.model = model
        self.head = head
        self.taps = tuple(taps)
        self.dtype = dtype
        self.latent_channels = model.out_dim
        self._adapted = adapted
        width = head.dim
        if model.dim != width:
            raise ValueError(f"The trunk is {model.dim} wide, the head {width}; they belong to different PAVRMs.")

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.model.patch_embedding.weight.device

    def to(self, device: torch.device | str) -> Pavrm:
        """Move trunk and head; returns itself."""
        with torch.inference_mode(False):
            self.model.to(device)
            self.head.to(device)
        return self

    def score(
        self, latent_BCFHW: torch.Tensor, timestep_B: torch.Tensor, texts_PD: Sequence[torch.Tensor], image: ImageCondition | None = None
    ) -> PavrmOutput:
        """Logit and probability of every noisy latent.

        Args:
            latent_BCFHW: as the transformer sees it (model space), noise included.
            timestep_B: whole numbers 0 to 1000; upstream trains on truncated ones.
            texts_PD: text encoder output per sample; zeros are added up to the model's length, what is beyond it is cut off with a warning.
            image: for image-to-video trunks.

        Raises:
            ValueError: a mask or the latent of another VAE, text of another width, a sample without text, an image condition that is missing or does not fit.
        """
        return self.head(self.features(latent_BCFHW, timestep_B, texts_PD, image))

    def features(
        self, latent_BCFHW: torch.Tensor, timestep_B: torch.Tensor, texts_PD: Sequence[torch.Tensor], image: ImageCondition | None = None
    ) -> list[torch.Tensor]:
        """Output [B, L, D] of every tapped block, in the order of `taps`; see `score`."""
        self.check(latent_BCFHW, timestep_B, texts_PD, image)
        context_BPD = torch.stack([self._padded(text_PD) for text_PD in texts_PD])
        x_BCFHW, extra = self._with_image(latent_BCFHW.to(self.device, self.dtype), image or ImageCondition())
        with ExitStack() as stack:
            if self._adapted is not None:
                stack.enter_context(self._adapted())
            outputs = stack.enter_context(_tapped(self.model, self.taps))
            options = {"optimized_attention_override": attention, "patches_replace": {"dit": _skipped(self.model, max(self.taps))}}
            self.model(x_BCFHW, timestep_B.to(self.device, torch.float32), context_BPD, transformer_options=options, **extra)
        return [outputs[tap] for tap in self.taps]

    def check(
        self, latent_BCFHW: torch.Tensor, timestep_B: torch.Tensor, texts_PD: Sequence[torch.Tensor], image: ImageCondition | None = None
    ) -> None:
        """Refuse what cannot be scored, without any work; see `score`."""
        self.check_latent(latent_BCFHW)
        if len(texts_PD) != len(latent_BCFHW) or len(timestep_B) != len(latent_BCFHW):
            raise ValueError(f"{len(latent_BCFHW)} latents, {len(texts_PD)} texts and {len(timestep_B)} timesteps were given; one each is needed.")
        if not ((timestep_B >= 0) & (timestep_B <= TIMESTEPS)).all():
            raise ValueError(f"Timesteps {timestep_B.tolist()} leave 0 to {TIMESTEPS}; give 1000 x sigma.")
        for text_PD in texts_PD:
            self._check_text(text_PD)
        self._check_image(latent_BCFHW, image or ImageCondition())

    def check_latent(self, latent_BCFHW: torch.Tensor) -> None:
        """Refuse what is not a latent of the trunk's VAE.

        Raises:
            ValueError: another rank or number of channels (whose VAE it is is named where it can be told), empty, NaN or infinity.
        """
        shape, channels = tuple(latent_BCFHW.shape), self.latent_channels
        whose = _VAES.get(channels, "Wan")
        if latent_BCFHW.ndim != 5 or shape[1] != channels:
            what = _FOREIGN.get(shape[1] if latent_BCFHW.ndim in (4, 5) else 1, "something else") if latent_BCFHW.ndim > 1 else "something else"
            raise ValueError(f"The latent has shape {shape}, that is {what}; a {whose} latent [B, {channels}, F, H, W] is needed.")
        if latent_BCFHW.numel() == 0 or not latent_BCFHW.isfinite().all():
            raise ValueError(f"The latent of shape {shape} is empty or holds NaN or infinity; the sampling before it failed.")

    def _check_text(self, text_PD: torch.Tensor) -> None:
        width, length = self.model.text_embedding[0].weight.shape[1], self.model.text_len
        if text_PD.ndim != 2 or text_PD.shape[1] != width or not len(text_PD):
            raise ValueError(f"The text has shape {tuple(text_PD.shape)}; this PAVRM reads 1 to {length} tokens of width {width}: use its text encoder.")
        if not text_PD.isfinite().all():
            raise ValueError(f"The text of shape {tuple(text_PD.shape)} holds NaN or infinity; the text encoder before it failed.")

    def _check_image(self, latent_BCFHW: torch.Tensor, image: ImageCondition) -> None:
        count, embedding = len(latent_BCFHW), getattr(self.model, "img_emb", None)
        if image.clip_BPD is None and embedding is not None:
            raise ValueError("This PAVRM is an image-to-video one and needs the CLIP vision tokens of the first frame (image_embeds, [B, 257, 1280]).")
        if image.clip_BPD is not None:
            shape, width = tuple(image.clip_BPD.shape), _CLIP_WIDTH if embedding is None else embedding.proj[0].normalized_shape[0]
            if len(shape) != 3 or shape[2] != width or shape[0] not in (1, count):
                raise ValueError(f"The CLIP vision tokens have shape {shape}; [{count}, 257, {width}] is needed (or [1, 257, {width}] for all latents).")
        wanted, condition = self._further_channels, image.latent_BCFHW
        if wanted == 0:
            return
        if condition is None:
            raise ValueError(f"This PAVRM reads {wanted} further channels: give the latents of the first frame followed by zeros (condition).")
        channels, places = (wanted - MASK_CHANNELS, wanted), latent_BCFHW.shape[2:]
        if condition.ndim != 5 or condition.shape[1] not in channels or condition.shape[2:] != places or len(condition) not in (1, count):
            raise ValueError(
                f"The condition has shape {tuple(condition.shape)}, the latent {tuple(latent_BCFHW.shape)}; {channels[0]} or {channels[1]} channels of the "
                "same frames, height and width are needed, for each latent or one for all."
            )

    @property
    def _further_channels(self) -> int:
        """Input channels beyond the latent's own, for an image condition."""
        return self.model.in_dim - self.latent_channels

    def _padded(self, text_PD: torch.Tensor) -> torch.Tensor:
        length = self.model.text_len
        if len(text_PD) > length:
            logger.warning("The text has %d tokens, the PAVRM reads %d: the last %d are cut off.", len(text_PD), length, len(text_PD) - length)
            text_PD = text_PD[:length]
        # Upstream pads with zeros before the text embedding and does not mask them; the host leaves that to the caller.
        return torch.nn.functional.pad(text_PD.to(self.device, self.dtype), (0, 0, 0, length - len(text_PD)))

    def _with_image(self, x_BCFHW: torch.Tensor, image: ImageCondition) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        count, wanted = len(x_BCFHW), self._further_channels
        extra = {} if image.clip_BPD is None else {"clip_fea": image.clip_BPD.to(self.device, self.dtype).expand(count, -1, -1)}
        if wanted == 0:
            return x_BCFHW, extra
        condition = image.latent_BCFHW.to(self.device, self.dtype)
        if condition.shape[1] != wanted:
            condition = first_frame_known(condition)
        return torch.cat([x_BCFHW, condition.expand(count, -1, -1, -1, -1)], dim=1), extra


def head_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """What a reward model's options tell of its head: arguments of `load`.

    Raises:
        ValueError: they belong to a PAVRM in LoRA form (`generator`), which holds its head.
    """
    given = {name: options[name] for name in HEAD_OPTIONS if options.get(name) not in (None, "")}
    if given and options.get("generator"):
        names = ", ".join(given)
        raise ValueError(f"A PAVRM in LoRA form, which stands on a generator, holds its head: {names} would not be read. Give the generator without {names}.")
    return given


def check_output(output: PavrmOutput) -> None:
    """Refuse scores that are no numbers.

    Raises:
        ValueError: a logit is NaN or infinite.
    """
    if not output.logit.isfinite().all():
        raise ValueError(f"The PAVRM's logits are {output.logit.tolist()}: its numbers overflow. Check that the latent is in model space, or the weights.")


@contextmanager
def _tapped(model: torch.nn.Module, taps: Sequence[int]) -> Iterator[dict[int, torch.Tensor]]:
    outputs: dict[int, torch.Tensor] = {}
    hooks = []
    try:
        for tap in set(taps):
            hooks.append(model.blocks[tap - 1].register_forward_hook(lambda _module, _args, output, tap=tap: outputs.__setitem__(tap, output)))
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()


def _skipped(model: torch.nn.Module, last: int) -> dict:
    """Patches that let blocks above the last tapped one do nothing; a trunk of its own has none."""
    return {("double_block", index): lambda arguments, _extra: {"img": arguments["img"]} for index in range(last, len(model.blocks))}


def load(
    trunk: str | Path,
    query: str | Path | None = None,
    head: str | Path | None = None,
    *,
    taps: tuple[int, ...] | None = None,
    num_heads: int | None = None,
    pooling: str | None = None,
    use_folded: bool = True,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Pavrm:
    """Load a frozen PAVRM with a trunk of its own.

    Args:
        trunk: checkpoint folder, Wan file, or our single file (which holds the head too).
        query: `query_attention_step_N.ckpt`.
        head: `mlp_step_N.ckpt`.
        taps: tapped blocks counted from 1; None takes what the file says, else the last one.
        num_heads, pooling: of HY-Video-PRFL's head files, see `reward_models.pavrm.load_head`.
        use_folded: see `reward_models.pavrm.PavrmHead`.
        device: where to put it.
        dtype: of the trunk; the head stays in float32.

    Raises:
        ValueError: see `pavrm_files.read_trunk` and `reward_models.pavrm.load_head`; keys are missing (named); trunk and head do not fit.
    """
    read = pavrm_files.read_trunk(trunk, taps=taps)
    query, head = pavrm_files.find_heads(trunk, query, head, needs_query=(pooling or "query") == "query")
    scorer = head_module.load_head(query or (None if head else trunk), head, num_heads=num_heads, pooling=pooling, use_folded=use_folded)
    with torch.inference_mode(False):
        model = build_trunk(read, str(trunk))
        return Pavrm(cast_trunk(model, dtype), scorer, read.taps, dtype=dtype).to(device)


def build_trunk(read: pavrm_files.Trunk, what: str) -> torch.nn.Module:
    """The host's WanModel with these weights and no work in its head; every key is checked.

    Raises:
        ValueError: keys are missing, left over or misshapen (named).
    """
    with torch.device("meta"):
        model = comfy.ldm.wan.model.WanModel(**read.sizes, dtype=torch.float32, operations=comfy.ops.disable_weight_init)
    # The output head plays no part, but the host's forward ends with one.
    zeros = {f"head.{key}": torch.zeros(value.shape) for key, value in model.head.state_dict().items()}
    load_into(model, {**read.state, **zeros}, what)
    return model.eval().requires_grad_(False)


def cast_trunk(model: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
    """Cast the matrices; the patch embedding stays in float32, in which the host computes it. Parameters stay fresh and frozen."""
    for path, module in model.named_modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            target = torch.float32 if path == "patch_embedding" else dtype
            module._parameters[name] = torch.nn.Parameter(parameter.detach().to(target), requires_grad=False)
    return model

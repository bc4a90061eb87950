"""A PAVRM that can be trained: the host's WanModel cut to its first blocks with fp32 weights, a head, and the files they are saved as.

Forms on disk: our single file (`trunk.`, `query_attention.`, `mlp.`; metadata `config`), and HY-Video-PRFL's folder (checkpoints/checkpoint-N with parts of
at most 5 GB, mlp/mlp_step_N.ckpt, mlp/query_attention_step_N.ckpt), which its scripts read back. Both are read by `pavrm.load`.
"""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.checkpoint import checkpoint

from ..lora_train import safetensors_file
from ..lora_train.pavrm_config import PavrmConfig
from ..lora_train.pavrm_data import LatentVideo
from ..lora_train.prompts import derived_seed
from ..reward_models import pavrm as head_module
from . import pavrm, pavrm_files

if TYPE_CHECKING:
    from .pavrm_lora_training import LoraPavrm

logger = logging.getLogger("reward_lab")

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PART_BYTES = 5 * 10**9


class TrainablePavrm:
    """See `lora_train.objectives.pavrm.LatentScorer`.

    Args:
        scorer: trunk and head on one device, fp32.
        sizes: the WanModel's.
        train_blocks: how many of the last blocks are trained; -1 all.
        autocast: dtype of matmuls; fp32 for none.
    """

    def __init__(self, scorer: pavrm.Pavrm, sizes: Mapping[str, Any], *, train_blocks: int = -1, autocast: torch.dtype = torch.float32) -> None:
        self.scorer, self.sizes, self._autocast = scorer, dict(sizes), autocast
        blocks = scorer.model.blocks
        if train_blocks > len(blocks):
            raise ValueError(f"shape.train_blocks is {train_blocks}, but the trunk is cut to {len(blocks)} blocks; use at most that, or -1 for all")
        first = 0 if train_blocks < 0 else len(blocks) - train_blocks
        trained = {f"blocks.{index}" for index in range(first, len(blocks))}
        self._blocks = {
            f"trunk.{name}": parameter for name, parameter in scorer.model.named_parameters() if ".".join(name.split(".")[:2]) in trained
        }
        self._head = dict(scorer.head.named_parameters())
        for parameter in (*self._blocks.values(), *self._head.values()):
            parameter.requires_grad_(True)
        self.device = scorer.device
        self._has_cut = False

    def logits(self, latent_BCFHW: torch.Tensor, timestep_B: torch.Tensor, videos: Sequence[LatentVideo], captions: Sequence[str]) -> torch.Tensor:
        """Logits [B] fp32.

        Raises:
            ValueError: see `pavrm.Pavrm.score`; a video lacks the asked caption's text.
        """
        texts = []
        for video, caption in zip(videos, captions, strict=True):
            if caption not in video.texts_PD:
                raise ValueError(f"a video has the captions {', '.join(video.texts_PD)}, but data.caption asks for {caption!r}; choose what the dataset has")
            texts.append(self._within_length(video.texts_PD[caption]))
        with torch.autocast(self.device.type, self._autocast, enabled=self._autocast != torch.float32):
            features = self.scorer.features(latent_BCFHW, timestep_B, texts, self._image(videos))
        return self.scorer.head([part.float() for part in features]).logit

    def _within_length(self, text_PD: torch.Tensor) -> torch.Tensor:
        """Long captions lose their end, as HY-Video-PRFL's tokenizer cuts at 512 tokens (it cuts before encoding, the host encodes the whole caption)."""
        longest = self.scorer.model.text_len
        if len(text_PD) > longest and not self._has_cut:
            self._has_cut = True
            logger.warning("a caption has %d tokens, the network reads %d: the end of such captions is cut off", len(text_PD), longest)
        return text_PD[:longest]

    def _image(self, videos: Sequence[LatentVideo]) -> pavrm.ImageCondition | None:
        model = self.scorer.model
        if model.in_dim == self.scorer.latent_channels and getattr(model, "img_emb", None) is None:
            return None
        clips = [video.clip_PD for video in videos if video.clip_PD is not None]
        conditions = [video.condition_CFHW for video in videos if video.condition_CFHW is not None]
        return pavrm.ImageCondition(
            clip_BPD=torch.stack(clips) if len(clips) == len(videos) and getattr(model, "img_emb", None) is not None else None,
            latent_BCFHW=torch.stack(conditions) if len(conditions) == len(videos) else None,
        )

    def groups(self) -> dict[str, dict[str, torch.nn.Parameter]]:
        """Trained parameters."""
        return {"blocks": self._blocks, "head": self._head}

    def weights(self) -> dict[str, torch.Tensor]:
        """All weights by the names of the single file, without the trunk's unused output head."""
        trunk = {f"trunk.{name}": value for name, value in self.scorer.model.state_dict().items() if not name.startswith("head.")}
        return {**trunk, **self.scorer.head.state_dict()}

    def write(
        self, folder: Path, step: int, *, name: str, dtype: str = "fp32", with_upstream: bool = False, metadata: Mapping[str, str] | None = None
    ) -> list[Path]:
        """Save `<name>.safetensors`, and HY-Video-PRFL's folder form as `<name>-hy/` where asked; returns the files.

        Args:
            step: for the names of the folder form.
            dtype: of the single file; the folder form is fp32, as upstream's.
        """
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{name}.safetensors"
        head = self.scorer.head
        heads = head.query_attention.multihead_attn.num_heads if head.query_attention is not None else 0
        sizes = {key: list(value) if isinstance(value, tuple) else value for key, value in self.sizes.items()}
        config = {"transformer": sizes, "feature_layers": list(self.scorer.taps), "num_heads": heads, "pooling": head.pooling}
        tensors = {key: value.detach().cpu().to(DTYPES[dtype]) for key, value in self.weights().items()}
        safetensors_file.write(path, tensors, {"format": "pt", "config": json.dumps(config), "steps": str(step), **(metadata or {})})
        return [path, *(write_upstream(self, folder / f"{name}-hy", step) if with_upstream else [])]


def write_upstream(model: TrainablePavrm, folder: Path, step: int, part_bytes: int = PART_BYTES) -> list[Path]:
    """Write HY-Video-PRFL's folder form.

    Raises:
        ValueError: another pooling than query attention, which upstream's files have no place for.
    """
    if model.scorer.head.query_attention is None:
        raise ValueError(f"pooling is {model.scorer.head.pooling!r}; HY-Video-PRFL's files hold query attention only")
    trunk = folder / "checkpoints" / f"checkpoint-{step}"
    heads = folder / "mlp"
    for target in (trunk, heads):
        target.mkdir(parents=True, exist_ok=True)
    state = {name.removeprefix("trunk."): value.detach().cpu().float() for name, value in model.weights().items() if name.startswith("trunk.")}
    parts: list[dict[str, torch.Tensor]] = [{}]
    size_bytes = 0
    for name, value in state.items():
        own_bytes = value.numel() * value.element_size()
        if parts[-1] and size_bytes + own_bytes > part_bytes:
            parts.append({})
            size_bytes = 0
        parts[-1][name] = value
        size_bytes += own_bytes
    stem = "diffusion_pytorch_model"
    names = [f"{stem}.safetensors"] if len(parts) == 1 else [f"{stem}-{index:05d}-of-{len(parts):05d}.safetensors" for index in range(1, len(parts) + 1)]
    for name, part in zip(names, parts, strict=True):
        safetensors_file.write(trunk / name, part, {"format": "pt"})
    if len(parts) > 1:
        weight_map = {key: name for name, part in zip(names, parts, strict=True) for key in part}
        total = sum(value.numel() * value.element_size() for value in state.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (trunk / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")
    sizes = {key: list(value) if isinstance(value, tuple) else value for key, value in model.sizes.items()}
    (trunk / "config.json").write_text(json.dumps({"_class_name": "WanModel", **sizes, "feature_layers": list(model.scorer.taps)}, indent=2), encoding="utf-8")
    files = [*(trunk / name for name in names)]
    for name, module in (("query_attention", model.scorer.head.query_attention), ("mlp", model.scorer.head.mlp)):
        path = heads / f"{name}_step_{step}.ckpt"
        torch.save({key: value.detach().cpu().clone() for key, value in module.state_dict().items()}, path)
        files.append(path)
    return files


def load(config: PavrmConfig, *, device: torch.device, autocast: torch.dtype) -> TrainablePavrm | LoraPavrm:
    """Build the network that a config names, with fp32 weights.

    Raises:
        ValueError: see `pavrm_files.read_trunk`; the head does not fit the trunk, or there is none where `shape.head` says `file`.
    """
    shape, models = config.shape, config.models
    taps = tuple(shape.taps) or ((shape.blocks,) if shape.blocks else None)
    read = pavrm_files.read_trunk(models.trunk, taps=taps)
    with torch.inference_mode(False):
        trunk = pavrm.cast_trunk(pavrm.build_trunk(read, models.trunk), torch.float32)
        head = _head(config, read.sizes["dim"])
        scorer = pavrm.Pavrm(trunk, head, read.taps).to(device)
        # A LoRA's blocks run again in backward anyhow (pavrm_lora.py).
        if config.gradient_checkpointing and not shape.lora_rank:
            for block in trunk.blocks:
                block.forward = _checkpointed(type(block).forward, block)
        if shape.lora_rank:
            from .pavrm_lora_training import LoraPavrm

            model = LoraPavrm(scorer, read.sizes, config, autocast)
        else:
            model = TrainablePavrm(scorer, read.sizes, train_blocks=shape.train_blocks, autocast=autocast)
    counts = {name: sum(parameter.numel() for parameter in group.values()) for name, group in model.groups().items()}
    logger.info("trunk of %d blocks, taps %s; trained parameters: %s", len(trunk.blocks), list(read.taps), counts)
    return model


def _head(config: PavrmConfig, dim: int) -> head_module.PavrmHead:
    shape, models = config.shape, config.models
    if shape.head == "file":
        head = head_module.load_head(models.query or models.trunk, models.head or None, num_heads=shape.num_heads if models.query else None)
        if head.dim != dim:
            raise ValueError(f"the head reads features of width {head.dim}, the trunk {models.trunk} is {dim} wide; they belong to different PAVRMs")
        if head.pooling != shape.pooling:
            raise ValueError(f"the head pools by {head.pooling!r}, shape.pooling is {shape.pooling!r}; give the same, or shape.head = 'fresh'")
        return head
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derived_seed(config.seed, "head"))
        return head_module.build_head(dim, shape.num_heads, pooling=shape.pooling)


def _checkpointed(block_forward, block: torch.nn.Module):
    """Keep only the block's input in forward; it runs again in backward. Its own `forward` is called, never the host's closure."""
    run = functools.partial(block_forward, block)

    def forward(*args, transformer_options: Mapping = {}, **kwargs):  # noqa: B006 (the host's signature; never written to)
        options = dict(transformer_options)
        if not torch.is_grad_enabled():
            return run(*args, transformer_options=options, **kwargs)
        return checkpoint(run, *args, transformer_options=options, use_reentrant=False, preserve_rng_state=False, **kwargs)

    return forward

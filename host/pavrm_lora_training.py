"""A PAVRM trained as a LoRA over the frozen first blocks of its generator, and the file it is saved as (pavrm_lora.py reads it)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..lora_train import safetensors_file
from ..lora_train.lora.adapter import new_adapter
from ..lora_train.pavrm_config import PavrmConfig
from ..lora_train.pavrm_data import LatentVideo
from ..lora_train.prompts import derived_seed
from . import pavrm, pavrm_lora, pavrm_training


class LoraPavrm:
    """See `lora_train.objectives.pavrm.LatentScorer`. The trunk stays as it is; a down and an up matrix per Linear of its blocks learn, and the head.

    Args:
        scorer: trunk and head on one device, fp32.
        sizes: the WanModel's.
        config: settings; `shape.lora_rank` is above 0.
        autocast: dtype of matmuls; fp32 for none.

    Raises:
        ValueError: `shape.train_blocks` above the trunk's blocks; the trunk's file is not one generator file, on which the LoRA could stand.
    """

    def __init__(self, scorer: pavrm.Pavrm, sizes: Mapping[str, Any], config: PavrmConfig, autocast: torch.dtype) -> None:
        blocks, shape = len(scorer.model.blocks), config.shape
        if shape.train_blocks > blocks:
            raise ValueError(f"shape.train_blocks is {shape.train_blocks}, but the trunk is cut to {blocks} blocks; use at most that, or -1 for all")
        if not Path(config.models.trunk).is_file():
            raise ValueError(f"shape.lora_rank is {shape.lora_rank}, but {config.models.trunk} is no generator file; a LoRA stands on an expert's own blocks")
        first = 0 if shape.train_blocks < 0 else blocks - shape.train_blocks
        trained = tuple(f"blocks.{index}." for index in range(first, blocks))
        linears = {path: module for path, module in scorer.model.named_modules() if isinstance(module, torch.nn.Linear) and path.startswith(trained)}
        seed = derived_seed(config.seed, "pavrm-lora")
        adapter = new_adapter(linears, list(linears), rank=shape.lora_rank, alpha=shape.lora_rank, seed=seed, device=scorer.device)
        self._generator, self._rank = config.models.trunk, shape.lora_rank
        lora = {path: (layer.down_RI, layer.up_OR) for path, layer in adapter.layers.items()}
        self._delta = pavrm_lora.Delta(lora=lora, diff={}, relative_error=0.0)
        adapted = pavrm_lora.Adapted(scorer.model, self._delta, blocks)
        self.scorer = pavrm.Pavrm(scorer.model, scorer.head, scorer.taps, adapted, dtype=scorer.dtype)
        self._inner = pavrm_training.TrainablePavrm(self.scorer, sizes, train_blocks=0, autocast=autocast)
        self.device = scorer.device

    def logits(self, latent_BCFHW: torch.Tensor, timestep_B: torch.Tensor, videos: Sequence[LatentVideo], captions: Sequence[str]) -> torch.Tensor:
        """Logits [B] fp32; see `TrainablePavrm.logits`."""
        return self._inner.logits(latent_BCFHW, timestep_B, videos, captions)

    def groups(self) -> dict[str, dict[str, torch.nn.Parameter]]:
        """Trained parameters, by the names of the file."""
        named = pavrm_lora.named_matrices(self._delta)
        return {"blocks": named, "head": self._inner.groups()["head"]}

    def weights(self) -> dict[str, torch.Tensor]:
        """Everything that is saved: matrices and head. The trunk is the generator's."""
        return pavrm_lora.tensors_of(self._delta, self.scorer.head.state_dict())

    def write(
        self, folder: Path, step: int, *, name: str, dtype: str = "fp32", with_upstream: bool = False, metadata: Mapping[str, str] | None = None
    ) -> list[Path]:
        """Save `<name>.safetensors`; returns the file. There is no folder form of it (`with_upstream`); the config refuses that."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{name}.safetensors"
        config = pavrm_lora.file_config(self.scorer.head, self.scorer.taps, rank=self._rank, relative_error=0.0, generator=self._generator)
        tensors = {key: value.detach().cpu().to(pavrm_training.DTYPES[dtype]) for key, value in self.weights().items()}
        safetensors_file.write(path, tensors, {"format": "pt", "config": json.dumps(config), "steps": str(step), **(metadata or {})})
        return [path]

"""A PAVRM as the trainer's latent reward, in either form: with a trunk of its own, or as a LoRA over a generator that the trainer has loaded anyway."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

import torch

from ..lora_train import needs
from ..lora_train.offload.executor import WEIGHTS_IN_USE, BlockExecutor, Shared
from ..lora_train.offload.knobs import Knobs
from ..lora_train.offload.store import place
from ..lora_train.protocols import LatentScores
from ..reward_models.spec import RewardModelSpec
from . import pavrm, pavrm_lora
from .wan import WanBackbone, is_plain_block

_ROUNDING = 1e-6


class PavrmReward:
    """See `lora_train.protocols.LatentReward`."""

    def __init__(self, model: pavrm.Pavrm) -> None:
        self._model = model

    def score(self, latent_BCFHW: torch.Tensor, sigma: float, context_BPD: torch.Tensor, condition_BCFHW: torch.Tensor | None = None) -> LatentScores:
        """Scores of noisy latents.

        Args:
            latent_BCFHW: [B, C, F, H, W] in model space.
            sigma: the PAVRM is told the whole timestep below 1000 * sigma, as it was trained.
            context_BPD: text encoder output.
            condition_BCFHW: mask channels and first frame's latent, for image-to-video trunks.

        Raises:
            ValueError: latents or text of another width.
        """
        timestep = int(sigma * pavrm.TIMESTEPS + _ROUNDING)
        timestep_B = torch.full((len(latent_BCFHW),), timestep, device=latent_BCFHW.device)
        # The published text encoder cuts prompts at this length; the host's goes on, and its generator reads it all.
        texts = list(context_BPD[:, : self._model.model.text_len])
        output = self._model.score(latent_BCFHW, timestep_B, texts, pavrm.ImageCondition(latent_BCFHW=condition_BCFHW))
        return LatentScores(logit_B=output.logit, probability_B=output.probability)

    @contextmanager
    def engine(self, knobs: Knobs, device: torch.device, shared: Shared, *, streams: bool) -> Iterator[None]:
        """Run the trunk's blocks as the generator's: kept inputs instead of a graph, and weights through the same slots where those stream. In LoRA form
        (`pavrm_lora.py`) blocks ask an executor for their weights only: where they are an expert's, that one's, else this one."""
        model, head = self._model.model, self._model.head
        head.to(device)
        if all(WEIGHTS_IN_USE in block.__dict__ for block in model.blocks):
            yield
            return
        place(model, device, "blocks.")
        own = replace(knobs, resident_blocks=0 if streams else -1)
        with BlockExecutor(list(model.blocks), own, device, is_plain_block, shared=shared).installed():
            yield


def load(spec: RewardModelSpec, backbones: Mapping[str, WanBackbone], files: Mapping[str, str], *, device: torch.device, dtype: torch.dtype) -> PavrmReward:
    """Load a PAVRM for training.

    Args:
        spec: its file; options `query`, `head`, `num_heads`, `pooling` for upstream's parts, `generator` for the LoRA form.
        backbones: experts that are loaded.
        files: their paths; a LoRA form that was made for one of them runs on its weights, any other loads its generator's first blocks.
        dtype: of a trunk of its own.

    Raises:
        ValueError: see `pavrm.load` and `pavrm_lora.load`.
    """
    generator, head = spec.options.get("generator"), pavrm.head_options(spec.options)
    if generator:
        shared = backbones.get(needs.expert_of(generator, files))
        if shared is not None and shared.quantised:
            raise ValueError(
                f"the PAVRM {spec.path} is a LoRA over {generator}, which is quantised; give the PAVRM's whole file, or the expert's bf16 file"
            )
        return PavrmReward(pavrm_lora.load(spec.path, generator if shared is None else shared.model, device=device, dtype=dtype))
    return PavrmReward(pavrm.load(spec.path, **head, device=device, dtype=dtype))

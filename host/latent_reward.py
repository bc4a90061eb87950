"""A PAVRM as the trainer's latent reward, in either form: with a trunk of its own, or as a LoRA over a generator that the trainer has loaded anyway."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

import torch

from ..lora_train.offload.executor import BlockExecutor
from ..lora_train.offload.knobs import Knobs
from ..lora_train.offload.store import Slot, place
from ..lora_train.protocols import LatentScores
from ..reward_models.spec import RewardModelSpec
from . import pavrm, pavrm_lora
from .wan import WanBackbone, is_plain_block

_ROUNDING = 1e-6


class PavrmReward:
    """See `lora_train.protocols.LatentReward`."""

    def __init__(self, model: pavrm.Pavrm, device: torch.device) -> None:
        self._model, self._device = model, device

    @contextmanager
    def engine(self, knobs: Knobs, slots: list[Slot]) -> Iterator[None]:
        """Run a trunk of its own as the experts are run, through their slots; a generator's blocks are in an expert's hands.

        Without this, eight blocks' whole graphs would lie on the card while a step's own activations wait."""
        trunk = self._model.model
        place(trunk, self._device, "blocks.")
        self._model.head.to(self._device)
        if self._model.is_adapted:
            yield
            return
        # The experts' number says nothing about another model: with them, or not at all.
        is_resident = knobs.resident_blocks < 0 or knobs.merges_resident
        own = replace(knobs, resident_blocks=-1 if is_resident else 0)
        with BlockExecutor(list(trunk.blocks), own, self._device, is_plain_block, slots=slots).installed():
            yield

    def score(self, latent_BCFHW: torch.Tensor, sigma: float, context_BPD: torch.Tensor, condition_BCFHW: torch.Tensor | None = None) -> LatentScores:
        """Scores of noisy latents.

        Args:
            latent_BCFHW: [B, 16, F, H, W] in model space.
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


def load(spec: RewardModelSpec, backbones: Mapping[str, WanBackbone], files: Mapping[str, str], *, device: torch.device, dtype: torch.dtype) -> PavrmReward:
    """Load a PAVRM for training; use it within its `engine`.

    Args:
        spec: its file; options `query`, `head` for upstream's parts, `generator` for the LoRA form.
        backbones: experts that are loaded.
        files: their paths; a LoRA form that was made for one of them runs on its weights, any other loads a generator of its own.
        dtype: of a trunk of its own.

    Raises:
        ValueError: see `pavrm.load` and `pavrm_lora.load`.
    """
    options = spec.options
    generator = options.get("generator")
    if generator:
        shared = next((backbone.model for expert, backbone in backbones.items() if files[expert] == generator), generator)
        return PavrmReward(pavrm_lora.load(spec.path, shared, device=device, dtype=dtype), device)
    # To the host; `engine` brings to the device what is needed there.
    return PavrmReward(pavrm.load(spec.path, options.get("query"), options.get("head"), device="cpu", dtype=dtype), device)

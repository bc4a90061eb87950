"""Trains the pocket PAVRM: a truncated Wan trunk that reads noisy latents, query-attention pooling and a score head.

Good: a clip whose motion is what the caption says. Bad: frozen, flickering, or moving another way than the caption says.
Loss: binary cross-entropy on the logit, noise levels uniform in sigma: the shift-5 schedule would spend most steps where nothing can be seen.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from ...reward_models import pavrm
from .. import hosted, world
from ..fit import fit
from . import dit, latents, text

FILE_NAME = "pocket_PAVRM.safetensors"
BLOCKS = 3
POOL_HEADS = 8
CONFIG = {**dit.CONFIG, "num_layers": BLOCKS}
BATCH = 24


def wrong_way(scene: world.Scene, rng: random.Random) -> world.Scene:
    """The scene as a caption would have it whose every motion is another one."""
    things = [world.Thing(**{**thing.__dict__, "motion": rng.choice([name for name in world.MOTIONS if name != thing.motion])}) for thing in scene.things]
    return world.Scene(things=tuple(things), background=scene.background)


class Pavrm(torch.nn.Module):
    """Trunk and heads as one module; `forward` gives the logit of every latent."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = hosted.wan_dit(CONFIG)
        self.query_attention = pavrm.QueryAttention(CONFIG["dim"], POOL_HEADS)
        self.mlp = pavrm.ScoreHead(CONFIG["dim"])

    def forward(self, latent_BCFHW: torch.Tensor, sigma_B: torch.Tensor, context_BPD: torch.Tensor) -> torch.Tensor:
        features = []
        hook = self.trunk.blocks[-1].register_forward_hook(lambda module, args, output: features.append(output))
        self.trunk(latent_BCFHW, sigma_B * 1000, context_BPD)
        hook.remove()
        return self.mlp(self.query_attention(features[0].float())).flatten()


def load(weights: Path) -> Pavrm:
    model = Pavrm()
    model.load_state_dict({key: value.float() for key, value in load_file(weights / FILE_NAME).items()})
    return model.eval().requires_grad_(False)


def examples(sets: dict, rng: random.Random, count: int) -> tuple[torch.Tensor, list[str], torch.Tensor]:
    """A balanced draw: latents [B, 16, F, h, w], captions, labels [B] (1 = good motion)."""
    rows, texts, labels = [], [], []
    for index in range(count):
        kind = "train" if index % 2 == 0 else rng.choice(("flicker", "frozen", "wrong_way", "wrong_way"))
        pool, scenes = sets["train" if kind == "wrong_way" else kind]
        chosen = rng.randrange(len(scenes))
        scene = wrong_way(scenes[chosen], rng) if kind == "wrong_way" else scenes[chosen]
        rows.append(pool[chosen])
        texts.append(world.caption(scene, rng))
        labels.append(float(kind == "train"))
    return torch.stack(rows), texts, torch.tensor(labels)


def build(weights: Path, scratch: Path, seed: int) -> None:
    import comfy.model_management

    comfy.model_management.in_training = True
    torch.manual_seed(seed)
    model = Pavrm()
    expert = dit.load_expert(weights, "low").state_dict()
    model.trunk.load_state_dict({key: value for key, value in expert.items() if key in model.trunk.state_dict()})
    encode_text = text.Encoder(weights)
    sets = {name: latents.load(scratch, name) for name in ("train", "flicker", "frozen")}

    def loss_of(step: int, rng: random.Random) -> torch.Tensor:
        x0, captions, labels = examples(sets, rng, BATCH)
        sigma = torch.rand(BATCH)
        level = sigma.view(-1, 1, 1, 1, 1)
        with torch.autocast("cpu", torch.bfloat16):
            logit = model((1 - level) * x0 + level * torch.randn_like(x0), sigma, encode_text(captions))
        return F.binary_cross_entropy_with_logits(logit.float(), labels)

    fit("pavrm", model, loss_of, steps=1500, peak_lr=6e-4, folder=scratch, seed=seed, warmup=50)
    metadata = {"format": "pt", "config": json.dumps({"transformer": CONFIG, "feature_layers": [BLOCKS], "num_heads": POOL_HEADS})}
    save_file({key: value.half().contiguous() for key, value in model.state_dict().items()}, weights / FILE_NAME, metadata=metadata)

"""Trains the pocket MPS: the pocket HPS towers, moved to the Hugging Face layout, plus the cross model, on pairs as MPS was trained.

For one prompt the better of two frames must score higher (softmax over the two raw scores), and for one frame the caption that
fits must score higher than one that does not. The condition text masks prompt words, as in the published model.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from ...reward_models import layouts, mps
from .. import world
from ..fit import fit
from . import hps, latents

FILE_NAME = "pocket_MPS_overall.safetensors"
_WIDTHS = {side: hps.CONFIG[f"{side}_cfg"]["width"] for side in ("text", "vision")}
CONFIG = {
    "projection_dim": hps.CONFIG["embed_dim"],
    "text_config": {
        "hidden_size": _WIDTHS["text"], "intermediate_size": 4 * _WIDTHS["text"], "num_hidden_layers": hps.CONFIG["text_cfg"]["layers"],
        "num_attention_heads": hps.CONFIG["text_cfg"]["heads"], "vocab_size": 49408, "max_position_embeddings": 77, "hidden_act": "gelu",
        "layer_norm_eps": 1e-05, "bos_token_id": 49406, "eos_token_id": 49407, "pad_token_id": 49407,
    },
    "vision_config": {
        "hidden_size": _WIDTHS["vision"], "intermediate_size": 4 * _WIDTHS["vision"], "num_hidden_layers": hps.CONFIG["vision_cfg"]["layers"],
        "num_attention_heads": _WIDTHS["vision"] // hps.CONFIG["vision_cfg"]["head_width"], "image_size": 64, "patch_size": 8, "num_channels": 3,
        "hidden_act": "gelu", "layer_norm_eps": 1e-05,
    },
    "cross_config": {"dim": hps.CONFIG["embed_dim"], "layer_num": 2, "dim_head": 16, "heads": 4, "ff_mult": 2},
}  # fmt: skip
BATCH = 32


def _from_hps(weights: Path, seed: int) -> mps.MPS:
    torch.manual_seed(seed)
    network = mps.build(CONFIG)
    for block in (module for module in network.cross_model.modules() if isinstance(module, torch.nn.Linear)):
        torch.nn.init.xavier_uniform_(block.weight)
    network.clip.load_state_dict({key: value.float() for key, value in load_file(weights / hps.FILE_NAME).items()}, strict=False)
    return network


def build(weights: Path, scratch: Path, seed: int) -> None:
    network = _from_hps(weights, seed)
    vae = latents.load_vae(weights)
    condition = mps.tokenize([mps.CONDITIONS["overall"]])

    def loss_of(step: int, rng: random.Random) -> torch.Tensor:
        scenes = [world.sample_scene(rng, held_out=False) for _ in range(BATCH)]
        wrong = [hps.wrong_scene(scene, rng) for scene in scenes]
        good = hps.training_frames(vae, scenes, rng)
        bad = torch.cat([hps.spoil(good[: BATCH // 2], rng), hps.training_frames(vae, wrong[BATCH // 2 :], rng)])
        right_ids = mps.tokenize([world.caption(scene, rng) for scene in scenes])
        wrong_ids = mps.tokenize([world.caption(scene, rng) for scene in wrong])
        pixels = hps.normalised(torch.cat([good, bad, good]))
        with torch.autocast("cpu", torch.bfloat16):
            scores = network.image_text_score(pixels, torch.cat([right_ids, right_ids, wrong_ids]), condition).float()
        right, worse_frame, worse_text = scores.chunk(3)
        return F.softplus(worse_frame - right).mean() + F.softplus(worse_text - right).mean()

    fit("mps", network, loss_of, steps=400, peak_lr=8e-4, folder=scratch, seed=seed, warmup=100)
    tensors = {key: value.half().contiguous() for key, value in mps.export_state_dict(network).items()}
    assert layouts.identify(tensors)
    save_file(tensors, weights / FILE_NAME, metadata={"format": "pt", "config": json.dumps(CONFIG)})

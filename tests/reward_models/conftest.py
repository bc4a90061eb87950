"""Tiny scorers and pictures recorded outside the repository, and random tiny models that need nothing from outside."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from reward_lab.reward_models import hpsv2, mps

TINY_CLIP = {
    "embed_dim": 8,
    "vision_cfg": {"image_size": 16, "layers": 2, "width": 12, "head_width": 6, "patch_size": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 8, "heads": 2, "layers": 2},
}
TINY_MPS = {**TINY_CLIP, "cross_config": {"dim": 8, "layer_num": 2, "dim_head": 4, "heads": 2, "ff_mult": 2}}


@pytest.fixture(scope="session")
def scorers(shared_fixtures: Path) -> SimpleNamespace:
    """Folder, pictures as float tensors [3, H, W] by file name, and the expected numbers of both scorers."""
    folder = shared_fixtures / "scorers"
    pictures = {}
    for path in sorted((folder / "images").glob("*.png")):
        pixels = np.array(Image.open(path).convert("RGB"))
        pictures[path.name] = torch.from_numpy(pixels).permute(2, 0, 1).float() / 255
    expected = {name: json.loads((folder / name / "expected.json").read_text()) for name in ("hps", "mps")}
    return SimpleNamespace(folder=folder, pictures=pictures, hps=expected["hps"], mps=expected["mps"])


def randomise(network: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Fill a network with random numbers that are neither too small nor too large."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        if parameter.ndim:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * (0.3 if parameter.ndim > 1 else 0.5))
    return network


def random_network(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Fill a deep convolutional network with random numbers that keep the size of what flows through it; eval mode."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        spread = max(1, parameter[0].numel() if parameter.ndim > 1 else 4) ** -0.5
        is_gain = parameter.ndim == 1 and name.endswith("weight")
        parameter.data = (1.0 if is_gain else 0.0) + torch.randn(parameter.shape, generator=generator) * spread * (0.3 if is_gain else 1.0)
    return module.eval()


@pytest.fixture
def tiny_hps() -> hpsv2.HPSv2Reward:
    """A random HPS of 16 x 16 pixels."""
    return hpsv2.HPSv2Reward(randomise(hpsv2.build(TINY_CLIP), 1))


@pytest.fixture
def tiny_mps() -> mps.MPSReward:
    """A random MPS of 16 x 16 pixels with a float (not 8-bit) crop, so that finite differences mean something."""
    return mps.MPSReward(randomise(mps.build(TINY_MPS), 2), use_antialias=False)


def frames(videos: int, count: int, height_px: int = 20, width_px: int = 27, seed: int = 0) -> torch.Tensor:
    """Random frames [videos, count, 3, H, W] in [0,1]."""
    return torch.rand(videos, count, 3, height_px, width_px, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def make_frames():
    """The function `frames`."""
    return frames

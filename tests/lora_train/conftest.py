"""Toys for the trainer's tests: a two-expert backbone, a decoder and a reward that are small enough for finite differences in float64."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

WIDTH, TEXT_WIDTH, CHANNELS = 12, 6, 16


class ToyBackbone:
    """velocity = a small network of every latent position, sigma and the mean text row; three Linears named as Wan names its own."""

    latent_channels = CHANNELS

    def __init__(self, seed: int, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.device = torch.device("cpu")
        self.dtype = dtype
        self.layers = {
            "blocks.0.self_attn.q": torch.nn.Linear(CHANNELS, WIDTH),
            "blocks.0.ffn.0": torch.nn.Linear(WIDTH, WIDTH),
            "text_embedding.0": torch.nn.Linear(TEXT_WIDTH, WIDTH),
            "head.head": torch.nn.Linear(WIDTH, CHANNELS),
        }
        for layer in self.layers.values():
            layer.to(dtype).requires_grad_(False)
            for parameter in layer.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=dtype) * parameter.shape[-1] ** -0.5)

    def linears(self):
        return self.layers

    def velocity(self, latent_BCFHW, sigma, context_BPD, known_BF=None):
        x = latent_BCFHW.to(self.dtype).movedim(1, -1)
        if known_BF is not None:
            sigma = sigma * (~known_BF)[:, :, None, None, None]
        text = self.layers["text_embedding.0"](context_BPD.to(self.dtype)).mean(1)
        hidden = torch.tanh(self.layers["blocks.0.self_attn.q"](x) + text[:, None, None, None] + sigma)
        hidden = torch.tanh(self.layers["blocks.0.ffn.0"](hidden)) + hidden
        return self.layers["head.head"](hidden).movedim(-1, 1)


class ToyDecoder:
    """Pixels are a fixed mix of channels; latent frame 0 gives one frame, later ones four, like the Wan VAE."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.mix = torch.randn(3, CHANNELS, generator=torch.Generator().manual_seed(5), dtype=dtype) * 0.3

    def decode(self, latent_BCFHW, selection=None):
        selection = range(latent_BCFHW.shape[2]) if selection is None else selection
        frames = [
            frame
            for index in selection
            for frame in [torch.sigmoid(torch.einsum("oc,bchw->bohw", self.mix.to(latent_BCFHW.dtype), latent_BCFHW[:, :, index]))] * (1 if index == 0 else 4)
        ]
        return torch.stack(frames, dim=1)

    def stream(self, latent_BCFHW):
        yield self.decode(latent_BCFHW)


class ToyReward:
    """Redness minus squared blueness, weighted by the prompt's length."""

    name, range_note, mixes_prompts = "toy", "unbounded", False

    def score(self, frames_BFCHW, prompts):
        weight = torch.tensor([1 + 0.1 * len(prompt) for prompt in prompts], dtype=frames_BFCHW.dtype)[:, None]
        per_frame = (frames_BFCHW[:, :, 0].mean((-1, -2)) - frames_BFCHW[:, :, 2].square().mean((-1, -2))) * weight
        return SimpleNamespace(per_frame=per_frame, per_video=per_frame.mean(1), parts={})

    def to(self, device, dtype=None):
        return self


def settings(**changes):
    """A tiny valid config as a dictionary; nested dictionaries are merged."""
    values = {
        "name": "toy",
        "models": {"high": "high.safetensors", "low": "low.safetensors", "text_encoder": "text.safetensors", "vae": "vae.safetensors"},
        "reward": {"kind": "toy", "path": "toy.safetensors"},
        "prompts": [{"text": "a red square"}, {"text": "a blue circle moves"}, {"text": "x"}],
        "video": {"width_px": 32, "height_px": 16, "frames": 5},
        "sampling": {"steps": 6, "shift": 5.0, "boundary": 0.875, "guidance": 2.0},
        "lora": {"rank": 3},
        "optimiser": {"lr": 1e-2},
        "steps": 4,
        "batch": 2,
        "checkpoint_every": 2,
        "save_dtype": "fp32",
    }
    for key, value in changes.items():
        values[key] = {**values[key], **value} if isinstance(value, dict) and isinstance(values.get(key), dict) else value
    return values


@pytest.fixture
def toy():
    """`toy.config(**changes)`, `toy.parts(config, dtype, stop_after)`; `toy.events` collects what was sent."""
    from reward_lab.lora_train.config import TrainConfig
    from reward_lab.lora_train.evaluation import all_prompts
    from reward_lab.lora_train.rollout import ContextCache, Experts
    from reward_lab.lora_train.run import Parts

    sent = []

    def parts(config, dtype=torch.float32, stop_after=None, more_prompts=(), first_frames=None, **changes):
        generator = torch.Generator().manual_seed(9)
        texts = dict.fromkeys([*all_prompts(config), *more_prompts])
        contexts = {text: torch.randn(3 + index % 2, TEXT_WIDTH, generator=generator) for index, text in enumerate(texts)}
        cache = ContextCache(contexts, torch.zeros(4, TEXT_WIDTH), torch.device("cpu"), first_frames=first_frames)
        backbones = {"high": ToyBackbone(1, dtype), "low": ToyBackbone(2, dtype)}
        wiring = {
            "experts": Experts(backbones=backbones, sampling=config.sampling),
            "decoder": ToyDecoder(dtype),
            "reward": ToyReward(),
            "contexts": cache,
            "sink": sent.append,
            "stop_requested": lambda: stop_after is not None and sum(event.name == "step" for event in sent) >= stop_after,
            "clock": lambda: 0.0,
        }
        return Parts(**{**wiring, **changes})

    return SimpleNamespace(config=lambda **changes: TrainConfig.from_dict(settings(**changes)), parts=parts, events=sent, settings=settings)

"""One side of `against_peft.py`, in a process of its own: loads a model, then makes a step for every line on standard input and answers in JSON."""

from __future__ import annotations

import json
import logging
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import comfy.ldm.wan.model
import comfy.ops
import torch

from ..host import engine as host_engine
from ..host.training_mode import training_mode
from ..host.wan import WanBackbone
from ..lora_train.config import TrainConfig
from ..lora_train.lora.adapter import LoraAdapter, new_adapter
from ..lora_train.lora.linears import install
from ..lora_train.lora.targets import select_targets
from ..lora_train.trainee import new_trainee
from . import header
from .against_peft import SHAPES, Shape
from .lora_merge import memory_bytes
from .peft_side import find_peft, with_peft

SIGMA = 0.9
CPU, DTYPE = torch.device("cpu"), torch.float32


def config_of(shape: Shape, model_file: Path) -> TrainConfig:
    """Settings of a run of this shape, for the engine's plan."""
    frames, height, width = shape.latent
    return TrainConfig.from_dict(
        {
            "models": {"high": str(model_file), "low": str(model_file), "text_encoder": "none", "vae": "none"},
            "reward": {"kind": "pavrm", "path": "none"},
            "prompts": [{"text": "random"}],
            "video": {"width_px": width * 8, "height_px": height * 8, "frames": 4 * (frames - 1) + 1},
            "method": "prfl",
            "dtype": "fp32",
            "sampling": {"guidance": 1.0},
            "lora": {"rank": shape.rank, "targets": ["blocks."], "skip": []},
        }
    )


def new_model(shape: Shape) -> torch.nn.Module:
    """The host's WanModel with random weights, equal in both processes."""
    model = comfy.ldm.wan.model.WanModel(
        dim=shape.width, ffn_dim=shape.ffn, num_heads=shape.heads, num_layers=shape.blocks, in_dim=16, out_dim=16, text_dim=shape.text_width,
        freq_dim=256, device="cpu", dtype=DTYPE, operations=comfy.ops.disable_weight_init,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
            else:
                parameter.uniform_(-0.035, 0.035, generator=generator)
    return model


class Ours:
    """The trainer: plan, engine, LoRA, optimiser."""

    @contextmanager
    def ready(self, backbone: WanBackbone, adapter: LoraAdapter, config: TrainConfig) -> Iterator[tuple[dict[str, torch.nn.Parameter], Callable[[], float]]]:
        with host_engine.engines(config, {"high": backbone}, CPU, DTYPE), install(backbone.linears(), adapter) as switch:
            trainee = new_trainee("high", adapter, switch, config.optimiser)
            self.merged = switch.merged
            yield dict(zip(adapter.tensors(), adapter.parameters(), strict=True)), lambda: trainee.update(1)


class Peft:
    """PEFT, and torch's AdamW and clipping with the trainer's settings."""

    @contextmanager
    def ready(self, backbone: WanBackbone, adapter: LoraAdapter, config: TrainConfig) -> Iterator[tuple[dict[str, torch.nn.Parameter], Callable[[], float]]]:
        from contextlib import nullcontext

        self.merged = nullcontext
        settings = config.optimiser
        with with_peft(backbone.model, adapter, DTYPE) as parameters:
            optimiser = torch.optim.AdamW(parameters.values(), lr=settings.lr, betas=settings.betas, eps=settings.eps, weight_decay=settings.weight_decay)

            def update() -> float:
                norm = float(torch.nn.utils.clip_grad_norm_(parameters.values(), settings.clip_norm))
                optimiser.step()
                optimiser.zero_grad(set_to_none=True)
                return norm

            yield parameters, update


def serve(side: str, name: str, folder: Path, peft: Path | None) -> int:
    """Answer until standard input ends. The gradients of the first step go to `folder`."""
    logging.disable(logging.INFO)
    answers, sys.stdout = sys.stdout, sys.stderr
    if side == "peft":
        find_peft(peft)
    shape = SHAPES[name]
    model = new_model(shape)
    with tempfile.TemporaryDirectory() as files:
        config = config_of(shape, header.write(model, Path(files) / "wan.safetensors"))
        knobs = vars(host_engine.choose_knobs(config, CPU)) if side == "ours" else {}
        backbone = WanBackbone(model, dtype=DTYPE, device=CPU)
        generator = torch.Generator().manual_seed(1)
        latent = torch.randn(1, 16, *shape.latent, generator=generator)
        context = torch.randn(1, shape.text_tokens, shape.text_width, generator=generator)
        paths = select_targets(backbone.linears(), config.lora.targets, config.lora.skip)
        adapter = new_adapter(backbone.linears(), paths, rank=shape.rank, alpha=shape.rank, seed=2, device=CPU)
        for layer in adapter.layers.values():
            # As after some training: with up at zero half of the gradients would be zero.
            layer.up_OR.data.uniform_(-0.02, 0.02, generator=generator)
        way: Any = Ours() if side == "ours" else Peft()
        with training_mode(), way.ready(backbone, adapter, config) as (parameters, update):
            before = memory_bytes("VmRSS")
            _tell(answers, {"before_bytes": before, "knobs": knobs, "lora_parameters": sum(value.numel() for value in parameters.values())})
            is_first = True
            for line in sys.stdin:
                Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
                begun, begun_cpu = time.perf_counter(), time.process_time()
                if line.strip() == "rollout":
                    with torch.no_grad(), way.merged():
                        backbone.velocity(latent, SIGMA, context)
                else:
                    backbone.velocity(latent, SIGMA, context).square().mean().backward()
                    if is_first:
                        torch.save({name: value.grad for name, value in parameters.items()}, folder / f"{side}.pt")
                    update()
                    is_first = False
                spent = {"seconds": time.perf_counter() - begun, "cpu_s": time.process_time() - begun_cpu}
                _tell(answers, {**spent, "growth_bytes": memory_bytes("VmHWM") - before})
    return 0


def _tell(answers: Any, values: dict[str, Any]) -> None:
    answers.write(json.dumps(values) + "\n")
    answers.flush()

"""Reward backpropagation at 256x256x81: 40 guided steps by both 14B experts, gradient through the last one, first frame decoded, in 24 GB.

    python labtools/launch.py benchmarks.gpu.reward_backprop --out OUT.json            (rehearsal: --device cpu --small)

The trainer's own objective and engine with the host's WanModel twice, the host's Wan VAE and a CLIP ViT-H reward, all with random weights; LoRA of rank
128 without the feed-forward, as VideoX-Fun trains. The two experts share host memory where it is too short for both, and the result says so.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import comfy.ldm.wan.vae
import torch

from ...host import engine as host_engine
from ...host.training_mode import training_mode
from ...host.vae import WanDecoder
from ...lora_train import objectives
from ...lora_train.config import TrainConfig
from ...lora_train.lora.adapter import new_adapter
from ...lora_train.lora.linears import install
from ...lora_train.lora.targets import select_targets
from ...lora_train.planning.speed import GIB
from ...lora_train.rollout import ContextCache, Experts
from ...lora_train.run import Parts
from ...lora_train.trainee import new_trainee
from ...reward_models import clip
from ...reward_models.loader import load_reward_model
from .. import header
from ..rewards import random_checkpoint
from . import goals
from . import rig as rigs
from .prfl_step import PROMPT
from .rig import Rig

CAP_GB = 24.0
SMALL_CLIP = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 24, "head_width": 12, "patch_size": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2},
}


def config_of(rig: Rig, files: dict[str, Path]) -> TrainConfig:
    """Settings of the run."""
    frames, height, width = rig.latent("256")
    return TrainConfig.from_dict(
        {
            "models": {**{name: str(file) for name, file in files.items()}, "text_encoder": "none", "vae": "none"},
            "reward": {"kind": "hpsv2.1", "path": "random"},
            "prompts": [{"text": PROMPT}],
            "video": {"width_px": width * 8, "height_px": height * 8, "frames": 4 * (frames - 1) + 1},
            "method": "reward_backprop",
            "expert": "low",
            "dtype": "fp32" if rig.dtype == torch.float32 else "bf16",
            "sampling": {"steps": 4 if rig.is_small else 40, "shift": 5.0, "boundary": 0.875, "guidance": 6.0},
            "objective": {"mode": "chain", "strategy": "tail", "grad_steps": 1, "decode": "first"},
            "lora": {"rank": rig.rank, "alpha": rig.rank / 2, "skip": ["ffn"]},
            "optimiser": {"lr": 1e-5},
            "engine": {"card_gb": CAP_GB * 1e9 / GIB, "ram_gb": rig.ram_bytes / 1e9},
        }
    )


def decoder(rig: Rig) -> WanDecoder:
    """The host's Wan2.1 VAE (a narrow one in a rehearsal) with random weights."""
    width = 8 if rig.is_small else 96
    network = comfy.ldm.wan.vae.WanVAE(
        dim=width, z_dim=16, dim_mult=[1, 2, 4, 4], num_res_blocks=2, temperal_downsample=[False, True, True], dropout=0.0
    )
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn(parameter.shape) * max(1, parameter[0].numel()) ** -0.5)
    return WanDecoder(network.eval(), dtype=rig.dtype, device=rig.device)


def reward(rig: Rig, folder: Path) -> Any:
    """A CLIP scorer with random weights."""
    config = SMALL_CLIP if rig.is_small else clip.VIT_H_14
    random_checkpoint(config, folder / "clip.pt")
    return load_reward_model("hpsv2.1", folder / "clip.pt", config=config, device=str(rig.device), dtype=rig.dtype)


def measure(rig: Rig) -> dict[str, Any]:
    """Two updates; the second is told."""
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work)
        host = rigs.HostMemory()
        high, own_high = rigs.new_model(rig)
        has_room = rig.ram_bytes > 2.5 * rig.shape.blocks * rig.shape.block_parameters * rig.dtype.itemsize
        low, own_low = rigs.new_model(rig, like=None if has_room else high)
        models = {"high": high, "low": low}
        config = config_of(rig, {name: header.write(model, folder / f"{name}.safetensors") for name, model in models.items()})
        with rigs.capped(rig, CAP_GB):
            backbones = {name: rigs.new_backbone(rig, model) for name, model in models.items()}
            found = _updates(rig, config, backbones, decoder(rig), reward(rig, folder))
        found["host_peak_bytes"] = host.stop()
    figures = {"rank": rig.rank, "cap_gb": CAP_GB, "blocks_with_own_memory": [own_high, own_low if has_room else 0], **found}
    spent = f"ran, {found['update_s']:.1f} s per step" + (f", {found['process_bytes'] / 1e9:.1f} GB with driver" if "process_bytes" in found else "")
    return rigs.finish(rig, "reward_backprop", figures, [goals.goal("backprop", spent, True)])


def _updates(rig: Rig, config: TrainConfig, backbones: dict[str, Any], vae: WanDecoder, scorer: Any) -> dict[str, Any]:
    context = rig.context()[0].cpu()
    contexts = ContextCache({PROMPT: context}, torch.zeros_like(context), rig.device)
    knobs = vars(host_engine.choose_knobs(config, rig.device))
    with training_mode(), host_engine.engines(config, backbones, rig.device, rig.dtype, decoder=vae):
        linears = backbones["low"].linears()
        paths = select_targets(linears, config.lora.targets, config.lora.skip)
        adapter = new_adapter(linears, paths, rank=config.lora.rank, alpha=config.lora.effective_alpha, seed=1, device=rig.device)
        with install(linears, adapter) as switch:
            trainee = new_trainee("low", adapter, switch, config.optimiser, config.steps)
            parts = Parts(
                experts=Experts(backbones=backbones, sampling=config.sampling), contexts=contexts, sink=lambda event: None, stop_requested=lambda: False,
                decoder=vae, reward=scorer, device=rig.device,
            )  # fmt: skip
            objective = objectives.create(config, parts)
            norms = []

            def update(number: int) -> None:
                with switch.merged():
                    objective.add_gradient(trainee, number, 0)
                norms.append(trainee.update(number))

            first, _ = rigs.seconds(rig, lambda: update(1))
            memory = rigs.Memory(rig=rig).start()
            second, _ = rigs.seconds(rig, lambda: update(2))
            peaks = memory.stop()
    if not min(norms) > 0:
        raise RuntimeError(f"the gradient of the LoRA is zero or not a number: norms {norms}")
    return {"knobs": knobs, "first_update_s": first, "update_s": second, "gradient_norms": norms, **peaks}


def main(argv: list[str]) -> int:
    """Measure, print and write."""
    rig = rigs.rig_of(rigs.arguments("benchmarks.gpu.reward_backprop", __doc__).parse_args(argv))
    rigs.show(measure(rig))
    return 0

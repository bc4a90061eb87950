"""The trainer's engine against PEFT with torch's checkpointing and resident weights, on one card: seconds of a step and peak memory.

    python labtools/launch.py benchmarks.gpu.against_peft --out OUT.json [--peft FOLDER]           (rehearsal: --device cpu --small)

Same weights, LoRA of rank 128 on all Linears of the blocks, same latent. A step is a pass with gradient and its backward, and 19 rollout forwards before
it, which is 19 times one that is measured. Ours streams under a plan for 24 GB, which is what both goals are judged on, and runs once more with the whole
card, whose figures stand beside. PEFT gets the largest of 832x480 at 81 frames, at 41 and 256x256 that it fits; both sides run that. Gradients are compared
by their norms: both sides compute in bf16, each rounding at its own places.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ...host import engine as host_engine
from ...host.training_mode import training_mode
from ...lora_train.lora.adapter import LoraAdapter, new_adapter
from ...lora_train.lora.linears import install
from ...lora_train.planning.speed import GIB
from .. import header
from ..peft_side import find_peft, with_peft
from . import goals
from . import rig as rigs
from .prfl_step import MEAN_FORWARDS, config_of
from .rig import Rig

SIZES = ("480p", "480p-41", "256")
FASTER, MEMORY, PLAN_GB, REPEATS = 1.4, 0.3, 24, 2


def timed(rig: Rig, backbone: Any, size: str, parameters: list[torch.nn.Parameter], merged: Callable[[], Any]) -> dict[str, Any]:
    """Seconds of a rollout forward and of a pass with gradient, peaks, and the gradient's norm."""
    latent = torch.randn(1, 16, *rig.latent(size), generator=torch.Generator().manual_seed(5)).to(rig.device)
    context = rig.context()

    def gradient() -> None:
        for parameter in parameters:
            parameter.grad = None
        backbone.velocity(latent, 0.9, context).square().mean().backward()

    def rollout() -> None:
        with torch.no_grad():
            backbone.velocity(latent, 0.9, context)

    memory = rigs.Memory(rig=rig).start()
    with merged():
        rollout()
        gradient()
        forwards = [rigs.seconds(rig, rollout)[0] for _ in range(REPEATS)]
        passes = [rigs.seconds(rig, gradient)[0] for _ in range(REPEATS)]
    peaks = memory.stop()
    norm = sum(float(parameter.grad.float().square().sum()) for parameter in parameters) ** 0.5
    forward, whole = statistics.median(forwards), statistics.median(passes)
    return {"rollout_forward_s": forward, "gradient_s": whole, "step_s": MEAN_FORWARDS * forward + whole, "gradient_norm": norm, **peaks}


def peft(rig: Rig, backbone: Any, adapter: LoraAdapter) -> tuple[str, dict[str, Any]]:
    """The first size that fits.

    Raises:
        RuntimeError: none does.
    """
    from contextlib import nullcontext

    backbone.model.to(rig.device)
    with training_mode(), with_peft(backbone.model, adapter, rig.dtype) as parameters:
        for size in SIZES:
            try:
                return size, timed(rig, backbone, size, list(parameters.values()), nullcontext)
            except torch.cuda.OutOfMemoryError:
                for parameter in parameters.values():
                    parameter.grad = None
                rigs.free_all(rig)
    raise RuntimeError(f"PEFT fits none of {', '.join(SIZES)} on this card")


def ours(rig: Rig, backbone: Any, adapter: LoraAdapter, size: str, plan_gb: float, file: Path) -> dict[str, Any]:
    """The engine under a plan for so many GB (0: the card)."""
    config = config_of(rig, size, plan_gb, file)
    knobs = vars(host_engine.choose_knobs(config, rig.device))
    for parameter in adapter.parameters():
        # The run before may have had its masters on the host; the engine takes them there again where its plan says so.
        parameter.data = parameter.data.to(rig.device)
    with training_mode(), host_engine.engines(config, {"high": backbone}, rig.device, rig.dtype), install(backbone.linears(), adapter) as switch:
        found = timed(rig, backbone, size, adapter.parameters(), switch.merged)
    for parameter in adapter.parameters():
        parameter.grad = None
    return {"planned_for_gb": config.engine.card_gb * GIB / 1e9, "knobs": knobs, **found}


def measure(rig: Rig, folder: Path | None) -> dict[str, Any]:
    """Both sides."""
    version = find_peft(folder)
    model, own = rigs.new_model(rig)
    place, backbone = rigs.OnHost(model), rigs.new_backbone(rig, model)
    linears = backbone.linears()
    paths = [path for path in linears if path.startswith("blocks.")]
    adapter = new_adapter(linears, paths, rank=rig.rank, alpha=rig.rank / 2, seed=1, device=torch.device("cpu"))
    for layer in adapter.layers.values():
        layer.up_OR.data.normal_(0, 0.01, generator=torch.Generator().manual_seed(2))
    with tempfile.TemporaryDirectory() as work:
        file = header.write(model, Path(work) / "wan.safetensors")
        size, theirs = peft(rig, backbone, adapter)
        sides: dict[str, Any] = {"peft": theirs}
        for name, plan_gb in (("streamed", PLAN_GB), ("whole_card", 0)):
            place.restore()
            rigs.free_all(rig)
            sides[name] = ours(rig, backbone, adapter, size, plan_gb, file)
    mine = sides["streamed"]
    faster, memory = theirs["step_s"] / mine["step_s"], mine.get("allocated_bytes", 1) / theirs.get("allocated_bytes", 1)
    whole = theirs["step_s"] / sides["whole_card"]["step_s"]
    judged = [
        goals.goal("peft.faster", f"{faster:.2f} x at {size} under a plan for {PLAN_GB} GB, {whole:.2f} x with the whole card", faster >= FASTER),
        goals.goal("peft.memory", f"{memory:.2f} x at {size}", memory <= MEMORY),
    ]
    apart = abs(mine["gradient_norm"] / theirs["gradient_norm"] - 1)
    figures = {"peft": version, "size": size, "rank": rig.rank, "blocks_with_own_memory": own, "gradient_norms_apart": apart, "sides": sides}
    return rigs.finish(rig, "against_peft", figures, judged)


def main(argv: list[str]) -> int:
    """Measure, print and write."""
    parser = rigs.arguments("benchmarks.gpu.against_peft", __doc__)
    parser.add_argument("--peft", type=Path, help="folder with peft and accelerate, where they are not installed")
    options = parser.parse_args(argv)
    rigs.show(measure(rigs.rig_of(options), options.peft))
    return 0

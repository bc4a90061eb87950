"""One block of Wan 14B, forward and backward, at 480p and 720p, with every attention kernel that torch has there.

    python labtools/launch.py benchmarks.gpu.block --out OUT.json            (rehearsal: --device cpu --small)

Through the block executor with resident weights, rank 128 on all Linears. `rollout`: without gradient, LoRA merged. `forward`: exact, keeping input and
attention output. `backward`: with what runs again; once as a LoRA on the time layers needs it (gates get gradients, ffn.2 runs again), once without.
The goals are for the fastest kernel, backward without gate gradients, as they were derived.
"""

from __future__ import annotations

from typing import Any

import torch

from ...host.training_mode import training_mode
from ...lora_train.kernels import attention
from ...lora_train.lora.adapter import new_adapter
from ...lora_train.lora.linears import install
from ...lora_train.offload.knobs import Knobs
from . import goals
from . import rig as rigs
from .rig import Rig

LIMITS = {"480p": (70.0, 175.0), "720p": (275.0, 740.0)}
CHUNK = 8192


def measure_block(rig: Rig, backbone: Any, size: str, backend: str) -> dict[str, float]:
    """Milliseconds of a pass of the only block."""
    block, shape, tokens = backbone.model.blocks[0], rig.shape, rig.tokens(size)
    linears = {path: linear for path, linear in backbone.linears().items() if path.startswith("blocks.")}
    adapter = new_adapter(linears, list(linears), rank=rig.rank, alpha=rig.rank / 2, seed=1, device=rig.device)
    knobs = Knobs(ffn_chunk_tokens=CHUNK, row_chunk_tokens=CHUNK // 2, attention=backend)
    x = torch.randn(1, tokens, shape.width, device=rig.device, dtype=rig.dtype)
    e = torch.randn(1, 1, 6, shape.width, device=rig.device, dtype=rig.dtype) * 0.1
    context = torch.randn(1, rig.context().shape[1], shape.width, device=rig.device, dtype=rig.dtype)
    angle = torch.randn(1, tokens, 1, shape.width // shape.heads // 2, device=rig.device)
    freqs = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], dim=-1).unflatten(-1, (2, 2))
    grad = torch.randn_like(x)
    times: dict[str, float] = {}
    with training_mode(), install(linears, adapter) as switch, backbone.engine(knobs):
        with torch.no_grad(), switch.merged():
            times["rollout"] = rigs.milliseconds(rig, lambda: block(x, e, freqs, context), repeats=5, warm_up=2)
        for name, needs_gates in (("forward", False), ("forward_with_gates", True)):
            leaf, gates = x.detach().requires_grad_(), e.detach().requires_grad_(needs_gates)
            times[name] = rigs.milliseconds(rig, lambda leaf=leaf, gates=gates: block(leaf, gates, freqs, context), repeats=5, warm_up=2)
            times[name.replace("forward", "backward")] = _backward(rig, lambda leaf=leaf, gates=gates: block(leaf, gates, freqs, context), grad)
    return times


def _backward(rig: Rig, forward: Any, grad: torch.Tensor, repeats: int = 5) -> float:
    """Median milliseconds of the backward alone; each needs a forward of its own."""
    times = []
    for _ in range(repeats + 1):
        out, own = forward(), grad.clone()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2)) if rig.device.type == "cuda" else (None, None)
        if begin is None:
            times.append(1000 * rigs.seconds(rig, lambda out=out, own=own: out.backward(own))[0])
            continue
        rigs.synchronize(rig)
        begin.record()
        out.backward(own)
        end.record()
        rigs.synchronize(rig)
        times.append(begin.elapsed_time(end))
    return sorted(times[1:])[repeats // 2]


def measure(rig: Rig) -> dict[str, Any]:
    """All sizes and backends; one that the driver refuses is named with its error."""
    model, _ = rigs.new_model(rig, blocks=1)
    backbone = rigs.new_backbone(rig, model).to(rig.device)
    width = rig.shape.width // rig.shape.heads
    backends = [name for name in attention._able(rig.device, rig.dtype, width) if name != "plain"]
    sizes: dict[str, dict[str, Any]] = {}
    for size in LIMITS:
        sizes[size] = {}
        for backend in backends:
            try:
                sizes[size][backend] = measure_block(rig, backbone, size, backend)
            except RuntimeError as error:
                sizes[size][backend] = {"error": str(error)[:300]}
            rigs.free_all(rig)
    judged = []
    for size, limits in LIMITS.items():
        for phase, limit in zip(("rollout", "backward"), limits, strict=True):
            found = {backend: times[phase] for backend, times in sizes[size].items() if phase in times}
            key = f"block.{'forward' if phase == 'rollout' else phase}.{size}"
            best = min(found, key=found.__getitem__, default="")
            judged.append(goals.goal(key, f"{found[best]:.1f} ms ({best})" if best else "no attention kernel ran", bool(best) and found[best] <= limit))
    return rigs.finish(rig, "block", {"rank": rig.rank, "milliseconds": sizes}, judged)


def main(argv: list[str]) -> int:
    """Measure, print and write."""
    rig = rigs.rig_of(rigs.arguments("benchmarks.gpu.block", __doc__).parse_args(argv))
    rigs.show(measure(rig))
    return 0

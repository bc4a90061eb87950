"""What streaming of weights and kept activations costs: a pass over blocks that come from the host, against the same blocks resident.

    python labtools/launch.py benchmarks.gpu.stall --out OUT.json            (rehearsal: --device cpu --small)

Two figures. `wall`: time of a streamed pass over that of a resident one. `waited`: by events on the compute stream, the time that it stood still for a
copy. The LoRA is off in the first pair (nothing but streaming differs), on in the second, where a streamed rollout merges each block anew. The rate of
the copies is compared with that of one large pinned copy alone.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch

from ...host.training_mode import training_mode
from ...lora_train.lora.adapter import new_adapter
from ...lora_train.lora.linears import install
from ...lora_train.offload.knobs import Knobs
from . import goals
from . import rig as rigs
from .rig import Rig

BLOCKS, REPEATS, CHUNK = 10, 3, 8192
MOST_PERCENT = 2.0
RESIDENT = {"resident_blocks": -1, "keep_place": "device"}
STREAMED = {"resident_blocks": 0, "keep_place": "host"}


class Waits:
    """Events around every wait of the compute stream for a copy."""

    def __init__(self, transfers: Any, rig: Rig) -> None:
        self._pairs: list[tuple[Any, Any]] = []
        self._rig = rig
        plain = transfers.wait

        def wait(mark: object) -> None:
            if mark is None or rig.device.type != "cuda":
                return plain(mark)
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            plain(mark)
            end.record()
            self._pairs.append((begin, end))
            return None

        transfers.wait = wait

    def milliseconds(self) -> float:
        """Of all waits since the last call."""
        rigs.synchronize(self._rig)
        pairs, self._pairs = self._pairs, []
        return sum(begin.elapsed_time(end) for begin, end in pairs)


def passes(backbone: Any, rig: Rig, size: str, switch: Any) -> dict[str, Callable[[], None]]:
    """The passes that are timed."""
    latent, context = torch.randn(1, 16, *rig.latent(size), device=rig.device), rig.context()

    def plain() -> None:
        with torch.no_grad(), switch.disabled():
            backbone.velocity(latent, 0.9, context)

    def rollout() -> None:
        with torch.no_grad():
            backbone.velocity(latent, 0.9, context)

    def gradient() -> None:
        backbone.velocity(latent, 0.9, context).square().mean().backward()

    return {"plain": plain, "rollout": rollout, "gradient": gradient}


def measure_way(rig: Rig, backbone: Any, size: str, changes: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Seconds and waits of each pass, resident or streamed."""
    knobs = Knobs(**changes, ffn_chunk_tokens=CHUNK, row_chunk_tokens=CHUNK // 2, head_groups=1, merges_resident=False)
    linears = backbone.linears()
    paths = [path for path in linears if path.startswith("blocks.")]
    found: dict[str, dict[str, float]] = {}
    with training_mode(), backbone.engine(knobs) as executor:
        adapter = new_adapter(linears, paths, rank=rig.rank, alpha=rig.rank / 2, seed=1, device=rig.device)
        with install(linears, adapter) as switch:
            waits = Waits(executor._transfers, rig)
            for name, call in passes(backbone, rig, size, switch).items():
                with switch.merged():
                    call()
                    waits.milliseconds()
                    copied, times, waited = executor.store.copied_bytes, [], []
                    for _ in range(REPEATS):
                        times.append(rigs.seconds(rig, call)[0])
                        waited.append(waits.milliseconds() / 1000)
                found[name] = {"seconds": statistics.median(times), "waited_s": statistics.median(waited)}
                found[name]["copied_bytes"] = (executor.store.copied_bytes - copied) / REPEATS
    for parameter in adapter.parameters():
        parameter.grad = None
    rigs.free_all(rig)
    return found


def copy_rate(rig: Rig) -> float:
    """Bytes per second of one large pinned copy to the card, alone."""
    if rig.device.type != "cuda":
        return 0.0
    source = rigs.pinned_empty((1 << 30,), torch.uint8)
    target = torch.empty_like(source, device=rig.device)
    return 1000 * source.numel() / rigs.milliseconds(rig, lambda: target.copy_(source, non_blocking=True), repeats=5)


def measure(rig: Rig) -> dict[str, Any]:
    """480p and 720p."""
    model, own = rigs.new_model(rig, blocks=min(BLOCKS, rig.shape.blocks))
    on_host = rigs.OnHost(model)
    backbone = rigs.new_backbone(rig, model)
    sizes: dict[str, Any] = {}
    rate = copy_rate(rig)
    for size in ("480p", "720p"):
        ways = {name: measure_way(rig, backbone, size, changes) for name, changes in (("streamed", STREAMED), ("resident", RESIDENT))}
        on_host.restore()
        rigs.free_all(rig)
        percent = {
            name: {
                "wall": 100 * (ways["streamed"][name]["seconds"] / ways["resident"][name]["seconds"] - 1),
                "waited": 100 * ways["streamed"][name]["waited_s"] / ways["streamed"][name]["seconds"],
            }
            for name in ways["streamed"]
        }
        sizes[size] = {**ways, "percent": percent}
    worst = max(max(sizes[size]["percent"][name]["wall"], sizes[size]["percent"][name]["waited"]) for size in sizes for name in ("plain", "gradient"))
    detail = ", ".join(f"{size} {name} {sizes[size]['percent'][name]['wall']:.1f}" for size in sizes for name in ("plain", "rollout", "gradient"))
    judged = [goals.goal("stall", f"{worst:.1f} % (wall: {detail})", worst <= MOST_PERCENT)]
    return rigs.finish(rig, "stall", {"blocks": len(model.blocks), "blocks_with_own_memory": own, "pinned_copy_bytes_per_s": rate, "sizes": sizes}, judged)


def main(argv: list[str]) -> int:
    """Measure, print and write."""
    rig = rigs.rig_of(rigs.arguments("benchmarks.gpu.stall", __doc__).parse_args(argv))
    rigs.show(measure(rig))
    return 0

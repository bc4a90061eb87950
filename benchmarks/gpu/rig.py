"""What the benchmarks of this folder share: models of the published shape with random weights in pinned host memory, memory caps, and timing by events.

Everything runs on a CPU with `--device cpu --small` as well: a rehearsal of the same code on toy shapes, whose result says so and judges no goal.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import comfy.ldm.wan.model
import comfy.ops
import torch

from ...host.wan import WanBackbone
from ...lora_train.offload.pinned import pinned_empty
from ...lora_train.plan import free_memory_bytes
from ...lora_train.planning.shapes import ModelShape, named_shape
from .. import report
from ..lora_merge import memory_bytes

# Latents (frames, height, width): 81 frames of 256 x 256, 832 x 480 and 1280 x 720; 41 of 832 x 480.
LATENTS = {"256": (21, 32, 32), "480p-41": (11, 60, 104), "480p": (21, 60, 104), "720p": (21, 90, 160)}
SMALL_LATENTS = {"256": (2, 4, 4), "480p-41": (1, 4, 6), "480p": (2, 4, 6), "720p": (2, 6, 8)}
SMALL_SHAPE = ModelShape(width=48, ffn=96, blocks=4, heads=3, text_width=32, frequency=32)
TEXT_TOKENS, SMALL_TEXT_TOKENS = 512, 9
RANK, ALPHA = 128, 64
_WEIGHT_SCALE = 0.02


@dataclass(frozen=True, kw_only=True)
class Rig:
    """Where and at which size a benchmark runs."""

    device: torch.device
    is_small: bool
    out: Path | None
    ram_bytes: int

    @property
    def shape(self) -> ModelShape:
        return SMALL_SHAPE if self.is_small else named_shape("wan-14b")

    @property
    def rank(self) -> int:
        return 4 if self.is_small else RANK

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32 if self.device.type == "cpu" else torch.bfloat16

    def latent(self, size: str) -> tuple[int, int, int]:
        return (SMALL_LATENTS if self.is_small else LATENTS)[size]

    def tokens(self, size: str) -> int:
        frames, height, width = self.latent(size)
        return frames * (height // 2) * (width // 2)

    def context(self) -> torch.Tensor:
        """Random text embeddings [1, P, D]."""
        generator = torch.Generator().manual_seed(3)
        count = SMALL_TEXT_TOKENS if self.is_small else TEXT_TOKENS
        return torch.randn(1, count, self.shape.text_width, generator=generator).to(self.device, self.dtype)


def arguments(prog: str, description: str | None) -> argparse.ArgumentParser:
    """The arguments of every benchmark here."""
    parser = argparse.ArgumentParser(prog=prog, description=(description or "").split("\n")[0])
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--small", action="store_true", help="toy shapes, to rehearse the code; no goal is judged")
    parser.add_argument("--ram-gb", type=float, default=0, help="host memory, where the system shows less than it gives (default: what is free)")
    parser.add_argument("--out", type=Path, help="JSON file to write (default: printed only)")
    return parser


def rig_of(options: argparse.Namespace) -> Rig:
    """Check the device.

    Raises:
        ValueError: no card, or a CPU with shapes that would take it days.
    """
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("no CUDA device was found; rehearse with --device cpu --small")
    if options.device == "cpu" and not options.small:
        raise ValueError("at the real shapes a CPU would take days; add --small")
    ram_bytes = int(options.ram_gb * 1e9) or free_memory_bytes()
    return Rig(device=torch.device(options.device), is_small=options.small, out=options.out, ram_bytes=ram_bytes)


def finish(rig: Rig, name: str, figures: dict[str, Any], goals: list[dict[str, Any]]) -> dict[str, Any]:
    """The result, written where asked for."""
    if rig.is_small:
        goals = [{**one, "met": None} for one in goals]
    result = {"benchmark": f"gpu/{name}", "is_rehearsal": rig.is_small, **report.machine(rig.device), "goals": goals, **figures}
    if rig.out is not None:
        report.write(rig.out, result)
    return result


def new_model(rig: Rig, *, blocks: int | None = None, like: torch.nn.Module | None = None) -> tuple[torch.nn.Module, int]:
    """The host's WanModel with random weights on the host, pinned where there is a card.

    Args:
        blocks: fewer than the shape has.
        like: another one of the same shape, whose blocks' memory is shared.

    Returns:
        The model, and how many blocks have memory of their own: fewer than it has, where host memory is short.
    """
    shape = rig.shape
    count = shape.blocks if blocks is None else blocks
    with torch.device("meta"):
        model = comfy.ldm.wan.model.WanModel(
            dim=shape.width, ffn_dim=shape.ffn, num_heads=shape.heads, num_layers=count, in_dim=shape.in_channels, out_dim=shape.latent_channels,
            text_dim=shape.text_width, freq_dim=shape.frequency, dtype=rig.dtype, operations=comfy.ops.disable_weight_init,
        )  # fmt: skip
    own = count if like is None else 0
    while own > 1 and own * shape.block_parameters * rig.dtype.itemsize > 0.4 * rig.ram_bytes:
        own //= 2
    for path, module in model.named_modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            full = f"{path}.{name}" if path else name
            module._parameters[name] = torch.nn.Parameter(_weights(rig, full, parameter, model, own, like), requires_grad=False)
    for name, buffer in list(model.named_buffers()):
        raise RuntimeError(f"the host's WanModel has a buffer now: {name} {tuple(buffer.shape)}")
    return model.eval(), own or count


def _weights(rig: Rig, full: str, parameter: torch.Tensor, model: torch.nn.Module, own: int, like: torch.nn.Module | None) -> torch.Tensor:
    if full.startswith("blocks."):
        _, index, rest = full.split(".", 2)
        if like is not None:
            return like.get_parameter(full).data
        if int(index) >= own:
            return model.get_parameter(f"blocks.{int(index) % own}.{rest}").data
    host = _host_empty(rig, parameter)
    if parameter.ndim == 1:
        return host.fill_(1.0 if "norm" in full and full.endswith("weight") else 0.0)
    scale = _WEIGHT_SCALE if parameter.ndim == 2 else 0.1
    return host.copy_(torch.randn(parameter.shape, device=rig.device, dtype=torch.float32 if rig.is_small else rig.dtype) * scale)


def _host_empty(rig: Rig, like: torch.Tensor) -> torch.Tensor:
    """Pinned where the system lets; the engine says so where it does not."""
    if rig.device.type == "cuda":
        try:
            return pinned_empty(tuple(like.shape), like.dtype)
        except RuntimeError:
            pass
    return torch.empty(like.shape, dtype=like.dtype, device="cpu")


class OnHost:
    """Where a model's parameters lie now; `restore` points them there again, after a run has left resident ones on the card."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._model = model
        self._data = {name: parameter.data for name, parameter in model.named_parameters()}

    def restore(self) -> None:
        for name, data in self._data.items():
            owner, _, leaf = name.rpartition(".")
            self._model.get_submodule(owner)._parameters[leaf] = torch.nn.Parameter(data, requires_grad=False)


def new_backbone(rig: Rig, model: torch.nn.Module) -> WanBackbone:
    """As the trainer holds it."""
    return WanBackbone(model, dtype=rig.dtype, device=rig.device)


@contextmanager
def capped(rig: Rig, cap_gb: float) -> Iterator[None]:
    """Let this process have `cap_gb` GB of the card within, driver and libraries counted; 0: all of it."""
    if rig.device.type != "cuda" or not cap_gb:
        yield
        return
    free_all(rig)
    free, total = torch.cuda.mem_get_info(rig.device)
    beside = total - free - torch.cuda.memory_reserved(rig.device)
    try:
        torch.cuda.set_per_process_memory_fraction(max(0.01, (cap_gb * 1e9 - beside) / total), rig.device)
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, rig.device)
        free_all(rig)


def free_all(rig: Rig) -> None:
    """Give everything back that nobody holds."""
    gc.collect()
    if rig.device.type == "cuda":
        torch.cuda.synchronize(rig.device)
        torch.cuda.empty_cache()


def synchronize(rig: Rig) -> None:
    if rig.device.type == "cuda":
        torch.cuda.synchronize(rig.device)


def milliseconds(rig: Rig, call: Callable[[], Any], *, repeats: int = 10, warm_up: int = 3) -> float:
    """Median time of a call; by events on a card."""
    for _ in range(warm_up):
        call()
    synchronize(rig)
    times = []
    for _ in range(repeats):
        if rig.device.type == "cuda":
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            call()
            end.record()
            synchronize(rig)
            times.append(begin.elapsed_time(end))
        else:
            begun = time.perf_counter()
            call()
            times.append(1000 * (time.perf_counter() - begun))
    return statistics.median(times)


def seconds(rig: Rig, call: Callable[[], Any]) -> tuple[float, Any]:
    """Wall time of a call, work on the card included, and its result."""
    synchronize(rig)
    begun = time.perf_counter()
    result = call()
    synchronize(rig)
    return time.perf_counter() - begun, result


@dataclass(kw_only=True)
class Memory:
    """Peaks since `start`. card_bytes: tensors and what the allocator holds back; process_bytes: with driver and libraries."""

    rig: Rig

    def start(self) -> Memory:
        self._host = HostMemory()
        if self.rig.device.type == "cuda":
            free_all(self.rig)
            torch.cuda.reset_peak_memory_stats(self.rig.device)
        return self

    def stop(self) -> dict[str, int]:
        found = {"host_growth_bytes": self._host.stop()}
        if self.rig.device.type == "cuda":
            free, total = torch.cuda.mem_get_info(self.rig.device)
            beside = total - free - torch.cuda.memory_reserved(self.rig.device)
            allocated, reserved = torch.cuda.max_memory_allocated(self.rig.device), torch.cuda.max_memory_reserved(self.rig.device)
            found |= {"allocated_bytes": allocated, "reserved_bytes": reserved, "driver_bytes": beside, "process_bytes": reserved + beside}
        return found


class HostMemory:
    """The host memory that this process takes at most while it exists: the larger of its highest resident size and of what free memory fell by, looked at
    ten times a second. Pinned pages may count in one of them alone; on a machine of one's own the second is this process."""

    def __init__(self, free_bytes: int = 0) -> None:
        """Args:
        free_bytes: what was free before anything was loaded; 0: what is free now, and growth from now on is told.
        """
        self._least = free_memory_bytes()
        self._free = free_bytes or self._least
        self._counts_all = free_bytes > 0
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._stop.wait(0.1):
            self._least = min(self._least, free_memory_bytes())

    def stop(self) -> int:
        self._stop.set()
        self._thread.join()
        fell = self._free - min(self._least, free_memory_bytes())
        return max(fell, memory_bytes("VmHWM")) if self._counts_all else fell


def small(shape: ModelShape, blocks: int) -> ModelShape:
    """The same model with fewer blocks."""
    return replace(shape, blocks=blocks)


def show(result: dict[str, Any]) -> None:
    """Print a result: its goals in words, last what a reader of a log's end wants."""
    print(json.dumps({key: value for key, value in result.items() if key != "goals"}, indent=1))
    for one in result["goals"]:
        verdict = {True: "met", False: "MISSED", None: "not judged"}[one["met"]]
        print(f"{result['benchmark']}: {one['goal']}: {one['measured']}: {verdict}", flush=True)

"""Memory and time of a merge into a model file with the keys and shapes of Wan2.2 14B.

    COMFYUI_PATH=… REWARD_LAB_CPU=1 python labtools/launch.py benchmarks.lora_merge [--blocks 40] [--rank 128] [--dtype same] [--folder DIR] [--kill-at 0.5]

The base is a sparse file of zeros in bf16 (real shapes, no disk space); the merged file is written in full: 0.7 GB a block, 28.6 GB at 40. Every
layer has a LoRA, feed-forward ones too, which is more than the official reward LoRAs change. Prints one JSON object. `peak_growth_bytes` is the
growth of the highest resident memory (VmHWM, Linux) over what the process held before, pages of mapped files counted; the limit is twice the
largest tensor and 1 GB. With `--kill-at` the merge is done once more by a process that is killed (SIGKILL) when it has written that share; this process then
goes on from what it left, and `same_bytes` tells whether both files are equal.
"""

from __future__ import annotations

import argparse
import json
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ..host.lora_download import sha256_of
from ..host.lora_keys import layout_named
from ..host.lora_merge import Merged, MergeSettings, merge
from ..host.lora_rows import LoraRow
from ..host.merge_plan import DTYPES
from ..host.rounding import ROUNDINGS
from ..host.stream_file import partial_path
from ..lora_train.safetensors_file import TensorSpec, header_bytes, write
from . import report

WIDTH, HIDDEN, TEXT, CHANNELS, FREQUENCIES, BLOCKS_14B = 5120, 13824, 4096, 16, 256, 40
LIMIT_EXTRA_BYTES = 1_000_000_000


def shapes(blocks: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield the weights of Wan2.2-T2V-A14B, with fewer blocks."""
    linear = {"text_embedding.0": (WIDTH, TEXT), "text_embedding.2": (WIDTH, WIDTH), "time_embedding.0": (WIDTH, FREQUENCIES)}
    linear |= {"time_embedding.2": (WIDTH, WIDTH), "time_projection.1": (6 * WIDTH, WIDTH), "head.head": (4 * CHANNELS, WIDTH)}
    for number in range(blocks):
        for attention in ("self_attn", "cross_attn"):
            linear |= {f"blocks.{number}.{attention}.{name}": (WIDTH, WIDTH) for name in "qkvo"}
            for norm in ("norm_q", "norm_k"):
                yield f"blocks.{number}.{attention}.{norm}.weight", (WIDTH,)
        linear |= {f"blocks.{number}.ffn.0": (HIDDEN, WIDTH), f"blocks.{number}.ffn.2": (WIDTH, HIDDEN), f"blocks.{number}.norm3": (WIDTH,)}
        yield f"blocks.{number}.modulation", (1, 6, WIDTH)
    for layer, shape in {**linear, "patch_embedding": (WIDTH, CHANNELS, 1, 2, 2)}.items():
        yield f"{layer}.weight", shape
        yield f"{layer}.bias", (shape[0],)
    yield "head.modulation", (1, 2, WIDTH)


def write_base(path: Path, blocks: int) -> list[TensorSpec]:
    """Write the header of a bf16 model and leave its numbers to the file system, which makes zeros of them."""
    specs = [TensorSpec(key=key, dtype="BF16", shape=shape) for key, shape in shapes(blocks)]
    head = header_bytes(specs, {})
    with path.open("wb") as file:
        file.write(head)
        file.truncate(len(head) + sum(spec.size_bytes for spec in specs))
    return specs


def write_lora(path: Path, specs: list[TensorSpec], rank: int) -> int:
    """Write a LoRA for every matrix of the model; returns how many layers it has."""
    layout, generator, tensors = layout_named("videox-fun"), torch.Generator().manual_seed(0), {}
    layers = [(spec.key.removesuffix(".weight"), spec.shape) for spec in specs if len(spec.shape) == 2]
    for layer, (outputs, inputs) in layers:
        tensors[layout.key(layer, "lora_down.weight")] = (torch.randn(rank, inputs, generator=generator) * inputs**-0.5).bfloat16()
        tensors[layout.key(layer, "lora_up.weight")] = (torch.randn(outputs, rank, generator=generator) * 0.01).bfloat16()
        tensors[layout.key(layer, "alpha")] = torch.tensor(rank / 2)
    write(path, tensors, {})
    return len(layers)


def memory_bytes(name: str) -> int:
    """Return an entry of /proc/self/status."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def measured(base: Path, lora: Path, target: Path, settings: MergeSettings) -> tuple[Merged, dict[str, Any]]:
    """Merge, and tell time and memory."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # VmHWM starts again from what is held now
    before, start = memory_bytes("VmRSS"), time.perf_counter()
    done = merge(base, [LoraRow(file=str(lora), high=0.5, low=0.0)], target, settings, expert="high")
    seconds, growth = time.perf_counter() - start, memory_bytes("VmHWM") - before
    return done, {"before_bytes": before, "peak_growth_bytes": growth, "seconds": round(seconds, 1)}


def killed_and_resumed(base: Path, lora: Path, target: Path, settings: MergeSettings, share: float, size_bytes: int) -> dict[str, Any]:
    """Have another process merge, kill it at a share of the bytes, and go on from what it left."""
    launch = Path(__file__).resolve().parents[1] / "labtools" / "launch.py"
    command = [sys.executable, str(launch), "benchmarks.lora_merge", "--only", str(base), str(lora), str(target)]
    child = subprocess.Popen([*command, "--dtype", settings.dtype, "--rounding", settings.rounding], stdout=subprocess.DEVNULL)
    partial = partial_path(target)
    while child.poll() is None and not (partial.is_file() and partial.stat().st_size >= share * size_bytes):
        time.sleep(0.02)
    child.kill()
    if child.wait() != -signal.SIGKILL:
        raise RuntimeError(f"the merge ended by itself ({child.returncode}) before it had written {share:g} of its bytes")
    left = partial.stat().st_size
    done, figures = measured(base, lora, target, settings)
    return {"killed_after_bytes": left, "taken_up_after_tensors": done.resumed, **{f"resumed_{name}": value for name, value in figures.items()}}


def goals_of(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Memory, and, where a merge was killed, that it was resumed to the same file."""
    growth = max(value for name, value in result.items() if name.endswith("peak_growth_bytes"))
    base, merged, limit, grown = (value / 1e9 for value in (result["base_bytes"], result["merged_bytes"], result["limit_bytes"], growth))
    found = [report.goal(f"merging {base:.1f} GB into {merged:.1f} GB: memory grows by at most {limit:.2f} GB", f"{grown:.2f} GB", grown <= limit)]
    if "same_bytes" in result:
        said = "the same sha256" if result["same_bytes"] else "another file"
        found.append(report.goal("a merge that was killed half-way and taken up again gives the same file", said, result["same_bytes"]))
    return found


def main(argv: list[str]) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="benchmarks.lora_merge")
    parser.add_argument("--blocks", type=int, default=BLOCKS_14B)
    parser.add_argument("--rank", type=int, default=128)
    parser.add_argument("--dtype", choices=list(DTYPES), default="same")
    parser.add_argument("--rounding", choices=ROUNDINGS, default="nearest")
    parser.add_argument("--folder", help="where the files go for the time of the measurement (default: the system's folder for such)")
    parser.add_argument("--kill-at", type=float, metavar="SHARE", help="also kill a merge when it has written this share, take it up, and compare the files")
    parser.add_argument("--only", nargs=3, type=Path, metavar=("BASE", "LORA", "OUT"), help=argparse.SUPPRESS)  # the process that is killed
    options = parser.parse_args(argv)
    settings = MergeSettings(dtype=options.dtype, rounding=options.rounding)
    if options.only:
        measured(*options.only, settings)
        return 0
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        base, lora, target = folder / "base-high.safetensors", folder / "lora-high.safetensors", folder / "out.safetensors"
        specs = write_base(base, options.blocks)
        layers = write_lora(lora, specs, options.rank)
        done, figures = measured(base, lora, target, settings)
        limit = 2 * max(spec.size_bytes for spec in specs) + LIMIT_EXTRA_BYTES
        result = {
            "benchmark": "lora_merge",
            "date": time.strftime("%Y-%m-%d"),
            "blocks": options.blocks,
            "rank": options.rank,
            "dtype": options.dtype,
            "rounding": options.rounding,
            "hardware": f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}, cpu",
            "base_bytes": base.stat().st_size,
            "lora_bytes": lora.stat().st_size,
            "merged_bytes": done.size_bytes,
            "layers": layers,
            "changed": done.changed,
            "largest_tensor_bytes": max(spec.size_bytes for spec in specs),
            **figures,
            "limit_bytes": limit,
        }
        if options.kill_at is not None:
            digest = sha256_of(target)
            target.unlink()  # there is seldom room for both
            result.update(killed_and_resumed(base, lora, target, settings, options.kill_at, done.size_bytes), sha256=digest)
            result["same_bytes"] = sha256_of(target) == digest
        result["goals"] = goals_of(result)
    print(json.dumps(result, indent=2))  # noqa: T201
    return 0 if all(one["met"] for one in result["goals"]) else 1

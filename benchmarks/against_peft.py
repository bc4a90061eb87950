"""The trainer's engine beside PEFT with torch's checkpointing, on a CPU: seconds of a step and growth of memory.

    python lab.py bench against-peft [--peft FOLDER] [--shapes pocket wan-1.3b] [--repeats N] [--out benchmarks/results/against-peft-cpu.json]

Both sides train the host's WanModel with the same random weights, LoRA values, latent and text, in fp32 (what the trainer uses on a CPU), rank 16 on all
Linears of the blocks (PEFT's usual choice for Wan: q, k, v, o and the feed-forward). A step is forward, backward and an update by AdamW. Each side is a
process of its own; they take turns step by step, so that both see the same machine, and only one computes at a time. Gradients of the first step are
compared before anything is timed. Ours is the engine as a run gets it: `host/engine.py` plans it for this machine.

Time: of the timed steps the fastest, in wall time; the process's own CPU time is told beside it, for machines that have other work. Memory: growth of
the highest resident size (VmHWM) over the resident size before the first step, models and LoRA loaded. Both include gradients and the optimiser's state.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from . import report
from .peft_side import find_peft

ROOT = Path(__file__).resolve().parent.parent
RESULTS = report.RESULTS / "against-peft-cpu.json"
MOST_TIME, MOST_MEMORY = 0.85, 0.5
SIDES = ("ours", "peft")
# Sums in another order, over all blocks, in fp32.
SAME_GRADIENT = 1e-4


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A model and what it is trained on: width, feed-forward, blocks, heads, text width; latent frames, height, width; text tokens; rank.

    repeats: timed steps of each side; the shorter a step, the more of them it takes until one was left alone.
    """

    width: int
    ffn: int
    blocks: int
    heads: int
    text_width: int
    latent: tuple[int, int, int]
    text_tokens: int
    rank: int = 16
    repeats: int = 3

    @property
    def tokens(self) -> int:
        frames, height, width = self.latent
        return frames * (height // 2) * (width // 2)


SHAPES = {
    # The pocket experts' sizes, on a video long enough for a step to take a second.
    "pocket": Shape(width=160, ffn=480, blocks=6, heads=5, text_width=128, latent=(5, 40, 64), text_tokens=32, repeats=12),
    "wan-1.3b": Shape(width=1536, ffn=8960, blocks=30, heads=12, text_width=4096, latent=(1, 48, 48), text_tokens=64),
    "tiny": Shape(width=48, ffn=96, blocks=3, heads=3, text_width=32, latent=(2, 8, 8), text_tokens=5, rank=4),
}


class Side:
    """One of the two processes, seen from the one that measures: a line of JSON in, a line of JSON out."""

    def __init__(self, name: str, shape: str, folder: Path, options: argparse.Namespace) -> None:
        command = [sys.executable, str(ROOT / "labtools" / "launch.py"), "benchmarks.against_peft", "--side", name, "--shapes", shape, "--work", str(folder)]
        if options.peft:
            command += ["--peft", str(options.peft)]
        environ = {**os.environ, "REWARD_LAB_CPU": "1", "OMP_NUM_THREADS": str(options.threads or torch.get_num_threads())}
        self.name = name
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environ)
        self.facts = self._answer()

    def ask(self, what: str) -> dict[str, Any]:
        """One step, or another word that `serve` knows."""
        self._process.stdin.write(what + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the {self.name} side ended with exit status {self._process.wait()}; its error is above")
        return json.loads(line)

    def close(self) -> None:
        self._process.stdin.close()
        if self._process.wait(timeout=60) != 0:
            raise RuntimeError(f"the {self.name} side ended with exit status {self._process.returncode}")

    def kill(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()


def measure(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Both sides of one shape."""
    sides: list[Side] = []
    with tempfile.TemporaryDirectory(prefix="reward-lab-bench-") as folder:
        try:
            for side in SIDES:
                sides.append(Side(side, name, Path(folder), options))
            steps: dict[str, list[dict[str, Any]]] = {side.name: [side.ask("step")] for side in sides}
            difference = _difference(*(torch.load(Path(folder) / f"{side.name}.pt", weights_only=True) for side in sides))
            if not difference <= SAME_GRADIENT:
                raise RuntimeError(f"{name}: gradients of the two sides differ by {difference:.2g}, so their times say nothing")
            for repeat in range(options.repeats or SHAPES[name].repeats):
                for side in sides if repeat % 2 == 0 else reversed(sides):
                    steps[side.name].append(side.ask("step"))
            rollouts = {side.name: side.ask("rollout") for side in sides}
            facts = {side.name: side.facts for side in sides}
            for side in sides:
                side.close()
        finally:
            for side in sides:
                side.kill()
    return {**asdict(SHAPES[name]), "tokens": SHAPES[name].tokens, "gradient_difference": difference, **_figures(steps, rollouts), "facts": facts}


def _difference(ours: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """Norm of all gradients' difference over their norm; each must be there on both sides."""
    if ours.keys() != other.keys():
        raise RuntimeError(f"one side alone has gradients of {sorted(ours.keys() ^ other.keys())[:4]}")
    apart = sum(float((ours[name] - other[name]).square().sum()) for name in ours)
    return (apart / sum(float(value.square().sum()) for value in other.values())) ** 0.5


def _figures(steps: dict[str, list[dict[str, Any]]], rollouts: dict[str, dict[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {"steps": steps, "rollouts": rollouts}
    best = {side: {part: min(step[part] for step in rows[1:]) for part in ("seconds", "cpu_s")} for side, rows in steps.items()}
    growth = {side: max(step["growth_bytes"] for step in rows) for side, rows in steps.items()}
    found["fastest"] = best
    found["median_s"] = {side: statistics.median(step["seconds"] for step in rows[1:]) for side, rows in steps.items()}
    found["growth_bytes"] = growth
    found["time_ratio"] = best["ours"]["seconds"] / best["peft"]["seconds"]
    found["cpu_time_ratio"] = best["ours"]["cpu_s"] / best["peft"]["cpu_s"]
    found["memory_ratio"] = growth["ours"] / growth["peft"]
    found["rollout_ratio"] = rollouts["ours"]["cpu_s"] / rollouts["peft"]["cpu_s"]
    return found


def goals_of(shapes: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """One line for time and one for memory of each shape."""
    goals = []
    for name, row in shapes.items():
        where = f"{name}, {row['tokens']} tokens, rank {row['rank']}, against PEFT with checkpointing"
        spent = f"{row['time_ratio']:.2f} x (processor time {row['cpu_time_ratio']:.2f} x)"
        goals.append(report.goal(f"{where}: step time at most {MOST_TIME} x", spent, row["time_ratio"] <= MOST_TIME))
        grown = f"{row['memory_ratio']:.2f} x ({row['growth_bytes']['ours'] / 1e6:.0f} against {row['growth_bytes']['peft'] / 1e6:.0f} MB)"
        goals.append(report.goal(f"{where}: growth of resident memory at most {MOST_MEMORY} x", grown, row["memory_ratio"] <= MOST_MEMORY))
    return goals


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="lab.py bench against-peft", description=__doc__.split("\n")[0])
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=["pocket", "wan-1.3b"])
    parser.add_argument("--repeats", type=int, help="timed steps of each side, after one that warms up (default: 12 of pocket, 3 of the others)")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads of a side (default: torch's)")
    parser.add_argument("--peft", type=Path, help="folder with peft and accelerate, where they are not installed")
    parser.add_argument("--out", type=Path, default=RESULTS, help="JSON file")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    """Measure, print and write."""
    options = parse(argv)
    if options.side:
        from . import against_peft_side

        return against_peft_side.serve(options.side, options.shapes[0], options.work, options.peft)
    if options.repeats is not None and options.repeats < 1:
        raise ValueError(f"--repeats is {options.repeats}; at least 1 step has to be timed")
    version = find_peft(options.peft)
    shapes = {name: measure(name, options) for name in options.shapes}
    result = {
        "benchmark": "against-peft", "command": "python lab.py bench against-peft", **report.machine(torch.device("cpu")), "peft": version,
        "load_of_the_machine": os.getloadavg()[0] if hasattr(os, "getloadavg") else None, "goals": goals_of(shapes), "shapes": shapes,
    }  # fmt: skip
    report.write(options.out, result)
    for one in result["goals"]:
        print(f"{one['goal']}: {one['measured']}: {'met' if one['met'] else 'MISSED'}")
    print(f"wrote {options.out}", file=sys.stderr)
    return 0

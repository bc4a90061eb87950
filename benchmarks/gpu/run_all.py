"""Runs the benchmarks of this folder in order of value within a time limit, each in its own process, and writes every result as soon as it is there.

    python labtools/launch.py benchmarks.gpu.run_all --out benchmarks/results/gpu-h200.json --limit-s 540

Run the same command again to go on: what the file holds whole is not measured again. A benchmark that fails or runs out of time is told with its error,
and is tried again by the next call, after those that were never tried.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .. import report

ROOT = Path(__file__).resolve().parent.parent.parent
# A benchmark may take longer than reckoned by so much before it is ended.
PATIENCE = 1.8
_SMALL_LIMIT_S = 120


@dataclass(frozen=True, kw_only=True)
class Item:
    """One process. `seconds`: reckoned on an H100 or H200, with making the weights; no card has been measured."""

    name: str
    module: str
    seconds: float
    arguments: tuple[str, ...] = ()


ITEMS = (
    Item(name="lora_linear", module="lora_linear", seconds=60),
    Item(name="prfl_peaks", module="prfl_step", seconds=290, arguments=("--runs", "480p:8:24", "720p:14:24")),
    Item(name="block", module="block", seconds=90),
    Item(name="stall", module="stall", seconds=110),
    Item(name="prfl_seconds", module="prfl_step", seconds=290, arguments=("--runs", "480p:0:0", "720p:0:0")),
    Item(name="against_peft", module="against_peft", seconds=240),
    Item(name="reward_backprop", module="reward_backprop", seconds=210),
    Item(name="prfl_16gb", module="prfl_step", seconds=220, arguments=("--runs", "720p:15.5:16")),
    Item(name="rewards", module="rewards", seconds=150),
    Item(name="prfl_host", module="prfl_step", seconds=220, arguments=("--runs", "720p:24:24:bf16:82")),
    Item(name="prfl_host_fp8", module="prfl_step", seconds=260, arguments=("--runs", "720p:24:24:fp8:65")),
)


def open_items(done: dict[str, Any], names: list[str]) -> list[Item]:
    """What is owed: first what was never tried, then what failed or was cut off."""
    chosen = [item for item in ITEMS if not names or item.name in names]
    untried = [item for item in chosen if item.name not in done]
    return untried + [item for item in chosen if item.name in done and not is_whole(done[item.name])]


def is_whole(result: dict[str, Any]) -> bool:
    """Whether a result need not be measured again."""
    return "error" not in result


def run(item: Item, options: argparse.Namespace, limit_s: float) -> dict[str, Any]:
    """One benchmark; on failure what it had written so far, with the error."""
    with tempfile.TemporaryDirectory() as folder:
        out, log = Path(folder) / "result.json", Path(folder) / "log.txt"
        command = [sys.executable, str(ROOT / "labtools" / "launch.py"), f"benchmarks.gpu.{item.module}", "--device", options.device, "--out", str(out)]
        command += ["--ram-gb", str(options.ram_gb), *(["--small"] if options.small else [])]
        command += ["--peft", str(options.peft)] if options.peft and item.module == "against_peft" else []
        environment = {**os.environ, "REWARD_LAB_CPU": "1" if options.device == "cpu" else "0"}
        begun, error = time.perf_counter(), ""
        with log.open("w") as file:
            try:
                status = subprocess.run([*command, *item.arguments], stdout=file, stderr=subprocess.STDOUT, env=environment, timeout=limit_s).returncode
                error = "" if status == 0 else f"exit status {status}"
            except subprocess.TimeoutExpired:
                error = f"ended after {limit_s:.0f} s"
        tail = log.read_text(encoding="utf-8", errors="replace").splitlines()[-25:]
        result = report.read(out)
    result["took_s"] = round(time.perf_counter() - begun, 1)
    if error or "goals" not in result:
        result |= {"error": error or "wrote no result", "log_tail": tail}
    return result


def combined(done: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """The file: what `lab.py bench` reads, and all results by name."""
    goals = [goal for item in ITEMS for goal in done.get(item.name, {}).get("goals", [])]
    failed = {name: result["error"] for name, result in done.items() if not is_whole(result)}
    device = torch.device(options.device)
    return {
        "benchmark": "gpu", "command": "python lab.py bench gpu", "is_rehearsal": options.small, **report.machine(device), "goals": goals, "failed": failed,
        "missing": [item.name for item in ITEMS if item.name not in done], "results": done,
    }  # fmt: skip


def main(argv: list[str]) -> int:
    """Run what is owed."""
    parser = argparse.ArgumentParser(prog="lab.py bench gpu", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, help="JSON file that is added to (default: benchmarks/results/gpu-CARD.json)")
    parser.add_argument("--only", nargs="+", choices=[item.name for item in ITEMS], default=[], help="these alone")
    parser.add_argument("--limit-s", type=float, default=3600, help="begin none that would not end within so many seconds from now (default: 3600)")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--small", action="store_true", help="rehearsal on toy shapes; judges nothing")
    parser.add_argument("--ram-gb", type=float, default=0, help="host memory, where the system shows less than it gives (default: what is free)")
    parser.add_argument("--peft", type=Path, help="folder with peft and accelerate, where they are not installed")
    options = parser.parse_args(argv)
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("no CUDA device was found; rehearse with --device cpu --small --out FILE")
    if options.small and not options.out:
        raise ValueError("a rehearsal does not belong among the results: give --out FILE")
    out = options.out or report.RESULTS / f"gpu-{_slug(report.card()[0])}.json"
    before = report.read(out)
    if before and before["is_rehearsal"] != options.small:
        raise ValueError(f"{out} is {'a' if before['is_rehearsal'] else 'no'} rehearsal; give another --out")
    done, end = before.get("results", {}), time.perf_counter() + options.limit_s
    for item in open_items(done, options.only):
        left, wanted = end - time.perf_counter(), _SMALL_LIMIT_S if options.small else item.seconds
        if wanted > left and not options.small:
            print(f"{item.name}: not begun, {left:.0f} s are left and it is reckoned at {wanted:.0f} s", flush=True)
            continue
        print(f"{item.name} ...", flush=True)
        done[item.name] = run(item, options, max(1.0, min(PATIENCE * wanted, left)))
        report.write(out, combined(done, options))
        _tell(item.name, done[item.name])
    report.write(out, combined(done, options))
    return 0 if all(is_whole(result) for result in done.values()) else 1


def _tell(name: str, result: dict[str, Any]) -> None:
    for goal in result.get("goals", []):
        verdict = {True: "met", False: "MISSED", None: "not judged"}[goal["met"]]
        print(f"  {goal['goal']}: {goal['measured']}: {verdict}", flush=True)
    if not is_whole(result):
        print(f"  {name} FAILED: {result['error']}\n    " + "\n    ".join(result["log_tail"]), flush=True)
    print(f"  took {result['took_s']} s", flush=True)


def _slug(name: str) -> str:
    return "-".join(part for part in name.lower().replace("nvidia", "").split() if part.isalnum())

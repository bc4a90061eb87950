"""`lab.py train`: makes a run (or goes on with one), follows its worker, and asks it to stop on Ctrl-C.

The worker is the same one that the training node starts, and the run lies where ComfyUI's page looks for runs.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from pathlib import Path

from ..lora_train.config import TrainConfig
from ..runs import process as run_process
from ..runs.store import RunStore, log_tail
from .configs import read_config
from .errors import LabError

RUNS = Path("reward_lab") / "runs"


def main(argv: list[str]) -> int:
    """Train in the foreground; returns 0 for a run that finished or was stopped, 1 for one that failed, 2 for wrong settings."""
    parser = argparse.ArgumentParser(prog="lab.py train")
    parser.add_argument("config", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args(argv)
    # Either way of ending it asks the worker, which has a session of its own, to stop.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return _train(options.config, options.output)
    except LabError as error:
        print(f"\nError: {error.message}\n\n{error.remedy}", file=sys.stderr)
    except ValueError as error:
        print(f"\nError: {error}", file=sys.stderr)
    return 2


def _train(config: Path, output: Path) -> int:
    resume = config.is_dir()
    if resume:
        folder = config.resolve()
    else:
        store = RunStore(output / RUNS)
        folder = store.folder(store.create(TrainConfig.from_dict(read_config(config))))
    known = len(RunStore(folder.parent).events(folder.name)) if resume else 0
    print(f"Run folder: {folder}", flush=True)
    # In the foreground the user waits for it: no lower priority.
    worker = run_process.start(folder, os.environ["COMFYUI_PATH"], resume=resume, niceness=0)
    ended: dict = {}
    watcher = run_process.watch(folder, worker, lambda event: _show(event, ended), skip=known)
    try:
        _join(watcher)
    except KeyboardInterrupt:
        print("\nStopping after this step; the run writes a checkpoint and a usable LoRA. Ctrl-C again ends it at once.", flush=True)
        RunStore(folder.parent).request_stop(folder.name)
        try:
            _join(watcher)
        except KeyboardInterrupt:
            worker.kill()
            _join(watcher)
    if ended.get("event") == "finished":
        return 0
    print("\n".join("  " + line for line in log_tail(folder)), file=sys.stderr)
    return 1


def _join(watcher) -> None:
    # A join without a limit would not be interrupted by Ctrl-C on Windows.
    while watcher.is_alive():
        watcher.join(0.5)


def _show(event: dict, ended: dict) -> None:
    """Print one event as a line; the last one is kept in `ended`."""
    kind = event["event"]
    if kind == "started":
        print(f"Training {event['parameters']:,} parameters on {event['device']}, step {event['first_step']} of {event['steps']}.", flush=True)
    elif kind == "step":
        held_out = f"  held-out {event['held_out']:.5f}" if event.get("held_out") is not None else ""
        left_s = (event["steps"] - event["step"]) * event["seconds"]
        facts = f"step {event['step']}/{event['steps']}  {event['expert']}  reward {_number(event['reward'])}  loss {_number(event['loss'])}"
        print(f"{facts}  grad {_number(event['grad_norm'])}  {event['seconds']:.2f} s  left {left_s / 60:.1f} min{held_out}", flush=True)
    elif kind in ("checkpoint", "sample"):
        print(f"{kind}: {', '.join(event['files'])}", flush=True)
    elif kind == "finished":
        ended |= event
        print(f"\n{event['reason'].capitalize()} after step {event['step']}. LoRAs:\n" + "\n".join("  " + file for file in event["files"]), flush=True)
    elif kind == "failed":
        ended |= event
        print(f"\nFailed: {event['error']}", file=sys.stderr, flush=True)


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.5f}"

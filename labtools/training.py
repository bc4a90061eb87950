"""`lab.py train`: makes a run (or goes on with one), follows its worker, and asks it to stop on Ctrl-C.

The worker is the same one that the training node starts, and the run lies where ComfyUI's page looks for runs.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
from pathlib import Path

from ..lora_train import run_config
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
        folder = store.folder(store.create(run_config.read(read_config(config))))
    known = len(RunStore(folder.parent).events(folder.name)) if resume else 0
    print(f"Run folder: {folder}", flush=True)
    # In the foreground the user waits for it: no lower priority.
    worker = run_process.start(folder, os.environ["COMFYUI_PATH"], resume=resume, niceness=0)
    stop = _StopKeys(RunStore(folder.parent), folder.name, worker)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    ended: dict = {}
    watcher = run_process.watch(folder, worker, lambda event: _show(event, ended), skip=known)
    while watcher.is_alive():
        # Short waits: on Windows a longer one keeps Ctrl-C from being heard.
        watcher.join(0.5)
    if ended.get("event") == "finished":
        return 0
    if RunStore(folder.parent).get(folder.name).state in ("finished", "stopped"):
        print("The run was not touched: its files are there as before.", file=sys.stderr)
        return 2
    print("\n".join("  " + line for line in log_tail(folder)), file=sys.stderr)
    return 1


class _StopKeys:
    """Signal handler: the first Ctrl-C (or SIGTERM) asks the worker, which has a session of its own, to stop in order; the second ends it at once.

    It raises nothing: an exception in the middle of `Thread.join` makes Python 3.11 take a living thread for an ended one.
    """

    def __init__(self, store: RunStore, run_id: str, worker: subprocess.Popen) -> None:
        self._store, self._run_id, self._worker = store, run_id, worker
        self._is_asked = False

    def __call__(self, number: int, frame: object) -> None:
        if self._is_asked:
            self._worker.kill()
            return
        self._is_asked = True
        # Written past print, whose lock the interrupted code may hold.
        os.write(1, b"\nStopping after this step; the run writes a checkpoint and a usable LoRA. Ctrl-C again ends it at once.\n")
        self._store.request_stop(self._run_id)


def _show(event: dict, ended: dict) -> None:
    """Print one event as a line; the last one is kept in `ended`."""
    kind = event["event"]
    if kind == "started":
        print(f"Training {event['parameters']:,} parameters on {event['device']}, step {event['first_step']} of {event['steps']}.", flush=True)
        if event.get("data_changed"):
            print(f"Note: {event['data_changed']}.", flush=True)
    elif kind == "preparing":
        print(f"{event['what'].capitalize()}: {event['done']} of {event['total']}", flush=True)
    elif kind == "step":
        held_out = f"  held-out {event['held_out']:.5f}" if event.get("held_out") is not None else ""
        left_s = (event["steps"] - event["step"]) * event["seconds"]
        measure = "accuracy" if event["expert"] == "pavrm" else "reward"
        facts = f"step {event['step']}/{event['steps']}  {event['expert']}  {measure} {_number(event['reward'])}  loss {_number(event['loss'])}"
        print(f"{facts}  grad {_number(event['grad_norm'])}  {event['seconds']:.2f} s  left {left_s / 60:.1f} min{held_out}", flush=True)
    elif kind in ("checkpoint", "sample"):
        print(f"{kind}: {', '.join(event['files'])}", flush=True)
    elif kind == "finished":
        ended |= event
        title = f"{event['reason'].replace('_', ' ').capitalize()} after step {event['step']}. {event.get('detail', '')}".strip()
        print(f"\n{title} Files:\n" + "\n".join("  " + file for file in event["files"]), flush=True)
    elif kind == "failed":
        ended |= event
        print(f"\nFailed: {event['error']}", file=sys.stderr, flush=True)


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.5f}"

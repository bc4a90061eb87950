"""The form of a result file, and the machine that it was measured on.

A result is one JSON object: `benchmark`, `command`, `date`, `hardware`, `goals` and whatever figures the benchmark has. Each goal is
`{"goal": words, "measured": words, "met": true | false | null}`; null: measured where the goal does not apply. `lab.py bench` prints them.
"""

from __future__ import annotations

import datetime
import json
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def goal(words: str, measured: str, met: bool | None) -> dict[str, Any]:
    """One line of the table."""
    return {"goal": words, "measured": measured, "met": met}


def machine(device: torch.device) -> dict[str, str]:
    """Date, hardware, driver and versions."""
    found = {"date": datetime.date.today().isoformat(), "hardware": hardware(device), "torch": torch.__version__, "python": platform.python_version()}
    if device.type == "cuda":
        found["card"], found["driver"] = card()
    return found


def hardware(device: torch.device) -> str:
    """The machine in words."""
    host = f"{processor()}, {torch.get_num_threads()} CPU thread(s), torch {torch.__version__}, {platform.system()} {platform.machine()}"
    return f"{card()[0]}, {host}" if device.type == "cuda" else host


def processor() -> str:
    """The CPU's name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor() or "unknown CPU")


def card() -> tuple[str, str]:
    """Name and driver of the first card. Asked of nvidia-smi where there is one: torch would take memory of the card to answer."""
    command = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        name, driver = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.splitlines()[0].split(",")
    except (OSError, subprocess.SubprocessError, IndexError, ValueError):
        return torch.cuda.get_device_name(), "unknown"
    return name.strip(), driver.strip()


def write(path: Path, result: dict[str, Any]) -> None:
    """Write a result whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)


def read(path: Path) -> dict[str, Any]:
    """A result file, or an empty object where there is none."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}

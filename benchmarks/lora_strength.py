"""How long a new LoRA strength takes on the pocket models, from the node's call until both experts are ready to sample.

    COMFYUI_PATH=… REWARD_LAB_CPU=1 python labtools/launch.py benchmarks.lora_strength [--repeats 20]

Prints one JSON object: milliseconds per change for rows beside the weights, with and without a curve, and for merged rows; `own_ms` is the part of it
that is not ComfyUI's loading. `cpu_ms` counts this process alone, for machines that have other work too. It measures the loading alone; the rows beside
the weights also cost time in every step of sampling, which `forward_ms` tells.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import comfy.model_management
import comfy.sd
import folder_paths
import torch

from ..host.lora_patch import apply_rows
from ..host.lora_rows import LoraRow
from ..host.sigma_curve import parse_curve
from . import report

WEIGHTS = Path(__file__).resolve().parent.parent / "pocket" / "weights"
LORA = "Pocket-Wan2.2-Fun-A14B-{expert}-noise-{reward}.safetensors"
LIMIT_MS = 100
CASES = {"bypass": ("bypass", ""), "bypass_with_curve": ("bypass", "1:0.2, 0:1"), "merged": ("merged", "")}


def rows(strength: float, curve: str) -> list[LoraRow]:
    """Four rows, two on each expert."""
    return [
        LoraRow(
            file=LORA.format(expert=expert, reward=reward),
            high=strength if expert == "high" else 0.0,
            low=strength if expert == "low" else 0.0,
            curve=parse_curve(curve),
        )
        for expert in ("high", "low")
        for reward in ("HPS2.1", "MPS")
    ]


def forward(model: object) -> float:
    """Milliseconds of one forward of a MODEL that is loaded, on a latent of the pocket size."""
    network = model.model.diffusion_model
    inputs = {"x": torch.zeros(1, network.in_dim, 3, 8, 8), "timestep": torch.tensor([900.0]), "context": torch.zeros(1, 16, network.text_dim)}
    inputs = {name: value.to(model.load_device, model.model.get_dtype_inference() if name != "timestep" else None) for name, value in inputs.items()}
    start = time.perf_counter()
    with torch.no_grad():
        network(**inputs)
    return 1000 * (time.perf_counter() - start)


def measure(models: dict[str, object], application: str, curve: str, repeats: int) -> dict[str, float]:
    """Change the strength `repeats` times."""
    times, own_times, cpu_times, forwards, kept = [], [], [], [], []
    for number in range(repeats + 1):
        start, start_cpu = time.perf_counter(), time.process_time()
        applied = apply_rows(models["high"], models["low"], rows(0.1 + number / (2 * repeats), curve), application)
        own_times.append(1000 * (time.perf_counter() - start))
        for model in (applied.model_high, applied.model_low):
            comfy.model_management.load_models_gpu([model, *model.get_nested_additional_models()])
        times.append(1000 * (time.perf_counter() - start))
        cpu_times.append(1000 * (time.process_time() - start_cpu))
        forwards.append(forward(applied.model_high))
        kept[:] = [applied]  # as the host's cache does: the old models go when the new ones are there
    first, *changes = times
    medians = {"change_ms": changes, "own_ms": own_times[1:], "cpu_ms": cpu_times[1:], "forward_ms": forwards}
    return {"first_ms": first, "worst_ms": max(changes), **{name: statistics.median(values) for name, values in medians.items()}}


def goals_of(result: dict[str, dict[str, float]]) -> list[dict[str, object]]:
    """A change of strengths is to take less than LIMIT_MS, whatever the way."""
    goals = []
    for name in CASES:
        middle, worst = result[name]["change_ms"], result[name]["worst_ms"]
        words = f"change of strengths on the pocket models, {name.replace('_', ' ')}: less than {LIMIT_MS} ms"
        goals.append(report.goal(words, f"{middle:.0f} ms, at worst {worst:.0f} ms", worst < LIMIT_MS))
    return goals


def main(argv: list[str]) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="benchmarks.lora_strength")
    parser.add_argument("--repeats", type=int, default=20)
    options = parser.parse_args(argv)
    folder_paths.folder_names_and_paths["loras"] = ([str(WEIGHTS)], {".safetensors"})
    models = {expert: comfy.sd.load_diffusion_model(str(WEIGHTS / f"pocket_wan2.2_t2v_{expert}_noise_14B.safetensors")) for expert in ("high", "low")}
    result = {
        "benchmark": "lora_strength",
        "repeats": options.repeats,
        **report.machine(comfy.model_management.get_torch_device()),
        **{name: measure(models, application, curve, options.repeats) for name, (application, curve) in CASES.items()},
    }
    result["goals"] = goals_of(result)
    print(json.dumps(result, indent=2))  # noqa: T201
    return 0

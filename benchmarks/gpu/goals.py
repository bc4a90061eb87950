"""The goals of this folder in words, and what is predicted for them where no card has been measured. Imports neither torch nor the host.

Predictions come from the plan (`lora_train/planning`, assumed rates of an H200) and, for the LoRA linear, from operations and bytes at 790 TFLOP/s and
4.8 TB/s.
"""

from __future__ import annotations

from typing import Any

from ...lora_train import plan
from ...lora_train.config import TrainConfig
from ...lora_train.planning.shapes import named_shape
from ...lora_train.planning.speed import CARDS, Card

WORDS = {
    "lora.exact": "LoRA linear forward, exact, over the base GEMM at 75,600 tokens: at most +6 %",
    "lora.merged": "LoRA linear forward, merged, over the base GEMM at 75,600 tokens: at most +1 %",
    "lora.backward": "LoRA linear backward, over the base GEMM at 75,600 tokens: at most +11 %",
    "block.forward.480p": "one block forward at 480p: at most 70 ms",
    "block.backward.480p": "one block backward at 480p: at most 175 ms",
    "block.forward.720p": "one block forward at 720p: at most 275 ms",
    "block.backward.720p": "one block backward at 720p: at most 740 ms",
    "stall": "streaming stall at 32,760 and 75,600 tokens: at most 2 %",
    "peak.480p": "peak of tensors on the card in a PRFL step at 480p: at most 8 GB",
    "peak.720p": "peak of tensors on the card in a PRFL step at 720p: at most 14 GB",
    "cap24.480p": "a PRFL step at 480p in 24 GB",
    "cap24.720p": "a PRFL step at 720p in 24 GB",
    "cap16.720p": "a PRFL step at 720p in 16 GB (a stretch)",
    "seconds.480p": "PRFL micro-step at 480p, 19 rollout forwards, bf16: at most 64 s",
    "seconds.720p": "PRFL micro-step at 720p, 19 rollout forwards, bf16: at most 255 s",
    "peft.faster": "against PEFT, torch checkpointing and resident weights: at least 1.4 x faster",
    "peft.memory": "against PEFT, torch checkpointing and resident weights: at most 0.3 x the memory",
    "backprop": "reward backpropagation, 256x256x81, 40 guided steps, first frame, both experts: in 24 GB",
    "host.bf16": "host memory of a PRFL step at 720p on a 24 GB card, bf16 base: at most 82 GB",
    "host.fp8": "host memory of a PRFL step at 720p on a 24 GB card, fp8 base: at most 65 GB",
}
SIZES_PX = {"480p": (832, 480), "720p": (1280, 720)}
_RATE, _BANDWIDTH, _TOKENS, _RANK = 790e12, 4.8e12, 75_600, 128
_LORA_SHAPES = ((5120, 5120), (5120, 13824), (13824, 5120))  # (in, out)


def goal(key: str, measured: str, met: bool | None) -> dict[str, Any]:
    """One line of the table."""
    return {"key": key, "goal": WORDS[key], "measured": measured, "met": met}


def predictions() -> dict[str, str]:
    """By key; a goal without an entry has no prediction of ours."""
    found = {f"lora.{name}": f"+{percent:.1f} %" for name, percent in _lora_percents().items()}
    for size, pixels in SIZES_PX.items():
        whole, small = _plan(pixels, CARDS["h200"]), _smallest(pixels)
        seconds = whole["seconds_per_step"]
        found[f"seconds.{size}"] = f"{seconds['total']:.0f} s"
        found[f"block.forward.{size}"] = f"{1000 * seconds['rollout'] / 19 / 40:.0f} ms"
        found[f"block.backward.{size}"] = f"{1000 * seconds['backward'] / 40:.0f} ms"
        peak = max(small["gpu_phase_bytes"].values())
        found[f"peak.{size}"] = f"{peak / 1e9:.1f} GB"
        found[f"cap24.{size}"] = f"{small['gpu_peak_bytes'] / 1e9:.1f} GB with driver"
    found["cap16.720p"] = found["cap24.720p"]
    found["stall"] = "0 %: copies take less than the work beside them"
    for base, weight_bytes, ram_gb in (("bf16", 2, 82), ("fp8", 1, 65)):
        planned = _plan(SIZES_PX["720p"], _card(24), weight_bytes, ram_gb)
        found[f"host.{base}"] = f"{planned['host_peak_bytes'] / 1e9:.0f} GB" if planned["fits"] else "no plan fits"
    return found


def _lora_percents() -> dict[str, float]:
    """The worst of the three shapes: separate S pass and one product over K + r; one read and write of the weight; one joint pass over dY."""
    exact, merged, backward = [], [], []
    for ins, outs in _LORA_SHAPES:
        base = 2 * _TOKENS * ins * outs / _RATE

        def skinny(width: int) -> float:
            return max(2 * _TOKENS * _RANK * width / _RATE, 2 * _TOKENS * (width + _RANK) / _BANDWIDTH)

        exact.append(100 * (skinny(ins) + 2 * _TOKENS * _RANK * outs / _RATE) / base)
        merged.append(100 * 4 * ins * outs / _BANDWIDTH / base)
        joint = max(4 * _TOKENS * _RANK * outs / _RATE, 2 * _TOKENS * outs / _BANDWIDTH)
        backward.append(100 * (joint + skinny(ins) + 2 * _TOKENS * _RANK * ins / _RATE) / base)
    return {"exact": max(exact), "merged": max(merged), "backward": max(backward)}


def _plan(pixels: tuple[int, int], card: Card, weight_bytes: int = 2, ram_gb: int = 200) -> dict[str, Any]:
    values = {
        "models": dict.fromkeys(("high", "low", "text_encoder", "vae"), "none"),
        "reward": {"kind": "pavrm", "path": "none"},
        "prompts": [{"text": "any"}],
        "video": {"width_px": pixels[0], "height_px": pixels[1], "frames": 81},
        "method": "prfl",
        "dtype": "bf16",
        # Boundary 0: one expert makes all 40 steps, so that the gradient step is the 19th in the mean, as released.
        "sampling": {"steps": 40, "shift": 5.0, "boundary": 0.0, "guidance": 1.0, "schedule": "unipc"},
        "lora": {"rank": _RANK, "skip": []},
    }
    return plan.plan(TrainConfig.from_dict(values), shape=named_shape("wan-14b", weight_bytes), card=card, host_free_bytes=ram_gb * 10**9)


def _card(gb: int) -> Card:
    return Card(**{**vars(CARDS["h200"]), "memory_bytes": gb * 10**9})


def _smallest(pixels: tuple[int, int]) -> dict[str, Any]:
    """The plan for the smallest card that takes it."""
    for gb in range(6, 33):
        found = _plan(pixels, _card(gb))
        if found["fits"]:
            return found
    return found

"""One training loop for every pocket model: seeded by step, resumable, with a cosine learning rate.

The batch of step `s` depends only on (seed, s), so an interrupted stage resumes with the data it would have seen.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable
from pathlib import Path

import torch

_SAVE_EVERY_S = 60.0


def _learning_rate(step: int, steps: int, peak: float, warmup: int) -> float:
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup))))


def _save(path: Path, modules: torch.nn.Module, optimiser: torch.optim.Optimizer, step: int) -> None:
    partial = path.with_suffix(".partial")
    torch.save({"modules": modules.state_dict(), "optimiser": optimiser.state_dict(), "step": step}, partial)
    partial.replace(path)


def fit(
    name: str,
    modules: torch.nn.Module,
    loss_of: Callable[[int, random.Random], torch.Tensor],
    *,
    steps: int,
    peak_lr: float,
    folder: Path,
    seed: int = 0,
    warmup: int = 50,
    weight_decay: float = 0.01,
    clip_norm: float = 1.0,
) -> None:
    """Minimise `loss_of` over the parameters of `modules`; resumes from `folder/<name>.ckpt` when it is there.

    Args:
        name: checkpoint name, one per phase.
        loss_of: (step, rng) -> scalar loss; `rng` and torch's global generator are seeded from (seed, step).
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.ckpt"
    parameters = [p for p in modules.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=peak_lr, betas=(0.9, 0.98), weight_decay=weight_decay)
    start = 0
    if path.exists():
        saved = torch.load(path, weights_only=True)
        modules.load_state_dict(saved["modules"])
        optimiser.load_state_dict(saved["optimiser"])
        start = saved["step"]
    begun = last_save = time.monotonic()
    mean_loss = None
    for step in range(start, steps):
        for group in optimiser.param_groups:
            group["lr"] = _learning_rate(step, steps, peak_lr, warmup)
        torch.manual_seed(seed * 1_000_003 + step)
        loss = loss_of(step, random.Random(seed * 1_000_003 + step))
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, clip_norm)
        optimiser.step()
        value = float(loss.detach())
        mean_loss = value if mean_loss is None else 0.95 * mean_loss + 0.05 * value
        if step % 50 == 0 or step == steps - 1:
            print(f"{name} {step + 1}/{steps} loss {mean_loss:.4f} {(time.monotonic() - begun) / (step - start + 1):.3f} s/step", flush=True)
        if time.monotonic() - last_save > _SAVE_EVERY_S:
            _save(path, modules, optimiser, step + 1)
            last_save = time.monotonic()
    if start < steps:
        _save(path, modules, optimiser, steps)

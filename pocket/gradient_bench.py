"""`lab.py bench gradients`: what a cheap gradient is worth, per DiT forward: several points on a trajectory, few-step rollouts, starts from real latents.

The question is asked at the base model (a LoRA that does nothing yet), for reward backpropagation through predictions of x0. What is wanted is the mean
direction of the plain form, which rolls out every step and takes one random point; it is estimated from many micro-batches of its own (`reference`).
Every way gets the same total of forward-equivalents (a backward is two) on other draws. Told is the mean cosine of one micro-batch's gradient with the wanted
direction. Averaging n of them makes the cosine grow as sqrt(n) while it is small, so (cosine)^2 / forwards says what a way is worth per forward, whether it
is noisier or points elsewhere; `cosine_of_all`, of the mean over all its micro-batches, is low where it points elsewhere. Directions and not gradients
are averaged, because a few micro-batches are a hundred times longer than others.

Finished ways are kept in `--work`; the command goes on where it was, and begins nothing new after `--seconds`.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import platform
import random
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..host import reward_loading
from ..host.training_mode import training_mode
from ..lora_train.config import TrainConfig
from ..lora_train.lora.adapter import new_adapter
from ..lora_train.lora.linears import install
from ..lora_train.lora.targets import select_targets
from ..lora_train.objectives import create
from ..lora_train.real import RealLatents, write_real
from ..lora_train.rollout import Experts
from ..lora_train.run import Parts
from ..lora_train.trainee import new_trainee
from ..reward_models.spec import RewardModelSpec
from . import world
from .build import SCRATCH, WEIGHTS
from .generate import Generator
from .stages import dit, hps, text, vae
from .stages.loras import training_prompts

RESULT = Path(__file__).resolve().parent.parent / "benchmarks" / "results" / "gradients.json"
REFERENCE = "reference"
REFERENCE_BATCHES = 160
BUDGET = 3000.0
BATCH, RANK, REAL_CLIPS = 2, 4, 96
EXPERT = "low"


@dataclass(frozen=True, kw_only=True)
class Way:
    """One way to a gradient: changes to the plain form's objective."""

    name: str
    objective: dict[str, Any] = field(default_factory=dict)


WAYS = (
    Way(name="plain"),
    Way(name="3 points", objective={"grad_steps": 3}),
    Way(name="rollout of at most 4", objective={"rollout_steps": 4}),
    Way(name="3 points, rollout of at most 4", objective={"grad_steps": 3, "rollout_steps": 4}),
    Way(name="real start", objective={"start": "real"}),
)
_PLAIN = {"mode": "x0", "strategy": "random", "grad_steps": 1, "decode": "random", "decode_count": 1, "decode_history": 1}


class Bench:
    """The pocket models and real latents, loaded once."""

    def __init__(self, work: Path) -> None:
        self.generator = Generator(WEIGHTS)
        self.reward = reward_loading.load(RewardModelSpec(kind="hpsv2.1", path=str(WEIGHTS / hps.FILE_NAME)))
        self._real = work / "real.safetensors"
        if not self._real.exists():
            work.mkdir(parents=True, exist_ok=True)
            rng = random.Random(77)
            scenes = [world.sample_scene(rng, held_out=False, two_share=0.0) for _ in range(REAL_CLIPS)]
            clips = torch.stack([torch.from_numpy(world.render(scene)) for scene in scenes]).permute(0, 1, 4, 2, 3)
            with training_mode(), torch.no_grad():
                latents = torch.cat([self.generator.decoder.encode(part) for part in clips.split(16)])
            write_real(self._real, latents, [world.caption(scene) for scene in scenes])

    def config(self, way: Way, seed: int) -> TrainConfig:
        """Settings of the plain form with a way's changes."""
        files = {**{side: str(WEIGHTS / name) for side, name in dit.FILE_NAMES.items()}, "text_encoder": str(WEIGHTS / text.FILE_NAME)}
        return TrainConfig.from_dict({
            "preset": "pocket", "models": {**files, "vae": str(WEIGHTS / vae.FILE_NAME)}, "reward": {"kind": "hpsv2.1", "path": str(WEIGHTS / hps.FILE_NAME)},
            "prompts": [{"text": prompt} for prompt in training_prompts(128, 500)], "expert": EXPERT, "lora": {"rank": RANK}, "batch": BATCH,
            "objective": {**_PLAIN, "kl_weight": 0.0, **way.objective}, "real": {"path": str(self._real)}, "seed": seed,
        })  # fmt: skip

    def gradients(self, way: Way, seed: int, *, batches: int = 0, budget: float = 0.0) -> tuple[torch.Tensor, float]:
        """Gradients [N, P] of the up matrices (those of the down matrices are 0 at the base), one per micro-batch, and what all cost in forwards.

        Args:
            seed: of prompts, noise, steps; the LoRA's own is the same for all.
            batches: how many; or budget: as many as it pays for.
        """
        config = self.config(way, seed)
        real = RealLatents(config.real.path)
        experts = Experts(backbones=self.generator.backbones, sampling=config.sampling)
        parts = Parts(
            experts=experts, contexts=self.generator.contexts([*(prompt.text for prompt in config.prompts), *real.prompts]), sink=lambda event: None,
            stop_requested=lambda: False, decoder=self.generator.decoder, reward=self.reward, real=real,
        )  # fmt: skip
        objective, linears = create(config, parts), self.generator.backbones[EXPERT].linears()
        adapter = new_adapter(linears, select_targets(linears, (), config.lora.skip), rank=RANK, alpha=RANK / 2, seed=1, device=torch.device("cpu"))
        rows = []
        with training_mode(), ExitStack() as stack:
            trainee = new_trainee(EXPERT, adapter, stack.enter_context(install(linears, adapter)), config.optimiser)
            while len(rows) < batches or experts.count.total < budget:
                objective.add_gradient(trainee, len(rows) + 1, 0)
                rows.append(torch.cat([layer.up_OR.grad.flatten() for layer in adapter.layers.values()]))
                trainee.optimiser.zero_grad(set_to_none=True)
        return torch.stack(rows), experts.count.total


def directions(rows: torch.Tensor) -> torch.Tensor:
    """Rows of length one."""
    return torch.nn.functional.normalize(rows, dim=1)


def cosine(one: torch.Tensor, other: torch.Tensor) -> float:
    """Of two mean directions."""
    return float(torch.nn.functional.cosine_similarity(one, other, dim=0))


def measured(bench: Bench, way: Way, wanted: torch.Tensor) -> dict[str, Any]:
    """How a way's micro-batches point along the wanted direction."""
    begun = time.process_time()
    rows, forwards = bench.gradients(way, 10_000, budget=BUDGET)
    cosines = directions(rows) @ torch.nn.functional.normalize(wanted, dim=0)
    mean, count = float(cosines.mean()), len(rows)
    return {
        "way": way.name, "micro_batches": count, "forwards_per_micro_batch": forwards / count, "cosine": mean,
        "standard_error": float(cosines.std()) / math.sqrt(count), "cosine_of_all": cosine(directions(rows).mean(0), wanted),
        "cpu_seconds_per_micro_batch": (time.process_time() - begun) / count,
    }  # fmt: skip


def compared(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """With what each way is worth per forward, relative to the plain form; the error is to first order."""
    def worth(row: dict[str, Any]) -> float:
        return row["cosine"] ** 2 / row["forwards_per_micro_batch"]

    plain = rows[0]
    found = []
    for row in rows:
        ratio = worth(row) / worth(plain)
        of_plain = plain["standard_error"] / plain["cosine"] if row is not plain else 0.0
        error = 2 * ratio * math.hypot(row["standard_error"] / row["cosine"] if row is not plain else 0.0, of_plain)
        found.append({**row, "worth_per_forward": ratio, "worth_error": error})
    return found


def main(argv: list[str]) -> int:
    """Measure what is missing and write the result."""
    parser = argparse.ArgumentParser(prog="lab.py bench gradients", description=__doc__.split("\n")[0])
    parser.add_argument("--work", type=Path, default=SCRATCH / "gradient-bench", help="finished ways are kept here")
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin nothing new after so long")
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args(argv)
    begun, rows, halves = time.monotonic(), [], None
    bench, reference = Bench(options.work), options.work / f"{REFERENCE}.pt"
    for way in (None, *WAYS):
        kept = reference if way is None else options.work / f"way-{WAYS.index(way)}.json"
        if not kept.exists():
            if time.monotonic() - begun > options.seconds:
                break
            if way is None:
                torch.save(bench.gradients(WAYS[0], 1, batches=REFERENCE_BATCHES)[0], kept)
            else:
                kept.write_text(json.dumps(measured(bench, way, directions(torch.load(reference)).mean(0))), encoding="utf-8")
            print(f"{way.name if way else REFERENCE}: {time.monotonic() - begun:.0f} s", flush=True)
        if way is None:
            drawn = directions(torch.load(reference))
            halves = cosine(drawn[::2].mean(0), drawn[1::2].mean(0))
        else:
            rows.append(json.loads(kept.read_text(encoding="utf-8")))
    document = {
        "command": "python lab.py bench gradients",
        "date": datetime.date.today().isoformat(),
        "hardware": f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}",
        "task": f"HPSv2.1-shaped pocket reward, {EXPERT}-noise expert, predictions of x0, a random latent frame; {BATCH} videos per micro-batch, rank {RANK}, "
        "at the base model",
        "reference": {"micro_batches": REFERENCE_BATCHES, "cosine_of_its_halves": halves},
        "forwards_per_way": BUDGET,
        "missing": len(WAYS) - len(rows),
        "ways": compared(rows) if rows else [],
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {options.out}; {document['missing']} ways are missing")
    return 0

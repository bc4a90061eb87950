"""A PRFL step of Wan 14B at 832x480x81 and 1280x720x81 under a memory cap: peak of the card, of the host, and seconds.

    python labtools/launch.py benchmarks.gpu.prfl_step --runs 480p:8:24 720p:14:24 --out OUT.json     (rehearsal: --device cpu --small)

The trainer's own objective (`lora_train/objectives/prfl.py`) through its own engine and plan, with the host's WanModel, LoRA of rank 128 on all Linears,
AdamW, and a PAVRM of 8 blocks. A run is SIZE:PLAN:CAP[:BASE[:RAM]]: the plan is made for a card of PLAN GB and a host of RAM GB (without it: what is
free), and the process may take CAP GB of the card, driver and libraries counted (0: all of it; PLAN grows until something fits, which the result says);
the base's weights are in bf16 or fp8. The gradient step is the third of the schedule, so
two rollout forwards are made and timed; the step at the released schedule's mean is reckoned as 19 of them and the rest of the step, which is measured.
The PAVRM's blocks share the memory of the generator's first ones: its own 5.6 GB are added to the host's figure, and told. Runs in fp8 come last.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ...host import engine as host_engine
from ...host.latent_reward import PavrmReward
from ...host.pavrm import Pavrm
from ...host.training_mode import training_mode
from ...lora_train import objectives
from ...lora_train.config import TrainConfig
from ...lora_train.kernels.lora_linear import fp8_weight
from ...lora_train.lora.adapter import new_adapter
from ...lora_train.lora.linears import install
from ...lora_train.lora.targets import select_targets
from ...lora_train.plan import free_memory_bytes
from ...lora_train.planning.speed import GIB
from ...lora_train.rollout import ContextCache, Experts
from ...lora_train.run import Parts
from ...lora_train.trainee import new_trainee
from ...reward_models.pavrm import build_head
from .. import header
from . import goals
from . import rig as rigs
from .rig import Rig

RUNS = ("480p:8:24", "720p:14:24", "720p:24:24:bf16:82", "720p:15.5:16", "480p:0:0", "720p:0:0", "720p:24:24:fp8:65")
PEAK_GB, SECONDS, HOST_GB = {"480p": 8.0, "720p": 14.0}, {"480p": 64.0, "720p": 255.0}, {"bf16": 82.0, "fp8": 65.0}
PEAK_CAP_GB = 24  # a card of this size, planned for as little as can be
PLANS_GB = (8, 10, 12, 14, 16, 18, 20, 24)
TRUNK_BLOCKS, MEAN_FORWARDS, GRADIENT_STEP = 8, 19, 2
_LARGEST_E4M3 = 448
PROMPT = "a red square moves over green hills"


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run as it is named, and what the name says; `cap_gb` 0 is the whole card, `ram_gb` 0 what is free of the host."""

    name: str
    size: str
    plan_gb: float
    cap_gb: float
    base: str = "bf16"
    ram_gb: float = 0.0


def run_of(name: str) -> Run:
    """Raises:
    ValueError: not SIZE:PLAN:CAP[:BASE[:RAM]].
    """
    size, *rest = name.split(":")
    limits, base = rest[:2] + rest[3:], rest[2] if len(rest) > 2 else "bf16"
    if size not in goals.SIZES_PX or base not in HOST_GB or len(limits) not in (2, 3):
        raise ValueError(f"run {name!r}: SIZE is one of {', '.join(goals.SIZES_PX)}, BASE one of {', '.join(HOST_GB)}; write SIZE:PLAN:CAP[:BASE[:RAM]]")
    plan_gb, cap_gb, ram_gb = map(float, (*limits, 0)[:3])
    return Run(name=name, size=size, plan_gb=plan_gb, cap_gb=cap_gb, base=base, ram_gb=ram_gb)


class Timed:
    """Experts whose velocities are timed; `forwards` holds the seconds of those without gradient."""

    def __init__(self, experts: Experts, rig: Rig) -> None:
        self._experts, self._rig = experts, rig
        self.forwards: list[float] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._experts, name)

    def velocity(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        if torch.is_grad_enabled():
            return self._experts.velocity(*args, **kwargs)
        spent, result = rigs.seconds(self._rig, lambda: self._experts.velocity(*args, **kwargs))
        self.forwards.append(spent)
        return result


def config_of(rig: Rig, size: str, plan_gb: float, model_file: Path, ram_gb: float = 0.0) -> TrainConfig:
    """Settings of a run; the small one has the same form."""
    frames, height, width = rig.latent(size)
    video = {"width_px": width * 8, "height_px": height * 8, "frames": 4 * (frames - 1) + 1}
    return TrainConfig.from_dict(
        {
            "models": {"high": str(model_file), "low": str(model_file), "text_encoder": "none", "vae": "none"},
            "reward": {"kind": "pavrm", "path": "random"},
            "prompts": [{"text": PROMPT}],
            "video": video,
            "method": "prfl",
            "expert": "high",
            "dtype": "fp32" if rig.dtype == torch.float32 else "bf16",
            "sampling": {"steps": 40, "shift": 5.0, "boundary": 0.875, "guidance": 1.0, "schedule": "unipc"},
            "prfl": {"first_step": GRADIENT_STEP, "last_step": GRADIENT_STEP},
            "lora": {"rank": rig.rank, "alpha": rig.rank / 2, "skip": []},
            # The weights are in memory already, and the plan counts them.
            "engine": {"card_gb": plan_gb * 1e9 / GIB, "ram_gb": ram_gb or rig.ram_bytes / 1e9},
        }
    )


def latent_reward(rig: Rig, model: torch.nn.Module) -> PavrmReward:
    """A PAVRM with random head, whose trunk of its own shares the memory of the generator's first blocks."""
    blocks = min(TRUNK_BLOCKS, rig.shape.blocks)
    trunk, _ = rigs.new_model(rig, blocks=blocks, like=model)
    head = build_head(rig.shape.width, 8 if rig.shape.width % 8 == 0 else 1).float().eval().requires_grad_(False)
    return PavrmReward(Pavrm(trunk, head, (blocks,), dtype=rig.dtype))


def step(rig: Rig, config: TrainConfig, backbone: Any, reward: PavrmReward) -> dict[str, Any]:
    """One whole update, twice: the first one warms up. Seconds and peaks are those of the second."""
    context = rig.context()[0].cpu()
    contexts = ContextCache({PROMPT: context, "": context}, context, rig.device)
    with training_mode(), host_engine.engines(config, {"high": backbone}, rig.device, rig.dtype, latent_reward=reward):
        linears = backbone.linears()
        paths = select_targets(linears, config.lora.targets, config.lora.skip)
        adapter = new_adapter(linears, paths, rank=config.lora.rank, alpha=config.lora.effective_alpha, seed=1, device=rig.device)
        with install(linears, adapter) as switch:
            trainee = new_trainee("high", adapter, switch, config.optimiser, config.steps)
            timed = Timed(Experts(backbones={"high": backbone}, sampling=config.sampling), rig)
            parts = Parts(
                experts=timed, contexts=contexts, sink=lambda event: None, stop_requested=lambda: False, latent_reward=reward, device=rig.device
            )
            objective = objectives.create(config, parts)

            def update(number: int) -> float:
                with switch.merged():
                    loss = objective.add_gradient(trainee, number, 0).loss
                if not trainee.update(number) > 0:
                    raise RuntimeError("the gradient of the LoRA is zero or not a number")
                return loss

            first, _ = rigs.seconds(rig, lambda: update(1))
            timed.forwards.clear()
            memory = rigs.Memory(rig=rig).start()
            whole, loss = rigs.seconds(rig, lambda: update(2))
            peaks = memory.stop()
    forward = statistics.median(timed.forwards)
    rest = whole - sum(timed.forwards)
    return {
        "first_update_s": first, "update_s": whole, "rollout_forwards": len(timed.forwards), "rollout_forward_s": forward,
        "gradient_and_update_s": rest, "micro_step_at_19_forwards_s": MEAN_FORWARDS * forward + rest, "loss": loss, **peaks,
    }  # fmt: skip


class Models:
    """Generator and PAVRM, made once and put back on the host between runs."""

    def __init__(self, rig: Rig, folder: Path) -> None:
        self.free_bytes = free_memory_bytes()
        model, self.own_blocks = rigs.new_model(rig)
        self.file = header.write(model, folder / "wan.safetensors")
        self.reward, self.backbone = latent_reward(rig, model), rigs.new_backbone(rig, model)
        self._places = [rigs.OnHost(model), rigs.OnHost(self.reward._model.model)]
        trunk = self.reward._model.model.blocks
        self.shared_bytes = _bytes(trunk) + _bytes(list(model.blocks)[self.own_blocks :])

    def restore(self) -> None:
        for place in self._places:
            place.restore()

    def quantise(self, rig: Rig) -> None:
        """Turn the generator's Linear weights into scaled fp8 ones; the PAVRM's stay, and have their memory to themselves then."""
        stored: dict[int, dict[str, Any]] = {}
        for index, block in enumerate(self.backbone.model.blocks):
            stored[index] = {}
            for path, linear in block.named_modules():
                if isinstance(linear, torch.nn.Linear):
                    near = linear.weight.to(rig.device)
                    scale = float(near.abs().max().float()) / _LARGEST_E4M3
                    stored[index][f"{path}.weight"] = fp8_weight((near.float() / scale).to(torch.float8_e4m3fn).cpu(), scale)
                    linear.weight = torch.nn.Parameter(torch.empty(linear.weight.shape, dtype=rig.dtype, device="meta"), requires_grad=False)
        self.backbone.quantised = stored
        self._places[0] = rigs.OnHost(self.backbone.model)
        self.shared_bytes = 0


def _bytes(modules: Any) -> int:
    return sum(parameter.numel() * parameter.element_size() for module in modules for parameter in module.parameters())


def one_run(rig: Rig, run: Run, models: Models) -> dict[str, Any]:
    """Plan and steps of one run; the weights are on the host again afterwards."""
    host = rigs.HostMemory(models.free_bytes)
    try:
        with rigs.capped(rig, run.cap_gb):
            config, knobs, refused = _fitting(rig, run, models.file)
            found = step(rig, config, models.backbone, models.reward) if knobs else {}
    finally:
        peak = host.stop()
        models.restore()
    return {
        "run": run.name, "blocks_with_own_memory": models.own_blocks, "planned_for_gb": config.engine.card_gb * GIB / 1e9, "refused_plans": refused,
        "knobs": knobs, **found, "host_peak_bytes": peak, "host_bytes_not_taken_because_shared": models.shared_bytes,
    }  # fmt: skip


def _fitting(rig: Rig, run: Run, path: Path) -> tuple[TrainConfig, dict[str, Any] | None, list[str]]:
    """The settings whose plan fits the smallest card from `plan_gb` on."""
    refused = []
    for card_gb in [run.plan_gb, *(more for more in PLANS_GB if run.plan_gb and more > run.plan_gb)]:
        config = config_of(rig, run.size, card_gb, path, run.ram_gb)
        try:
            return config, vars(host_engine.choose_knobs(config, rig.device)), refused
        except ValueError as error:
            refused.append(f"{card_gb} GB: {error}")
    return config, None, refused


def goals_of(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the runs say about the goals; a run that was not made says nothing, one that failed has missed them."""
    judged = []
    for row in rows:
        run, ran = run_of(row["run"]), "update_s" in row
        why = row.get("error") or "no plan fits: " + "; ".join(row.get("refused_plans", []))
        if run.ram_gb:
            held = (row.get("host_peak_bytes", 0) + row.get("host_bytes_not_taken_because_shared", 0)) / 1e9
            judged.append(goals.goal(f"host.{run.base}", f"{held:.1f} GB" if ran else why, ran and held <= HOST_GB[run.base]))
        elif run.cap_gb:
            key = f"cap{run.cap_gb:.0f}.{run.size}"
            judged.append(goals.goal(key, f"ran, {row.get('process_bytes', 0) / 1e9:.1f} GB with driver" if ran else why, ran))
            if run.cap_gb == PEAK_CAP_GB:
                peak = row.get("allocated_bytes", 0) / 1e9
                judged.append(goals.goal(f"peak.{run.size}", f"{peak:.1f} GB" if ran else why, ran and peak <= PEAK_GB[run.size]))
        else:
            words = "{micro_step_at_19_forwards_s:.1f} s (19 x {rollout_forward_s:.2f} + {gradient_and_update_s:.1f})".format(**row) if ran else why
            judged.append(goals.goal(f"seconds.{run.size}", words, ran and row["micro_step_at_19_forwards_s"] <= SECONDS[run.size]))
    return judged


def measure(rig: Rig, runs: list[str], done: Callable[[dict[str, Any]], None] = lambda result: None) -> dict[str, Any]:
    """All runs; the result so far is handed to `done` after each. A run that fails is told with its error, and the next one begins."""
    rows: list[dict[str, Any]] = []
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        models = Models(rig, Path(folder))
        for run in sorted(map(run_of, runs), key=lambda run: run.base == "fp8"):
            try:
                if run.base == "fp8" and not models.backbone.quantised:
                    models.quantise(rig)
                rows.append(one_run(rig, run, models))
            except (RuntimeError, ValueError) as error:
                rows.append({"run": run.name, "error": f"{type(error).__name__}: {str(error)[:400]}"})
            rigs.free_all(rig)
            note = "micro-step at 19 forwards: 19 times the median rollout forward, plus the measured rest of the step"
            result = rigs.finish(rig, "prfl_step", {"rank": rig.rank, "note": note, "runs": rows}, goals_of(rows))
            done(result)
    return result


def main(argv: list[str]) -> int:
    """Measure, print and write."""
    parser: argparse.ArgumentParser = rigs.arguments("benchmarks.gpu.prfl_step", __doc__)
    parser.add_argument("--runs", nargs="+", default=list(RUNS), help=f"SIZE:PLAN:CAP[:BASE[:RAM]] (default: {' '.join(RUNS)})")
    options = parser.parse_args(argv)
    rigs.show(measure(rigs.rig_of(options), options.runs))
    return 0

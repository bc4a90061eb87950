"""`lab.py bench learning`: do the methods align, at equal compute? The pocket models, the trainer's own loop, and an oracle that no reward model sees.

Every run has the same budget of DiT forward-equivalents (a pass of one video through one expert; a backward is two; decoders and reward models are not
counted) and ends with the update that spends it. Its LoRA is judged on held-out prompts and seeds that are the same for all.

Results are kept per (experiment, seed) in benchmarks/results/learning/ (learning_store.py), so the bench can run in pieces, on several machines: `--only NAME`,
`--seeds 0,1`, `--limit-s 450`. It ends by writing benchmarks/results/learning.json, docs/learning.md and docs/images/learning.png from what is there
(learning_report.py).
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ..host import latent_reward, reward_loading
from ..host.training_mode import training_mode
from ..lora_train import needs, objectives, replay
from ..lora_train.config import RewardSource, TrainConfig
from ..lora_train.evaluation import all_prompts
from ..lora_train.real import RealLatents, write_real
from ..lora_train.rollout import Experts
from ..lora_train.run import Parts, train
from ..reward_models.base import RewardModel, score_in_chunks
from ..reward_models.spec import RewardModelSpec
from . import learning_experiments, learning_report, learning_store, world
from .build import WEIGHTS
from .generate import Generator
from .quality import held_out_scenes
from .stages import dit, pavrm
from .stages.loras import training_prompts
from .table import score_row

REPO = Path(__file__).resolve().parents[1]
RESULTS = REPO / "benchmarks" / "results" / "learning"
SUMMARY = REPO / "benchmarks" / "results" / "learning.json"
PICTURE = REPO / "docs" / "images" / "learning.png"
PAGE = REPO / "docs" / "learning.md"
WORK = REPO / ".lab" / "learning"
REAL_CLIPS = 96
TRAINING_PROMPTS = 128
PAVRM_SIGMAS = (0.3, 0.6, 0.9)


class Bench:
    """Models of the bench, loaded once."""

    def __init__(self, weights: Path, work: Path) -> None:
        self.generator = Generator(weights)
        self.weights, self.work = weights, work
        work.mkdir(parents=True, exist_ok=True)
        self.judge, self.mps = (reward_loading.load(RewardModelSpec.from_dict(learning_experiments.reward(weights, kind))) for kind in ("hpsv2.1", "mps"))
        spec = RewardModelSpec(kind="pavrm", path=str(weights / pavrm.FILE_NAME))
        self.pavrm = latent_reward.load(spec, {}, {}, device=torch.device("cpu"), dtype=torch.float32)

    def real_latents(self, *, mislabelled: bool) -> Path:
        """Clips of training scenes, rendered and encoded once; mislabelled: under captions that lie as often as those that spoiled the base."""
        path = self.work / _clips_file(mislabelled)
        if not path.exists():
            rng = random.Random(77)
            scenes = [world.sample_scene(rng, held_out=False, two_share=0.0) for _ in range(REAL_CLIPS)]
            captions = dit.captions(scenes, rng, 0.0, dit.LIES) if mislabelled else [world.caption(scene) for scene in scenes]
            write_real(path, self._encoded(scenes), captions)
        return path

    @torch.no_grad()
    def _encoded(self, scenes: Sequence[world.Scene]) -> torch.Tensor:
        """Rendered clips as latents in model space."""
        latents = []
        for start in range(0, len(scenes), 16):
            clips = torch.stack([torch.from_numpy(world.render(scene)) for scene in scenes[start : start + 16]])
            with training_mode(), torch.no_grad():
                latents.append(self.generator.decoder.encode(clips.permute(0, 1, 4, 2, 3)))
        return torch.cat(latents)

    def train(self, experiment: learning_experiments.Experiment, seed: int, folder: Path) -> dict[str, Any]:
        """Run the training; returns its curve and what it cost."""
        config = TrainConfig.from_dict(settings(experiment, seed, self.real_latents(mislabelled=experiment.mislabelled)))
        experts = Experts(backbones=self.generator.backbones, sampling=config.sampling)
        steps: list = []
        real = RealLatents(config.real.path) if needs.real_latents(config) else None
        contexts = self.generator.contexts([*all_prompts(config), *(real.prompts if real else ())])
        parts = Parts(
            experts=experts,
            contexts=contexts,
            sink=lambda event: steps.append(event) if event.name in ("step", "finished") else None,
            stop_requested=lambda: experts.count.total >= experiment.budget,
            decoder=self.generator.decoder,
            reward=None if needs.scores_latents(config) else _loaded(config.reward),
            latent_reward=self.pavrm if needs.pavrm(config) else None,
            motion=RewardModelSpec(kind="dynamic_degree", path="").load() if config.guards.motion_floor > 0 else None,
            judge=_loaded(config.held_out.judge) if config.held_out.judge else None,
            real=real,
        )
        begun = time.perf_counter()
        with training_mode():
            parts = replay.with_clips(config, parts, folder)
            finished = train(config, parts, objectives.create(config, parts), folder, resume=folder.exists())
        updates = [event for event in steps if event.name == "step"]
        curve = [
            {
                "step": event.step, "forwards": event.forwards, "reward": event.reward, "kl": event.kl, "held_out": event.held_out,
                "held_out_base": event.held_out_base, "motion": event.held_out_motion, "judge": event.held_out_judge,
            }
            for event in updates
        ]  # fmt: skip
        ended = {"reason": finished.reason, "detail": finished.detail, "files": finished.files, "seconds": time.perf_counter() - begun}
        return {"curve": curve, "forwards": experts.count.total, "updates": len(updates), **ended}

    def judged(self, files: list[str], seed: int, pairs: int) -> dict[str, list[float]]:
        """Every measure of every held-out video."""
        loras = [(Path(file), "high" if "-high-noise-" in Path(file).name else "low", 1.0) for file in files]
        scenes = _judged_scenes(seed, pairs)
        prompts = [world.caption(scene) for scene in scenes]
        latents = self.generator.latents(prompts, [seed * 1_000_003 + index for index in range(pairs)], loras)
        return self._measured(latents, scenes, seed)

    def rendered(self, seed: int, pairs: int) -> dict[str, list[float]]:
        """The same of the truth: what the prompts tell, rendered, through the VAE. No generator does better without pleasing a reward beyond it."""
        scenes = _judged_scenes(seed, pairs)
        return self._measured(self._encoded(scenes), scenes, seed)

    def _measured(self, latents: torch.Tensor, scenes: Sequence[world.Scene], seed: int) -> dict[str, list[float]]:
        frames = self.generator.frames(latents)
        row = score_row(self.judge, "", frames, scenes)
        values = {name: numbers.tolist() for name, numbers in row.values.items()}
        values["text"] = [colour * shape for colour, shape in zip(values["colour"], values["shape"], strict=True)]
        prompts = [world.caption(scene) for scene in scenes]
        with torch.no_grad():
            values["mps"] = score_in_chunks(self.mps, frames, prompts, 64).per_video.tolist()
        return {**values, "pavrm": self._pavrm(latents, prompts, seed)}

    @torch.no_grad()
    def _pavrm(self, clean: torch.Tensor, prompts: list[str], seed: int) -> list[float]:
        """PAVRM probability of finished latents, noised; the mean over noise levels."""
        noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(seed))
        context = self.generator.contexts(prompts).batch(prompts).prompt_BPD
        with training_mode(), torch.no_grad():
            scores = [self.pavrm.score((1 - sigma) * clean + sigma * noise, sigma, context).probability_B for sigma in PAVRM_SIGMAS]
        return torch.stack(scores).mean(0).tolist()


def _clips_file(mislabelled: bool) -> str:
    return "mislabelled.safetensors" if mislabelled else "real.safetensors"


def _judged_scenes(seed: int, pairs: int) -> list[world.Scene]:
    return held_out_scenes(pairs, 40_000 + seed, two_share=0.0)


def _loaded(source: RewardSource) -> RewardModel:
    return reward_loading.load(RewardModelSpec.from_dict(asdict(source)))


def settings(experiment: learning_experiments.Experiment, seed: int, real: Path) -> dict[str, Any]:
    """Settings of a run, for `TrainConfig.from_dict`."""
    return learning_experiments.settings(experiment, WEIGHTS, seed, training_prompts(TRAINING_PROMPTS, 500 + seed), real)


def recipe(name: str, seed: int, pairs: int) -> str:
    """What a result depends on, the pocket models included."""
    models = json.loads((REPO / "pocket" / "MANIFEST.json").read_text(encoding="utf-8"))["files"]
    experiment = learning_experiments.EXPERIMENTS.get(name)
    values = settings(experiment, seed, Path(_clips_file(experiment.mislabelled))) if experiment else {}
    return learning_store.recipe({**values, "files": [file["sha256"] for file in models]}, experiment.budget if experiment else 0.0, pairs)


def run_one(bench: Bench, name: str, seed: int, pairs: int, made_of: str) -> dict[str, Any]:
    """Train and judge one (experiment, seed), or judge the base or rendered clips; `made_of` is its recipe."""
    begun = time.perf_counter()
    if name in (learning_experiments.BASE, learning_experiments.RENDERED):
        oracle = bench.judged([], seed, pairs) if name == learning_experiments.BASE else bench.rendered(seed, pairs)
        return {"experiment": name, "seed": seed, "recipe": made_of, "oracle": oracle, "seconds": time.perf_counter() - begun}
    experiment = learning_experiments.EXPERIMENTS[name]
    folder = bench.work / f"run-{name}-{seed}-{made_of}"
    result = bench.train(experiment, seed, folder)
    oracle = bench.judged(result.pop("files"), seed, pairs)
    forwards = {point["step"]: point["forwards"] for point in result["curve"]}
    looks = []
    for step in sorted(set(experiment.looks) & set(forwards)):
        files = [str(path) for path in sorted((folder / "checkpoints").glob(f"*-noise-*-step{step:06d}.safetensors"))]
        if not files:
            raise ValueError(f"{name} looks at update {step}, but kept no checkpoint of it; make checkpoint_every divide it and keep_checkpoints larger")
        looks.append({"step": step, "forwards": forwards[step], "oracle": bench.judged(files, seed, pairs)})
    cost = {"budget": experiment.budget, "seconds": time.perf_counter() - begun}
    return {"experiment": name, "seed": seed, "recipe": made_of, **result, **cost, "oracle": oracle, "looks": looks}


def _means(values: Mapping[str, list[float]]) -> dict[str, float]:
    return {name: sum(numbers) / len(numbers) for name, numbers in values.items()}


def main(argv: list[str]) -> int:
    """Run what is missing, then report."""
    parser = argparse.ArgumentParser(prog="lab.py bench learning", description=__doc__.split("\n")[0])
    parser.add_argument("--results", type=Path, default=RESULTS, help="a file for each result; what is there is not run again")
    parser.add_argument("--work", type=Path, default=WORK, help="clips and run folders")
    parser.add_argument("--seeds", default="0,1,2", help="of the comparison (default: 0,1,2); tune on others")
    parser.add_argument("--only", default="", help="names of experiments, with commas between (default: all)")
    parser.add_argument("--pairs", type=int, default=64, help="held-out prompt/seed pairs per seed (default: 64)")
    parser.add_argument("--limit-s", type=float, default=0.0, help="start no run after so many seconds; the same command goes on")
    parser.add_argument("--report", action="store_true", help="run nothing; sum up what there is")
    options = parser.parse_args(argv)
    begun = time.monotonic()
    bench = None
    todo = learning_experiments.plan([int(seed) for seed in options.seeds.split(",")], options.only.split(",") if options.only else None)
    for name, seed in () if options.report else todo:
        made_of = recipe(name, seed, options.pairs)
        target = learning_store.path(options.results, name, seed)
        if target.exists():
            if learning_store.read_one(target)["recipe"] == made_of:
                continue
            print(f"{target.name} was made with other settings or models and is made again", flush=True)
        if options.limit_s and time.monotonic() - begun > options.limit_s:
            print(f"not started yet: {name}, seed {seed}; run the same command again", flush=True)
            return 3
        bench = bench or Bench(WEIGHTS, options.work)
        result = run_one(bench, name, seed, options.pairs, made_of)
        learning_store.write(options.results, result)
        means = _means(result["oracle"])
        shown = ", ".join(f"{key} {means[key]:.4f}" for key in ("reward", "text", "colour", "shape", "motion", "dynamic_degree", "pavrm", "mps"))
        cost = f"{result.get('updates', 0)} updates, {result.get('forwards', 0):.0f} forwards, {result['seconds']:.0f} s"
        print(f"{name} seed {seed}: {cost}; {shown}", flush=True)
    if options.report or not options.only:
        learning_report.write(options.results, SUMMARY, PICTURE, PAGE)
    return 0

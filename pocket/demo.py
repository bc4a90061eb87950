"""The whole product in one go, on the pocket models: `python lab.py demo`.

In a real ComfyUI server it runs the three example workflows as a user would (press Run and wait), trains a reward LoRA in the
background while the queue works, and then measures base, reward LoRAs and the new LoRA on held-out prompts with the oracle.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from ..labtools.client import Client
from ..labtools.workflow import to_prompt
from ..reward_models.loader import load_reward_model
from ..testlab.plot import Curve, line_chart
from . import table as comparison
from .demo_report import write_report
from .stages import hps, loras

REPO = Path(__file__).resolve().parents[1]
WORKFLOWS = {"sample": "1 load and sample", "testlab": "2 testlab strengths", "train": "3 train a reward lora"}
TRAIN_LIMIT_S = 420.0


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="lab.py demo")
    parser.add_argument("--server", required=True)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pairs", type=int, default=128, help="held-out prompt/seed pairs of every row")
    options = parser.parse_args(argv)
    options.out.mkdir(parents=True, exist_ok=True)
    demo = _Demo(Client(options.server), options.base, options.out, options.seed)
    demo.clear_old_results()
    run_id = demo.start_training()
    demo.sample()
    demo.sweep()
    run = demo.wait_for_training(run_id)
    demo.draw_reward(run_id)
    rows = demo.compare(run, options.pairs)
    write_report(options.out, run, rows, demo.seconds)
    print(f"\n{comparison.as_text(rows)}\n\nWrote {options.out}: report.html, grid.mp4, grid.png, reward.png, table.json ({demo.elapsed():.0f} s)")
    return 0


class _Demo:
    """The steps of the demo; `seconds` keeps how long each took."""

    def __init__(self, client: Client, base: Path, out: Path, seed: int) -> None:
        self.client, self.base, self.out, self.seed = client, base, out, seed
        self.object_info = client.get("/object_info", limit_s=120)
        self.seconds: dict[str, float] = {}
        self._begun = time.monotonic()

    def elapsed(self) -> float:
        return time.monotonic() - self._begun

    def _timed(self, name: str, action: Callable[[], dict]) -> dict:
        print(f"[{self.elapsed():4.0f} s] {name} ...", flush=True)
        begun = time.monotonic()
        result = action()
        self.seconds[name] = time.monotonic() - begun
        return result

    def _prompt(self, name: str) -> dict:
        """The API prompt of an example workflow, with the demo's seed in every seed widget."""
        graph = json.loads((REPO / "example_workflows" / f"{WORKFLOWS[name]}.json").read_text(encoding="utf-8"))
        prompt = to_prompt(graph, self.object_info)
        for node in prompt.values():
            if "seed" in node["inputs"]:
                node["inputs"]["seed"] += self.seed
        return prompt

    def clear_old_results(self) -> None:
        """Cells and runs of an earlier demo would be taken for this one's."""
        for folder in ("sweeps", "runs"):
            shutil.rmtree(self.base / "output" / "reward_lab" / folder, ignore_errors=True)

    def start_training(self) -> str:
        prompt = self._prompt("train")
        # The node that waits for the result stays out: the queue must be free while the run goes on.
        prompt = {key: node for key, node in prompt.items() if node["class_type"] not in ("RewardLabRunResult", "PreviewImage", "SaveLoRA")}
        self._timed("start training a reward LoRA in the background", lambda: self.client.run(prompt))
        runs = self.client.get("/reward_lab/runs")
        return runs[0]["id"]

    def sample(self) -> None:
        self._timed("workflow 1: load models and LoRAs, sample, score", lambda: self.client.run(self._prompt("sample")))

    def sweep(self) -> None:
        prompt = self._prompt("testlab")
        name = next(node["inputs"]["sweep"] for node in prompt.values() if node["class_type"] == "RewardLabTestLabGrid")

        def run() -> dict:
            self.client.run(prompt)
            self.client.wait_idle()
            return {}

        self._timed("workflow 2: sweep the strengths in TestLab", run)
        folder = self.base / "output" / "reward_lab" / "sweeps" / name
        for file in ("grid.png", "grid.mp4"):
            shutil.copyfile(folder / file, self.out / file)

    def wait_for_training(self, run_id: str) -> dict:
        def wait() -> dict:
            deadline = time.monotonic() + TRAIN_LIMIT_S
            while (info := self.client.get(f"/reward_lab/runs/{run_id}"))["state"] in ("created", "running", "stopping"):
                if time.monotonic() > deadline:
                    at = f"step {info['step']} of {info['steps']}"
                    raise SystemExit(f"the run {run_id} is not done after {TRAIN_LIMIT_S:.0f} s ({at}); see {self._run_folder(run_id)}/log.txt")
                time.sleep(0.5)
            if info["state"] != "finished":
                raise SystemExit(f"the training run {run_id} ended as {info['state']}: {info['error']}")
            return info

        return self._timed("workflow 3: wait for the training run", wait)

    def _run_folder(self, run_id: str) -> Path:
        return self.base / "output" / "reward_lab" / "runs" / run_id

    def draw_reward(self, run_id: str) -> None:
        events = [json.loads(line) for line in (self._run_folder(run_id) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        steps = [event for event in events if event["event"] == "step"]
        base = next((event["held_out_base"] for event in steps if event["held_out_base"] is not None), None)
        held_out = (base, *(event["held_out"] for event in steps))
        curves = [
            Curve(label="reward of each update", values=(math.nan, *(event["reward"] for event in steps)), smooth=True),
            Curve(label="held-out prompts, fixed seeds", values=tuple(math.nan if value is None else value for value in held_out), sparse=True),
        ]
        chart = line_chart(curves, title="Reward of the LoRA in training", subtitle=f"run {run_id}, {len(steps)} updates", x_label="update")
        chart.save(self.out / "reward.png")

    def compare(self, run: dict, pairs: int) -> list[comparison.Row]:
        weights = REPO / "pocket" / "weights"
        kinds = [(name, expert) for name in loras.REWARDS for expert in ("high", "low")]
        official = [(f"{name}, {expert} noise", [(weights / loras.file_name(name, expert), expert, 1.0)]) for name, expert in kinds]
        trained = [(path, "high" if "-high-noise-" in path.name else "low", 1.0) for path in sorted(self._run_folder(run["id"]).glob("*.safetensors"))]
        rows = [("base", []), *official, ("just trained", trained)]
        reward = load_reward_model("hpsv2.1", weights / hps.FILE_NAME)
        measured = self._timed(
            f"compare on {pairs} held-out prompt/seed pairs",
            lambda: {"rows": comparison.measure(weights, reward, rows, pairs=pairs, seed=self.seed)},
        )
        result = measured["rows"]
        (self.out / "table.json").write_text(json.dumps(comparison.as_json(result), indent=1), encoding="utf-8")
        return result

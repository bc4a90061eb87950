"""Nodes that plan a training run, start it in the background and fetch what it made."""

from __future__ import annotations

from comfy_api.latest import io

from ..host import plan_report, queue, training
from .types import Prompts, RewardModel, Run, WanFiles, run_output, seed_and_settings

_HELD_OUT = "Prompts to judge by and never to train on, the second list of Prompt Set: their reward is measured before the run and at every tenth of it."
_ALPHA = "Alpha of the LoRA; its change is scaled by alpha / rank. Official reward LoRAs: 64 at rank 128."


def run_inputs() -> list[io.Input]:
    """What describes a training run; Memory Plan takes the same."""
    return [
        WanFiles.Input("wan_files", tooltip="The model files, from Load Wan2.2 Models."),
        Prompts.Input("prompts", tooltip="What to train on, from Prompt Set."),
        RewardModel.Input("reward_model", tooltip="What to raise, from Load Reward Model."),
        io.String.Input("name", default="my_reward_lora", tooltip="Name of the LoRA file: <name>-high-noise-<reward>.safetensors and -low-noise-."),
        io.Combo.Input(
            "expert",
            options=["high", "low", "both"],
            default="low",
            tooltip="Which expert gets a LoRA. 'both' trains them in turn and writes two files. Of the 5B model, which has no experts, the one model.",
        ),
        io.Combo.Input(
            "preset",
            options=list(training.PRESETS),
            default="reward-lab",
            tooltip="Method and settings. reward-lab: this pack's defaults, which sample nothing and learn from your clips (real.path) or from some "
            "that the base model makes first. reward-lab-backprop: reward backpropagation as we run it. videox-fun: the published recipe of the "
            "official reward LoRAs. reward-lab-prfl: PRFL, on the score of noisy latents by a PAVRM. hy-video-prfl: its published recipe, which needs "
            "real videos. roll-reward-flow: gradient through several steps in a row. The widgets below override each.",
        ),
        io.Int.Input("steps", default=100, min=1, max=1_000_000, tooltip="Optimiser steps."),
        io.Int.Input("rank", default=16, min=1, max=1024, tooltip="Rank of the LoRA. Official reward LoRAs: 128."),
        io.Float.Input("alpha", default=8.0, min=0.01, max=4096.0, step=0.5, tooltip=_ALPHA),
        io.Float.Input(
            "learning_rate", default=1e-4, min=0.0, max=1.0, step=1e-6, round=1e-9, tooltip="Learning rate of AdamW. Official reward LoRAs: 1e-5 at batch 8."
        ),
        io.Int.Input("batch", default=1, min=1, max=256, tooltip="Videos per step."),
        io.Int.Input("width", default=256, min=16, max=4096, step=16, tooltip="Width of the training videos in pixels."),
        io.Int.Input("height", default=256, min=16, max=4096, step=16, tooltip="Height of the training videos in pixels."),
        io.Int.Input("frames", default=81, min=1, max=1001, step=4, tooltip="Frames of the training videos: 4 n + 1."),
        io.Int.Input("sampling_steps", default=40, min=1, max=1000, tooltip="Sampling steps of each training video."),
        io.Float.Input("guidance", default=6.0, min=1.0, max=100.0, step=0.1, tooltip="Guidance scale (CFG) while sampling the training videos."),
        *seed_and_settings("Seed of noise, prompt order and LoRA initialisation.", '{"objective": {"kl_weight": 0.1}}'),
        Prompts.Input("held_out", optional=True, tooltip=_HELD_OUT),
    ]


class TrainLoRA(io.ComfyNode):
    """Starts reward training in a process of its own and returns at once."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Return the node's inputs and outputs."""
        return io.Schema(
            node_id="RewardLabTrainLoRA",
            display_name="Train Reward LoRA",
            category="Reward Lab/training",
            description="Trains a LoRA by one pass over clips, reward backpropagation, PRFL or reward flow, in the background. The queue stays free; follow "
            "the run in the Reward Lab sidebar tab, stop it there, and use Run Result to fetch the LoRA. Settings that have been trained already are "
            "not trained again: change the seed or the name.",
            search_aliases=["train lora", "reward training", "draft", "reward backpropagation"],
            inputs=run_inputs(),
            outputs=[run_output()],
            is_output_node=True,
        )

    @classmethod
    def fingerprint_inputs(cls, **_inputs) -> float:
        """Never equal: whether these settings have been trained is looked up in the run folders."""
        return float("nan")

    @classmethod
    def execute(cls, wan_files: dict, prompts: list, reward_model, **settings) -> io.NodeOutput:
        """Start the run. Raises ValueError for settings that cannot work, before anything starts."""
        started = training.start_run(wan_files, prompts, reward_model, settings)
        return io.NodeOutput(started.run_id, ui={"text": [started.message], "reward_lab_run": [started.run_id]})


class MemoryPlan(io.ComfyNode):
    """Tells before a run what it will need, and what to change if it does not fit."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Return the node's inputs and outputs."""
        return io.Schema(
            node_id="RewardLabMemoryPlan",
            display_name="Memory Plan",
            category="Reward Lab/training",
            description="Predicts what a training run would need on the card and in memory and how long an update takes, chooses how the model is run in the "
            "memory at hand, and says what to change if it does not fit. Reads the headers of the model files only; nothing is loaded.",
            search_aliases=["vram", "out of memory", "plan", "fits", "training memory"],
            inputs=[
                *run_inputs(),
                io.Combo.Input(
                    "shape",
                    options=list(plan_report.SHAPE_CHOICES),
                    default=plan_report.THESE_FILES,
                    tooltip="Size of the experts: that of the chosen files, or of a published model that need not be there.",
                ),
                io.Combo.Input(
                    "card",
                    options=list(plan_report.CARD_CHOICES),
                    default=plan_report.THIS_MACHINE,
                    tooltip="Card to plan for. Rates of named cards are assumed from published figures; the memory is that of the card.",
                ),
                io.Float.Input("card_gb", default=0.0, min=0.0, max=1024.0, step=0.5, tooltip="So much of the card's memory, in GiB; 0 takes all of it."),
                io.Float.Input("ram_gb", default=0.0, min=0.0, max=8192.0, step=1.0, tooltip="Memory for the run, in GB; 0 takes what this machine has free."),
            ],
            outputs=[
                io.String.Output("table", display_name="table", tooltip="The whole plan as text."),
                io.Boolean.Output("fits", display_name="fits", tooltip="Whether it fits."),
                io.String.Output("json", display_name="json", tooltip="The plan as JSON, as `lab.py plan --json` prints it."),
                io.Image.Output("chart", display_name="chart", tooltip="Peaks by phase against card and memory."),
            ],
            is_output_node=True,
        )

    @classmethod
    def fingerprint_inputs(cls, **_inputs) -> float:
        """Never equal: free memory changes."""
        return float("nan")

    @classmethod
    def execute(cls, wan_files: dict, prompts: list, reward_model, shape: str, card: str, card_gb: float, ram_gb: float, **settings) -> io.NodeOutput:
        """Plan. Raises ValueError for settings that cannot work; a run that does not fit is a plan that says so."""
        made = plan_report.report(wan_files, prompts, reward_model, settings, shape=shape, card=card, card_gb=card_gb, ram_gb=ram_gb)
        return io.NodeOutput(made.text, made.fits, made.json, made.chart, ui={"images": made.chart_files, "text": [made.verdict]})


class RunResult(io.ComfyNode):
    """Fetches the LoRAs, the curves and the file names of a run; can wait for it to end."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Return the node's inputs and outputs."""
        return io.Schema(
            node_id="RewardLabRunResult",
            display_name="Run Result",
            category="Reward Lab/training",
            description="Fetches what a training run has made so far, or waits for its end. LORA_MODEL and LOSS_MAP fit the host's own LoRA nodes.",
            search_aliases=["training result", "loss graph", "lora model"],
            inputs=[
                Run.Input("run", tooltip="From Train Reward LoRA."),
                io.Boolean.Input(
                    "wait",
                    default=False,
                    tooltip="Wait for the run to end, with a progress bar. This occupies the queue; cancelling stops the waiting, not the run.",
                ),
            ],
            outputs=[
                io.LoraModel.Output("lora_high", display_name="lora_high", tooltip="The newest LoRA of the high-noise expert, if the run trains it."),
                io.LoraModel.Output("lora_low", display_name="lora_low", tooltip="The newest LoRA of the low-noise expert, if the run trains it."),
                io.LossMap.Output("loss_map", display_name="loss_map", tooltip="Loss and reward of every step."),
                io.String.Output("file_names", display_name="file_names", tooltip="Paths of these LoRA files, one a line."),
                io.Image.Output("chart", display_name="chart", tooltip="Reward and loss over the steps."),
            ],
            is_output_node=True,
        )

    @classmethod
    def fingerprint_inputs(cls, **_inputs) -> float:
        """Never equal: a run changes while it trains."""
        return float("nan")

    @classmethod
    def execute(cls, run: str, wait: bool) -> io.NodeOutput:
        """Fetch the result. Raises ValueError when the run is unknown or has written no LoRA yet, RuntimeError with the log's end when it failed."""
        result = training.run_result(run, wait)
        high, low = (result.loras.get(expert) or queue.refused(training.not_trained(run, expert)) for expert in ("high", "low"))
        ui = {"images": result.chart_files, "text": [result.message]}
        return io.NodeOutput(high, low, result.loss_map, "\n".join(map(str, result.files.values())), result.chart, ui=ui)

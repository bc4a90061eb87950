"""Nodes that start a training run in the background and fetch what it made."""

from __future__ import annotations

from comfy_api.latest import io

from ..host import queue, training
from .types import Prompts, RewardModel, Run, WanFiles


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
            inputs=[
                WanFiles.Input("wan_files", tooltip="The model files, from Load Wan2.2 Models."),
                Prompts.Input("prompts", tooltip="What to train on, from Prompt Set."),
                RewardModel.Input("reward_model", tooltip="What to raise, from Load Reward Model."),
                io.String.Input("name", default="my_reward_lora", tooltip="Name of the LoRA file: <name>-high-noise-<reward>.safetensors and -low-noise-."),
                io.Combo.Input(
                    "expert",
                    options=["high", "low", "both"],
                    default="low",
                    tooltip="Which expert gets a LoRA. 'both' trains one after the other and writes two files.",
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
                io.Float.Input(
                    "alpha",
                    default=8.0,
                    min=0.01,
                    max=4096.0,
                    step=0.5,
                    tooltip="Alpha of the LoRA; its change is scaled by alpha / rank. Official reward LoRAs: 64 at rank 128.",
                ),
                io.Float.Input(
                    "learning_rate",
                    default=1e-4,
                    min=0.0,
                    max=1.0,
                    step=1e-6,
                    round=1e-9,
                    tooltip="Learning rate of AdamW. Official reward LoRAs: 1e-5 at batch 8.",
                ),
                io.Int.Input("batch", default=1, min=1, max=256, tooltip="Videos per step."),
                io.Int.Input("width", default=256, min=16, max=4096, step=16, tooltip="Width of the training videos in pixels."),
                io.Int.Input("height", default=256, min=16, max=4096, step=16, tooltip="Height of the training videos in pixels."),
                io.Int.Input("frames", default=81, min=1, max=1001, step=4, tooltip="Frames of the training videos: 4 n + 1."),
                io.Int.Input("sampling_steps", default=40, min=1, max=1000, tooltip="Sampling steps of each training video."),
                io.Float.Input("guidance", default=6.0, min=1.0, max=100.0, step=0.1, tooltip="Guidance scale (CFG) while sampling the training videos."),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0x7FFFFFFF,
                    control_after_generate=io.ControlAfterGenerate.fixed,
                    tooltip="Seed of noise, prompt order and LoRA initialisation.",
                ),
                io.String.Input(
                    "advanced",
                    multiline=True,
                    default="{}",
                    placeholder='{"objective": {"kl_weight": 0.1}}',
                    tooltip="JSON that overrides single settings of the training config, by section. Unknown names are refused.",
                    advanced=True,
                ),
            ],
            outputs=[Run.Output("run", display_name="run", tooltip="The run, for Run Result.")],
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

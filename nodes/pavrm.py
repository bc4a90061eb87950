"""Nodes that make a labelled dataset of videos and train a PAVRM on it."""

from __future__ import annotations

from comfy_api.latest import io

from ..host import paths, pavrm_nodes, training
from ..lora_train.labels import QUALITIES
from ..lora_train.pavrm_config import LOSSES, POOLINGS
from .types import Dataset, WanFiles, run_output, seed_and_settings


class VideoDataset(io.ComfyNode):
    """Encodes a folder of videos into latents and text embeddings, cached on disk."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Return the node's inputs and outputs."""
        return io.Schema(
            node_id="RewardLabDataset",
            display_name="Video Dataset",
            category="Reward Lab/training",
            description="Decodes, resizes and encodes a folder of videos (or the cells of a TestLab sweep) into a dataset to label and to train PAVRM "
            "on. Everything is cached by content: a second run encodes only new videos. Broken videos are skipped and listed.",
            search_aliases=["dataset", "preprocess", "encode videos", "latent cache"],
            inputs=[
                WanFiles.Input("wan_files", tooltip="From Load Wan2.2 Models; its VAE and text encoder encode."),
                io.String.Input("name", default="my_dataset", tooltip="Name of the dataset: its folder under output/reward_lab/datasets."),
                io.String.Input(
                    "folder", default="videos", tooltip="Folder of videos: a name in the input folder or an absolute path. sweep:NAME takes a sweep."
                ),
                io.String.Input(
                    "prompt",
                    default="",
                    multiline=True,
                    tooltip="Caption of every video that has no text file of its name beside it. Not used with prompts_file.",
                ),
                io.String.Input(
                    "prompts_file", default="", tooltip="Captions per video: TXT in order, or CSV / JSON / JSONL by file name; in the input folder."
                ),
                io.Float.Input("frame_rate", default=16.0, min=0.1, max=240.0, step=0.1, tooltip="Frames per second. Wan2.2 14B: 16."),
                io.Int.Input("frames", default=81, min=1, max=1001, step=4, tooltip="At most so many frames, 4 n + 1; shorter videos are cut to 4 n + 1."),
                io.Int.Input("short_px", default=480, min=16, max=4096, step=16, tooltip="Short side in pixels; used when width and height are 0."),
                io.Int.Input("long_px", default=832, min=16, max=8192, step=16, tooltip="Most that the long side may be; used when width and height are 0."),
                io.Int.Input("width_px", default=0, min=0, max=8192, step=16, tooltip="Exact width; 0 goes by the short side."),
                io.Int.Input("height_px", default=0, min=0, max=8192, step=16, tooltip="Exact height; 0 goes by the short side."),
                io.Combo.Input("dtype", options=["bf16", "fp16", "fp32"], default="bf16", tooltip="Precision of the caches."),
            ],
            outputs=[
                Dataset.Output("dataset", display_name="dataset", tooltip="The dataset, for Train PAVRM."),
                io.String.Output("report", display_name="report", tooltip="What was encoded, and what was skipped and why."),
            ],
            is_output_node=True,
        )

    @classmethod
    def fingerprint_inputs(cls, **_inputs) -> float:
        """Never equal: the folder may have new videos; what is cached costs no time."""
        return float("nan")

    @classmethod
    def execute(cls, wan_files: dict, name: str, folder: str, **settings) -> io.NodeOutput:
        """Encode. Raises ValueError for settings that the VAE cannot take, or when no video can be used."""
        dataset, report = pavrm_nodes.make_dataset(wan_files, name, folder, settings)
        return io.NodeOutput(dataset, report, ui={"text": [report]})


class TrainPAVRM(io.ComfyNode):
    """Starts PAVRM training in a process of its own and returns at once."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Return the node's inputs and outputs."""
        return io.Schema(
            node_id="RewardLabTrainPAVRM",
            display_name="Train PAVRM",
            category="Reward Lab/training",
            description="Trains a reward model of noisy latents on labelled videos (cross-entropy) or on votes and pairs (Bradley-Terry), in a background "
            "process. Accuracy by noise level, calibration and scores per video are shown in the Reward Lab sidebar tab.",
            search_aliases=["pavrm", "reward model training", "preference", "latent reward"],
            inputs=[
                WanFiles.Input("wan_files", tooltip="From Load Wan2.2 Models; an expert of it is the trunk to begin with."),
                Dataset.Input("dataset", tooltip="From Video Dataset, labelled on the labelling page."),
                io.String.Input("name", default="my_pavrm", tooltip="Name of the file: <name>.safetensors in output/reward_models."),
                io.Combo.Input(
                    "trunk",
                    options=list(pavrm_nodes.TRUNKS),
                    default=pavrm_nodes.TRUNKS[0],
                    tooltip="What training begins with: an expert's first blocks, or a PAVRM.",
                ),
                io.Combo.Input(
                    "pavrm_file",
                    options=[pavrm_nodes.NO_FILE, *paths.model_files(paths.REWARD_MODEL_FOLDER)],
                    default=pavrm_nodes.NO_FILE,
                    tooltip="The PAVRM to go on with; only for trunk 'PAVRM file'.",
                ),
                io.Combo.Input(
                    "quality", options=list(QUALITIES), default="motion_quality", tooltip="Which label is learned. motion_quality: physics and human."
                ),
                io.Combo.Input("loss", options=list(LOSSES), default="ce", tooltip="ce: labels. bt: pairs (votes, or good against bad). both: their sum."),
                io.String.Input(
                    "votes", default="", tooltip="Name of a sweep whose votes are the pairs; the dataset must hold its videos. Needs loss bt or both."
                ),
                io.Combo.Input(
                    "noise", options=["shifted", "uniform", "logit_normal"], default="shifted", tooltip="How noise levels are drawn. shifted: published."
                ),
                io.Int.Input("blocks", default=8, min=0, max=200, tooltip="Blocks kept of the trunk, all trained. Published: 8. 0: as the file has it."),
                io.Combo.Input("pooling", options=list(POOLINGS), default="query", tooltip="How tokens become one vector. query: published."),
                io.Int.Input("steps", default=1000, min=1, max=1_000_000, tooltip="Optimiser steps."),
                io.Int.Input("batch", default=1, min=1, max=256, tooltip="Videos (or pairs) per step."),
                io.Float.Input("block_lr", default=1e-6, min=0.0, max=1.0, step=1e-7, round=1e-10, tooltip="Learning rate of the blocks. Published: 1e-6."),
                io.Float.Input("head_lr", default=1e-5, min=0.0, max=1.0, step=1e-6, round=1e-9, tooltip="Learning rate of pooling and head. Published: 1e-5."),
                *seed_and_settings("Seed of noise, order, held-out videos and head.", '{"optimiser": {"accumulate": 8, "ema_decay": 0.99}}'),
            ],
            outputs=[run_output()],
            is_output_node=True,
        )

    @classmethod
    def fingerprint_inputs(cls, **_inputs) -> float:
        """Never equal: labels and votes change, and whether this was trained is looked up in the run folders."""
        return float("nan")

    @classmethod
    def execute(cls, wan_files: dict, dataset: str, **settings) -> io.NodeOutput:
        """Start the run. Raises ValueError for settings or labels that cannot work, before anything starts."""
        started: training.StartedRun = pavrm_nodes.start_run(wan_files, dataset, settings)
        return io.NodeOutput(started.run_id, ui={"text": [started.message], "reward_lab_run": [started.run_id]})

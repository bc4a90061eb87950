"""Nodes that choose a reward model and score videos with it."""

from __future__ import annotations

from comfy_api.latest import io

from ..host import paths, scoring
from .types import RewardModel


class RewardModelNode(io.ComfyNode):
    """Names a reward model and its weights; loading happens where it is first used."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Return the node's inputs and outputs."""
        return io.Schema(
            node_id="RewardLabRewardModel",
            display_name="Load Reward Model",
            category="Reward Lab/reward",
            description="Chooses a reward model (HPSv2.1 or MPS) and its weights from models/reward_models. Used by Score "
            "Video, TestLab Cell and Train Reward LoRA.",
            search_aliases=["hps", "hpsv2", "mps", "human preference score", "aesthetic"],
            inputs=[
                io.Combo.Input(
                    "kind",
                    options=list(scoring.REWARD_KINDS),
                    default="hpsv2.1",
                    tooltip="hpsv2.1: how much people would like a picture for its prompt. mps: Multi-dimensional Preference Score, overall condition.",
                ),
                io.Combo.Input(
                    "file",
                    options=paths.model_files("reward_models"),
                    tooltip="Weights in models/reward_models, for example HPS_v2.1_compressed.pt or MPS_overall.pth.",
                ),
                io.Combo.Input(
                    "resize",
                    options=list(scoring.RESIZE_MODES),
                    default="default",
                    tooltip="How frames become square. default: what the model's authors publish. squash: what VideoX-Fun trains with.",
                ),
                io.Boolean.Input("antialias", default=True, tooltip="Smooth while shrinking frames. Off reproduces old torchvision on tensors."),
            ],
            outputs=[RewardModel.Output("reward_model", display_name="reward_model", tooltip="The reward model's settings.")],
        )

    @classmethod
    def execute(cls, kind: str, file: str, resize: str, antialias: bool) -> io.NodeOutput:
        """Return the settings. Raises ValueError when the file is missing or not a weight file."""
        return io.NodeOutput(scoring.reward_model_spec(kind, file, resize, antialias))


class ScoreVideo(io.ComfyNode):
    """Scores every frame of a video against its prompt and draws the curve."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Return the node's inputs and outputs."""
        return io.Schema(
            node_id="RewardLabScoreVideo",
            display_name="Score Video",
            category="Reward Lab/reward",
            description="Scores a video with a reward model: the mean, a curve over the frames with the best and the worst "
            "frame marked, and all numbers as JSON.",
            search_aliases=["score", "reward", "hps score", "video quality"],
            inputs=[
                io.Image.Input("images", tooltip="The frames of one video."),
                RewardModel.Input("reward_model", tooltip="From Load Reward Model."),
                io.String.Input(
                    "prompt",
                    multiline=True,
                    default="",
                    tooltip="What the video should show. The score is how well people would like the frames for this text.",
                ),
            ],
            outputs=[
                io.Float.Output(
                    "reward", display_name="reward", tooltip="Mean over the frames. Higher is better; compare only within one prompt and one reward model."
                ),
                io.Image.Output("plot", display_name="plot", tooltip="Score over the frames."),
                io.String.Output("json", display_name="json", tooltip="All numbers as JSON."),
            ],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, images, reward_model, prompt: str) -> io.NodeOutput:
        """Score. Raises ValueError for a video without frames or an empty prompt."""
        result = scoring.score_images(images, reward_model, prompt)
        plot = scoring.plot_scores(result)
        ui = {"images": paths.save_temp_images(plot), "text": [result.summary()]}
        return io.NodeOutput(result.reward, plot, result.to_json(), ui=ui)

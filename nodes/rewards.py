"""Nodes that choose reward models, mix them, and score videos and latents with them."""

from __future__ import annotations

from comfy_api.latest import io

from ..host import paths, reward_files, score_nodes, scoring
from .types import RewardModel

_FILES_HINT = "Absolute path, or a name in the input folder."


class RewardModelNode(io.ComfyNode):
    """Names a reward model and its weights; loading happens where it is first used."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Return the node's inputs and outputs."""
        files = paths.model_files(paths.REWARD_MODEL_FOLDER)
        return io.Schema(
            node_id="RewardLabRewardModel",
            display_name="Load Reward Model",
            category="Reward Lab/reward",
            description="Chooses a reward model and its weights from models/reward_models, and can fetch published weights on request. Used by Score "
            "Video, Score Latent (PAVRM), Mix Rewards, TestLab Cell and Train Reward LoRA.",
            search_aliases=["hps", "hpsv2", "mps", "pickscore", "aesthetic", "arcface", "pavrm", "human preference score", "download reward model"],
            inputs=[
                io.Combo.Input("kind", options=list(scoring.REWARD_KINDS), default="hpsv2.1", tooltip=_KIND_TOOLTIP),
                io.Combo.Input(
                    "file",
                    options=[*files, scoring.NO_FILE],
                    tooltip="Weights in models/reward_models, for example HPS_v2.1_compressed.pt or MPS_overall.pth. (none): for measures without weights, "
                    "and for a download.",
                ),
                io.Combo.Input(
                    "resize",
                    options=list(scoring.RESIZE_MODES),
                    default="default",
                    tooltip="How frames become square. default: what the model's authors publish. squash: what VideoX-Fun trains with.",
                ),
                io.Boolean.Input("antialias", default=True, tooltip="Smooth while shrinking frames. Off reproduces old torchvision on tensors."),
                *_further_inputs(files),
            ],
            outputs=[RewardModel.Output("reward_model", display_name="reward_model", tooltip="The reward model's settings.")],
            has_intermediate_output=True,
        )

    @classmethod
    def execute(
        cls,
        kind: str,
        file: str,
        resize: str,
        antialias: bool,
        download: bool = False,
        condition: str = "overall",
        threshold: float = 0.01,
        second_file: str = scoring.NO_FILE,
        third_file: str = scoring.NO_FILE,
        generator: str = scoring.NO_FILE,
        reference: str = "",
        stability: bool = False,
    ) -> io.NodeOutput:
        """Return the settings. Raises ValueError when the file is missing or not a weight file."""
        chosen = reward_files.Choice(
            kind=kind, file=file, second_file=second_file, third_file=third_file, generator=generator, reference=reference, download=download
        )
        files = reward_files.resolve(chosen)
        options = {"condition": condition, "threshold": threshold, "stability": stability or None, **files.options}
        spec = scoring.reward_model_spec(kind, files.file, resize, antialias, **options)
        return io.NodeOutput(spec, ui={"text": [files.report]})


def _further_inputs(files: list[str]) -> list[io.Input]:
    """Optional inputs of Load Reward Model. Most belong to one kind; the page hides those that the chosen kind does not read (web/reward_kind.js)."""

    def file_input(name: str, options: list[str], tooltip: str) -> io.Input:
        return io.Combo.Input(name, options=[scoring.NO_FILE, *options], optional=True, tooltip=tooltip)

    return [
        io.Boolean.Input(
            "download",
            default=False,
            optional=True,
            tooltip="Fetch the published file of this kind into models/reward_models when the workflow runs, and use it. Size and hash are checked where they "
            "are published: both for hpsv2.1, a hash for mps and aesthetic, neither for pickscore and CLIP.",
        ),
        io.String.Input(
            "condition",
            default="overall",
            optional=True,
            tooltip="mps: overall, or (experimental: the released weights were trained on overall alone) aesthetics, quality, "
            "semantic, a text, or weights such as aesthetics=0.3, quality=0.7.",
        ),
        io.Float.Input(
            "threshold",
            default=0.01,
            min=0.0,
            max=0.99,
            step=0.01,
            optional=True,
            tooltip="mps: words below this share of the largest likeness to the condition are masked. 0.01 in training, 0.3 in the evaluation.",
        ),
        file_input(
            "second_file",
            files,
            "aesthetic: OpenAI's CLIP ViT-L/14. face: the detector mobilenet0.25_Final.pth. pavrm: query_attention_step_N.ckpt.",
        ),
        file_input("third_file", files, "pavrm: mlp_step_N.ckpt."),
        file_input("generator", paths.model_files("diffusion_models"), "pavrm stored as a LoRA: the generator whose first blocks it stands on."),
        io.String.Input(
            "reference",
            default="",
            optional=True,
            tooltip="face: picture, video or folder with the face to compare with; empty takes each video's own first face. " + _FILES_HINT,
        ),
        io.Boolean.Input(
            "stability",
            default=False,
            optional=True,
            tooltip="Score Video also shows drop_when_changed: how much the reward falls when frames are moved or blurred a little. A fooled reward falls "
            "far. Takes four times as long.",
        ),
    ]


class MixRewards(io.ComfyNode):
    """Adds up to four rewards, each centred, scaled and weighted."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Return the node's inputs and outputs."""
        inputs = []
        for number in range(1, score_nodes.ROWS + 1):
            is_optional = number > 1
            inputs.append(RewardModel.Input(f"reward_{number}", optional=is_optional, tooltip="From Load Reward Model."))
            tip = "Factor of this reward after centring and scaling; negative turns it round."
            inputs.append(io.Float.Input(f"weight_{number}", default=1.0, min=-1000.0, max=1000.0, step=0.05, optional=is_optional, tooltip=tip))
            tip = "Reward that counts as 0. Filled from base videos when measure_baseline is on."
            inputs.append(io.Float.Input(f"centre_{number}", default=0.0, min=-1e6, max=1e6, step=0.0001, round=1e-6, optional=is_optional, tooltip=tip))
            tip = "Reward difference that counts as 1. Filled from base videos when measure_baseline is on."
            inputs.append(io.Float.Input(f"scale_{number}", default=1.0, min=1e-6, max=1e6, step=0.0001, round=1e-6, optional=is_optional, tooltip=tip))
        measure = "Measure centre and scale: mean and standard deviation of each reward over the videos in baseline_folder, made without reward LoRA."
        return io.Schema(
            node_id="RewardLabMixRewards",
            display_name="Mix Rewards",
            category="Reward Lab/reward",
            description="A weighted sum of rewards: weight x (reward - centre) / scale each. All parts stay visible in the scores. Base videos can fill "
            "centre and scale.",
            search_aliases=["reward mix", "weighted reward", "combine rewards", "baseline"],
            inputs=[
                *inputs,
                io.Boolean.Input("measure_baseline", default=False, optional=True, tooltip=measure),
                io.String.Input("baseline_folder", default="", optional=True, tooltip="Folder of base videos, 2 or more, better 16. " + _FILES_HINT),
                io.String.Input("baseline_prompts", default="", optional=True, tooltip="File with a prompt per base video. " + _FILES_HINT),
            ],
            outputs=[
                RewardModel.Output("reward_model", display_name="reward_model", tooltip="The mix, for scoring and training."),
                io.String.Output("report", display_name="report", tooltip="The sum, and what was measured."),
            ],
            has_intermediate_output=True,
        )

    @classmethod
    def fingerprint_inputs(cls, measure_baseline: bool = False, baseline_folder: str = "", baseline_prompts: str = "", **_rows) -> str:
        """A text that changes with the base videos, while they are measured."""
        return scoring.files_stamp(baseline_folder, baseline_prompts) if measure_baseline else ""

    @classmethod
    def execute(cls, measure_baseline: bool = False, baseline_folder: str = "", baseline_prompts: str = "", **rows) -> io.NodeOutput:
        """Return the mix. Raises ValueError for rewards that cannot be mixed or base videos that cannot be measured."""
        mixed = score_nodes.mix(rows, measure_baseline, baseline_folder, baseline_prompts)
        return io.NodeOutput(mixed.spec, mixed.report, ui={"text": [mixed.report], "reward_lab_baseline": list(mixed.measured)})


class ScoreVideo(io.ComfyNode):
    """Scores every frame of a video, or of every video in a folder, against its prompt and draws the curve."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Return the node's inputs and outputs."""
        return io.Schema(
            node_id="RewardLabScoreVideo",
            display_name="Score Video",
            category="Reward Lab/reward",
            description="Scores a video with a reward model: the reward, a curve over the frames with the best and the worst frame shown, and all numbers "
            "as JSON and CSV. Takes frames, a VIDEO, a file, or a folder of videos (finished ones are not scored again).",
            search_aliases=["score", "reward", "hps score", "video quality", "score folder"],
            inputs=[
                io.Image.Input("images", optional=True, tooltip="The frames of one video."),
                RewardModel.Input("reward_model", tooltip="From Load Reward Model or Mix Rewards."),
                io.String.Input(
                    "prompt",
                    multiline=True,
                    default="",
                    tooltip="What the video should show. The score is how well people would like the frames for this text.",
                ),
                io.Video.Input("video", optional=True, tooltip="One video, in place of images."),
                io.String.Input("path", default="", optional=True, tooltip="A video file or a folder of videos, in place of images. " + _FILES_HINT),
                io.String.Input(
                    "prompts_file",
                    default="",
                    optional=True,
                    tooltip="For a folder: a prompt per video (.txt in order, .csv or .json by file name); empty uses the prompt above for all. " + _FILES_HINT,
                ),
            ],
            outputs=[
                io.Float.Output(
                    "reward",
                    display_name="reward",
                    tooltip="The video's reward, mostly the mean over frames; of a folder the mean over videos. Compare only within one prompt and one model.",
                ),
                io.Image.Output("plot", display_name="plot", tooltip="Score over the frames, best and worst frame below."),
                io.String.Output("json", display_name="json", tooltip="All numbers as JSON."),
                io.String.Output("csv", display_name="csv", tooltip="Path of a table with a row per frame and a column per part."),
            ],
            is_output_node=True,
        )

    @classmethod
    def fingerprint_inputs(cls, path: str = "", prompts_file: str = "", **_inputs) -> str:
        """A text that changes with the files to score."""
        return scoring.files_stamp(path, prompts_file)

    @classmethod
    def execute(cls, reward_model, prompt: str, images=None, video=None, path: str = "", prompts_file: str = "") -> io.NodeOutput:
        """Score. Raises ValueError for a video without frames, an empty prompt, or none or two sources."""
        result = score_nodes.score_video(reward_model, prompt, images=images, video=video, path=path, prompts_file=prompts_file)
        return io.NodeOutput(result.reward, result.plot, result.json, result.csv, ui={"images": paths.save_temp_images(result.plot), "text": [result.text]})


class ScoreLatent(io.ComfyNode):
    """Scores a latent with a PAVRM at several noise levels, without decoding it."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Return the node's inputs and outputs."""
        return io.Schema(
            node_id="RewardLabScoreLatent",
            display_name="Score Latent (PAVRM)",
            category="Reward Lab/reward",
            description="Scores the motion of a finished latent with a PAVRM, at any noise level and without decoding: probability and logit over sigma.",
            search_aliases=["pavrm", "latent reward", "prfl", "motion quality"],
            inputs=[
                io.Latent.Input("latent", tooltip="A finished Wan2.1 or Wan2.2 14B latent (16 channels)."),
                io.Conditioning.Input("positive", tooltip="The prompt's conditioning; for image-to-video the one with the start image."),
                RewardModel.Input("reward_model", tooltip="From Load Reward Model with kind pavrm."),
                io.String.Input("sigmas", default="0.2, 0.4, 0.6, 0.8", tooltip="Noise levels from 0 to 1; the latent gets so much noise before it is scored."),
                io.Int.Input(
                    "seed", default=0, min=0, max=2**63 - 1, control_after_generate=io.ControlAfterGenerate.fixed, tooltip="Of the noise."
                ),
            ],
            outputs=[
                io.Float.Output("probability", display_name="probability", tooltip="Mean over the latents and noise levels; higher is better."),
                io.Image.Output("plot", display_name="plot", tooltip="Probability over sigma, a curve per latent."),
                io.String.Output("json", display_name="json", tooltip="Logit and probability per latent and sigma."),
            ],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, latent, positive, reward_model, sigmas: str, seed: int) -> io.NodeOutput:
        """Score. Raises ValueError for a latent of another VAE, text of another width, or a reward model of frames."""
        result = score_nodes.score_latent(latent, positive, reward_model, sigmas, seed)
        return io.NodeOutput(result.reward, result.plot, result.json, ui={"images": paths.save_temp_images(result.plot), "text": [result.text]})


_KIND_TOOLTIP = (
    "hpsv2.1: how much people would like a picture for its prompt. mps: Multi-dimensional Preference Score. pickscore: preferences of Pick-a-Pic. "
    "aesthetic: LAION's predictor, without prompt. face: likeness of faces (weights are yours; many are for non-commercial research only). "
    "dynamic_degree, flicker, drift: measures without weights. pavrm: scores latents."
)

"""Nodes that sweep any widgets of the user's own workflow and show the videos side by side."""

from __future__ import annotations

from comfy_api.latest import io

from ..host import queue, testlab_nodes
from .types import RewardModel


class TestLabCell(io.ComfyNode):
    """Records the frames, scores and applied values of one cell of a sweep; passes the frames on."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Return the node's inputs and outputs."""
        return io.Schema(
            node_id="RewardLabTestLabCell",
            display_name="TestLab Cell",
            category="Reward Lab/testlab",
            description="Put it at the end of your workflow. During a sweep it records frames, scores and the values that were "
            "applied; otherwise it only passes the frames on.",
            search_aliases=["xy plot", "sweep", "grid cell", "compare"],
            inputs=[
                io.Image.Input("images", lazy=True, tooltip="The finished frames of your workflow."),
                io.String.Input("sweep", default="my_sweep", tooltip="Name of the sweep; the same as on TestLab Grid."),
                io.String.Input(
                    "prompt", default="", multiline=True, optional=True, tooltip="The text that the frames are scored against. Needed only with a reward model."
                ),
                RewardModel.Input("reward_model", optional=True, tooltip="Optional: scores every cell."),
                io.Float.Input("frame_rate", default=8.0, min=0.1, max=240.0, step=0.1, tooltip="Frames per second of the recorded video. Wan2.2 14B: 16."),
                io.String.Input("applied", default="", multiline=True, tooltip="Filled in by the sweep. Leave it empty.", advanced=True),
            ],
            outputs=[
                io.Image.Output("images_out", display_name="images", tooltip="The same frames."),
                io.String.Output("scores", display_name="scores", tooltip="Scores of this cell as JSON."),
            ],
            hidden=[io.Hidden.prompt, io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def check_lazy_status(cls, images=None, sweep: str = "", applied: str = "", **_inputs) -> list[str]:
        """Ask for the frames, except where a TestLab Grid of this prompt will queue this node's cells itself."""
        return [] if images is not None or testlab_nodes.is_left_to_grid(cls.hidden.prompt, sweep, applied) else ["images"]

    @classmethod
    def fingerprint_inputs(cls, applied: str | None = "", **_inputs) -> float | str:
        """During a sweep never equal: a recorded cell may have been deleted since the host cached this node."""
        return float("nan") if applied else ""

    @classmethod
    def execute(cls, images, sweep: str, frame_rate: float, applied: str, prompt: str = "", reward_model=None) -> io.NodeOutput:
        """Record the cell. Raises ValueError for a video without frames or broken `applied` data."""
        if images is None:
            return io.NodeOutput(*queue.blocked(2), ui={"text": ["Recorded by TestLab Grid, cell by cell."]})
        cell = testlab_nodes.record(images, sweep, prompt, reward_model, frame_rate, applied, cls.hidden.prompt)
        return io.NodeOutput(images, cell.scores_json, ui={"text": [cell.message]})


class TestLabGrid(io.ComfyNode):
    """Queues the missing cells of a sweep and, when all exist, renders grid, report and table."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Return the node's inputs and outputs."""
        return io.Schema(
            node_id="RewardLabTestLabGrid",
            display_name="TestLab Grid",
            category="Reward Lab/testlab",
            description="Sweeps widgets of this workflow: queues one prompt per cell, then shows all videos in a labelled grid. A stopped sweep goes on "
            "where it was; a longer one adds only what is missing.",
            search_aliases=["xy plot", "sweep", "grid", "compare", "test lab"],
            inputs=[
                io.String.Input(
                    "sweep", default="my_sweep", tooltip="Name of the sweep: its folder under output/reward_lab/sweeps. The same as on TestLab Cell."
                ),
                io.String.Input(
                    "axes",
                    multiline=True,
                    default="",
                    placeholder="Load Reward LoRAs.rows[0].high = 0, 0.5, 1\nSample Wan2.2 (two experts).seed = 1, 2",
                    tooltip="One axis a line: node title or id, a dot, the widget, an optional path into JSON, an equals sign, values separated by "
                    'commas (text with a comma in "quotes"). First axis: columns. Second: rows.',
                ),
            ],
            outputs=[
                io.Image.Output("grid", display_name="grid", tooltip="The labelled grid as a picture, taken at half of the videos' length."),
                io.Video.Output("video", display_name="video", tooltip="The labelled grid as a video."),
                io.String.Output("report", display_name="report", tooltip="Path of report.html."),
            ],
            hidden=[io.Hidden.prompt, io.Hidden.extra_pnginfo, io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def fingerprint_inputs(cls, **_inputs) -> float:
        """Never equal: the node looks at what is recorded each time."""
        return float("nan")

    @classmethod
    async def execute(cls, sweep: str, axes: str) -> io.NodeOutput:
        """Queue what is missing, or render. Raises ValueError for axes that do not fit the workflow."""
        step = await testlab_nodes.advance(sweep, axes, cls.hidden.prompt, cls.hidden.unique_id)
        if step.grid is None:
            return io.NodeOutput(*queue.blocked(3), ui={"text": [step.message]})
        return io.NodeOutput(step.grid, step.video, step.report_path, ui=step.ui)

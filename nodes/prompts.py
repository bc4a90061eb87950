"""Node that reads a set of prompts from text or a file."""

from __future__ import annotations

from comfy_api.latest import io

from ..host import prompt_files
from .types import Prompts as PromptsType


class Prompts(io.ComfyNode):
    """Collects prompts, one a line or from a file, with optional weights."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Return the node's inputs and outputs."""
        return io.Schema(
            node_id="RewardLabPrompts",
            display_name="Prompt Set",
            category="Reward Lab/training",
            description="A set of prompts to train on: one a line, or from a TXT, CSV or JSON file. A byte-order mark and Windows line ends are understood.",
            search_aliases=["prompts", "prompt list", "csv prompts"],
            inputs=[
                io.String.Input(
                    "text",
                    multiline=True,
                    default="",
                    placeholder="one prompt a line",
                    tooltip="Prompts, one a line. Empty lines are skipped. Added to those of the file.",
                ),
                io.String.Input(
                    "file",
                    default="",
                    tooltip="Optional TXT, CSV (column 'text' or 'prompt', optional 'weight' and 'image'), JSON or JSONL file: a name in ComfyUI's "
                    "input folder or an absolute path.",
                ),
                io.Float.Input(
                    "held_out_share",
                    default=0.0,
                    min=0.0,
                    max=0.9,
                    step=0.05,
                    optional=True,
                    tooltip="Share of the prompts that goes to the output held_out instead, to judge by and never to train on.",
                ),
                io.Int.Input("split_seed", default=0, min=0, max=0x7FFFFFFF, optional=True, tooltip="Which prompts are held out."),
            ],
            outputs=[
                PromptsType.Output("prompts", display_name="prompts", tooltip="The prompts with their weights."),
                io.Int.Output("count", display_name="count", tooltip="How many prompts there are to train on."),
                PromptsType.Output("held_out", display_name="held_out", tooltip="The held-out prompts; empty when the share is 0."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, text: str = "", file: str = "", held_out_share: float = 0.0, split_seed: int = 0) -> str:
        """Change when the text or the split changes or the file on disk does."""
        return f"{prompt_files.fingerprint(text, file)}|{held_out_share}|{split_seed}"

    @classmethod
    def execute(cls, text: str, file: str, held_out_share: float = 0.0, split_seed: int = 0) -> io.NodeOutput:
        """Read the prompts. Raises ValueError when there are none, the file cannot be read, or the split leaves none to train on."""
        prompts, held_out = prompt_files.divide(prompt_files.read(text, file), held_out_share, split_seed)
        return io.NodeOutput(prompts, len(prompts), held_out)

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
                    tooltip="Optional TXT, CSV (column 'text' or 'prompt', optional 'weight') or JSON file: a name in ComfyUI's "
                    "input folder or an absolute path.",
                ),
            ],
            outputs=[
                PromptsType.Output("prompts", display_name="prompts", tooltip="The prompts with their weights."),
                io.Int.Output("count", display_name="count", tooltip="How many prompts there are."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, text: str = "", file: str = "") -> str:
        """Change when the text changes or the file on disk does."""
        return prompt_files.fingerprint(text, file)

    @classmethod
    def execute(cls, text: str, file: str) -> io.NodeOutput:
        """Read the prompts. Raises ValueError when there are none or the file cannot be read."""
        prompts = prompt_files.read(text, file)
        return io.NodeOutput(prompts, len(prompts))

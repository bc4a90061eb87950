"""Node that applies any number of LoRAs to both experts, with a strength for each."""

from __future__ import annotations

from comfy_api.latest import io

from ..host import lora_lists, lora_patch
from .types import LoraStack, WanVideoLora


class LoadLoRAs(io.ComfyNode):
    """Applies rows of (file, strength high, strength low) and says how many keys of each were applied."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Return the node's inputs and outputs."""
        return io.Schema(
            node_id="RewardLabLoadLoRAs",
            display_name="Load Reward LoRAs",
            category="Reward Lab/loras",
            description="Applies any number of LoRAs to the two Wan2.2 experts, each with its own strength for the high-noise and the low-noise "
            "expert, and reports how many keys were applied.",
            search_aliases=["lora loader", "power lora loader", "reward lora", "wan lora", "HPS", "MPS"],
            inputs=[
                io.Model.Input("model_high", optional=True, tooltip="The high-noise expert. None is needed for the lists for other packs."),
                io.Model.Input("model_low", optional=True, tooltip="The low-noise expert, or the only model (Wan2.1, 5B). None is needed for the lists."),
                io.String.Input(
                    "rows",
                    multiline=True,
                    default="[]",
                    placeholder='[{"on": true, "file": "x-high-noise-HPS2.1.safetensors", "high": 0.5, "low": 0.0}]',
                    tooltip="One row per LoRA: switch, file, strength on the high-noise expert, strength on the low-noise expert. 0.5 is the strength in "
                    "the reward LoRA authors' examples; it is not tuned.",
                ),
                io.Combo.Input(
                    "application",
                    options=list(lora_patch.APPLICATIONS),
                    default="auto",
                    optional=True,  # absent in prompts saved before it existed
                    tooltip="merged: the host adds the LoRAs to the weights. bypass: they run beside the weights, which stay as they are; a new strength "
                    "then loads nothing. auto: merged, but bypass on fp8, GGUF and other quantised weights and for strengths over sigma.",
                ),
            ],
            outputs=[
                io.Model.Output("model_high_out", display_name="model_high", tooltip="The high-noise expert with its LoRAs."),
                io.Model.Output("model_low_out", display_name="model_low", tooltip="The low-noise expert with its LoRAs."),
                io.String.Output("report", display_name="report", tooltip="Per row: applied N of M keys on each expert, and warnings."),
                WanVideoLora.Output("wanvideo_high", tooltip="The rows of the high-noise expert for the LoRA input of WanVideoWrapper's model loader."),
                WanVideoLora.Output("wanvideo_low", tooltip="The rows of the low-noise expert for the LoRA input of WanVideoWrapper's model loader."),
                LoraStack.Output("stack_high", tooltip="The rows of the high-noise expert as a LoRA stack: (file, strength, 0)."),
                LoraStack.Output("stack_low", tooltip="The rows of the low-noise expert as a LoRA stack: (file, strength, 0)."),
            ],
            is_output_node=False,
            has_intermediate_output=True,
        )

    @classmethod
    def validate_inputs(cls, rows: str | None = None, application: str | None = None) -> bool | str:
        """Refuse rows that cannot work before the graph starts."""
        return lora_patch.check_rows(rows, application)

    @classmethod
    def fingerprint_inputs(cls, rows: str | None = None, application: str | None = None, **_linked) -> str:
        """Change when the rows or their application change or a LoRA file on disk does."""
        return f"{application}|{lora_patch.fingerprint(rows)}"

    @classmethod
    def execute(cls, model_high=None, model_low=None, rows: str = "[]", application: str = "auto") -> io.NodeOutput:
        """Apply the rows to clones of both models. Raises ValueError naming the row that cannot be applied."""
        parsed = lora_patch.parse_rows(rows)
        result = lora_patch.apply_rows(model_high, model_low, parsed, application)
        high, low = (lora_lists.lora_lists(parsed, expert, application) for expert in ("high", "low"))
        left_out = dict.fromkeys((*high.left_out, *low.left_out))
        report = "\n".join([result.report, *(f"{file}: its curve or block strengths cannot be carried by the lists for other packs" for file in left_out)])
        ui = {"reward_lab_rows": [row.to_dict() for row in result.rows], "text": [report]}
        return io.NodeOutput(result.model_high, result.model_low, report, high.wanvideo, low.wanvideo, high.stack, low.stack, ui=ui)

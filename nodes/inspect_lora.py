"""Node that looks into LoRA files: report, heat map, difference of two."""

from __future__ import annotations

from comfy_api.latest import io

from ..host import lora_inspect, paths


class InspectLoRA(io.ComfyNode):
    """Says what is in a LoRA file and draws how much it changes each layer of each block."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Return the node's inputs and outputs."""
        files = paths.model_files("loras")
        return io.Schema(
            node_id="RewardLabInspectLoRA",
            display_name="Inspect LoRA",
            category="Reward Lab/loras",
            description="Looks into a LoRA file without applying it: key layout, expert, rank, alpha, what a model would take of it, and a heat map of the "
            "change by block and kind of layer. With a second file, also the difference of the two.",
            search_aliases=["lora info", "lora metadata", "lora keys", "lora heat map", "lora block weight", "compare lora"],
            inputs=[
                io.Combo.Input("lora", options=files, tooltip="The file to look into."),
                io.Combo.Input(
                    "compare_with", options=[lora_inspect.NO_FILE, *files], default=lora_inspect.NO_FILE, tooltip="A second file to compare it with, or none."
                ),
                io.Model.Input(
                    "model_high",
                    optional=True,
                    tooltip="The high-noise expert. With a model, changes are shown as a share of its weights, and misfits are found.",
                ),
                io.Model.Input("model_low", optional=True, tooltip="The low-noise expert. A LoRA whose expert is known is compared with that one alone."),
            ],
            outputs=[
                io.String.Output("report", display_name="report", tooltip="What is in the file, for people."),
                io.Image.Output("heat_map", display_name="heat_map", tooltip="Change by block and kind of layer, one panel per file and expert."),
                io.String.Output("info", display_name="info", tooltip="All numbers as JSON."),
            ],
            is_output_node=True,
        )

    @classmethod
    def fingerprint_inputs(cls, lora: str, compare_with: str = lora_inspect.NO_FILE, **_linked) -> str:
        """Change when a file on disk does."""
        return lora_inspect.fingerprint((lora, compare_with))

    @classmethod
    def execute(cls, lora: str, compare_with: str, model_high=None, model_low=None) -> io.NodeOutput:
        """Inspect. A bad file is a report that says so; raises ValueError only when a file is not there."""
        report, heat_map, info = lora_inspect.inspect_for_node(lora, compare_with, model_high, model_low)
        ui = {"images": paths.save_temp_images(heat_map), "text": [report]}
        return io.NodeOutput(report, heat_map, info, ui=ui)

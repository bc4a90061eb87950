"""Nodes for LoRA files: apply them to both experts, look into them, merge them into a model file."""

from __future__ import annotations

from comfy_api.latest import io

from ..host import lora_inspect, lora_lists, lora_merge, lora_patch, paths
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
        report = "\n".join([result.report, *lora_lists.notes(result.rows, (high, low))])
        ui = {"reward_lab_rows": [row.to_dict() for row in result.rows], "text": [report]}
        return io.NodeOutput(result.model_high, result.model_low, report, high.wanvideo, low.wanvideo, high.stack, low.stack, ui=ui)


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


class MergeLoRA(io.ComfyNode):
    """Writes a model file with LoRAs merged into it, weight by weight."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Return the node's inputs and outputs."""
        return io.Schema(
            node_id="RewardLabMergeLoRA",
            display_name="Merge LoRA into Model File",
            category="Reward Lab/loras",
            description="Writes a new model file: the base with LoRAs merged into its weights. Streams weight by weight, so that a 28 GB file needs about 1 GB "
            "of memory. A run that was stopped goes on where it was.",
            search_aliases=["merge lora", "bake lora", "fuse lora", "save model", "checkpoint merge", "fp8 scaled"],
            inputs=[
                io.Combo.Input("base", options=paths.model_files("diffusion_models"), tooltip="The model file to merge into. It is not changed."),
                io.String.Input(
                    "rows",
                    multiline=True,
                    default="[]",
                    tooltip="One row per LoRA, as in Load Reward LoRAs. Only the strength on the base's expert counts; a curve over sigma cannot be merged.",
                ),
                io.Combo.Input(
                    "expert",
                    options=list(lora_merge.EXPERT_CHOICES),
                    default="auto",
                    tooltip="Which strength of the rows counts. auto: the expert that the base's metadata or name tells.",
                ),
                io.Combo.Input(
                    "dtype",
                    options=list(lora_merge.DTYPES),
                    default="same",
                    tooltip="Type of the numbers. same: as in the base. fp8_scaled: the blocks' matrices in fp8 with a scale each, as ComfyUI writes them now; "
                    "fp8_scaled_old: as older ComfyUI versions read them.",
                ),
                io.Combo.Input(
                    "rounding",
                    options=list(lora_merge.ROUNDINGS),
                    default="nearest",
                    tooltip="How sums are rounded to the type. stochastic: up or down by chance, so that changes smaller than a step are kept on average.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFF,
                    control_after_generate=io.ControlAfterGenerate.fixed,
                    tooltip="Seed of the stochastic rounding.",
                ),
                io.Float.Input(
                    "shard_gb", default=0.0, min=0.0, max=1000.0, step=0.5, tooltip="Write files of at most this many GB and an index. 0 writes one file."
                ),
                io.String.Input("name", default="", tooltip="Name of the new file in output/diffusion_models. Empty: the base's name with '-merged'."),
                io.Boolean.Input("overwrite", default=False, tooltip="Whether a file with that name is replaced."),
            ],
            outputs=[
                io.String.Output("file", display_name="file", tooltip="The new file, or the index of several."),
                io.String.Output("report", display_name="report", tooltip="What was merged, and what rounding did to it."),
            ],
            is_output_node=True,
        )

    @classmethod
    def validate_inputs(cls, rows: str | None = None) -> bool | str:
        """Refuse rows that cannot be merged before the graph starts."""
        return lora_patch.check_rows(rows, "merged")

    @classmethod
    def fingerprint_inputs(cls, base: str, rows: str | None = None, **_others) -> str:
        """Change when the rows or a file on disk do."""
        return f"{lora_merge.fingerprint(base)}|{lora_patch.fingerprint(rows)}"

    @classmethod
    def execute(cls, base, rows, expert, dtype, rounding, seed, shard_gb, name, overwrite) -> io.NodeOutput:
        """Merge. Raises ValueError when a file cannot be used, a row does not fit, the target is there, or the disk is too full."""
        settings = lora_merge.MergeSettings(dtype=dtype, rounding=rounding, seed=seed, shard_bytes=int(shard_gb * 1e9), overwrite=overwrite)
        done = lora_merge.merge_for_node(base, lora_patch.parse_rows(rows), expert, name, settings)
        return io.NodeOutput(str(done.path), done.text(), ui={"text": [done.text()]})

"""Socket types of the pack's own. Values are plain data, so that other packs can make and read them.

`WAN_FILES`: dict with `high`, `low`, `text_encoder`, `vae` (absolute paths; `low` empty for one model), `weight_dtype` and `latents` (`wan2.1`, `wan2.2`).
`REWARD_MODEL`: a `RewardModelSpec`.
`PROMPTS`: list of dicts `{"text": str, "weight": float, "image": str}` (image: path of a start image, or empty).
`DATASET`: folder of a dataset. `RUN`: the id of a training run. `WANVIDLORA` (of kijai's WanVideoWrapper) and `LORA_STACK` (of the stacking loaders) are other
packs' types that this pack writes.
"""

from __future__ import annotations

from comfy_api.latest import io

WanFiles = io.Custom("WAN_FILES")
RewardModel = io.Custom("REWARD_MODEL")
Prompts = io.Custom("PROMPTS")
Run = io.Custom("RUN")
Dataset = io.Custom("DATASET")
WanVideoLora = io.Custom("WANVIDLORA")
LoraStack = io.Custom("LORA_STACK")


def seed_and_settings(seed_tooltip: str, placeholder: str) -> list[io.Input]:
    """The last widgets of a node that starts a run: seed, and JSON laid over everything else."""
    return [
        io.Int.Input("seed", default=0, min=0, max=0x7FFFFFFF, control_after_generate=io.ControlAfterGenerate.fixed, tooltip=seed_tooltip),
        io.String.Input(
            "advanced",
            multiline=True,
            default="{}",
            placeholder=placeholder,
            tooltip="JSON that overrides single settings of the training config, by section. Unknown names are refused.",
            advanced=True,
        ),
    ]


def run_output() -> Run.Output:
    """The only output of such a node."""
    return Run.Output("run", display_name="run", tooltip="The run, for Run Result.")

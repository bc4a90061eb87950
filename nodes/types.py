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

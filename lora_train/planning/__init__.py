"""What a run will need, by arithmetic alone: no weights are loaded and no torch is imported.

`shapes` the models · `work` floating-point operations · `memory` bytes on card and host · `speed` seconds by phase · `choose` the knobs that fit.
`lora_train/plan.py` puts them together.
"""

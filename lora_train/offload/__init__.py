"""Runs a transformer block by block in little memory: weights and kept activations may live on the host and come when they are needed.

`knobs` what can be chosen · `transfers` copies on their own streams · `store` weights · `keeper` activations · `block` the arithmetic of one block ·
`executor` wraps the blocks of a model. `lora_train/plan` chooses the knobs.
"""

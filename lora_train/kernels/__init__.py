"""The trainer's numerical kernels. Each has a plain reference beside it; what is chosen where is decided by `lora_linear.choose_kernels` and reported."""

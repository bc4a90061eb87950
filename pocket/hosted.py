"""Builds empty host modules (ComfyUI's own Wan classes) for the pocket trainers, on CPU in fp32.

The host's layers skip weight initialisation, because they expect a checkpoint; `initialise` gives them one.
"""

from __future__ import annotations

import torch


def initialise(module: torch.nn.Module, seed: int) -> None:
    """Initialise in place as the published models are: Xavier for linears, Kaiming for convolutions, small embeddings."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        with torch.no_grad():
            if parameter.ndim <= 1:
                is_gain = name.endswith(("norm.weight", "norm_q.weight", "norm_k.weight", "norm3.weight", "gamma", "layer_norm.weight"))
                parameter.fill_(1.0 if is_gain else 0.0)
            elif name.endswith("gamma"):
                parameter.fill_(1.0)
            elif name.endswith("modulation"):
                parameter.normal_(0, parameter.shape[-1] ** -0.5, generator=generator)
            elif parameter.ndim == 2:
                bound = (6 / sum(parameter.shape)) ** 0.5
                parameter.uniform_(-bound, bound, generator=generator)
            else:
                bound = (3 / parameter[0].numel()) ** 0.5
                parameter.uniform_(-bound, bound, generator=generator)


def wan_vae(width: int) -> torch.nn.Module:
    """ComfyUI's Wan2.1 VAE with `width` base channels (the published one has 96)."""
    import comfy.ldm.wan.vae

    return comfy.ldm.wan.vae.WanVAE(dim=width, z_dim=16, dim_mult=[1, 2, 4, 4], num_res_blocks=2, temperal_downsample=[False, True, True]).float()


def wan_dit(config: dict) -> torch.nn.Module:
    """ComfyUI's Wan transformer; `config` holds its constructor's sizes."""
    import comfy.ldm.wan.model
    import comfy.ops

    return comfy.ldm.wan.model.WanModel(**config, device="cpu", dtype=torch.float32, operations=comfy.ops.disable_weight_init)

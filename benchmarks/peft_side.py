"""The other side of the comparisons: PEFT's LoRA on the host's WanModel, each block under torch's own checkpointing, weights where they are.

PEFT is needed by benchmarks only (`pip install 'reward-lab[bench]'`, or `--peft FOLDER` with `pip install --no-deps --target FOLDER peft accelerate`).
`autocast_adapter_dtype=False`: PEFT would else hold adapters in fp32 and widen every input to them, which costs it memory.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.utils.checkpoint import checkpoint

from ..lora_train.lora.adapter import LoraAdapter


def find_peft(folder: Path | None) -> str:
    """Make PEFT importable; returns its version.

    Raises:
        ValueError: it is neither installed nor in the folder.
    """
    if folder is not None and str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    try:
        return importlib.import_module("peft").__version__
    except ImportError as error:
        raise ValueError(
            f"PEFT cannot be imported ({error}); pip install --no-deps --target FOLDER peft accelerate, and give --peft FOLDER"
        ) from error


@contextmanager
def with_peft(model: torch.nn.Module, adapter: LoraAdapter, dtype: torch.dtype) -> Iterator[dict[str, torch.nn.Parameter]]:
    """A WanModel with PEFT layers of the adapter's values, its blocks checkpointed (use_reentrant=False).

    Args:
        model: on its device, frozen.
        adapter: whose values, rank, alpha and targets are taken over.
        dtype: of PEFT's own parameters.

    Yields:
        Its parameters by the adapter's names, `<path>.down` and `<path>.up`.
    """
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=adapter.rank, lora_alpha=adapter.alpha, lora_dropout=0.0, target_modules=list(adapter.layers))
    wrapped = get_peft_model(model, config, autocast_adapter_dtype=False)
    modules = dict(model.named_modules())
    parameters = {}
    for path, layer in adapter.layers.items():
        for name, own, value in (("down", modules[path].lora_A, layer.down_RI), ("up", modules[path].lora_B, layer.up_OR)):
            parameter = own["default"].weight
            parameter.data = value.detach().to(model.patch_embedding.weight.device, dtype).clone()
            parameters[f"{path}.{name}"] = parameter
    try:
        for block in model.blocks:
            block.forward = _checkpointed(block.forward)
        yield parameters
    finally:
        for block in model.blocks:
            block.__dict__.pop("forward", None)
        wrapped.unload()


def _checkpointed(forward):
    def run(*args, transformer_options=None, **kwargs):
        # The host changes this dictionary from block to block; a second run must see what the first one saw.
        options = dict(transformer_options or {})
        if not torch.is_grad_enabled():
            return forward(*args, transformer_options=options, **kwargs)
        return checkpoint(forward, *args, transformer_options=options, use_reentrant=False, **kwargs)

    return run

"""umT5 text encoders of any width as the host's own CLIP object, and prompts to contexts for the trainer.

The stock loader recognises only the 4096-wide umT5. A smaller one carries its sizes in the file's metadata: `config` = JSON
`{"umt5xxl_model_config": {...}, "text_len": N}`; its embeddings are filled up to N tokens as the stock one's are to 512.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import comfy.sd
import comfy.text_encoders.sd3_clip
import comfy.text_encoders.wan
import comfy.utils
import torch

from ..lora_train.safetensors_file import read_header

_STOCK_WIDTH = 4096
_FIRST_KEY = "shared.weight"


def load_text_encoder(path: str | Path, *, model_options: dict | None = None, embedding_directory: str | None = None) -> comfy.sd.CLIP:
    """Load a umT5 file as the CLIP object that `CLIPTextEncode` takes.

    Args:
        path: safetensors in the host's umT5 key layout, with `spiece_model` inside.
        model_options: passed to the host (`load_device`, `dtype`, ...).

    Raises:
        ValueError: missing or truncated file, not a umT5, or a small one without its sizes.
    """
    options = dict(model_options or {})
    path = str(path)
    if not path.endswith(".safetensors"):
        return comfy.sd.load_clip([path], embedding_directory, comfy.sd.CLIPType.WAN, model_options=options)
    header = read_header(path, "text encoder")
    if header.shapes.get(_FIRST_KEY, (0, 0))[-1] == _STOCK_WIDTH and "config" not in header.metadata:
        return comfy.sd.load_clip([path], embedding_directory, comfy.sd.CLIPType.WAN, model_options=options)
    config = _small_config(path, header.shapes, header.metadata)
    tensors = comfy.utils.load_torch_file(path, safe_load=True)
    target = SimpleNamespace(
        params={}, clip=comfy.text_encoders.wan.te(**comfy.text_encoders.sd3_clip.t5_xxl_detect(tensors)), tokenizer=comfy.text_encoders.wan.WanT5Tokenizer
    )
    options["umt5xxl_model_config"] = config["umt5xxl_model_config"]
    return comfy.sd.CLIP(
        target,
        embedding_directory=embedding_directory,
        tokenizer_data={"spiece_model": tensors["spiece_model"], "umt5xxl_min_length": int(config["text_len"])},
        parameters=comfy.utils.calculate_parameters(tensors),
        state_dict=[tensors],
        model_options=options,
    )


def _small_config(path: str, shapes: dict[str, tuple[int, ...]], metadata: dict[str, str]) -> dict:
    if _FIRST_KEY not in shapes or "encoder.final_layer_norm.weight" not in shapes or "spiece_model" not in shapes:
        raise ValueError(f"the text encoder {path} is not a umT5 with its vocabulary inside; use umt5_xxl_fp16.safetensors or the pocket one")
    config = json.loads(metadata.get("config", "{}"))
    if not {"umt5xxl_model_config", "text_len"} <= config.keys():
        raise ValueError(
            f"the text encoder {path} is {shapes[_FIRST_KEY][-1]} wide instead of {_STOCK_WIDTH} and lacks its sizes: its metadata needs "
            '`config` = {"umt5xxl_model_config": {...}, "text_len": N}'
        )
    return config


class PromptEncoder:
    """Prompts to the context that the backbones read; holds the CLIP object until it is dropped."""

    def __init__(self, clip: comfy.sd.CLIP) -> None:
        self._clip = clip

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> list[torch.Tensor]:
        """One context [P, D] per prompt, fp32 on the CPU, the same numbers that `CLIPTextEncode` gives."""
        contexts = []
        for prompt in prompts:
            cond = self._clip.encode_from_tokens_scheduled(self._clip.tokenize(prompt))[0][0]
            contexts.append(cond[0].float().cpu().clone())
        return contexts

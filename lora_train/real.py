"""Real videos as latents with their prompts: for flow-matching losses and as starts of trajectories.

File: safetensors with `latents` [N, C, F, H, W] in model space, any float type, and in the metadata `prompts`, a JSON list of N texts.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .config import Prompt
from .prompts import PromptSampler


class RealLatents:
    """An open file of real latents; rows are read when they are drawn.

    Raises:
        ValueError: the file cannot be read, or lacks latents or prompts.
    """

    def __init__(self, path: str | Path) -> None:
        self._path = str(path)
        try:
            with safe_open(self._path, "pt") as file:
                shape = file.get_slice("latents").get_shape()
                self.prompts: list[str] = json.loads((file.metadata() or {}).get("prompts", "null"))
        except (OSError, SafetensorError, ValueError) as error:
            raise ValueError(f"the real latents {path} cannot be read ({error}); give a safetensors file with the tensor `latents`") from error
        if len(shape) != 5 or not isinstance(self.prompts, list) or len(self.prompts) != shape[0] or shape[0] == 0:
            count = len(self.prompts) if isinstance(self.prompts, list) else "no"
            raise ValueError(f"the real latents {path} have shape {shape} and {count} prompts; [N, C, F, H, W] and N prompts in the metadata are needed")
        self.shape = tuple(shape[1:])

    def draw(self, seed: int, position: int, count: int) -> tuple[torch.Tensor, list[str]]:
        """Latents [count, C, F, H, W] fp32 and their prompts, number `position` and on of the endless stream."""
        names = [Prompt(text=str(index)) for index in range(len(self.prompts))]
        rows = [int(name) for name in PromptSampler(names, seed).draw(position, count)]
        with safe_open(self._path, "pt") as file:
            whole = file.get_slice("latents")
            latents = torch.cat([whole[row : row + 1] for row in rows])
        return latents.float(), [self.prompts[row] for row in rows]


def write_real(path: Path, latents_BCFHW: torch.Tensor, prompts: Sequence[str]) -> None:
    """Write such a file."""
    save_file({"latents": latents_BCFHW.contiguous()}, path, metadata={"prompts": json.dumps(list(prompts))})

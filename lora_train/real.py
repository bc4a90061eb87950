"""Real videos as latents with their prompts: for flow-matching losses and as starts of trajectories. From a file, or from a dataset of encoded videos.

File: safetensors with `latents` [N, C, F, H, W] in model space, any float type, and in the metadata `prompts`, a JSON list of N texts.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from . import safetensors_file
from .config import Prompt
from .pavrm_data import Sample
from .prompts import PromptSampler


class Clips:
    """Latents of one shape with their prompts. Subclasses set `prompts`, `names` (of the clips, each once) and `shape` (C, F, H, W) and read single clips."""

    prompts: list[str]
    names: list[str]
    shape: tuple[int, ...]

    @property
    def offered(self) -> int:
        """How many clips there were before some were chosen."""
        return len(self.prompts)

    @property
    def has_conditions(self) -> bool:
        """Whether every clip comes with what an image-to-video model is told of its first frame."""
        return False

    def clip(self, number: int) -> torch.Tensor:
        """Latent [C, F, H, W] fp32 of prompt `number`."""
        raise NotImplementedError

    def condition(self, number: int) -> torch.Tensor:
        """Latent [C, F, H, W] fp32 of the clip's first frame followed by grey ones; only where `has_conditions`."""
        raise NotImplementedError

    def draw(self, seed: int, position: int, count: int) -> tuple[torch.Tensor, list[str]]:
        """Latents [count, C, F, H, W] fp32 and their prompts, number `position` and on of the endless stream."""
        numbers = self._drawn(seed, position, count)
        return torch.stack([self.clip(number) for number in numbers]), [self.prompts[number] for number in numbers]

    def conditions(self, seed: int, position: int, count: int) -> torch.Tensor:
        """The conditions [count, C, F, H, W] of the same clips."""
        return torch.stack([self.condition(number) for number in self._drawn(seed, position, count)])

    def _drawn(self, seed: int, position: int, count: int) -> list[int]:
        names = [Prompt(text=str(number)) for number in range(len(self.prompts))]
        return [int(name) for name in PromptSampler(names, seed).draw(position, count)]


class RealLatents(Clips):
    """An open file of real latents; every row is looked at once on opening, and read again when it is drawn.

    Raises:
        ValueError: the file cannot be read, lacks latents or prompts, or a clip holds NaN or infinity.
    """

    def __init__(self, path: str | Path) -> None:
        self._path = str(path)
        try:
            with safe_open(self._path, "pt") as file:
                shape = file.get_slice("latents").get_shape()
                self.prompts = json.loads((file.metadata() or {}).get("prompts", "null"))
        except (OSError, SafetensorError, ValueError) as error:
            raise ValueError(f"the real latents {path} cannot be read ({error}); give a safetensors file with the tensor `latents`") from error
        if len(shape) != 5 or not isinstance(self.prompts, list) or len(self.prompts) != shape[0] or shape[0] == 0:
            count = len(self.prompts) if isinstance(self.prompts, list) else "no"
            raise ValueError(f"the real latents {path} have shape {shape} and {count} prompts; [N, C, F, H, W] and N prompts in the metadata are needed")
        strange = [prompt for prompt in self.prompts if not isinstance(prompt, str)]
        if strange:
            raise ValueError(f"the real latents {path} have the prompt {strange[0]!r}, which is no text; write {len(self.prompts)} texts into the metadata")
        self.shape, self.names = tuple(shape[1:]), [str(number) for number in range(len(self.prompts))]
        self._check_numbers()

    def _check_numbers(self) -> None:
        with safe_open(self._path, "pt") as file:
            latents = file.get_slice("latents")
            for number, prompt in enumerate(self.prompts):
                if not latents[number].float().isfinite().all():
                    which = f"clip {number} (counted from 0), {prompt[:60]!r}"
                    raise ValueError(f"the real latents {self._path} hold NaN or infinity in {which}; make the clip again, or write the file without it")

    def clip(self, number: int) -> torch.Tensor:
        """See `Clips.clip`."""
        with safe_open(self._path, "pt") as file:
            return file.get_slice("latents")[number].float()


class RealSamples(Clips):
    """The same of a dataset's videos; those of another shape than most are left out, as a batch has one shape.

    Raises:
        ValueError: no video has a caption.
    """

    def __init__(self, samples: Sequence[Sample]) -> None:
        told = [sample for sample in samples if sample.caption.strip()]
        if not told:
            raise ValueError(f"none of the dataset's {len(samples)} videos has a caption, which flow matching needs; add captions")
        ((self.shape, count),) = Counter(tuple(sample.shape) for sample in told).most_common(1)
        self._samples = [sample for sample in told if tuple(sample.shape) == self.shape]
        self.prompts, self.names = [sample.caption for sample in self._samples], [sample.id for sample in self._samples]
        self.left_out = len(samples) - count

    def clip(self, number: int) -> torch.Tensor:
        """See `Clips.clip`."""
        return self._samples[number].read().latent_CFHW.float()

    @property
    def has_conditions(self) -> bool:
        """See `Clips.has_conditions`."""
        return all(sample.has_condition for sample in self._samples)

    def condition(self, number: int) -> torch.Tensor:
        """See `Clips.condition`."""
        return self._samples[number].read().condition_CFHW.float()


class Chosen(Clips):
    """Some of other clips, by their numbers there.

    Args:
        is_choice: the rest was on offer too; else it counts as not there.
    """

    def __init__(self, clips: Clips, numbers: Sequence[int], *, is_choice: bool = True) -> None:
        self._clips, self._numbers = clips, list(numbers)
        self.prompts, self.names = [clips.prompts[number] for number in numbers], [clips.names[number] for number in numbers]
        self.shape, self._is_choice = clips.shape, is_choice

    @property
    def offered(self) -> int:
        """See `Clips.offered`."""
        return self._clips.offered if self._is_choice else len(self._numbers)

    def clip(self, number: int) -> torch.Tensor:
        """See `Clips.clip`."""
        return self._clips.clip(self._numbers[number])

    @property
    def has_conditions(self) -> bool:
        """See `Clips.has_conditions`."""
        return self._clips.has_conditions

    def condition(self, number: int) -> torch.Tensor:
        """See `Clips.condition`."""
        return self._clips.condition(self._numbers[number])


def write_real(path: Path, latents_BCFHW: torch.Tensor, prompts: Sequence[str], **facts: str) -> None:
    """Write such a file. `facts`: further metadata."""
    # Not safetensors' own writer: it puts several entries of metadata in an order that changes from call to call.
    safetensors_file.write(path, {"latents": latents_BCFHW.contiguous()}, {"prompts": json.dumps(list(prompts)), **facts})

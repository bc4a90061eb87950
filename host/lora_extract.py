"""Makes a LoRA from two full checkpoints: the difference of their weights, as low-rank as asked for, with the error told.

For models that are published whole (HY-Video-PRFL). The best product of rank r is given by the largest r singular values (Eckart and
Young, 1936); large matrices use a randomised decomposition (Halko, Martinsson and Tropp, 2011). One weight is in memory at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from .experts import guess_expert
from .lora_convert import check_target, save_whole
from .lora_keys import Layout, layout_named
from .weight_source import WeightSource, open_source

EXACT_SIZE = 1024  # up to this side the whole decomposition is taken; above, it would take minutes per weight
OVERSAMPLING, POWER_STEPS = 32, 4  # of the randomised decomposition
MAX_RANK = 1024
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True, kw_only=True)
class Extraction:
    """What became of an extraction.

    Attributes:
        path: The LoRA.
        rank: Asked for.
        layers: Weights with a low-rank change.
        whole: Weights whose change is stored whole (norms, biases, convolutions).
        unchanged: Weights that are equal in both checkpoints.
        error: Norm of what the LoRA does not reproduce over the norm of the whole difference, rounding to the file's type included.
        change: Norm of the difference over the norm of the base's changed weights.
        worst: (layer, error) of the layers that are reproduced worst.
        missing: Weights that only one of the two checkpoints has.
    """

    path: Path
    rank: int
    layers: int
    whole: int
    unchanged: int
    error: float
    change: float
    worst: tuple[tuple[str, float], ...]
    missing: tuple[str, ...]

    def text(self) -> str:
        """Return the result for people."""
        lines = [
            f"{self.path}: rank {self.rank}, {self.layers} layers, {self.whole} weights stored whole, {self.unchanged} unchanged",
            f"  the checkpoints differ by {100 * self.change:.3g} % of the base; {100 * self.error:.3g} % of that difference is lost at this rank",
        ]
        lines += [f"  worst: {layer} loses {100 * error:.3g} %" for layer, error in self.worst]
        if self.missing:
            lines.append(f"  warning: {len(self.missing)} weights are in one checkpoint only and are left out, for example {self.missing[0]}")
        return "\n".join(lines)


@dataclass
class _Sums:
    """Running sums over the weights: squares of norms, and counts."""

    lost: float = 0.0
    change: float = 0.0
    base: float = 0.0
    whole: int = 0
    unchanged: int = 0
    errors: dict[str, float] = field(default_factory=dict)

    def add(self, weight: str, old: torch.Tensor, change: torch.Tensor, rank: int, dtype: torch.dtype) -> list[tuple[str, dict[str, torch.Tensor]]]:
        """Take in one weight and return (layer, parts) for the file; nothing where the weight is unchanged."""
        size = float(change.double().square().sum())
        if not math.isfinite(size):
            raise ValueError(f"{weight} holds NaN or infinity in one of the checkpoints. Download it again.")
        if size == 0.0:
            self.unchanged += 1
            return []
        parts, kept = _parts(weight, change, rank, dtype)
        lost = float((change - kept.to(change)).double().square().sum())
        self.lost, self.change, self.base = self.lost + lost, self.change + size, self.base + float(old.double().square().sum())
        layer = weight.removesuffix(".weight").removesuffix(".bias")
        if "lora_up.weight" in parts:
            self.errors[layer] = math.sqrt(lost / size)
        else:
            self.whole += 1
        return [(layer, parts)]


def extract(
    full: Path,
    base: Path,
    target: Path,
    *,
    rank: int,
    layout_name: str = "videox-fun",
    dtype: str = "bf16",
    overwrite: bool = False,
    device: torch.device | str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> Extraction:
    """Make a LoRA from two checkpoints.

    Args:
        full: The trained model: a safetensors file, an index of shards, or their folder.
        base: The model it was trained from, in the same forms.
        target: The LoRA to write.
        rank: Of every layer; smaller layers take what they have.
        layout_name: Name of a row of `lora_keys.LAYOUTS`.
        dtype: Of the file: bf16, fp16 or fp32.
        overwrite: Whether a file that is there already is replaced.
        device: Where to compute.
        progress: Called with (weights done, weights in all).

    Returns:
        What became of it, with the error.

    Raises:
        ValueError: A checkpoint cannot be read, the two are of different size or equal, or an argument is out of range.
    """
    layout = _checked(target, rank=rank, layout_name=layout_name, dtype=dtype, overwrite=overwrite)
    sources = open_source(full), open_source(base)
    shared = _shared(*sources)
    sums = _Sums()
    tensors: dict[str, torch.Tensor] = {}
    for number, weight in enumerate(shared):
        old = sources[1].read(weight).to(device)
        change = sources[0].read(weight).to(device) - old
        for layer, parts in sums.add(weight, old, change, rank, DTYPES[dtype]):
            tensors.update(_keyed(layout, layer, parts))
        if progress:
            progress(number + 1, len(shared))
    if not tensors:
        raise ValueError(f"{full.name} and {base.name} hold the same weights: there is nothing to extract.")
    result = Extraction(
        path=target,
        rank=rank,
        layers=len(sums.errors),
        whole=sums.whole,
        unchanged=sums.unchanged,
        error=math.sqrt(sums.lost / sums.change),
        change=math.sqrt(sums.change / sums.base) if sums.base else math.inf,
        worst=tuple(sorted(sums.errors.items(), key=lambda item: -item[1])[:3]),
        missing=tuple(sorted(set(sources[0].shapes) ^ set(sources[1].shapes))),
    )
    save_whole(tensors, target, _metadata(result, sources, layout))
    return result


def _checked(target: Path, *, rank: int, layout_name: str, dtype: str, overwrite: bool) -> Layout:
    """Check the arguments before long work and return the layout."""
    layout = layout_named(layout_name)
    if not 1 <= rank <= MAX_RANK:
        raise ValueError(f"rank is {rank}; it must be from 1 to {MAX_RANK}.")
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; choose one of {', '.join(DTYPES)}.")
    check_target(target, overwrite=overwrite)
    return layout


def _shared(full: WeightSource, base: WeightSource) -> list[str]:
    """List the weights of both, and refuse models of different size before any is read."""
    shared = [weight for weight in base.shapes if weight in full.shapes]
    for weight in shared:
        if full.shapes[weight] != base.shapes[weight]:
            raise ValueError(
                f"{weight} has shape {full.shapes[weight]} in {full.name} and {base.shapes[weight]} in {base.name}. "
                "Take the base that the model was trained from."
            )
    unreadable = [weight for weight in shared if weight in full.unreadable or weight in base.unreadable]
    if unreadable:
        raise ValueError(f"{unreadable[0]} is quantised in a format that is not read here. Take the fp32, bf16, fp16 or fp8 files.")
    return shared


def _parts(weight: str, change: torch.Tensor, rank: int, dtype: torch.dtype) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Turn one weight's change into a LoRA's parts.

    Returns:
        The parts in the file's type, and the change that they make, fp32 or wider.
    """
    if weight.endswith(".bias"):
        part = change.to(dtype)
        return {"diff_b": part.cpu()}, part.float()
    if change.ndim != 2 or not weight.endswith(".weight"):
        part = change.to(dtype)
        return {"diff": part.cpu()}, part.float()
    up, down = low_rank(change, rank)
    up, down = up.to(dtype), down.to(dtype)
    parts = {"lora_up.weight": up.cpu(), "lora_down.weight": down.cpu(), "alpha": torch.tensor(float(down.shape[0]))}
    return parts, up.float() @ down.float()


def low_rank(matrix_OI: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the best product of two matrices for a matrix: up [O, R] and down [R, I], with equal shares of the singular values.

    Args:
        matrix_OI: fp32.
        rank: At most the smaller side; larger asks are cut.
    """
    rank = min(rank, *matrix_OI.shape)
    if min(matrix_OI.shape) <= EXACT_SIZE:
        left, values, right = torch.linalg.svd(matrix_OI, full_matrices=False)
    else:
        # The random start is fixed, so that the same checkpoints give the same file.
        with torch.random.fork_rng(devices=[matrix_OI.device] if matrix_OI.is_cuda else []):
            torch.manual_seed(0)
            left, values, right_t = torch.svd_lowrank(matrix_OI, q=min(rank + OVERSAMPLING, *matrix_OI.shape), niter=POWER_STEPS)
        right = right_t.mH
    root = values[:rank].sqrt()
    return left[:, :rank] * root, root[:, None] * right[:rank]


def _keyed(layout: Layout, layer: str, parts: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Name the parts; layouts without alpha need none, for alpha is the rank here."""
    return {layout.key(layer, part): tensor.contiguous() for part, tensor in parts.items() if part != "alpha" or layout.has_alpha}


def _metadata(result: Extraction, sources: tuple[WeightSource, WeightSource], layout: Layout) -> dict[str, str]:
    """Say in the file where it comes from."""
    metadata = {
        "reward_lab_layout": layout.name,
        "reward_lab_extracted_from": sources[0].name,
        "reward_lab_base": sources[1].name,
        "reward_lab_rank": str(result.rank),
        "reward_lab_relative_error": f"{result.error:.6g}",
    }
    expert = guess_expert(sources[0].name, sources[0].metadata).expert or guess_expert(sources[1].name, sources[1].metadata).expert
    return {**metadata, "reward_lab_expert": expert} if expert else metadata

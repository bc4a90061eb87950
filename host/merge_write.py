"""Writes the files of a planned merge: copies what nothing changes, adds and rounds the rest, one weight in memory at a time."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import comfy.lora
import torch

from ..lora_train.safetensors_file import read_header
from .lora_file import MODEL_PREFIX, FittedLora, LoraFile, patch_of
from .merge_plan import Unit
from .patch_rows import patch_rows
from .rounding import Rounder, largest_of
from .stream_file import StreamFile, journal_path, partial_path
from .weight_source import WeightSource

RECIPE = "reward_lab_merge_recipe"  # metadata entry by which a finished file is known again
DISK_RESERVE_BYTES = 64_000_000
PIECE_NUMBERS = 1 << 23  # of a weight at a time; the largest of the 14B model, time_projection.1, takes 629 MB in fp32


@dataclass(frozen=True, kw_only=True)
class MergeRow:
    """A row that fits the base: its file without numbers, and the strength of each weight by model key, those of 0 left out."""

    lora: LoraFile
    fitted: FittedLora
    strengths: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class MergeJob:
    """A merge that was checked and planned.

    Attributes:
        source: The base.
        rows: In the order in which they are added.
        shards: What goes into each file.
        paths: The files.
        index: The index, where there are several.
        recipe: Hash of all that decides about the content.
        metadata: Of every file.
        rounding, seed: See `rounding.round_weight`.
        device: Where to add.
    """

    source: WeightSource
    rows: tuple[MergeRow, ...]
    shards: tuple[tuple[Unit, ...], ...]
    paths: tuple[Path, ...]
    index: Path | None
    recipe: str
    metadata: Mapping[str, str]
    rounding: str
    seed: int
    device: torch.device | str = "cpu"

    @property
    def size_bytes(self) -> int:
        """Of all tensors."""
        return sum(unit.size_bytes for shard in self.shards for unit in shard)

    def is_written(self, path: Path) -> bool:
        """Tell whether one of the files is there, whole and of this recipe."""
        try:
            return path.is_file() and read_header(path).metadata.get(RECIPE) == self.recipe
        except ValueError:
            return False


@dataclass
class WriteSums:
    """What a run did: squares of the norms of the change and of what rounding moved, and tensors that an earlier run had written."""

    change: float = 0.0
    lost: float = 0.0
    resumed: int = 0


def check_targets(job: MergeJob, *, overwrite: bool) -> None:
    """Refuse targets that must not be written, and a disk that is too full.

    Raises:
        ValueError: A target is one of the inputs, or is there and is not ours; or there is no room for what is still to be written.
    """
    inputs = {file.resolve() for file in (*job.source.headers, *(row.lora.path for row in job.rows))}
    targets = [*job.paths, *([job.index] if job.index else [])]
    for path in targets:
        if path.resolve() in inputs:
            raise ValueError(f"{path} is one of the files that are merged. Choose another name.")
        if path.exists() and not overwrite and not job.is_written(path):
            raise ValueError(f"{path} is there already. Choose another name, or ask to overwrite it.")
    there = sum(path.stat().st_size for path in job.paths if job.is_written(path))
    there += sum(partial_path(path).stat().st_size for path in job.paths if partial_path(path).is_file() and journal_path(path).is_file())
    missing = job.size_bytes + DISK_RESERVE_BYTES - there
    folder = job.paths[0].absolute().parent
    free = shutil.disk_usage(folder).free
    if missing > free:
        raise ValueError(f"The merged model needs {missing / 1e9:.2f} GB more, {folder} has {free / 1e9:.2f} GB. Free some room, or choose another folder.")


def write_files(job: MergeJob, progress: Callable[[int, int], None] | None = None) -> WriteSums:
    """Write all files, and the index after them.

    Args:
        job: The merge.
        progress: Called with (bytes written, bytes in all); what it raises stops the run, which can be taken up later.

    Raises:
        ValueError: A file cannot be read any more, or a weight holds NaN or infinity.
    """
    sums = WriteSums()
    written = 0
    for shard, path in zip(job.shards, job.paths, strict=True):
        if job.is_written(path):
            written, sums.resumed = written + sum(unit.size_bytes for unit in shard), sums.resumed + len(shard)
            continue
        file = StreamFile(path, [spec for unit in shard for spec in unit.specs], dict(job.metadata), job.recipe)
        sums.resumed += file.done
        try:
            end = 0
            for unit in shard:
                end += len(unit.specs)
                if file.done < end:
                    _write_unit(job, unit, file, end, sums)
                written += unit.size_bytes
                if progress:
                    progress(written, job.size_bytes)
            file.finish()
        finally:
            file.pause()
    if job.index:
        _write_index(job)
    return sums


def _write_unit(job: MergeJob, unit: Unit, file: StreamFile, end: int, sums: WriteSums) -> None:
    """Write what is missing of one unit; `end` is the place behind it."""
    if unit.value is not None:
        file.write([unit.value])
    elif unit.weight:
        _write_weight(job, unit, file, end, sums)
    else:
        places = [(unit.file, unit.key), *([unit.scale] if unit.scale else [])]
        for source, key in places[len(places) - (end - file.done) :]:
            file.copy(source, job.source.headers[source].begin_of[key])


def _write_weight(job: MergeJob, unit: Unit, file: StreamFile, end: int, sums: WriteSums) -> None:
    """Compute one weight, round it and write it; where it gets a scale, all of it must be known before the first number is rounded."""
    is_scaled = len(unit.specs) == 2
    pieces: Iterable[torch.Tensor] = _exact_pieces(job, unit, sums)
    largest = None
    if is_scaled:
        pieces = _gathered(pieces, unit.specs[0].shape)
        largest = max(map(largest_of, pieces))
    rounder = Rounder(unit.specs[0].dtype, largest=largest, rounding=job.rounding, seed=f"{job.seed} {unit.weight}")
    try:
        if file.done == end - len(unit.specs):
            file.write(map(rounder.round, pieces))
    except ValueError as error:
        raise ValueError(f"{job.source.name}: {unit.weight} cannot be merged: {error}.") from error
    if is_scaled:
        file.write([rounder.scale])
    if any(MODEL_PREFIX + unit.weight in row.strengths for row in job.rows):
        sums.lost += rounder.lost


def _gathered(pieces: Iterable[torch.Tensor], shape: tuple[int, ...]) -> Sequence[torch.Tensor]:
    """Hold all pieces of a weight in one block of memory, which goes back to the system as a whole: kept one by one between short-lived tensors they
    left holes, and the process grew by 3 GB over the 40 blocks of the 14B model.
    """
    whole, lengths = torch.empty(shape, dtype=torch.float32), []
    for piece in pieces:
        begin = sum(lengths)
        whole[begin : begin + len(piece)] = piece
        lengths.append(len(piece))
    return whole.split(lengths)


def _exact_pieces(job: MergeJob, unit: Unit, sums: WriteSums) -> Iterator[torch.Tensor]:
    """Compute one weight in fp32, some rows at a time where the adapters allow it."""
    key, shape = MODEL_PREFIX + unit.weight, unit.specs[0].shape
    patches = [(row.strengths[key], patch_of(row.lora, row.fitted, key)) for row in job.rows if key in row.strengths]
    row_count = shape[0] if shape else 1
    step = max(1, PIECE_NUMBERS * row_count // max(1, prod(shape)))
    if not shape or any(patch_rows(patch, slice(0, 1)) is None for _, patch in patches):
        step = row_count
    for begin in range(0, row_count, step):
        rows = slice(begin, begin + step) if step < row_count else None
        base = job.source.read(unit.weight, rows)
        if not patches:
            yield base
            continue
        parts = [(strength, patch if rows is None else patch_rows(patch, rows), 1.0, None, None) for strength, patch in patches]
        exact = comfy.lora.calculate_weight(parts, base.to(job.device, copy=True), key).cpu()
        sums.change += float(torch.linalg.vector_norm(base.sub_(exact))) ** 2
        del base
        yield exact


def _write_index(job: MergeJob) -> None:
    """Write the index of the shards."""
    weight_map = {spec.key: path.name for shard, path in zip(job.shards, job.paths, strict=True) for unit in shard for spec in unit.specs}
    new = job.index.with_name(job.index.name + ".new")
    new.write_text(json.dumps({"metadata": {"total_size": job.size_bytes}, "weight_map": weight_map}, indent=2), encoding="utf-8")
    new.replace(job.index)

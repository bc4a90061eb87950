"""Merges LoRA rows into a model file: base + rows -> one safetensors, or shards with an index. Streams weight by weight.

The sum is taken in fp32 by the host's own adapters, as when it merges into a loaded model, and rounded once. Interrupted runs are taken up again;
a file has its name only when it is whole, and an index is written after all of its shards.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import comfy.model_management
import comfy.utils
import folder_paths
import torch

from . import paths
from .block_strengths import layer_factors
from .experts import EXPERTS, guess_expert
from .lora_convert import check_target
from .lora_file import MODEL_PREFIX, fit, scan_lora
from .lora_rows import LoraRow
from .lora_slots import base_warnings, repeat_warnings
from .merge_plan import DTYPES, plan_metadata, plan_units, split_units
from .merge_write import RECIPE, MergeJob, MergeRow, check_targets, write_files
from .rounding import ROUNDINGS
from .weight_source import INDEX_END, WeightSource, open_source

EXPERT_CHOICES = ("auto", *EXPERTS)
LARGE_LOSS = 0.5  # of the change; above, the report advises another type or rounding
_BLOCK = re.compile(r"^blocks\.(\d+)\.")


@dataclass(frozen=True, kw_only=True)
class MergeSettings:
    """How to write the merged model.

    Attributes:
        dtype: A key of `merge_plan.DTYPES`; `same` keeps the type of each weight.
        rounding: `nearest` or `stochastic`.
        seed: Of the stochastic rounding.
        shard_bytes: Largest size of a shard; 0 writes one file.
        overwrite: Whether a file that is there already is replaced.
    """

    dtype: str = "same"
    rounding: str = "nearest"
    seed: int = 0
    shard_bytes: int = 0
    overwrite: bool = False

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype is {self.dtype!r}; choose one of {', '.join(DTYPES)}.")
        if self.rounding not in ROUNDINGS:
            raise ValueError(f"rounding is {self.rounding!r}; choose one of {', '.join(ROUNDINGS)}.")
        if self.shard_bytes < 0:
            raise ValueError(f"shard_bytes is {self.shard_bytes}; it must be 0 (one file) or more.")


@dataclass(frozen=True, kw_only=True)
class Merged:
    """What became of a merge.

    Attributes:
        files: The safetensors files, in order.
        index: The index, where there are several.
        changed: Weights that a LoRA changes.
        converted: Further weights that only changed their type.
        size_bytes: Of all files.
        resumed: How many tensors an interrupted run had written already.
        was_there: Whether the files of this recipe were there and whole; nothing was written then.
        lost: Norm of what rounding moved over the norm of the change, in the changed weights that this run wrote; None when it wrote none.
        rows: A line of report for each row.
        warnings: What to look at.
    """

    files: tuple[Path, ...]
    index: Path | None
    changed: int
    converted: int
    size_bytes: int
    resumed: int = 0
    was_there: bool = False
    lost: float | None = None
    rows: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def path(self) -> Path:
        """The file, or the index of several."""
        return self.index or self.files[0]

    def text(self) -> str:
        """Return the result for people."""
        state = "was there already, made of the same files with the same settings" if self.was_there else f"{self.changed} weights changed"
        if self.converted and not self.was_there:
            state += f", {self.converted} more converted"
        lines = [f"{self.path}: {self.size_bytes / 1e9:.3g} GB in {len(self.files)} file{'s' * (len(self.files) > 1)}, {state}"]
        lines += [f"  {row}" for row in self.rows]
        if self.lost is not None:
            lines.append(f"  rounding moved the changed weights by {100 * self.lost:.3g} % of the change")
        if self.resumed:
            lines.append(f"  taken up after {self.resumed} tensors")
        return "\n".join(lines + [f"  warning: {warning}" for warning in self.warnings])

    def to_dict(self) -> dict[str, object]:
        """Return the result as plain data."""
        lists = {"files": [str(file) for file in self.files], "rows": list(self.rows), "warnings": list(self.warnings)}
        return {**self.__dict__, **lists, "index": str(self.index) if self.index else None, "file": str(self.path)}


def merge(
    base: Path,
    rows: Sequence[LoraRow],
    target: Path,
    settings: MergeSettings,
    *,
    expert: str,
    locate: Callable[[str], Path] = Path,
    device: torch.device | str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> Merged:
    """Merge rows into a model.

    Args:
        base: A safetensors file, the index of a sharded checkpoint, or a folder that holds one of them.
        rows: The rows; those that are off or have strength 0 on this expert change nothing.
        target: The file to write. Shards get `-00001-of-00003` before the ending, and an index `.safetensors.index.json`.
        settings: How to write it.
        expert: `high` or `low`: which strength of the rows counts.
        locate: Returns the path of a row's file.
        device: Where to add.
        progress: Called with (bytes written, bytes in all); what it raises stops the run, which can be taken up later.

    Returns:
        What became of it.

    Raises:
        ValueError: A file cannot be used, a row does not fit or has a curve, the target is there, or the disk is too full.
    """
    check_target(target, overwrite=True)  # what is there is looked at below: it may be this very merge
    source = open_source(base)
    active = _active(rows, expert)
    fitted = tuple(_fit(row, expert, source, locate(row.file)) for row in active)
    changed = {key.removeprefix(MODEL_PREFIX) for row in fitted for key in row.strengths}
    job = _job(source, fitted, changed, target, settings, device)
    units = [unit for shard in job.shards for unit in shard]
    was_there = all(map(job.is_written, job.paths)) and (job.index is None or job.index.is_file())
    done = None
    if not was_there:
        check_targets(job, overwrite=settings.overwrite)
        done = write_files(job, progress)
    lost = math.sqrt(done.lost / done.change) if done and done.change else None
    return Merged(
        files=job.paths,
        index=job.index,
        changed=len(changed),
        converted=sum(1 for unit in units if unit.weight and unit.weight not in changed),
        size_bytes=sum(path.stat().st_size for path in job.paths),
        resumed=done.resumed if done else 0,
        was_there=was_there,
        lost=lost,
        rows=tuple(_row_text(row, of) for row, of in zip(active, fitted, strict=True)),
        warnings=tuple(_warnings(source, active, fitted, expert, lost, settings.rounding)),
    )


def merge_for_node(base: str, rows: Sequence[LoraRow], expert: str, name: str, settings: MergeSettings) -> Merged:
    """Merge for the node: files by the host's names, into `output/diffusion_models`, which the host lists among its models.

    Args:
        base: Name among the host's diffusion models.
        rows: The rows.
        expert: One of EXPERT_CHOICES.
        name: Of the new file, without folders; empty takes the base's with `-merged`.
        settings: How to write it.

    Raises:
        ValueError: As `merge`; or the expert is not known, or the name has a folder in it.
    """
    path = paths.model_path("diffusion_models", base)
    known = guess_expert(path.name, open_source(path).metadata).expert if expert == "auto" else expert
    if known is None:
        raise ValueError(f"Neither the metadata nor the name of {path.name} says which expert it is. Set expert to high or low.")
    file_name = (name.strip() or f"{path.stem}-merged").removesuffix(".safetensors") + ".safetensors"
    if re.search(r'[\\/:*?"<>|]', file_name) or file_name.startswith("."):
        raise ValueError(f'{name!r} is no file name. Give one without folders and without any of \\ / : * ? " < > |.')
    folder = Path(folder_paths.get_output_directory()) / "diffusion_models"
    folder.mkdir(parents=True, exist_ok=True)
    bar = comfy.utils.ProgressBar(1000)

    def show(done: int, of: int) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        bar.update_absolute(1000 * done // max(of, 1))

    device = comfy.model_management.get_torch_device()
    locate = partial(paths.model_path, "loras")
    return merge(path, rows, folder / file_name, settings, expert=known, locate=locate, device=device, progress=show)


def fingerprint(base: str) -> str:
    """Return a text that changes when the base on disk does."""
    try:
        status = paths.model_path("diffusion_models", base).stat()
    except ValueError as error:
        return str(error)
    return f"{base}:{status.st_mtime_ns}:{status.st_size}"


def _active(rows: Sequence[LoraRow], expert: str) -> list[LoraRow]:
    """Return the rows that act on the expert, in an order that does not depend on theirs: sums of floats do. Raises ValueError for a curve."""
    active = [row for row in rows if row.on and row.strength(expert) != 0.0]
    for row in active:
        if not row.curve.is_constant():
            raise ValueError(f"{row.file} has a strength over sigma, which a file cannot have. Remove the curve of this row.")
    return sorted(active, key=lambda row: (row.file, row.strength(expert), row.blocks))


def _fit(row: LoraRow, expert: str, source: WeightSource, path: Path) -> MergeRow:
    """Check a row's file and fit it to the base."""
    lora = scan_lora(path)
    fitted = fit(lora, {MODEL_PREFIX + weight: shape for weight, shape in source.shapes.items()})
    blocks = 1 + max(int(found[1]) for weight in source.shapes if (found := _BLOCK.match(weight)))
    strength = row.strength(expert) * row.curve.at(1.0)
    factors = layer_factors(row.blocks, fitted.patches, blocks)
    return MergeRow(lora=lora, fitted=fitted, strengths={key: strength * factor for key, factor in factors.items() if strength * factor != 0.0})


def _job(source: WeightSource, rows: tuple[MergeRow, ...], changed: set[str], target: Path, settings: MergeSettings, device) -> MergeJob:
    """Plan the files."""
    shards = split_units(plan_units(source, changed, settings.dtype), settings.shard_bytes)
    count = len(shards)
    names = [target.name] if count == 1 else [f"{target.stem}-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
    recipe = _recipe(source, rows, settings)
    merged = [{"file": row.lora.name, "strengths": sorted(set(row.strengths.values()))} for row in rows]
    expert = guess_expert(source.name, source.metadata).expert
    own = {"reward_lab_base": source.name, "reward_lab_merged": json.dumps(merged), **({"reward_lab_expert": expert} if expert else {}), RECIPE: recipe}
    return MergeJob(
        source=source,
        rows=rows,
        shards=tuple(map(tuple, shards)),
        paths=tuple(target.with_name(name) for name in names),
        index=target.with_name(target.stem + INDEX_END) if count > 1 else None,
        recipe=recipe,
        metadata=plan_metadata(source, settings.dtype, own),
        rounding=settings.rounding,
        seed=settings.seed,
        device=device,
    )


def _recipe(source: WeightSource, rows: Sequence[MergeRow], settings: MergeSettings) -> str:
    """Return a hash of everything that decides about the content. Files count by name, size and time: hashing 28 GB would take a minute."""
    files = [*source.headers, *(row.lora.path for row in rows)]
    states = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    said = {name: value for name, value in asdict(settings).items() if name != "overwrite"}
    return hashlib.sha256(json.dumps([states, said, [sorted(row.strengths.items()) for row in rows]]).encode()).hexdigest()


def _row_text(row: LoraRow, of: MergeRow) -> str:
    """Say what became of one row."""
    blocks = f" ({row.blocks})" if row.blocks else ""
    spread = sorted({min(of.strengths.values(), default=0.0), max(of.strengths.values(), default=0.0)})
    strength = " to ".join(f"{value:g}" for value in spread)
    return f"{of.lora.name} at {strength}{blocks}: applied {of.fitted.applied_keys} of {of.fitted.total_keys} keys, {len(of.strengths)} weights"


def _warnings(source: WeightSource, rows: Sequence[LoraRow], fitted: Sequence[MergeRow], expert: str, lost: float | None, rounding: str) -> list[str]:
    """Collect what the user should look at."""
    warnings = [] if rows else ["no row acts on this expert: the weights are those of the base"]
    guess = guess_expert(source.name, source.metadata)
    if guess.expert not in (None, expert):
        warnings.append(f"the base is the {guess.expert}-noise expert by its {guess.source}, but the strengths for {expert} noise were taken")
    for of in fitted:
        warnings += [f"{of.lora.name}: {text}" for text in (*base_warnings(of.lora, expert), *of.fitted.notes)]
    warnings += repeat_warnings([(row.file, {expert: row.strength(expert)}) for row in rows])
    if lost is not None and lost > LARGE_LOSS:
        advice = "by chance it is kept on average" if rounding == "stochastic" else "stochastic rounding keeps it on average"
        warnings.append(f"rounding hides much of the change in single weights; {advice}, a finer dtype keeps it as it is")
    return list(dict.fromkeys(warnings))

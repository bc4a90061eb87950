"""What the Inspect LoRA node and the command line show: reports, the heat map and the data of one or two LoRA files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from . import paths
from .lora_base import BaseWeights, base_from_model
from .lora_change import WeightDifference, total
from .lora_heatmap import HeatMap, change_map, difference_map, draw
from .lora_patch import model_expert
from .lora_report import LoraReport, difference, difference_text, inspect

NO_FILE = "none"


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """Reports of one or two files, per base they were compared with; the difference of the two; the picture.

    Attributes:
        reports: In the order of the files, then of the bases.
        differences: Per weight; None for one file, or when the two cannot be compared.
        difference_note: The difference for people, or why there is none.
        picture: The heat maps.
    """

    reports: tuple[LoraReport, ...]
    differences: tuple[WeightDifference, ...] | None
    difference_note: str
    picture: Image.Image

    def text(self) -> str:
        """Return everything for people."""
        return "\n\n".join([*(report.text() for report in self.reports), *([self.difference_note] if self.difference_note else [])])

    def to_dict(self) -> dict[str, Any]:
        """Return the first report as plain data; further reports and the difference beside it."""
        data = self.reports[0].to_dict()
        if len(self.reports) > 1:
            data["others"] = [report.to_dict() for report in self.reports[1:]]
        if self.differences is not None:
            norms = [total([entry.first for entry in self.differences]), total([entry.second for entry in self.differences])]
            product = sum((entry.cosine or 0.0) * entry.first * entry.second for entry in self.differences)
            data["difference"] = {
                "norm": total([entry.difference for entry in self.differences]),
                "norms": norms,
                "cosine": product / (norms[0] * norms[1]) if all(norms) else None,
            }
        return data


def inspect_files(files: Sequence[Path], bases: Sequence[BaseWeights] = ()) -> Inspection:
    """Inspect one or two LoRA files.

    Args:
        files: One, or two to compare.
        bases: Models to measure against. A file whose expert is known is measured against that expert alone, where it is among them.

    Returns:
        Reports, difference and picture; a bad file is a report that says so.
    """
    reports: list[LoraReport] = []
    for file in files:
        unmeasured = inspect(file) if len(bases) != 1 else None
        fitting = [base for base in bases if unmeasured and base.expert == unmeasured.expert] or list(bases)
        reports += [inspect(file, base) for base in fitting] or [unmeasured]
    maps = [change_map(_title(report), report.changes) for report in reports]
    differences, note = None, ""
    if len(files) == 2:
        differences, note = _difference(files[0], files[1], bases)
        if differences is not None:
            maps.append(_difference_panel(files, differences))
    return Inspection(reports=tuple(reports), differences=differences, difference_note=note, picture=draw(maps))


def inspect_for_node(lora: str, compare_with: str, model_high: Any, model_low: Any) -> tuple[str, Any, str]:
    """Inspect for the node.

    Args:
        lora: Name among the host's LoRA files.
        compare_with: A second name, or `none`.
        model_high: MODEL of the high-noise expert, or None.
        model_low: MODEL of the low-noise expert, or None.

    Returns:
        The report, the heat map as IMAGE [1, H, W, 3], and the data as JSON.

    Raises:
        ValueError: No such file.
    """
    files = [paths.model_path("loras", name) for name in (lora, compare_with) if name != NO_FILE]
    if not files:
        raise ValueError("Choose a LoRA to inspect.")
    connected = (("high", model_high), ("low", model_low))
    bases = [base_from_model(model, f"the {expert}-noise expert", model_expert(model) or expert) for expert, model in connected if model is not None]
    found = inspect_files(files, bases)
    return found.text(), paths.image_tensor(found.picture), json.dumps(found.to_dict())


def fingerprint(names: Sequence[str]) -> str:
    """Return a text that changes when one of the files on disk does."""
    parts = []
    for name in names:
        try:
            status = paths.model_path("loras", name).stat() if name != NO_FILE else None
        except ValueError as error:
            parts.append(str(error))
        else:
            parts.append(f"{name}:{status.st_mtime_ns}:{status.st_size}" if status else name)
    return "|".join(parts)


def _title(report: LoraReport) -> str:
    """Name a panel: file, expert, base."""
    if report.verdict == "refused":
        return f"{report.file}: refused"
    against = f", relative to {report.base}" if report.base else ""
    return f"{report.file} ({report.expert or 'expert not known'}{against})"


def _difference(first: Path, second: Path, bases: Sequence[BaseWeights]) -> tuple[tuple[WeightDifference, ...] | None, str]:
    """Compare two files; a reason instead when they cannot be compared."""
    try:
        found = tuple(difference(first, second, bases[0] if bases else None))
    except ValueError as error:
        return None, f"{first.name} and {second.name} cannot be compared: {error}"
    return found, difference_text(first.name, second.name, found)


def _difference_panel(files: Sequence[Path], differences: Sequence[WeightDifference]) -> HeatMap:
    return difference_map(f"difference of {files[0].name} and {files[1].name}, relative to the larger change", differences)

"""Applies LoRA rows to both experts: clones, the host's weight adapters, and a report of what was applied.

The models given are never changed: patches go on a clone and the host keeps the original weights. All rows are fitted to both models
before the first is applied, so a bad row costs nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from . import paths
from .experts import EXPERTS, guess_expert, other_expert
from .lora_file import FittedLora, LoraFile, fit, read_lora
from .lora_rows import LoraRow, check_rows, fingerprint, parse_rows

__all__ = ["AppliedRows", "RowReport", "apply_rows", "check_rows", "fingerprint", "model_expert", "parse_rows"]

EXPERT_ATTACHMENT = "reward_lab_expert"
MAX_TOTAL_STRENGTH = 1.0  # above, reward LoRAs are reported to overcook: field.md section 5 row 4


@dataclass(frozen=True, kw_only=True)
class RowReport:
    """What became of one row. `applied_*` counts keys of the file; None where the row does not act on that expert."""

    file: str
    applied_high: int | None
    applied_low: int | None
    total: int
    high: float = 0.0
    low: float = 0.0
    detail: str = ""
    warnings: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return the row as plain data for the page."""
        return {
            "file": self.file,
            "applied_high": self.applied_high,
            "applied_low": self.applied_low,
            "total": self.total,
            "detail": self.detail,
            "warnings": list(self.warnings),
        }

    def text(self) -> str:
        """Return the row as lines of the report."""
        counts = []
        for expert, applied, strength in (("high", self.applied_high, self.high), ("low", self.applied_low, self.low)):
            counts.append(f"{expert} {strength:g}: " + ("not applied" if applied is None else f"applied {applied} of {self.total} keys"))
        lines = [f"{self.file} ({self.detail})" if self.detail else self.file, "  " + "; ".join(counts)]
        return "\n".join(lines + [f"  warning: {warning}" for warning in self.warnings])


@dataclass(frozen=True, kw_only=True)
class AppliedRows:
    """Both models with their LoRAs, and the report."""

    model_high: Any
    model_low: Any
    rows: list[RowReport] = field(default_factory=list)
    report: str = ""


def model_expert(model: Any) -> str | None:
    """Tell which expert a MODEL is, from the pack's own loader or from the file it was loaded from; None when not known."""
    attached = model.attachments.get(EXPERT_ATTACHMENT)
    if attached is not None:
        return attached
    source = model.cached_patcher_init[1] if model.cached_patcher_init else ()
    return guess_expert(source[0]).expert if source and isinstance(source[0], str) else None


def apply_rows(model_high: Any, model_low: Any, rows: Sequence[LoraRow]) -> AppliedRows:
    """Apply rows to clones of both models.

    Args:
        model_high: MODEL of the high-noise expert.
        model_low: MODEL of the low-noise expert.
        rows: The rows; those switched off, and strengths of 0, change nothing.

    Returns:
        Both clones and the report.

    Raises:
        ValueError: A file is missing, broken, holds NaN, or does not fit; nothing was applied then.
    """
    models = {"high": model_high, "low": model_low}
    shapes = {expert: {key: tuple(value.shape) for key, value in model.model_state_dict().items()} for expert, model in models.items()}
    loras = [read_lora(paths.model_path("loras", row.file)) if row.on else None for row in rows]
    fitted = [_fit_row(row, lora, shapes) for row, lora in zip(rows, loras, strict=True)]
    clones = {expert: model.clone() for expert, model in models.items()}
    for row, fits in zip(rows, fitted, strict=True):
        for expert, fitting in fits.items():
            done = clones[expert].add_patches(fitting.patches, strength_patch=row.strength(expert))
            if len(done) != len(fitting.patches):
                raise RuntimeError(f"{row.file}: the host took {len(done)} of {len(fitting.patches)} layers on the {expert}-noise expert.")
    reports = [_report(row, lora, fits) for row, lora, fits in zip(rows, loras, fitted, strict=True)]
    general = _general_warnings(models, rows)
    lines = [report.text() for report in reports] + [f"warning: {warning}" for warning in general]
    return AppliedRows(
        model_high=clones["high"], model_low=clones["low"], rows=reports, report="\n".join(lines) or "No LoRA: both models pass through unchanged."
    )


def _fit_row(row: LoraRow, lora: LoraFile | None, shapes: Mapping[str, Mapping[str, tuple[int, ...]]]) -> dict[str, FittedLora]:
    """Fit one row to each expert that it acts on."""
    if lora is None:
        return {}
    fits = {}
    for expert in EXPERTS:
        if row.strength(expert) != 0.0:
            try:
                fits[expert] = fit(lora, shapes[expert])
            except ValueError as error:
                raise ValueError(f"On the {expert}-noise expert: {error}") from error
    return fits


def _report(row: LoraRow, lora: LoraFile | None, fits: Mapping[str, FittedLora]) -> RowReport:
    """Say what became of one row."""
    if lora is None:
        return RowReport(file=row.file, applied_high=None, applied_low=None, total=0, detail="off")
    counts = {expert: fits[expert].applied_keys if expert in fits else None for expert in EXPERTS}
    warnings = list(_slot_warnings(row, lora))
    for fitting in fits.values():
        warnings.extend(note for note in fitting.notes if note not in warnings)
    return RowReport(
        file=row.file,
        applied_high=counts["high"],
        applied_low=counts["low"],
        total=len(lora.tensors),
        high=row.high,
        low=row.low,
        detail=_detail(lora, fits),
        warnings=tuple(warnings),
    )


def _detail(lora: LoraFile, fits: Mapping[str, FittedLora]) -> str:
    """Describe a LoRA in a few words: expert, layers, rank, alpha."""
    words = [f"made for {lora.guess.expert} noise" if lora.guess.expert else "expert unknown"]
    fitting = next(iter(fits.values()), None)
    if fitting is not None:
        words.append(f"{len(fitting.patches)} layers")
        if fitting.ranks:
            words.append("rank " + "–".join(f"{rank}" for rank in sorted({fitting.ranks[0], fitting.ranks[-1]})))
            words.append("alpha " + ("–".join(f"{alpha:g}" for alpha in sorted({fitting.alphas[0], fitting.alphas[-1]})) if fitting.alphas else "= rank"))
    return ", ".join(words)


def _slot_warnings(row: LoraRow, lora: LoraFile) -> list[str]:
    """Warn about a LoRA that acts on the expert it was not made for."""
    warnings = []
    made_for, source = lora.guess.expert, lora.guess.source
    if made_for is not None:
        other = other_expert(made_for)
        if row.strength(other) != 0.0 and row.strength(made_for) == 0.0:
            warnings.append(f"its {source} says {made_for} noise, but it acts on the {other}-noise expert only; swap the two strengths")
        elif row.strength(other) != 0.0:
            warnings.append(f"its {source} says {made_for} noise, but it acts on both experts; set the strength on {other} noise to 0 unless you mean it")
    if "wan2.1" in lora.name.lower():
        warnings.append("made for Wan2.1; the Wan2.2 reward LoRAs' page once linked a Wan2.1 file by mistake")
    return warnings


def _general_warnings(models: Mapping[str, Any], rows: Sequence[LoraRow]) -> list[str]:
    """Warn about what concerns several rows or the models."""
    warnings = []
    active = [row for row in rows if row.on]
    files = [row.file for row in active]
    warnings.extend(f"{file} stands in {files.count(file)} rows; their strengths add up" for file in sorted(set(files)) if files.count(file) > 1)
    for expert in EXPERTS:
        total = sum(row.strength(expert) for row in active)
        if abs(total) > MAX_TOTAL_STRENGTH + 1e-9:
            warnings.append(f"strengths on the {expert}-noise expert add up to {total:g}; above {MAX_TOTAL_STRENGTH:g} reward LoRAs tend to overcook")
        is_expert = model_expert(models[expert])
        if is_expert not in (None, expert):
            warnings.append(f"the model connected as {expert} noise is the {is_expert}-noise expert")
    return warnings

"""Applies LoRA rows to both experts: clones, the host's weight adapters, and a report of what was applied.

The models given are never changed: patches go on a clone and the host keeps the original weights. All rows are fitted to both models
before the first is applied, so a bad row costs nothing. A row is merged into the weights by the host, or runs beside them (`lora_bypass`).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from . import paths
from .block_strengths import layer_factors
from .experts import EXPERTS, guess_expert
from .lora_bypass import UnmergedRow, add_rows, quantised_kind, split_patches, weight_shapes
from .lora_file import FittedLora, LoraFile, fit, read_lora
from .lora_rows import APPLICATIONS, LoraRow, application_of, check_rows, fingerprint, parse_rows
from .lora_share import Share, share_of
from .lora_slots import repeat_warnings, slot_warnings

__all__ = ["APPLICATIONS", "AppliedRows", "RowReport", "apply_rows", "check_rows", "fingerprint", "model_expert", "parse_rows"]

EXPERT_ATTACHMENT = "reward_lab_expert"
_fits: dict[int, dict[int, FittedLora]] = {}  # by the identity of the file in memory; an entry goes when the file does
MAX_TOTAL_STRENGTH = 1.0  # above, reward LoRAs are reported to overcook: field.md section 5 row 4


@dataclass(frozen=True, kw_only=True)
class RowReport:
    """What became of one row.

    `applied_*` counts keys of the file; None where the row does not act on that expert. `high`, `low` and `on` are those of the row. `unmerged` names the
    experts beside whose weights it runs. `kinds`, `left_out` and `memory_bytes` are those of `FittedLora`, `layout` is that of the file. `shares` tells by
    expert how much the row changes the weights it acts on, at its strengths, a curve at its largest.
    """

    file: str
    applied_high: int | None
    applied_low: int | None
    total: int
    high: float = 0.0
    low: float = 0.0
    on: bool = True
    detail: str = ""
    warnings: tuple[str, ...] = ()
    unmerged: tuple[str, ...] = ()
    kinds: Mapping[str, int] = field(default_factory=dict)
    left_out: Mapping[str, int] = field(default_factory=dict)
    memory_bytes: int = 0
    layout: str = ""
    shares: Mapping[str, Share] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return the row as plain data for the page."""
        return {
            "file": self.file,
            "applied_high": self.applied_high,
            "applied_low": self.applied_low,
            "total": self.total,
            "high": self.high,
            "low": self.low,
            "on": self.on,
            "detail": self.detail,
            "warnings": list(self.warnings),
            "unmerged": list(self.unmerged),
            "kinds": dict(self.kinds),
            "left_out": dict(self.left_out),
            "memory_bytes": self.memory_bytes,
            "layout": self.layout,
            "shares": {expert: {"value": share.value, "text": share.text()} for expert, share in self.shares.items()},
        }

    def text(self) -> str:
        """Return the row as lines of the report."""
        counts = []
        for expert, applied, strength in (("high", self.applied_high, self.high), ("low", self.applied_low, self.low)):
            how = ", unmerged" if expert in self.unmerged else ""
            share = f", changes {self.shares[expert].text()}" if expert in self.shares else ""
            counts.append(f"{expert} {strength:g}: " + ("not applied" if applied is None else f"applied {applied} of {self.total} keys{how}{share}"))
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


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """How one row is applied to one expert: patches for the host to merge, by factor, and what runs beside the weights."""

    file: str
    strength: float
    merged: dict[float, dict[str, Any]] = field(default_factory=dict)
    unmerged: UnmergedRow | None = None
    is_beside: bool = False
    notes: tuple[str, ...] = ()
    share: Share | None = None


def apply_rows(
    model_high: Any,
    model_low: Any,
    rows: Sequence[LoraRow],
    application: str = "auto",
    *,
    locate: Callable[[str], Path] | None = None,
    check_slot: Callable[[LoraFile, Mapping[str, float]], list[str]] = slot_warnings,
) -> AppliedRows:
    """Apply rows to clones of both models.

    Args:
        model_high: MODEL of the high-noise expert; None applies nothing to it.
        model_low: MODEL of the low-noise expert; None applies nothing to it.
        rows: The rows; those switched off, and strengths of 0, change nothing.
        application: `merged`, `bypass`, or `auto`: merged, but beside the weights where these are quantised or the strength follows sigma.
        locate: Returns the path of a row's file; without it, the file is one of the host's LoRA folder.
        check_slot: Returns warnings about a file with its strengths by expert.

    Returns:
        Both clones and the report.

    Raises:
        ValueError: A file is missing, broken, holds NaN, or does not fit, or a curve is to be merged; nothing was applied then.
    """
    models = {expert: model for expert, model in (("high", model_high), ("low", model_low)) if model is not None}
    shapes = {expert: weight_shapes(model) for expert, model in models.items()}
    quantised = {expert: quantised_kind(model) for expert, model in models.items()}
    locate = locate or partial(paths.model_path, "loras")
    loras = [read_lora(locate(row.file)) if row.on else None for row in rows]
    fitted = [_fit_row(row, lora, shapes) for row, lora in zip(rows, loras, strict=True)]
    plans = [
        {expert: _plan(row, expert, models[expert], lora, fitting, application_of(row, application), quantised[expert]) for expert, fitting in fits.items()}
        for row, lora, fits in zip(rows, loras, fitted, strict=True)
    ]
    clones = {expert: model.clone() for expert, model in models.items()}
    for expert, clone in clones.items():
        _apply(clone, [plan[expert] for plan in plans if expert in plan])
    reports = [_report(row, lora, fits, plan, check_slot) for row, lora, fits, plan in zip(rows, loras, fitted, plans, strict=True)]
    general = _general_warnings(models, rows)
    general_notes = [f"{expert} noise: {kind} weights" for expert, kind in quantised.items() if kind]
    lines = [report.text() for report in reports] + general_notes + [f"warning: {warning}" for warning in general]
    return AppliedRows(
        model_high=clones.get("high"),
        model_low=clones.get("low"),
        rows=reports,
        report="\n".join(lines) or "No LoRA: both models pass through unchanged.",
    )


def _plan(row: LoraRow, expert: str, model: Any, lora: LoraFile, fitting: FittedLora, application: str, quantised: str) -> _Plan:
    """Decide how one row is applied to one expert. Changes nothing."""
    factors = layer_factors(row.blocks, fitting.patches, len(model.model.diffusion_model.blocks))
    strength = row.strength(expert)
    is_beside = application == "bypass" or (application == "auto" and (bool(quantised) or not row.curve.is_constant()))
    # The host (0.30.0) passes over bare parameters such as a block's modulation when it merges, so these always run beside the weights.
    beside = {key: patch for key, patch in fitting.patches.items() if is_beside or not key.endswith((".weight", ".bias"))}
    terms, merge_keys = split_patches(model, lora, beside)
    notes = ()
    if merge_keys and not row.curve.is_constant():
        raise ValueError(
            f"{row.file}: {len(merge_keys)} layers are of a kind that depends on the base weights (DoRA, OFT, BOFT, GLoRA), for example "
            f"{merge_keys[0]}; these can only be merged and cannot follow sigma. Remove the curve of this row."
        )
    if merge_keys:
        notes = (f"{len(merge_keys)} layers are of a kind that depends on the base weights (DoRA, OFT, BOFT, GLoRA) and were merged",)
    unmerged = None
    if terms.model.keys:
        changed = {key: factor for key, factor in factors.items() if factor != 1.0}
        unmerged = UnmergedRow(name=row.file, patcher=terms, strength=strength, curve=row.curve, factors=changed)
    merge_keys += [key for key in fitting.patches if key not in beside]
    merged: dict[float, dict[str, Any]] = {}
    for key in merge_keys:
        factor = factors[key] * row.curve.at(1.0)
        if factor != 0.0:
            merged.setdefault(factor, {})[key] = fitting.patches[key]
    largest = strength * row.curve.largest()
    share = share_of(model, fitting, {key: largest * factor for key, factor in factors.items()})
    return _Plan(file=row.file, strength=strength, merged=merged, unmerged=unmerged, is_beside=is_beside, notes=notes, share=share)


def _apply(clone: Any, plans: Sequence[_Plan]) -> None:
    """Apply all rows to one clone, in an order that does not depend on theirs: sums of floats do."""
    for plan in sorted(plans, key=lambda plan: (plan.file, plan.strength, sorted(plan.merged))):
        for factor, patches in sorted(plan.merged.items()):
            done = clone.add_patches(patches, strength_patch=plan.strength * factor)
            if len(done) != len(patches):
                raise RuntimeError(f"{plan.file}: the host took {len(done)} of {len(patches)} layers.")
    add_rows(clone, [plan.unmerged for plan in plans if plan.unmerged is not None])


def _fit_row(row: LoraRow, lora: LoraFile | None, shapes: Mapping[str, Mapping[str, tuple[int, ...]]]) -> dict[str, FittedLora]:
    """Fit one row to each expert that it acts on."""
    if lora is None:
        return {}
    fits = {}
    for expert in shapes:
        if row.strength(expert) != 0.0:
            try:
                fits[expert] = _fit_once(lora, shapes[expert])
            except ValueError as error:
                raise ValueError(f"On the {expert}-noise expert: {error}") from error
    return fits


def _fit_once(lora: LoraFile, shapes: Mapping[str, tuple[int, ...]]) -> FittedLora:
    """Fit a file to a model's shapes, or return what came out last time: a new strength must not take the time of reading all keys."""
    if id(lora) not in _fits:
        weakref.finalize(lora, _fits.pop, id(lora), None)
        _fits[id(lora)] = {}
    known = _fits[id(lora)]
    signature = hash(frozenset(shapes.items()))
    if signature not in known:
        known[signature] = fit(lora, shapes)
    return known[signature]


def _report(row: LoraRow, lora: LoraFile | None, fits: Mapping[str, FittedLora], plans: Mapping[str, _Plan], check_slot: Callable) -> RowReport:
    """Say what became of one row."""
    if lora is None:
        return RowReport(file=row.file, applied_high=None, applied_low=None, total=0, high=row.high, low=row.low, on=False, detail="off")
    counts = {expert: fits[expert].applied_keys if expert in fits else None for expert in EXPERTS}
    warnings = check_slot(lora, {"high": row.high, "low": row.low})
    fitting = next(iter(fits.values()), None)
    for found in (*fits.values(), *plans.values()):
        warnings.extend(note for note in found.notes if note not in warnings)
    return RowReport(
        file=row.file,
        applied_high=counts["high"],
        applied_low=counts["low"],
        total=len(lora.tensors),
        high=row.high,
        low=row.low,
        detail=_detail(lora, fits),
        warnings=tuple(warnings),
        unmerged=tuple(expert for expert, plan in plans.items() if plan.is_beside),
        kinds=fitting.kinds if fitting else {},
        left_out=fitting.left_out if fitting else {},
        memory_bytes=fitting.memory_bytes if fitting else 0,
        layout=lora.layout,
        shares={expert: plan.share for expert, plan in plans.items() if plan.share is not None},
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


def _general_warnings(models: Mapping[str, Any], rows: Sequence[LoraRow]) -> list[str]:
    """Warn about what concerns several rows or the models."""
    warnings = []
    active = [row for row in rows if row.on]
    warnings.extend(repeat_warnings([(row.file, {expert: row.strength(expert) for expert in EXPERTS}) for row in active]))
    for expert in EXPERTS:
        total = sum(row.strength(expert) for row in active)
        if abs(total) > MAX_TOTAL_STRENGTH + 1e-9:
            warnings.append(f"strengths on the {expert}-noise expert add up to {total:g}; above {MAX_TOTAL_STRENGTH:g} reward LoRAs tend to overcook")
        if expert not in models:
            if total:
                warnings.append(f"no {expert}-noise model is connected; the strengths on it change nothing but the lists for other packs")
            continue
        is_expert = model_expert(models[expert])
        if is_expert not in (None, expert):
            warnings.append(f"the model connected as {expert} noise is the {is_expert}-noise expert")
    return warnings

"""Inspects a LoRA file: what is in it, what of it a model would take, how much it changes. As data, and as text for people."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .lora_base import BaseWeights, base_of_itself
from .lora_change import WeightChange, WeightDifference, compare, measure, relative_norm, total
from .lora_file import MODEL_PREFIX, FittedLora, LoraFile, fit, read_lora
from .lora_keys import LAYOUTS, split_key
from .lora_reasons import width_name
from .lora_slots import base_warnings
from .official_loras import find_official

KIND_WORDS = {
    "image_branch": "of Wan2.1's image branch, harmless",
    "text_encoder": "for a text encoder",
    "duplicate": "naming a layer a second time",
    "unknown": "unknown",
    "misfit": "of layers with another size",
}
HARMLESS = ("image_branch", "text_encoder")
SHOWN_METADATA = 30
SMALL_WIDTHS = (1536, 3072)


@dataclass(frozen=True, kw_only=True)
class LoraReport:
    """What is known about a LoRA file.

    Attributes:
        file: Its name.
        layout: Name of its key layout; `mixed` when no single one describes it, empty when it could not be read.
        expert, expert_source: For which expert it was made and what says so; None and empty when nothing does.
        ranks, alphas: Those that occur; no alphas means alpha = rank.
        modules_applied, modules_total: Layers that change, of those that the file names.
        keys_applied, keys_total: The same in keys.
        left_out: Kind of key -> how many were left out (see KIND_WORDS).
        kinds: Kind of adapter -> how many weights.
        base: Name of the model it was compared with; empty without one.
        relative_norm: Norm of all changes at strength 1 over the norm of the weights they change; None without a base.
        change_norm: Norm of all changes at strength 1.
        memory_bytes: Of the tensors in use.
        changes: Per weight.
        metadata: Of the file.
        verdict: `ok` or `refused`.
        reason: Why it was refused; empty otherwise.
        warnings: What to look at.
    """

    file: str
    layout: str = ""
    expert: str | None = None
    expert_source: str = ""
    ranks: tuple[int, ...] = ()
    alphas: tuple[float, ...] = ()
    modules_applied: int = 0
    modules_total: int = 0
    keys_applied: int = 0
    keys_total: int = 0
    left_out: Mapping[str, int] = field(default_factory=dict)
    kinds: Mapping[str, int] = field(default_factory=dict)
    base: str = ""
    relative_norm: float | None = None
    change_norm: float | None = None
    memory_bytes: int = 0
    changes: tuple[WeightChange, ...] = ()
    metadata: Mapping[str, str] = field(default_factory=dict)
    verdict: str = "ok"
    reason: str = ""
    warnings: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain data, every number finite."""
        data = {name: value for name, value in self.__dict__.items() if name not in ("changes", "ranks", "alphas")}
        data.update(
            # Files with one rank and one alpha are the rule; the lists tell of the others.
            rank=max(self.ranks, default=None),
            ranks=list(self.ranks),
            alpha=self.alphas[0] if len(self.alphas) == 1 else None,
            alphas=list(self.alphas),
            left_out=dict(self.left_out),
            kinds=dict(self.kinds),
            metadata=dict(self.metadata),
            warnings=list(self.warnings),
            modules=[
                {"module": change.weight.removeprefix(MODEL_PREFIX), "change": change.change, "base": change.base, "relative": _finite(change.relative)}
                for change in self.changes
            ],
        )
        return data

    def text(self) -> str:
        """Return the report for people."""
        if self.verdict == "refused":
            return "\n".join([f"{self.file}: refused", f"  {self.reason}", *(f"  warning: {warning}" for warning in self.warnings)])
        made_by = next((layout.made_by for layout in LAYOUTS if layout.name == self.layout), "no single trainer")
        expert = f"{self.expert} noise (from its {self.expert_source})" if self.expert else "not known: neither its metadata nor its name says it"
        norm = "not measured" if self.change_norm is None else f"{self.change_norm:.4g}"
        if self.relative_norm is not None:
            norm += f", {100 * self.relative_norm:.3g} % of the weights it changes in {self.base}"
        lines = [
            self.file,
            f"  layout: {self.layout} ({made_by})",
            f"  expert: {expert}",
            f"  layers: {self.modules_applied} of {self.modules_total} applied; keys: {self.keys_applied} of {self.keys_total}",
            f"  rank {spread(self.ranks) or 'none'}, alpha {spread(self.alphas) or '= rank'}; " + ", ".join(f"{n} {kind}" for kind, n in self.kinds.items()),
            f"  size of the change: {norm}",
            f"  memory: {self.memory_bytes / 1e6:.1f} MB",
        ]
        lines += [f"  left out: {count} keys {KIND_WORDS[kind]}" for kind, count in self.left_out.items()]
        lines += [f"  warning: {warning}" for warning in self.warnings]
        shown = list(self.metadata.items())[:SHOWN_METADATA]
        lines += [f"  metadata {key}: {value[:120]}" for key, value in shown]
        return "\n".join(lines)


def inspect(path: Path, base: BaseWeights | None = None) -> LoraReport:
    """Inspect a LoRA file. Never raises for a bad file: the report says `refused` and why.

    Args:
        path: The file.
        base: The model to compare it with; None judges the file by itself.
    """
    lora = None
    try:
        lora = read_lora(path)
        fitted, changes = fit_and_measure(lora, base)
    except ValueError as error:
        return _refusal(path, lora, base, str(error))
    against = base or base_of_itself(lora)
    return LoraReport(
        file=lora.name,
        layout=lora.layout,
        expert=lora.guess.expert,
        expert_source=lora.guess.source,
        ranks=fitted.ranks,
        alphas=fitted.alphas,
        modules_applied=fitted.layers,
        modules_total=_module_count(lora),
        keys_applied=fitted.applied_keys,
        keys_total=fitted.total_keys,
        left_out=fitted.left_out,
        kinds=fitted.kinds,
        base=against.name,
        relative_norm=relative_norm(changes),
        change_norm=total([change.change for change in changes]),
        memory_bytes=fitted.memory_bytes,
        changes=tuple(changes),
        metadata=lora.metadata,
        warnings=_warnings(lora, fitted, changes, base),
    )


def fit_and_measure(lora: LoraFile, base: BaseWeights | None) -> tuple[FittedLora, list[WeightChange]]:
    """Fit a LoRA to a base, or to the shapes it implies itself, and measure every weight. Raises ValueError as `lora_file.fit` does."""
    against = base or base_of_itself(lora)
    fitted = fit(lora, against.shapes)
    return fitted, measure(fitted.patches, against.shapes, against.read)


def difference(first: Path, second: Path, base: BaseWeights | None = None) -> list[WeightDifference]:
    """Compare two LoRA files, weight by weight.

    Raises:
        ValueError: One cannot be read or does not fit, or they are for models of different size.
    """
    loras = [read_lora(path) for path in (first, second)]
    againsts = [base or base_of_itself(lora) for lora in loras]
    for key in set(againsts[0].shapes) & set(againsts[1].shapes):
        if againsts[0].shapes[key] != againsts[1].shapes[key]:
            raise ValueError(
                f"{first.name} and {second.name} are for models of different size ({key}: {againsts[0].shapes[key]} and {againsts[1].shapes[key]}); "
                "only LoRAs for the same model can be compared."
            )
    patches = [fit(lora, against.shapes).patches for lora, against in zip(loras, againsts, strict=True)]
    return compare(*patches, {**againsts[0].shapes, **againsts[1].shapes}, base.read if base else None)


def difference_text(first: str, second: str, differences: Sequence[WeightDifference]) -> str:
    """Describe the difference of two LoRAs: norms, distance, angle, and the layers that differ most."""
    norms = [total([entry.first for entry in differences]), total([entry.second for entry in differences])]
    distance = total([entry.difference for entry in differences])
    product = math.fsum((entry.cosine or 0.0) * entry.first * entry.second for entry in differences)
    lines = [f"{first} against {second}", f"  norms {norms[0]:.4g} and {norms[1]:.4g}, norm of the difference {distance:.4g}"]
    if all(norms):
        lines.append(f"  cosine {product / (norms[0] * norms[1]):.4f} (1: same direction, 0: unrelated, -1: opposite)")
    only = [sum(1 for entry in differences if entry.second == 0.0 < entry.first), sum(1 for entry in differences if entry.first == 0.0 < entry.second)]
    if any(only):
        lines.append(f"  weights that only one of them changes: {only[0]} and {only[1]}")
    most = sorted(differences, key=lambda entry: -entry.difference)[:5]
    lines += [f"  {entry.weight.removeprefix(MODEL_PREFIX)}: difference {entry.difference:.4g}" for entry in most if entry.difference]
    return "\n".join(lines)


def spread(values: Sequence[float]) -> str:
    """Write the range of some ascending numbers: `8`, or `4–32`; empty for none."""
    return "–".join(f"{value:g}" for value in sorted({values[0], values[-1]})) if values else ""


def _warnings(lora: LoraFile, fitted: FittedLora, changes: Sequence[WeightChange], base: BaseWeights | None) -> tuple[str, ...]:
    """Collect what the user should look at."""
    warnings = [*fitted.notes, *base_warnings(lora, base.expert if base else None)]
    width = _width(lora)
    if base is None and width in SMALL_WIDTHS:
        warnings.append(f"its width is {width_name(width)}; the experts of Wan2.2 14B have width {width_name(5120)} and will refuse it")
    if changes and all(change.change == 0.0 for change in changes):
        warnings.append("it changes nothing: all its changes are zero (an untrained LoRA?)")
    if base and base.read is None:
        warnings.append(f"the weights of {base.name} are GGUF, which is not read here: its layers were compared, the size of the change is no share of them")
    unknown = [change for change in changes if change.change is None]
    if unknown:
        warnings.append(f"{len(unknown)} weights are DoRA, whose change can only be measured against a base")
    return tuple(dict.fromkeys(warnings))


def _refusal(path: Path, lora: LoraFile | None, base: BaseWeights | None, reason: str) -> LoraReport:
    """Report a file that cannot be applied, with what is known of it where it could be read."""
    said = {"file": path.name, "base": base.name if base else "", "verdict": "refused", "reason": reason}
    if lora is None:
        official = find_official(path.name)
        again = f"it has the name of an official file; download it again with: lab.py lora download {official.name} --to FOLDER" if official else ""
        return LoraReport(**said, warnings=(again,) if again else ())
    parts = [(split_key(key) or ("", ""), tensor) for key, tensor in lora.tensors.items()]
    return LoraReport(
        **said,
        layout=lora.layout,
        expert=lora.guess.expert,
        expert_source=lora.guess.source,
        ranks=tuple(sorted({tensor.shape[0] for (_, part), tensor in parts if part == "lora_down.weight" and tensor.ndim})),
        alphas=tuple(sorted({float(tensor) for (_, part), tensor in parts if part == "alpha" and tensor.numel() == 1})),
        modules_total=_module_count(lora),
        keys_total=len(lora.tensors),
        metadata=lora.metadata,
        warnings=tuple(base_warnings(lora, base.expert if base else None)),
    )


def _module_count(lora: LoraFile) -> int:
    """Count the layers that a file names, of whatever model."""
    return len({(split_key(key) or (key, ""))[0] for key in lora.tensors})


def _width(lora: LoraFile) -> int | None:
    """Return the inputs of the first self-attention layer."""
    for key, tensor in lora.tensors.items():
        split = split_key(key)
        if split and split[1] == "lora_down.weight" and split[0].endswith("self_attn_q") and tensor.ndim == 2:
            return tensor.shape[1]
    return None


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None

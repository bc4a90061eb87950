"""Warns when a LoRA acts on the wrong expert, or is not the file that its name says. Needs the file, not the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from .experts import EXPERTS, other_expert
from .lora_file import LoraFile
from .lora_keys import IMAGE_BRANCH, split_key
from .official_loras import find_official

ALL_EXPERTS_STRENGTH = "set the strength on {} noise to 0 unless you mean it"


def slot_warnings(lora: LoraFile, strengths: Mapping[str, float]) -> list[str]:
    """Warn about one LoRA with its two strengths.

    Args:
        lora: The file.
        strengths: `high` and `low` -> strength.

    Returns:
        Sentences; empty when nothing is suspicious.
    """
    acts_on = [expert for expert in EXPERTS if strengths.get(expert, 0.0) != 0.0]
    made_for, source = lora.guess.expert, lora.guess.source
    warnings = []
    if made_for is not None:
        other = other_expert(made_for)
        if acts_on == [other]:
            warnings.append(f"its {source} says {made_for} noise, but it acts on the {other}-noise expert only; swap the two strengths")
        elif other in acts_on:
            warnings.append(f"its {source} says {made_for} noise, but it acts on both experts; {ALL_EXPERTS_STRENGTH.format(other)}")
    elif len(acts_on) == 2:
        warnings.append(
            "both experts are given this same file, and neither its metadata nor its name says for which it was made; LoRAs for Wan2.2 mostly come in pairs"
        )
    return warnings + identity_warnings(lora)


def base_warnings(lora: LoraFile, expert: str | None) -> list[str]:
    """Warn about one LoRA for one model, where there is one strength only.

    Args:
        lora: The file.
        expert: Which expert the model is; None when nothing says it.
    """
    warnings = identity_warnings(lora)
    if None in (expert, lora.guess.expert) or expert == lora.guess.expert:
        return warnings
    told = f"its {lora.guess.source} says {lora.guess.expert} noise, but the base is the {expert}-noise expert"
    return [f"{told}; take the {expert}-noise file, or the other base", *warnings]


def identity_warnings(lora: LoraFile) -> list[str]:
    """Warn when a file is not what its name says: the reward LoRAs of Wan2.1 and Wan2.2 are confused on the authors' own pages.

    The authors' recipe for Wan2.2 leaves the feed-forward layers out, the one for Wan2.1 trains them, and Wan2.1 has an image branch.
    """
    name = lora.name.lower()
    if "wan2.1" in name or "wan21" in name:
        told = "made for Wan2.1 by its name"
        if "mps" in name:
            told += "; the Wan2.2 reward LoRAs' page once linked Wan2.1-Fun-14B-InP-MPS as the low-noise MPS file. Take Wan2.2-Fun-A14B-InP-low-noise-MPS"
        return [told]
    official = find_official(lora.name)
    if official is None:
        return []
    layers = [split[0] for split in map(split_key, lora.tensors) if split]
    has_image = any(IMAGE_BRANCH.search(layer) for layer in layers)
    if has_image or any("_ffn_" in layer for layer in layers):
        found = "an image branch" if has_image else "feed-forward layers"
        return [
            f"it has the name of an official Wan2.2 reward LoRA, but {found}, which that file does not have: it is probably the Wan2.1 file under "
            f"another name. Download {official.name} again"
        ]
    advice = official.advice
    return [advice] if advice else []


def repeat_warnings(rows: Sequence[tuple[str, Mapping[str, float]]]) -> list[str]:
    """Warn when one file stands in several rows: on one expert the strengths add up, on both it is given to an expert it was not made for.

    Args:
        rows: (file, strengths by expert) of the rows that are on.
    """
    warnings = []
    for file in sorted({file for file, _ in rows}):
        strengths = [strength for name, strength in rows if name == file]
        counts = {expert: sum(strength.get(expert, 0.0) != 0.0 for strength in strengths) for expert in EXPERTS}
        if max(counts.values()) > 1:
            warnings.append(f"{file} stands in {len(strengths)} rows; their strengths add up")
        elif len(strengths) > 1 and all(counts.values()):
            warnings.append(f"{file} is given to both experts, by two rows; LoRAs for Wan2.2 mostly come in pairs, one file for each")
    return warnings

"""Which of the two Wan2.2 experts a file belongs to, as far as its metadata or its name tells.

The metadata counts more than the name. Where both are silent the answer is None: nothing is guessed from the weights.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from ..lora_train.flow import EXPERTS

METADATA_KEYS = ("expert", "reward_lab_expert", "reward_lab.expert", "noise_level")

_NAME_PATTERNS = {
    "high": re.compile(r"high[-_ ]?noise|(?:^|[-_ .\d])(?:high|hn)(?=[-_ .]|$)", re.IGNORECASE),
    "low": re.compile(r"low[-_ ]?noise|(?:^|[-_ .\d])(?:low|ln)(?=[-_ .]|$)", re.IGNORECASE),
}


@dataclass(frozen=True, kw_only=True)
class ExpertGuess:
    """The expert a file belongs to (None: not known) and what told so (`metadata`, `file name` or empty)."""

    expert: str | None
    source: str = ""


def guess_expert(file_name: str, metadata: Mapping[str, str] | None = None) -> ExpertGuess:
    """Tell which expert a model or LoRA file belongs to.

    Args:
        file_name: Name or path of the file; only the last part is looked at.
        metadata: The safetensors metadata, when there is any.

    Returns:
        The expert and the source of the knowledge. A name that mentions both experts tells nothing.
    """
    for key in METADATA_KEYS:
        value = str((metadata or {}).get(key, "")).strip().lower()
        for expert in EXPERTS:
            if value.startswith(expert):
                return ExpertGuess(expert=expert, source="metadata")
    stem = re.split(r"[\\/]", file_name)[-1].rsplit(".", 1)[0]
    named = [expert for expert in EXPERTS if _NAME_PATTERNS[expert].search(stem)]
    return ExpertGuess(expert=named[0], source="file name") if len(named) == 1 else ExpertGuess(expert=None)


def other_expert(expert: str) -> str:
    """Return the expert that is not `expert`."""
    return EXPERTS[1 - EXPERTS.index(expert)]

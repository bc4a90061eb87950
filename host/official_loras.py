"""The four reward LoRAs of VideoX-Fun's authors for Wan2.2: what is known about them. Data only; lora_download fetches them.

Source: the README and model card of alibaba-pai/Wan2.2-Fun-Reward-LoRAs and VideoX-Fun@804a4258 (Apache-2.0). Both pages have the reward of two files
swapped and link a Wan2.1 file for the low-noise MPS; here the file name counts. No hashes are published there: the hub's own are asked for
when a file is downloaded.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

REPOSITORY = "alibaba-pai/Wan2.2-Fun-Reward-LoRAs"
DEFAULT_STRENGTH = 0.5
STRENGTH_NOTE = "0.5 is the value of the authors' examples; it is not tuned"
# From the shapes: 326 modules of rank 128 in bf16, without the header. The exact size is the hub's to say.
EXPECTED_BYTES = 858_300_000


@dataclass(frozen=True, kw_only=True)
class OfficialLora:
    """One of the authors' files.

    Attributes:
        name: File name.
        expert: `high` or `low`.
        reward: The reward model that it was trained on.
        steps: Training steps at batch 8, as the authors say.
        advice: What the authors say about using it; empty when nothing.
        base: The models it was made for.
        rank, alpha: Of every layer.
        sha256: None: no hash is published; the hub's is used.
    """

    name: str
    expert: str
    reward: str
    steps: int
    advice: str = ""
    base: str = "Wan2.2-Fun-A14B-InP and Wan2.2-T2V-A14B"
    rank: int = 128
    alpha: int = 64
    expected_bytes: int = EXPECTED_BYTES
    sha256: str | None = None

    def to_dict(self) -> dict[str, object]:
        """Return the entry as plain data."""
        return {**self.__dict__, "repository": REPOSITORY, "strength": DEFAULT_STRENGTH, "strength_note": STRENGTH_NOTE}


OFFICIAL = (
    OfficialLora(name="Wan2.2-Fun-A14B-InP-high-noise-HPS2.1.safetensors", expert="high", reward="HPSv2.1", steps=5000),
    OfficialLora(name="Wan2.2-Fun-A14B-InP-low-noise-HPS2.1.safetensors", expert="low", reward="HPSv2.1", steps=2700),
    OfficialLora(name="Wan2.2-Fun-A14B-InP-high-noise-MPS.safetensors", expert="high", reward="MPS", steps=5000),
    OfficialLora(
        name="Wan2.2-Fun-A14B-InP-low-noise-MPS.safetensors",
        expert="low",
        reward="MPS",
        steps=4500,
        advice="the authors found that MPS converges slowly on low noise and advise the HPS file there (high MPS + low HPS, or HPS on both)",
    ),
)


def find_official(name: str) -> OfficialLora | None:
    """Return the official file that a name means, with or without folder, ending and letter case; None when it is none of them.

    Args:
        name: For example `Wan2.2-Fun-A14B-InP-high-noise-HPS2.1.safetensors` or `high-noise-HPS2.1`.
    """
    stem = re.split(r"[\\/]", name.strip())[-1].lower().removesuffix(".safetensors")
    for lora in OFFICIAL:
        official = lora.name.lower().removesuffix(".safetensors")
        if stem in (official, official.removeprefix("wan2.2-fun-a14b-inp-")):
            return lora
    return None


def official_named(name: str) -> OfficialLora:
    """Return an official file by its name. Raises ValueError that lists the names."""
    found = find_official(name)
    if found is None:
        raise ValueError(f"{name[:200]!r} is no official reward LoRA. Choose one of {', '.join(lora.name for lora in OFFICIAL)}.")
    return found

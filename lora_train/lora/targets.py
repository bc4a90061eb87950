"""Which Linears of a Wan model get a LoRA."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

# Linears that a text-to-video LoRA cannot reach: the image branch of Wan2.1 I2V is not run, so its LoRAs would never get a gradient.
_NEVER = ("img_emb.", ".k_img", ".v_img")


def select_targets(paths: Iterable[str], targets: Sequence[str], skip: Sequence[str]) -> list[str]:
    """Choose the Linears to adapt.

    Args:
        paths: paths of all Linears of the model (`blocks.0.self_attn.q`, `time_projection.1`, ...).
        targets: keep a path that holds one of these substrings; empty keeps all.
        skip: drop a path that holds one of these substrings, as VideoX-Fun's `lora_skip_name` does.

    Returns:
        The chosen paths in model order; with skip = ("ffn",) a 40-block Wan2.2 14B gives 326.

    Raises:
        ValueError: nothing is left.
    """
    paths = list(paths)
    chosen = [
        path
        for path in paths
        if (not targets or any(part in path for part in targets)) and not any(part in path for part in (*skip, *_NEVER))
    ]
    if not chosen:
        raise ValueError(
            f"lora.targets {list(targets)} and lora.skip {list(skip)} leave none of the model's {len(paths)} Linears; "
            f"use parts of names such as {', '.join(paths[:3])}"
        )
    return chosen

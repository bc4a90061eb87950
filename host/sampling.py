from __future__ import annotations
import comfy.samplers


def sampler_names() -> list[str]:
    """Return the host's samplers."""
    return list(comfy.samplers.SAMPLER_NAMES)


def scheduler_names() -> list[str]:
    """Return the host's schedulers."""
    return list(comfy.samplers.SCHEDULER_NAMES)

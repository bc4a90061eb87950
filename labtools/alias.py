"""Makes the pack importable as `reward_lab` from any folder name, without running the pack's `__init__.py`.

The host imports the pack under its own path, so inside the pack only relative imports work, and its root must never be on
`sys.path` (there, `nodes` and `tests` would hide the host's modules of these names).
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
from pathlib import Path

ALIAS = "reward_lab"


def register(root: Path, name: str = ALIAS) -> None:
    """Register `root` as the package `name`; does nothing when that has been done."""
    if name in sys.modules:
        return
    spec = importlib.machinery.ModuleSpec(name, loader=None, is_package=True)
    spec.submodule_search_locations = [str(root)]
    sys.modules[name] = importlib.util.module_from_spec(spec)

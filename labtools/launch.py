"""Runs `main(argv)` of a module of the pack: `PYTHON launch.py pocket.bench ARGS`.

With COMFYUI_PATH set, ComfyUI can be imported; with REWARD_LAB_CPU=1 it is told, before anything of it is imported, to use the CPU.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent


def import_host(comfyui: Path, *, cpu: bool) -> None:
    """Make ComfyUI importable and choose its device."""
    sys.path.insert(0, str(comfyui))
    if cpu:
        import comfy.cli_args

        comfy.cli_args.args.cpu = True


def main(argv: list[str]) -> int:
    """Run the module named first with the rest as its arguments; returns its exit status."""
    if not argv:
        raise SystemExit("usage: launch.py MODULE [ARGS...], for instance: launch.py pocket.bench")
    # A script's own folder stands first on the path; there it could hide modules of the host.
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != HERE]
    spec = importlib.util.spec_from_file_location("reward_lab_alias", HERE / "alias.py")
    alias = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(alias)
    alias.register(HERE.parent)
    if os.environ.get("COMFYUI_PATH"):
        import_host(Path(os.environ["COMFYUI_PATH"]), cpu=os.environ.get("REWARD_LAB_CPU") == "1")
    return importlib.import_module(f"{alias.ALIAS}.{argv[0]}").main(argv[1:]) or 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

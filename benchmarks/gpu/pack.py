"""Puts together what a lent GPU machine without network lacks: `python benchmarks/gpu/pack.py [--comfyui PATH] [--python 3.12]`. Standard library only.

Writes the folder `.gpu` (ignored by git) at the root of the repository: ComfyUI's own code without its data, and the packages that it and the pack need and
a PyTorch image usually lacks, unpacked for its PYTHONPATH. comfy-kitchen goes without its 45 MB of compiled kernels: it falls back to torch, and training
uses none of them. `benchmarks/gpu/README.md` says how it is used.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
OUT = ROOT / ".gpu"
# What `comfy` imports on the way to a WanModel; all of it is Python.
HOST_PARTS = ("comfy", "comfy_api", "comfy_execution", "node_helpers.py", "folder_paths.py", "comfyui_version.py", "utils")
PINNED_BY_HOST = ("comfy-kitchen", "comfy-aimdo")
OTHERS = ("open_clip_torch>=3.3.0,<4", "ftfy", "wcwidth")
LEFT_OUT = re.compile(r"comfy_kitchen/.*\.so$")
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_27_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")
MOST_BYTES = 26 << 20  # with the tree's 37 MB under the 64 MiB that travel


def copy_host(host: Path) -> None:
    """ComfyUI's Python files."""
    for part in HOST_PARTS:
        source, target = host / part, OUT / "comfyui" / part
        if source.is_dir():
            shutil.copytree(source, target, ignore=_not_code, dirs_exist_ok=True)
        elif source.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, target)


def _not_code(folder: str, names: list[str]) -> set[str]:
    keeps = {name for name in names if name.endswith(".py") or (Path(folder) / name).is_dir()}
    return set(names) - keeps | {"__pycache__"}


def requirements(host: Path) -> list[str]:
    """Packages to fetch; the host's own in the versions that it asks for."""
    lines = (host / "requirements.txt").read_text(encoding="utf-8").splitlines()
    asked = [line.strip() for line in lines if re.split(r"[=<>~!\[ ]", line.strip())[0].lower().replace("_", "-") in PINNED_BY_HOST]
    return [*asked, *OTHERS]


def fetch(wanted: list[str], version: str) -> list[str]:
    """Unpack wheels for the machine's Python, without what they need themselves; returns their names."""
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", "--python-version", version, "--implementation", "cp"]
    for platform in PLATFORMS:
        command += ["--platform", platform]
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([*command, "-d", folder, *wanted], check=True)
        wheels = sorted(Path(folder).iterdir())
        for wheel in wheels:
            with zipfile.ZipFile(wheel) as packed:
                packed.extractall(OUT / "site", [name for name in packed.namelist() if not LEFT_OUT.search(name)])
        return [wheel.name for wheel in wheels]


def main(argv: list[str]) -> int:
    """Pack."""
    parser = argparse.ArgumentParser(prog="benchmarks/gpu/pack.py", description=(__doc__ or "").split(":")[0])
    parser.add_argument("--comfyui", type=Path, default=os.environ.get("COMFYUI_PATH", ROOT / ".lab" / "comfyui"))
    parser.add_argument("--python", default="3.12", help="of the machine (default: 3.12)")
    options = parser.parse_args(argv)
    host = Path(options.comfyui)
    if not (host / "comfy").is_dir():
        print(f"{host} is no ComfyUI; give --comfyui PATH, or run lab.py setup first", file=sys.stderr)
        return 2
    shutil.rmtree(OUT, ignore_errors=True)
    copy_host(host)
    names = fetch(requirements(host), options.python)
    size = sum(path.stat().st_size for path in OUT.rglob("*") if path.is_file())
    print(f"{OUT}: {size / 1e6:.1f} MB; packages: {', '.join(names)}")
    if size > MOST_BYTES:
        print(f"more than {MOST_BYTES / 1e6:.0f} MB: leave something out, or it will not travel", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

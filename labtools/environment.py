"""Chooses the Python that runs ComfyUI: one that already has everything, else a virtual environment of our own.

The user's own interpreters are only read, never installed into. Packages come from the package index through uv, or through pip
where uv is not to be had.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from . import requirements
from .cache import GIB, REPO, Cache, input_hash, read_stamp, require_free_space, write_stamp
from .errors import DISK_SIGNS, NETWORK_SIGNS, LabError, explain_failure
from .host import Host

ENVIRONMENT_BYTES = 8 * GIB
PROBE = Path(__file__).with_name("probe.py")
IMPORT_CHECK = "import torch, torchvision, torchaudio, av, transformers, open_clip, safetensors, aiohttp; print(torch.__version__)"


def packages_for(host: Host, *, with_tests: bool) -> dict[str, list[str]]:
    """What the environment needs, as install steps in order: {step: requirement lines}."""
    steps = {
        "PyTorch": list(requirements.TORCH),
        f"ComfyUI's packages ({host.version})": requirements.without_torch(requirements.read(host.path / "requirements.txt")),
        "Reward Lab's packages": requirements.read(REPO / "requirements.txt"),
    }
    if with_tests:
        steps["test tools"] = requirements.read(REPO / "requirements-dev.txt")
    return steps


def probe(python: Path, *, files: bool = False) -> dict:
    """What is installed for an interpreter; {} where it does not run."""
    command = [str(python), "-I", str(PROBE)] + (["--files"] if files else [])
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, timeout=120)
        return json.loads(done.stdout) if done.returncode == 0 else {}
    except (OSError, ValueError, subprocess.TimeoutExpired):
        return {}


def users_interpreters(host: Host) -> list[Path]:
    """Interpreters that may have everything already: the running one, and those that commonly lie beside a ComfyUI."""
    beside = [host.path / "venv", host.path / ".venv", host.path.parent / "venv", host.path.parent / ".venv"]
    candidates = [Path(sys.executable)] + [interpreter_of(folder) for folder in beside] + [host.path.parent / "python_embeded" / "python.exe"]
    return [path for path in dict.fromkeys(candidates) if path.exists()]


def fitting_interpreter(host: Host, *, with_tests: bool) -> Path | None:
    """The first of the user's interpreters that has all packages, with any torch of 2.4 or newer."""
    lines = [line for step, needed in packages_for(host, with_tests=with_tests).items() if step != "PyTorch" for line in needed]
    for python in users_interpreters(host):
        found = probe(python)
        if found and not requirements.unmet(["torch>=2.4", "torchvision", "torchaudio", *lines], found["packages"]):
            return python
    return None


def interpreter_of(venv: Path) -> Path:
    """Where a virtual environment keeps its interpreter."""
    return venv / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def ready_environment(cache: Cache, host: Host, *, with_tests: bool) -> Path | None:
    """Our own environment's interpreter if it is complete and whole, else None.

    "Whole" means: every step has its stamp, and no file that a package recorded is missing.
    """
    python = interpreter_of(cache.venv)
    steps = packages_for(host, with_tests=with_tests)
    if not python.exists() or any(not _is_done(cache, step, lines) for step, lines in steps.items()):
        return None
    return python if not _damage(python, steps) else None


def build_environment(cache: Cache, host: Host, *, with_tests: bool, verbose: bool = False) -> Path:
    """Build, complete or repair our own environment; returns its interpreter.

    Raises:
        LabError: no network, no space, no build for this system, or an interpreter without the venv module.
    """
    steps = packages_for(host, with_tests=with_tests)
    python = interpreter_of(cache.venv)
    done = [step for step, lines in steps.items() if _is_done(cache, step, lines)]
    finished = {step: steps[step] for step in done}
    if cache.venv.exists() and (not python.exists() or _damage(python, finished)):
        print("The cached environment is damaged; building it again.", flush=True)
        shutil.rmtree(cache.venv)
        done = []
    if "PyTorch" not in done:
        require_free_space(cache.root, ENVIRONMENT_BYTES, "the Python packages")
    create_venv(cache)
    install = _installer(cache, verbose=verbose)
    for number, (step, lines) in enumerate(steps.items(), start=1):
        if step in done:
            continue
        start = time.monotonic()
        print(f"[{number}/{len(steps)}] installing {step} ...", flush=True)
        # Torch is named in each step, so that no later package can move it.
        install(f"installing {step}", [*requirements.TORCH, *lines] if step != "PyTorch" else lines)
        if step == "Reward Lab's packages":
            _check_imports(python)
        write_stamp(_stamp(cache, step), {"key": input_hash(lines)})
        print(f"[{number}/{len(steps)}] {step}: {time.monotonic() - start:.0f} s", flush=True)
    return python


def create_venv(cache: Cache) -> Path:
    """Make the empty environment if it is not there; returns its interpreter.

    Raises:
        LabError: this Python cannot make one (Debian ships the module apart).
    """
    python = interpreter_of(cache.venv)
    if probe(python):
        return python
    shutil.rmtree(cache.venv, ignore_errors=True)
    done = subprocess.run([sys.executable, "-m", "venv", str(cache.venv)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode != 0 or not probe(python):
        shutil.rmtree(cache.venv, ignore_errors=True)
        if any(sign in done.stdout.lower() for sign in DISK_SIGNS):
            raise explain_failure("making a virtual environment", done.stdout, done.returncode)
        raise LabError(
            f"{sys.executable} could not make a virtual environment:\n{done.stdout.strip()}",
            remedy="On Debian and Ubuntu: sudo apt install python3-venv. Elsewhere: use a Python from python.org, or uv python.",
        )
    return python


def _stamp(cache: Cache, step: str) -> Path:
    # Inside the environment, so that removing the folder removes its stamps as well.
    return cache.venv / "reward-lab-steps" / f"{step.split()[0].lower().replace(chr(39), '')}.json"


def _is_done(cache: Cache, step: str, lines: Sequence[str]) -> bool:
    return read_stamp(_stamp(cache, step)).get("key") == input_hash(list(lines))


def _damage(python: Path, steps: dict[str, list[str]]) -> list[str]:
    """What is wrong with an environment that has finished these steps."""
    found = probe(python, files=True)
    if not found:
        return ["its interpreter does not run"]
    lines = [line for needed in steps.values() for line in needed]
    return found["broken"] + requirements.unmet(lines, found["packages"])


def _check_imports(python: Path) -> None:
    done = subprocess.run([str(python), "-I", "-c", IMPORT_CHECK], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    if done.returncode != 0:
        tail = "\n".join("  " + line for line in done.stdout.strip().splitlines()[-8:])
        raise LabError(
            f"The packages are installed but do not import:\n{tail}",
            remedy=f"Remove {python.parent.parent} and run again; if it comes back, report these lines.",
        )


def _installer(cache: Cache, *, verbose: bool):
    """A function (doing, requirement lines) -> None that installs into our environment with uv, else with pip."""
    python = interpreter_of(cache.venv)
    environ = _installer_environment(cache)
    pip = [str(python), "-m", "pip", "install", "--disable-pip-version-check", "--retries", "2"]
    uv = _find_uv(python, pip, environ, verbose=verbose)

    def install(doing: str, lines: Sequence[str]) -> None:
        if uv:
            code, output = _run([*uv, "pip", "install", "--python", str(python), *lines], environ, verbose=verbose)
            if code == 0:
                return
            if any(sign in output.lower() for sign in DISK_SIGNS + NETWORK_SIGNS):
                raise explain_failure(doing, output, code)
            # uv reads neither pip's configuration nor its local wheel folders; pip may well succeed.
            print("uv could not do it; trying pip.", flush=True)
        code, output = _run([*pip, *lines], environ, verbose=verbose)
        if code != 0:
            raise explain_failure(doing, output, code)

    return install


def _find_uv(python: Path, pip: list[str], environ: dict[str, str], *, verbose: bool) -> list[str] | None:
    if environ.get("REWARD_LAB_INSTALLER", "uv") != "uv":
        return None
    if shutil.which("uv"):
        return ["uv"]
    if "uv" not in (probe(python).get("packages") or {}):
        code, output = _run([*pip, "uv"], environ, verbose=verbose)
        if code != 0:
            # Without network the big packages would fail as well, after longer waiting.
            if any(sign in output.lower() for sign in DISK_SIGNS + NETWORK_SIGNS):
                raise explain_failure("installing uv", output, code)
            return None
    return [str(python), "-m", "uv"]


def _installer_environment(cache: Cache) -> dict[str, str]:
    environ = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")}
    home = os.path.expanduser("~")
    if not os.access(home, os.W_OK):
        # No home to cache in: the installers' caches go beside ours.
        environ.setdefault("UV_CACHE_DIR", str(cache.downloads / "uv"))
        environ.setdefault("PIP_CACHE_DIR", str(cache.downloads / "pip"))
    if environ.get("PIP_INDEX_URL"):
        environ.setdefault("UV_DEFAULT_INDEX", environ["PIP_INDEX_URL"])
    return environ


def _run(command: list[str], environ: dict[str, str], *, verbose: bool) -> tuple[int, str]:
    """Run an installer; returns its exit status and everything it printed."""
    process = subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    lines = []
    try:
        for line in process.stdout:
            lines.append(line)
            if verbose:
                print("    " + line, end="", flush=True)
        return process.wait(), "".join(lines)
    finally:
        # Interrupted: an installer that goes on alone would meet the one of the next attempt.
        if process.poll() is None:
            process.terminate()
            process.wait()
        process.stdout.close()

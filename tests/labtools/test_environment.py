"""Building, resuming and repairing a real virtual environment, with a package of one file from a local folder."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from reward_lab.labtools import cache as cache_module
from reward_lab.labtools import environment, requirements
from reward_lab.labtools.cache import Cache
from reward_lab.labtools.errors import LabError, explain_failure, unreachable_hosts
from reward_lab.labtools.host import Host


def make_wheel(folder: Path, name: str, version: str) -> None:
    info = f"{name}-{version}.dist-info"
    contents = {
        f"{name}.py": f"VERSION = {version!r}\n",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    contents[f"{info}/RECORD"] = "".join(f"{path},,\n" for path in [*contents, f"{info}/RECORD"])
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        for path, text in contents.items():
            wheel.writestr(path, text)


@pytest.fixture
def wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is the only place pip may install from."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    for name in ("labtorch", "labhost", "labpack"):
        make_wheel(folder, name, "1.0")
    for name, value in {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(folder), "REWARD_LAB_INSTALLER": "pip", "PIP_CONFIG_FILE": "/dev/null"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(requirements, "TORCH", ("labtorch==1.0",))
    monkeypatch.setattr(environment, "IMPORT_CHECK", "import labtorch, labhost, labpack")
    steps = {"PyTorch": ["labtorch==1.0"], "ComfyUI's packages": ["labhost"], "Reward Lab's packages": ["labpack==1.0"]}
    monkeypatch.setattr(environment, "packages_for", lambda host, *, with_tests: dict(steps))
    return folder


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    (tmp_path / "cache").mkdir()
    return Cache(root=tmp_path / "cache")


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(path=tmp_path / "ComfyUI", version="0.30.0", origin="a test")


def installed(python: Path) -> dict[str, str]:
    return {name: version for name, version in environment.probe(python)["packages"].items() if name.startswith("lab")}


def test_build_resume_and_repair(cache: Cache, host: Host, wheels: Path, capsys: pytest.CaptureFixture) -> None:
    assert environment.ready_environment(cache, host, with_tests=False) is None

    # A step fails: what came before it is kept and not done again.
    hidden = wheels.parent / "labhost-1.0-py3-none-any.whl"
    shutil.move(wheels / hidden.name, hidden)
    with pytest.raises(LabError, match="installing ComfyUI's packages"):
        environment.build_environment(cache, host, with_tests=False)
    assert installed(environment.interpreter_of(cache.venv)) == {"labtorch": "1.0"}
    shutil.move(hidden, wheels / hidden.name)
    capsys.readouterr()
    python = environment.build_environment(cache, host, with_tests=False)
    assert "[1/3]" not in capsys.readouterr().out
    assert installed(python) == {"labtorch": "1.0", "labhost": "1.0", "labpack": "1.0"}
    assert environment.ready_environment(cache, host, with_tests=False) == python

    # A file of a package is lost: noticed, and repaired.
    lost = next(cache.venv.rglob("labhost.py"))
    lost.unlink()
    assert environment.ready_environment(cache, host, with_tests=False) is None
    environment.build_environment(cache, host, with_tests=False)
    assert lost.exists()
    assert "damaged" in capsys.readouterr().out


def test_a_half_made_environment_is_made_again(cache: Cache, host: Host, wheels: Path) -> None:
    (cache.venv / "bin").mkdir(parents=True)
    (cache.venv / "pyvenv.cfg").write_text("home = /nowhere\n", encoding="utf-8")
    assert environment.ready_environment(cache, host, with_tests=False) is None
    python = environment.build_environment(cache, host, with_tests=False)
    assert len(installed(python)) == 3


@pytest.mark.skipif(os.name == "nt", reason="the stand-in for Python is a shell script")
def test_a_python_without_the_venv_module_names_the_package(cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python = tmp_path / "python3"
    python.write_text("#!/bin/sh\necho 'The virtual environment was not created successfully because ensurepip is not available.'\nexit 1\n", encoding="utf-8")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(LabError, match="could not make a virtual environment:\nThe virtual environment was not created") as caught:
        environment.create_venv(cache)
    assert "apt install python3-venv" in caught.value.remedy
    assert not cache.venv.exists()


def test_full_disk_is_told_before_anything_is_made(cache: Cache, host: Host, wheels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module.shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10**12, 10**12, 2 * 1024**3))
    with pytest.raises(LabError, match=r"8\.0 GB are needed in .*, 2\.0 GB are free") as caught:
        environment.build_environment(cache, host, with_tests=False)
    assert "REWARD_LAB_CACHE" in caught.value.remedy
    assert not cache.venv.exists()


def test_no_network_while_installing(cache: Cache, host: Host, wheels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Port 9 of this machine: nobody listens, so the connection is refused as it is without a network.
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.setenv("REWARD_LAB_INSTALLER", "uv")
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    with pytest.raises(LabError, match=r"No network: could not reach 127\.0\.0\.1:9") as caught:
        environment.build_environment(cache, host, with_tests=False)
    assert "mirror" in caught.value.remedy


def test_the_running_interpreter_is_taken_when_it_has_everything(comfyui: Path) -> None:
    host = Host(path=comfyui, version="0.30.0", origin="a test")
    assert environment.fitting_interpreter(host, with_tests=True) == Path(sys.executable)


def test_an_interpreter_without_the_packages_is_not_taken(tmp_path: Path, comfyui: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bare = tmp_path / "bare"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(bare)], check=True)
    monkeypatch.setattr(environment, "users_interpreters", lambda host: [environment.interpreter_of(bare), tmp_path / "none"])
    assert environment.fitting_interpreter(Host(path=comfyui, version="0.30.0", origin="a test"), with_tests=False) is None


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        ("ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device", "disk became full"),
        ("error: Failed to extract\n  Caused by: No space left on device (os error 28)", "disk became full"),
        (
            "error: Failed to fetch: `https://pypi.org/simple/torch/`\n  Caused by: error sending request for url\n  Caused by: dns error",
            "could not reach pypi.org while",
        ),
        (
            "WARNING: Retrying: NewConnectionError('HTTPSConnection(host='pypi.org', port=443): Failed to establish a new connection')",
            "could not reach pypi.org while",
        ),
        ("ERROR: No matching distribution found for torch==2.11.0", "no build for this Python"),
        ("something else", "exit status 3"),
    ],
)
def test_failures_are_told_apart(output: str, expected: str) -> None:
    error = explain_failure("installing PyTorch", output, 3)
    assert expected in error.message
    assert error.remedy


def test_hosts_are_named_without_passwords() -> None:
    assert unreachable_hosts("https://user:secret@mirror.example:8443/simple and https://pypi.org/simple") == ["mirror.example:8443", "pypi.org"]

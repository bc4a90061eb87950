"""The command line itself, run as a user runs it."""

from __future__ import annotations

import ast
import functools
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LAB = ROOT / "lab.py"


def run_lab(*arguments: str, environ: dict[str, str] | None = None, limit_s: float = 120) -> subprocess.CompletedProcess:
    """Run lab.py and collect what it prints; None as a value removes a variable."""
    merged = {**os.environ, **(environ or {})}
    merged = {name: value for name, value in merged.items() if value is not None}
    return subprocess.run([sys.executable, str(LAB), *arguments], capture_output=True, text=True, env=merged, timeout=limit_s, check=False)


def load_lab():
    """The script as a module."""
    import importlib.util

    spec = importlib.util.spec_from_file_location("lab_script", LAB)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_it_starts_under_an_old_python_and_says_so() -> None:
    # An old Python must get as far as the check, so the file may use no newer syntax.
    ast.parse(LAB.read_text(encoding="utf-8"), feature_version=(3, 7))
    with pytest.raises(SystemExit, match=r"needs Python 3\.10 or newer; this is Python 3\.8"):
        load_lab().check_python((3, 8, 1))
    load_lab().check_python((3, 10, 0))


def test_it_uses_the_standard_library_only() -> None:
    tops = {node.names[0].name.split(".")[0] for node in ast.walk(ast.parse(LAB.read_text(encoding="utf-8"))) if isinstance(node, ast.Import)}
    assert tops <= sys.stdlib_module_names


def test_help_lists_every_sub_command() -> None:
    done = run_lab("--help")
    assert done.returncode == 0
    for name in ("demo", "test", "serve", "train", "plan", "bench", "lora", "setup"):
        assert re.search(rf"^\s+{name}\s", done.stdout, re.MULTILINE), name


def test_a_taken_port_is_told_at_once() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        start = time.monotonic()
        done = run_lab("serve", "--port", str(port))
    assert done.returncode == 1
    assert f"Port {port} on 127.0.0.1 cannot be used" in done.stderr
    assert "--port 0" in done.stderr
    assert "Traceback" not in done.stderr
    assert time.monotonic() - start < 20


@pytest.mark.parametrize(("port", "message"), [("70000", "70000 is no TCP port"), ("-1", "-1 is no TCP port")])
def test_a_number_that_is_no_port(port: str, message: str) -> None:
    done = run_lab("serve", f"--port={port}")
    assert (done.returncode, message in done.stderr) == (1, True)
    assert "Traceback" not in done.stderr


def test_no_network_on_a_fresh_machine(tmp_path: Path) -> None:
    environ = {
        "HOME": str(tmp_path),
        "REWARD_LAB_CACHE": str(tmp_path / "cache"),
        "COMFYUI_PATH": None,
        # Nobody listens on port 9: connections are refused as they are without a network.
        "PIP_INDEX_URL": "http://127.0.0.1:9/simple",
        "PIP_CONFIG_FILE": "/dev/null",
        "PIP_NO_CACHE_DIR": "1",
        "PIP_FIND_LINKS": None,
    }
    done = run_lab("setup", environ=environ)
    assert done.returncode == 1
    assert "No network: could not reach 127.0.0.1:9 while fetching ComfyUI" in done.stderr
    assert "--comfyui PATH" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_folder_that_is_no_comfyui(tmp_path: Path) -> None:
    done = run_lab("setup", "--comfyui", str(tmp_path))
    assert done.returncode == 1
    assert f"{tmp_path} (from --comfyui) is no ComfyUI folder: main.py" in done.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, a disk that is always full")
def test_a_disk_that_becomes_full(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    lab = load_lab()
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.setitem(lab.COMMANDS, "setup", (lambda options: Path("/dev/full").write_bytes(b"x"), lab.arguments_setup))
    try:
        assert lab.main(["setup"]) == 1
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] == "labtools"]:
            del sys.modules[name]
    assert "The disk is full" in capsys.readouterr().err


def test_a_cache_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x", encoding="utf-8")
    done = run_lab("setup", environ={"REWARD_LAB_CACHE": str(tmp_path / "file")})
    assert done.returncode == 1
    assert "cannot be written to" in done.stderr


@pytest.mark.host
def test_a_second_run_is_ready_in_seconds(comfyui: Path) -> None:
    start = time.monotonic()
    done = run_lab("setup", "--with-tests")
    assert done.returncode == 0, done.stderr
    assert "Set-up finished" not in done.stdout, "something was installed"
    assert time.monotonic() - start < 10


@pytest.mark.host
@pytest.mark.skipif(os.name == "nt", reason="sends signals")
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 0), (signal.SIGTERM, 128 + signal.SIGTERM)])
def test_serve_prints_its_address_and_stops_in_order(comfyui: Path, pocket_models: list[dict], tmp_path: Path, number: int, status: int) -> None:
    command = [sys.executable, str(LAB), "serve", "--port", "0", "--base", str(tmp_path / "base")]
    # A test run in the background has SIGINT ignored, and its children would inherit that.
    hears_ctrl_c = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, preexec_fn=hears_ctrl_c)
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith("ComfyUI with Reward Lab: "):
            break
    assert lines and lines[-1].startswith("ComfyUI with Reward Lab: "), "".join(lines)
    url = lines[-1].split(": ", 1)[1].strip()
    with urllib.request.urlopen(f"{url}/models/diffusion_models", timeout=10) as response:
        listed = response.read().decode()
    assert all(entry["name"] in listed for entry in pocket_models if entry["folder"] == "diffusion_models")
    process.send_signal(number)
    rest = process.communicate(timeout=60)[0]
    assert process.returncode == status, rest
    with pytest.raises(OSError, match="refused"):
        urllib.request.urlopen(url, timeout=5)

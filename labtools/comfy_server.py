"""Starts a real ComfyUI server as a process of its own, waits until it answers, stops it."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .client import Client
from .errors import LabError

# About 6 s on an idle machine; a cold disk and busy cores can make it minutes (6 were seen). An early end is noticed at once.
START_LIMIT_S = 600.0
STOP_LIMIT_S = 10.0


@dataclass(frozen=True, kw_only=True)
class Server:
    """A running server; `log` is the file that holds all it prints."""

    process: subprocess.Popen
    url: str
    base: Path
    log: Path

    def client(self) -> Client:
        """A client of this server's API."""
        return Client(self.url)

    def is_running(self) -> bool:
        """Whether the process is alive."""
        return self.process.poll() is None

    def stop(self) -> None:
        """End the process and what it started; returns when it is gone."""
        if not self.is_running():
            return
        _signal_group(self.process, signal.SIGTERM)
        try:
            self.process.wait(STOP_LIMIT_S)
        except subprocess.TimeoutExpired:
            _signal_group(self.process, getattr(signal, "SIGKILL", signal.SIGTERM))
            self.process.wait()


def has_gpu() -> bool:
    """Whether an NVIDIA card or an Apple GPU is there, as far as one can tell without torch."""
    if sys.platform == "darwin":
        return os.uname().machine == "arm64"
    if not shutil.which("nvidia-smi"):
        return False
    done = subprocess.run(["nvidia-smi", "-L"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    return done.returncode == 0 and "GPU" in done.stdout


def free_port() -> int:
    """A TCP port that nobody listens on at the moment."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def require_port(port: int, listen: str = "127.0.0.1") -> int:
    """Check that a port can be listened on; 0 picks a free one.

    Raises:
        LabError: the port is in use, not allowed, or no port at all.
    """
    if port == 0:
        return free_port()
    if not 0 < port < 65536:
        raise LabError(f"{port} is no TCP port.", remedy="Give a number from 1 to 65535, or 0 to let lab.py pick a free one.")
    with socket.socket(socket.AF_INET6 if ":" in listen else socket.AF_INET) as listener:
        if os.name != "nt":
            # Lets a port in TIME_WAIT pass, as the server itself does; a live listener still refuses.
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((listen, port))
        except OSError as error:
            other = port + 1 if port < 65535 else 8189
            raise LabError(
                f"Port {port} on {listen} cannot be used: {error.strerror or error}.",
                remedy=f"Stop the program that listens there, choose another port (--port {other}), or let lab.py pick a free one (--port 0).",
            ) from error
    return port


def start_server(
    python: Path,
    comfyui: Path,
    base: Path,
    *,
    port: int = 0,
    cpu: bool | None = None,
    listen: str = "127.0.0.1",
    extra: Sequence[str] = (),
    log: Path | None = None,
    limit_s: float = START_LIMIT_S,
) -> Server:
    """Start ComfyUI and return when it answers requests.

    Args:
        python: an interpreter with ComfyUI's packages.
        comfyui: ComfyUI's folder.
        base: its base directory (see `base.make_base`).
        port: TCP port; 0 picks a free one.
        cpu: run on the CPU; None: only where no GPU is found.
        listen: address to listen on.
        extra: further arguments of ComfyUI's main.py.
        log: file for its output; `<base>/server.log` by default.
        limit_s: how long it may take, in seconds.

    Raises:
        LabError: the port is in use, the server ended, or it did not answer in time.
    """
    port = require_port(port, listen)
    log = log or base / "server.log"
    # The database goes into the base directory: in its default place, two servers of one ComfyUI would exclude each other.
    database = (base / "user" / "comfyui.db").as_posix()
    command = [str(python), "main.py", "--base-directory", str(base), "--listen", listen, "--port", str(port), "--disable-auto-launch"]
    command += ["--database-url", f"sqlite:///{database}"]
    if cpu if cpu is not None else not has_gpu():
        command.append("--cpu")
    environ = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    environ |= {"PYTHONUNBUFFERED": "1", "COMFYUI_PATH": str(comfyui)}
    with log.open("wb") as sink:
        # A group of its own, so that Ctrl-C reaches lab.py alone, which then stops the server in order.
        process = subprocess.Popen([*command, *extra], cwd=comfyui, env=environ, stdout=sink, stderr=subprocess.STDOUT, **_group_options())
    server = Server(process=process, url=f"http://{_local_name(listen)}:{port}", base=base, log=log)
    try:
        _wait_until_ready(server, limit_s)
    except BaseException:
        server.stop()
        raise
    return server


def _local_name(listen: str) -> str:
    """The name under which this machine reaches a server that listens on `listen`."""
    if listen in ("0.0.0.0", "::"):
        return "127.0.0.1" if listen == "0.0.0.0" else "[::1]"
    return f"[{listen}]" if ":" in listen else listen


def log_tail(log: Path, lines: int = 25) -> str:
    """The last lines of a log file, indented."""
    text = log.read_text(encoding="utf-8", errors="replace")
    return "\n".join("  " + line for line in text.splitlines()[-lines:])


def _wait_until_ready(server: Server, limit_s: float) -> None:
    client, deadline = server.client(), time.monotonic() + limit_s
    while time.monotonic() < deadline:
        if not server.is_running():
            raise LabError(
                f"ComfyUI ended while starting, with exit status {server.process.returncode}. Its last lines:\n{log_tail(server.log)}",
                remedy=f"The whole log: {server.log}",
            )
        try:
            client.get("/system_stats", limit_s=2)
            return
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)
    raise LabError(f"ComfyUI did not answer within {limit_s:.0f} s. Its last lines:\n{log_tail(server.log)}", remedy=f"The whole log: {server.log}")


def _group_options() -> dict:
    if os.name == "nt":
        return {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP}
    return {"start_new_session": True}


def _signal_group(process: subprocess.Popen, number: int) -> None:
    try:
        if os.name == "nt":
            process.terminate()
        else:
            os.killpg(process.pid, number)
    except ProcessLookupError:
        # It ended by itself in the meantime.
        return

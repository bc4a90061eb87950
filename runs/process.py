"""Starts, watches and stops the worker process of a run. The worker has a session of its own: it neither holds the server nor dies with it."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..lora_train import events
from . import lock
from .store import CONFIG, LOG, METRICS, STOP, append_event, log_tail

WORKER = Path(__file__).resolve().parent.parent / "host" / "worker.py"
POLL_S = 0.25
_TERMINAL = ("finished", "failed")
_NICENESS = 5
logger = logging.getLogger("reward_lab")


def start(
    run_folder: str | Path,
    comfyui_path: str | Path,
    python: str = sys.executable,
    *,
    resume: bool = False,
    niceness: int = _NICENESS,
    environment: dict[str, str] | None = None,
) -> subprocess.Popen:
    """Start the worker of a run folder and return at once.

    Args:
        run_folder: made by `RunStore.create`.
        comfyui_path: ComfyUI's root folder.
        python: interpreter of the worker.
        resume: go on from the newest checkpoint.
        niceness: lower priority, so that the machine stays responsive; 0 leaves it.
        environment: variables to set besides the present ones.

    Raises:
        ValueError: no config in the folder, no ComfyUI at the path, or a living worker already owns the folder.
    """
    folder = Path(run_folder).resolve()
    if not (folder / CONFIG).is_file():
        raise ValueError(f"{folder} holds no {CONFIG}; make the run with RunStore.create")
    if not (Path(comfyui_path) / "comfy").is_dir():
        raise ValueError(f"{comfyui_path} is not a ComfyUI folder; give the one that holds main.py and comfy/")
    if lock.is_held(folder):
        raise lock.RunInUseError(f"the run folder {folder} is in use by process {lock.owner(folder)}; stop that run first, or start a new one")
    (folder / STOP).unlink(missing_ok=True)
    command = [python, str(WORKER), str(folder), "--comfyui", str(Path(comfyui_path).resolve()), "--nice", str(niceness)]
    own_session: dict[str, Any] = {"start_new_session": True}
    if sys.platform == "win32":
        own_session = {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP | subprocess.CREATE_NO_WINDOW}
    with (folder / LOG).open("ab") as log:
        return subprocess.Popen(
            command + (["--resume"] if resume else []),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=folder,
            env={**os.environ, "PYTHONUNBUFFERED": "1", **(environment or {})},
            **own_session,
        )


def watch(
    run_folder: str | Path, process: subprocess.Popen | None, callback: Callable[[dict[str, Any]], None], *, skip: int = 0
) -> threading.Thread:
    """Call `callback(event)` for every new event, in a thread of its own, until the run has ended.

    Args:
        process: what `start` returned; None follows a worker that another server started, as long as it owns its folder.
        skip: number of events that are already known.

    Returns:
        The running daemon thread. A worker that ends without a last word gets a `failed` event with the end of its log.
    """
    thread = threading.Thread(target=_watch, args=(Path(run_folder), process, callback, skip), daemon=True, name="reward_lab_run")
    thread.start()
    return thread


def _watch(folder: Path, process: subprocess.Popen | None, callback: Callable[[dict[str, Any]], None], skip: int) -> None:
    reader = _Tail(folder / METRICS, skip)
    last = ""
    while True:
        has_ended = process.poll() is not None if process is not None else not lock.is_held(folder)
        for event in reader.new():
            last = event["event"]
            _deliver(callback, event)
        if has_ended:
            break
        time.sleep(POLL_S)
    if last in _TERMINAL:
        return
    code = process.returncode if process is not None else None
    failed = events.Failed(time=time.time(), error=_reason(code), log_tail=log_tail(folder))
    try:
        append_event(folder, failed)
    except OSError:
        # A full disk ends runs and cannot take their last word either; the page gets it all the same.
        logger.exception("the failure of the run in %s cannot be recorded", folder)
    _deliver(callback, events.to_dict(failed))


def _deliver(callback: Callable[[dict[str, Any]], None], event: dict[str, Any]) -> None:
    try:
        callback(event)
    except Exception:  # the page's trouble must not end the watching of the run; it is logged in full
        logger.exception("a listener failed on the event %s", event.get("event"))


def _reason(code: int | None) -> str:
    if code is not None and code < 0:
        hint = "; the system may have run out of memory" if code == -9 else ""
        return f"the training process was ended by signal {-code}{hint}"
    return f"the training process ended with code {code} without a word" if code is not None else "the training process ended without a word"


class _Tail:
    """New whole lines of a growing file."""

    def __init__(self, path: Path, skip: int) -> None:
        self._path = path
        self._offset = 0
        self._rest = b""
        self._skip = skip
        self._identity: int | None = None
        # Hashes of lines: of this file, and of those that it replaced.
        self._read: set[int] = set()
        self._told: set[int] = set()

    def new(self) -> list[dict[str, Any]]:
        if not self._path.is_file():
            return []
        with self._path.open("rb") as file:
            identity = os.fstat(file.fileno()).st_ino
            if self._identity not in (None, identity):
                # A resumed worker replaced the file by its own beginning, which has been told, and reports what is new at once.
                self._offset, self._rest, self._skip = 0, b"", 0
                self._told |= self._read
            self._identity = identity
            file.seek(self._offset)
            read = file.read()
        self._offset += len(read)
        *lines, self._rest = (self._rest + read).split(b"\n")
        new = [line for line in lines if line and hash(line) not in self._told]
        self._read.update(map(hash, new))
        found = [event for line in new if (event := _parsed(line)) is not None]
        skipped, self._skip = min(self._skip, len(found)), max(0, self._skip - len(found))
        return found[skipped:]


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        return events.to_dict(events.from_line(line.decode("utf-8")))
    except (ValueError, TypeError) as error:
        # The run itself goes on and must be followed to its end; the list of runs says that its file is broken.
        logger.warning("an event cannot be read: %s", error)
        return None


def stop(run_folder: str | Path, process: subprocess.Popen | None = None, grace_s: float = 60.0) -> None:
    """Ask the worker to stop in order; end it when it has not done so in time.

    Args:
        process: what `start` returned; without it the request is only written down.
        grace_s: how long the worker may take for its step, checkpoint and LoRA.
    """
    (Path(run_folder) / STOP).touch()
    if process is None:
        return
    try:
        process.wait(grace_s)
    except subprocess.TimeoutExpired:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

"""Run folders: making, listing and reading them. Everything is derived from the files, so it survives restarts of the server.

    <root>/<id>/config.json    settings, as the worker reads them
                metrics.jsonl  events, one a line (see lora_train/events.py)
                log.txt        what the worker printed
                worker.lock    see lock.py
                stop           exists when somebody asked the run to stop
                checkpoints/ samples/ *.safetensors
"""

from __future__ import annotations

import json
import os
import re
import secrets
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..lora_train import events
from ..lora_train.run_config import RunConfig
from . import lock

CONFIG, METRICS, LOG, STOP = "config.json", "metrics.jsonl", "log.txt", "stop"
STATES = ("created", "running", "stopping", "finished", "stopped", "failed", "broken")
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,149}")
_LOG_TAIL_BYTES = 64 * 1024
_STARTING_S = 120.0  # a worker takes its lock within seconds of its start; one that has not by now never will


@dataclass(frozen=True, kw_only=True)
class RunInfo:
    """What a list of runs shows. `files`: absolute paths of finished LoRAs; `reward`, `held_out`: latest values; `ended`: why a guard ended the run;
    `preparing`: what it does before its first update, and how far it is.

    `state` is one of STATES; `broken` means that the folder's files cannot be read, and `error` says why.
    """

    id: str
    name: str
    state: str
    step: int = 0
    steps: int = 0
    reward: float | None = None
    held_out: float | None = None
    held_out_base: float | None = None
    reward_kind: str = ""
    expert: str = ""
    files: list[str] = field(default_factory=list)
    samples: list[str] = field(default_factory=list)
    checkpoint_step: int = 0
    error: str = ""
    log_tail: list[str] = field(default_factory=list)
    pid: int | None = None
    created: float = 0.0
    seconds_per_step: float | None = None
    ended: str = ""
    preparing: str = ""

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class NewEvents:
    """Events that a reader has not had. `file`: identity of the file they stand in; `start`: number of the first of them, 0 where the file is another."""

    file: str
    start: int
    events: list[dict[str, Any]]

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)


class RunStore:
    """The runs under one root folder."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)

    def create(self, config: RunConfig, run_id: str | None = None) -> str:
        """Make a run folder with its `config.json`.

        Args:
            run_id: name of the folder; by default made of the run's name and the time.

        Returns:
            The id.

        Raises:
            ValueError: the id is no plain name, or its folder exists and is not empty.
        """
        run_id = run_id or f"{config.name}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
        folder = self._path(run_id)
        if folder.exists() and any(folder.iterdir()):
            raise ValueError(f"the run folder {folder} is already in use; choose another name, or resume that run")
        folder.mkdir(parents=True, exist_ok=True)
        # At once: a list of runs that is read meanwhile must not find half of it.
        partial = folder / f"{CONFIG}.partial"
        partial.write_text(json.dumps(config.to_dict(), indent=2), encoding="utf-8")
        partial.replace(folder / CONFIG)
        return run_id

    def folder(self, run_id: str) -> Path:
        """Folder of an existing run.

        Raises:
            ValueError: no plain name, or no such run.
        """
        path = self._path(run_id)
        if not (path / CONFIG).is_file():
            raise ValueError(f"there is no run {run_id!r} in {self.root}; it may have been removed")
        return path

    def _path(self, run_id: str) -> Path:
        if not isinstance(run_id, str) or not _ID.fullmatch(run_id):
            raise ValueError(f"{str(run_id)[:200]!r} is no run id; ids are letters, digits, '.', '_' and '-', at most 150, starting with a letter or digit")
        return self.root / run_id

    def list(self) -> list[RunInfo]:
        """All runs, newest first; one that cannot be read is among them with the state `broken`."""
        if not self.root.is_dir():
            return []
        folders = [path for path in self.root.iterdir() if _ID.fullmatch(path.name) and (path / CONFIG).is_file()]
        return sorted(map(_info, folders), key=lambda info: info.created, reverse=True)

    def get(self, run_id: str) -> RunInfo:
        """Present state of one run; see RunInfo for one that cannot be read.

        Raises:
            ValueError: no plain name, or no such run.
        """
        return _info(self.folder(run_id))

    def events(self, run_id: str, start: int = 0) -> list[dict[str, Any]]:
        """Events from number `start` on; a line that is still being written is left for the next call."""
        return read_events(self.folder(run_id), start)

    def new_events(self, run_id: str, start: int, file: str) -> NewEvents:
        """Events for a reader that has had `start` of them from `file` (empty: from none yet).

        A run that goes on from a checkpoint replaces its file by the beginning of it; all of it is new then.
        """
        identity, lines = _read_lines(self.folder(run_id))
        if file not in ("", identity) or start > len(lines):
            start = 0
        return NewEvents(file=identity, start=start, events=_parsed(lines, start))

    def log_tail(self, run_id: str, lines: int = 20) -> list[str]:
        """Last lines of the log."""
        return log_tail(self.folder(run_id), lines)

    def request_stop(self, run_id: str) -> None:
        """Ask the run to stop after its present step; it then writes a checkpoint and a usable LoRA."""
        (self.folder(run_id) / STOP).touch()


def read_config(folder: Path) -> dict[str, Any]:
    """The settings of a run folder as JSON values; they are not checked.

    Raises:
        ValueError: not a JSON object.
    """
    path = folder / CONFIG
    try:
        values = json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"{CONFIG} is not JSON ({error})") from error
    if not isinstance(values, dict):
        raise ValueError(f"{CONFIG} holds a {type(values).__name__}, not an object of settings")
    return values


def read_events(folder: Path, start: int = 0) -> list[dict[str, Any]]:
    """Events of a run folder from number `start` on.

    Raises:
        ValueError: a whole line is no event.
    """
    return _parsed(_read_lines(folder)[1], start)


def _read_lines(folder: Path) -> tuple[str, list[str]]:
    """Identity of `metrics.jsonl` and its whole lines."""
    path = folder / METRICS
    if not path.is_file():
        return "", []
    with path.open(encoding="utf-8") as file:
        return str(os.fstat(file.fileno()).st_ino), file.read().split("\n")[:-1]


def _parsed(lines: list[str], start: int) -> list[dict[str, Any]]:
    found = []
    for number, line in enumerate(lines, start=1):
        if number <= start or not line:
            continue
        try:
            event = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{METRICS}, line {number} is not JSON ({error})") from error
        if not isinstance(event, dict) or not isinstance(event.get("event"), str):
            raise ValueError(f"{METRICS}, line {number} is no event: {line[:80]!r}")
        found.append(event)
    return found


def append_event(folder: Path, event: events.Event) -> None:
    """Add one event to `metrics.jsonl`; half a line that a killed process left at its end is cut off first."""
    with (folder / METRICS).open("ab+") as file:
        size_bytes = file.seek(0, 2)
        file.seek(max(0, size_bytes - 1))
        if file.read(1) not in (b"", b"\n"):
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)
        file.write(events.to_line(event).encode() + b"\n")


def log_tail(folder: Path, lines: int = 20) -> list[str]:
    """Last lines of `log.txt`, empty when there is none."""
    path = folder / LOG
    if not path.is_file():
        return []
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - _LOG_TAIL_BYTES))
        return file.read().decode("utf-8", errors="replace").splitlines()[-lines:]


def _info(folder: Path) -> RunInfo:
    try:
        return _read_info(folder)
    except (OSError, ValueError, KeyError, TypeError) as error:
        # Files that somebody edited, or that a full disk cut short: the other runs must stay visible.
        reason = f"an event in {METRICS} lacks {error}" if isinstance(error, KeyError) else str(error)
        created = folder.stat().st_mtime if folder.is_dir() else 0.0
        return RunInfo(id=folder.name, name=folder.name, state="broken", created=created, error=f"{reason}; repair the file, or delete {folder}")


def _read_info(folder: Path) -> RunInfo:
    config = read_config(folder)
    reward = config.get("reward")
    values: dict[str, Any] = {
        "name": str(config.get("name", folder.name)),
        "steps": int(config.get("steps", 0)),
        "expert": str(config.get("expert", "")),
        "reward_kind": str(reward.get("kind", "")) if isinstance(reward, dict) else str(config.get("kind", "")),
        "created": (folder / CONFIG).stat().st_mtime,
        "pid": lock.owner(folder),
    }
    last = _summarise(read_events(folder), values)
    return RunInfo(id=folder.name, state=_state(folder, last, values), **values)


def _summarise(run_events: list[dict[str, Any]], values: dict[str, Any]) -> str:
    """Fill `values` from the events; returns the name of the last one."""
    last = ""
    for event in run_events:
        last = event["event"]
        if last == "preparing":
            values["preparing"] = f"{event['what']}, {event['done']} of {event['total']}"
        elif last == "step":
            values |= {"step": event["step"], "reward": event["reward"], "seconds_per_step": event["seconds"]}
            if event.get("held_out") is not None:
                values |= {"held_out": event["held_out"], "held_out_base": event.get("held_out_base")}
        elif last == "sample":
            values["samples"] = event["files"]
        elif last == "checkpoint":
            values["checkpoint_step"] = event["step"]
        elif last == "finished":
            values |= {"files": event["files"], "step": event["step"], "reason": event["reason"], "ended": event.get("detail", "")}
        elif last == "failed":
            values |= {"error": event["error"], "log_tail": event["log_tail"]}
    return last


def _state(folder: Path, last: str, values: dict[str, Any]) -> str:
    reason = values.pop("reason", "")
    if lock.is_held(folder):
        return "stopping" if (folder / STOP).exists() else "running"
    if last == "finished":
        return "stopped" if reason == "stopped" else "finished"
    if last == "failed":
        return "failed"
    # A process needs a moment from its start to its lock.
    has_begun = bool(last) or (folder / lock.FILE).exists()
    if not has_begun and time.time() - values["created"] < _STARTING_S:
        return "created"
    ended = "the training process ended without a word (killed, or out of memory); its last checkpoint is good"
    values["error"] = ended if has_begun else "the training process never began; start the run again"
    values["log_tail"] = log_tail(folder)
    return "failed"

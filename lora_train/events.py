"""What a run reports, one JSON object per line in `metrics.jsonl`. No torch here: the server process reads these too.

Every line is `{"event": <name>, "time": <unix seconds>, ...fields}`. Numbers that are not finite become null, since JSON has none.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field, fields
from typing import Any, ClassVar


@dataclass(frozen=True, kw_only=True)
class Started:
    """The worker is ready: models loaded, prompts encoded. `first_step` > 0 means that it resumed there.

    `clips`: how many the run learns from, of so many `clips_offered`; 0 where a run needs none.
    `data_changed`: how what it learns from differs from what it began with, in a sentence; empty where it does not.
    `measure`: what the numbers called reward are in this run: `reward`, or `accuracy` where a PAVRM is trained.
    """

    name: ClassVar[str] = "started"
    time: float
    steps: int
    first_step: int = 0
    experts: list[str] = field(default_factory=list)
    reward: str = ""
    parameters: int = 0
    device: str = ""
    boundary_step: int = 0
    sampling_steps: int = 0
    measure: str = "reward"
    clips: int = 0
    clips_offered: int = 0
    data_changed: str = ""


@dataclass(frozen=True, kw_only=True)
class Preparing:
    """Work before the first update that may take hours: `done` of `total`, of `what` (making clips, scoring clips)."""

    name: ClassVar[str] = "preparing"
    time: float
    what: str
    done: int
    total: int


@dataclass(frozen=True, kw_only=True)
class Step:
    """One optimiser update. `reward` is the mean over its videos; what is `held_out` stands only on steps that evaluated: reward, dynamic degree,
    and a judge's reward that training never sees."""

    name: ClassVar[str] = "step"
    time: float
    step: int
    steps: int
    reward: float
    loss: float
    grad_norm: float
    sigma: float
    seconds: float
    expert: str
    kl: float = 0.0
    learning_rate: float = 0.0
    forwards: float = 0.0
    held_out: float | None = None
    held_out_error: float | None = None
    held_out_base: float | None = None
    held_out_motion: float | None = None
    held_out_judge: float | None = None


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Files, relative to the run folder, that show fixed prompts and seeds at `step`."""

    name: ClassVar[str] = "sample"
    time: float
    step: int
    files: list[str]
    prompts: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """Files, relative to the run folder: the resumable state first, then the LoRAs."""

    name: ClassVar[str] = "checkpoint"
    time: float
    step: int
    files: list[str]


@dataclass(frozen=True, kw_only=True)
class Replanned:
    """The card's memory ended in `step`, which runs once more with a smaller plan. `detail`: what changed, in a sentence."""

    name: ClassVar[str] = "replanned"
    time: float
    step: int
    detail: str


@dataclass(frozen=True, kw_only=True)
class Memory:
    """What a step took and what was planned, in bytes: of tensors on a card; on the CPU, how far the process grew.

    when: `rehearsal`, of the largest step before training; `run`, the peak of all updates. error: measured over predicted, less 1.
    """

    name: ClassVar[str] = "memory"
    time: float
    when: str
    predicted_bytes: int
    measured_bytes: int
    limit_bytes: int
    error: float
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Finished:
    """The run ended well. `files` are absolute paths of the LoRAs.

    reason: completed, stopped (somebody asked), or a guard's: kl_budget, motion, no_gain. detail: why, and of which update the LoRAs are, in a sentence.
    """

    name: ClassVar[str] = "finished"
    time: float
    step: int
    files: list[str]
    reason: str
    detail: str = ""


@dataclass(frozen=True, kw_only=True)
class Failed:
    """The run ended badly. `error` is for the user; `log_tail` are the last lines of log.txt."""

    name: ClassVar[str] = "failed"
    time: float
    error: str
    step: int = 0
    log_tail: list[str] = field(default_factory=list)


Event = Started | Preparing | Step | Sample | Checkpoint | Memory | Replanned | Finished | Failed
EVENTS: dict[str, type] = {kind.name: kind for kind in (Started, Preparing, Step, Sample, Checkpoint, Memory, Replanned, Finished, Failed)}


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def to_dict(event: Event) -> dict[str, Any]:
    """The event as plain JSON values, its name under `event`."""
    return {"event": event.name, **{key: _finite(value) for key, value in asdict(event).items()}}


def to_line(event: Event) -> str:
    """The event as one line of `metrics.jsonl`, without the line end."""
    return json.dumps(to_dict(event), separators=(",", ":"))


def from_line(line: str) -> Event:
    """Read a line that `to_line` wrote; fields that a newer version added are left out.

    Raises:
        ValueError: not JSON, or an unknown event.
    """
    values = json.loads(line)
    kind = EVENTS.get(values.get("event")) if isinstance(values, dict) else None
    if kind is None:
        raise ValueError(f"not an event line of this version: {line[:120]!r}; known events: {', '.join(EVENTS)}")
    known = {entry.name for entry in fields(kind)}
    return kind(**{key: value for key, value in values.items() if key in known})

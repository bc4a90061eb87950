"""Names and payloads of what the pack sends to the page. `web/events.js` mirrors them; a test compares the two."""

from __future__ import annotations

from typing import Any

from ..lora_train.events import EVENTS
from ..runs.store import RunInfo

RUN_EVENT = "reward_lab.run"
RUN_STEP_EVENTS = tuple(EVENTS)


def run_payload(info: RunInfo, event: dict[str, Any]) -> dict[str, Any]:
    """Payload of `reward_lab.run`: the run as its routes show it, and the event that changed it (one of RUN_STEP_EVENTS, under `event`)."""
    return {**info.to_dict(), "event": event}

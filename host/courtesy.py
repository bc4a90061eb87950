"""Lets training runs pause while the server executes prompts on the same card, or on the same cores.

A thread looks at the server's queue while a run is active and keeps the runs' `busy` file up to date (runs/lease.py). A queued prompt counts as well: an
update begun in the moment between two cells of a sweep would slow the next one down. A prompt that only waits for a run does not count: it would
wait for ever for a run that waits for it.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from server import PromptServer

from ..runs import lease

POLL_S = 0.1

_lock = threading.Lock()
_thread: threading.Thread | None = None
_waiting_prompts = 0


@contextlib.contextmanager
def waiting_for_run() -> Iterator[None]:
    """Within it, the prompt that is being executed counts as idle."""
    global _waiting_prompts
    with _lock:
        _waiting_prompts += 1
    try:
        yield
    finally:
        with _lock:
            _waiting_prompts -= 1


def start(runs_folder: Path, has_active_run: Callable[[], bool]) -> None:
    """Start the thread, unless it runs already.

    Args:
        runs_folder: Where the `busy` file goes.
        has_active_run: The thread ends when this is False.
    """
    global _thread
    with _lock:
        if _thread is None or not _thread.is_alive():
            _thread = threading.Thread(target=_watch, args=(runs_folder, has_active_run), daemon=True, name="reward_lab_courtesy")
            _thread.start()


def _watch(runs_folder: Path, has_active_run: Callable[[], bool]) -> None:
    was_busy = False
    try:
        while has_active_run():
            is_busy = has_work()
            if is_busy != was_busy:
                (lease.mark_busy if is_busy else lease.mark_free)(runs_folder)
                was_busy = is_busy
            time.sleep(POLL_S)
    finally:
        if was_busy:
            lease.mark_free(runs_folder)


def has_work() -> bool:
    """Tell whether the server executes a prompt that does more than wait for a run, or is about to."""
    server = getattr(PromptServer, "instance", None)
    if server is None:
        return False
    running, queued = server.prompt_queue.get_current_queue_volatile()
    return len(running) > _waiting_prompts or (not running and bool(queued))

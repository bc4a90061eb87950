"""When training leaves card and cores to the queue: on the host's own PromptQueue."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

pytest.importorskip("torch")
pytest.importorskip("comfy.sd", reason="needs ComfyUI on the path")

from execution import PromptQueue  # noqa: E402
from server import PromptServer  # noqa: E402

from reward_lab.host import courtesy  # noqa: E402
from reward_lab.runs import lease  # noqa: E402

pytestmark = pytest.mark.host


@pytest.fixture
def queue(monkeypatch):
    made = PromptQueue(SimpleNamespace(queue_updated=lambda: None))
    monkeypatch.setattr(PromptServer, "instance", SimpleNamespace(prompt_queue=made), raising=False)
    return made


def put(queue: PromptQueue, number: int) -> None:
    queue.put((number, f"prompt-{number}", {}, {}, []))


def test_a_queue_with_work_is_busy_also_between_two_prompts(queue) -> None:
    assert not courtesy.has_work()
    put(queue, 1)
    put(queue, 2)
    assert courtesy.has_work()  # queued
    _, number = queue.get()
    assert courtesy.has_work()  # running
    queue.task_done(number, {}, None)
    assert courtesy.has_work()  # between the two
    _, number = queue.get()
    queue.task_done(number, {}, None)
    assert not courtesy.has_work()


def test_a_prompt_that_waits_for_a_run_does_not_hold_it_up(queue) -> None:
    put(queue, 1)
    put(queue, 2)
    queue.get()
    with courtesy.waiting_for_run():
        # The second one cannot begin before the first has ended.
        assert not courtesy.has_work()
    assert courtesy.has_work()


def test_the_file_follows_the_queue_and_goes_with_the_run(queue, tmp_path) -> None:
    put(queue, 1)
    looks = iter([True, True, False])
    seen = []

    def has_active_run() -> bool:
        seen.append(lease.is_busy(tmp_path))
        return next(looks)

    courtesy._watch(tmp_path, has_active_run)
    assert seen == [False, True, True]
    assert not lease.is_busy(tmp_path)

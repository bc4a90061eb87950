"""The labelling page in the real front-end: keys, undo, going on after a reload, blind votes and the ranking; what stands on the disk is read back."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from urllib.error import HTTPError

import pytest

from reward_lab.lora_train import annotations
from reward_lab.testlab import votes
from reward_lab.tests.browser import frontend, label_scene

pytestmark = [pytest.mark.host, pytest.mark.browser]


@pytest.fixture(scope="module")
def folders(server):
    return label_scene.fill(server.base / "output")


@pytest.fixture(scope="module")
def page(server, folders, chromium_path: str) -> Iterator[Any]:
    pytest.importorskip("playwright")
    with frontend.open_front_end(server.url, chromium=chromium_path, width_px=1280, height_px=800) as opened:
        yield opened
        assert opened.reward_lab_errors == []


def open_page(page: Any, source: str) -> None:
    """Open the labelling page through the sidebar and choose a source."""
    page.evaluate("() => { const s = window.app.extensionManager.sidebarTab; if (s.activeSidebarTabId !== 'reward-lab') s.toggleSidebarTab('reward-lab'); }")
    page.get_by_label("Label and vote").first.click()
    select = page.get_by_label("Dataset or sweep")
    select.locator("option", has_text=source).wait_for(state="attached")
    select.select_option(label=select.locator("option", has_text=source).inner_text())
    page.wait_for_function("() => [...document.querySelectorAll('.rl-label-stage video')].every((video) => video.readyState >= 2)")


def wait_for_progress(page: Any, text: str) -> None:
    page.wait_for_function("(text) => document.querySelector('.rl-label-progress')?.textContent.startsWith(text)", arg=text)


def wait_for_caption(page: Any, text: str) -> None:
    """The progress is told before the first video is shown."""
    page.wait_for_function("(text) => document.querySelector('.rl-label-caption')?.textContent === text", arg=text)


def wait_for_lines(page: Any, file: Any, count: int) -> None:
    """Wait until a file has so many lines."""
    for _ in range(100):
        if file.is_file() and len(file.read_text().splitlines()) >= count:
            break
        page.wait_for_timeout(100)
    assert len(file.read_text().splitlines()) == count


def test_videos_are_labelled_by_keys(page, folders) -> None:
    file = folders[0] / annotations.FILE_NAME
    open_page(page, label_scene.DATASET)
    wait_for_progress(page, "0 of 4")
    wait_for_caption(page, label_scene.clip(0)[1])
    for number, key in enumerate("gbs", 1):
        page.keyboard.press(key)
        wait_for_progress(page, f"{number} of 4")
    page.keyboard.press("u")
    wait_for_progress(page, "2 of 4")
    assert page.locator(".rl-label-progress").inner_text() == "2 of 4 · 1 good, 1 bad, 0 skipped"
    page.wait_for_function("() => document.querySelector('.rl-label-now').textContent === 'Video 3 of 4'")
    page.keyboard.press("Escape")
    page.locator(".rl-label-page").wait_for(state="detached")
    # Four answers are written, the last of them takes the third back. The page does not wait for the disk, so the test does.
    wait_for_lines(page, file, 4)
    labels = annotations.read(file)
    assert {video: label["motion_quality"] for video, label in labels.items()} == {"clip0": "good", "clip1": "bad"}

    open_page(page, label_scene.DATASET)
    wait_for_progress(page, "2 of 4")
    wait_for_caption(page, label_scene.clip(2)[1])
    page.get_by_label("What to judge").select_option("label:blur_quality")
    wait_for_progress(page, "0 of 4")
    page.get_by_role("button", name="Good").click()
    wait_for_progress(page, "1 of 4")
    page.keyboard.press("Escape")
    wait_for_lines(page, file, 5)
    assert annotations.read(file)["clip0"] == {"motion_quality": "good", "blur_quality": "good"}


def test_blind_votes_and_their_ranking(page, folders) -> None:
    path = folders[1] / votes.FILE_NAME
    open_page(page, label_scene.SWEEP)
    wait_for_progress(page, "0 votes · 6 pairs")
    together = "a.currentTime > 0.1 && Math.abs(a.currentTime - b.currentTime) < 0.3"
    page.wait_for_function(f"() => {{ const [a, b] = document.querySelectorAll('.rl-vote-stage video'); return {together}; }}")
    shown = page.locator(".rl-label-body").inner_text()
    assert "strength" not in shown and "0.5" not in shown, "a vote must be blind"
    for number, key in enumerate(("ArrowLeft", "ArrowRight", "ArrowDown", "s"), 1):
        page.keyboard.press(key)
        wait_for_progress(page, f"{number} votes")
    page.keyboard.press("u")
    wait_for_progress(page, "3 votes")
    rows = votes.read(path).rows
    assert [vote.result for vote in rows] == ["left", "right", "tie"]
    for vote in rows:
        left, right = int(vote.left, 16), int(vote.right, 16)
        assert left // 3 == right // 3 and left != right  # the same seed, another strength
    page.get_by_role("button", name="Ranking").click()
    page.locator(".rl-ranking tbody tr").nth(2).wait_for()
    names = page.locator(".rl-ranking tbody td:first-child").all_inner_texts()
    assert sorted(names) == ["0", "0.5", "1"] and page.locator(".rl-interval-line").count() == 3
    page.keyboard.press("Escape")
    page.locator(".rl-label-page").wait_for(state="detached")


def test_the_front_ends_own_keys_are_not_pressed_by_accident(page) -> None:
    """`g` groups nodes and `r` reloads the lists in the front-end; while the page is open they must not."""
    page.evaluate("() => { window.rewardLabKeys = 0; window.addEventListener('keydown', () => { window.rewardLabKeys += 1; }); }")
    open_page(page, label_scene.DATASET)
    page.keyboard.press("r")
    assert page.evaluate("() => window.rewardLabKeys") == 0
    page.keyboard.press("Escape")
    page.keyboard.press("r")
    assert page.evaluate("() => window.rewardLabKeys") == 1


def test_bad_requests_are_refused(server, folders) -> None:
    client = server.client()
    dataset = f"/reward_lab/label/dataset/{label_scene.DATASET.replace(' ', '%20')}"
    for path, body in (
        (dataset, {"id": "nobody", "quality": "motion_quality", "label": "good"}),
        (dataset, {"id": "clip0", "quality": "beauty", "label": "good"}),
        (dataset, {"id": "clip0", "quality": "motion_quality", "label": "nice"}),
        (dataset, ["no object"]),
        ("/reward_lab/label/folder/x", {"id": "clip0"}),
        (f"/reward_lab/vote/{label_scene.SWEEP}", {"left": "00000000", "right": "ffffffff", "result": "left"}),
        (f"/reward_lab/vote/{label_scene.SWEEP}", {"left": "00000000", "right": "00000001", "result": "both"}),
    ):
        with pytest.raises(HTTPError) as caught:
            client.post(path, body)
        assert caught.value.code == 404 and caught.value.read(), (path, body)
    for path in ("/reward_lab/datasets/pocket%20clips/dataset.json", "/reward_lab/datasets/..%2f..%2fx/previews/0.mp4", "/reward_lab/vote/strengths?axis=9"):
        with pytest.raises(HTTPError):
            client.get(path)
    assert client.fetch("/reward_lab/datasets/pocket%20clips/previews/0.mp4")[4:8] == b"ftyp"

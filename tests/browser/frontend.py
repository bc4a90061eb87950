"""Drive the real ComfyUI front-end in headless Chromium: open a page, load graphs, press Run, read nodes.

Used by the browser tests and by `workflow_builder.py`. Needs the `playwright` package and a Chromium that is installed on the machine
(REWARD_LAB_CHROMIUM, or one on the PATH); it never downloads one.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from typing import Any

CHROMIUM_FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
"""Without the background flags Chromium calls home at every start and waits for the refusals of a closed network."""

START_LIMIT_S = 240.0
"""A busy machine needs minutes for the front-end's six hundred files."""
ACTION_LIMIT_S = 60.0

QUIET_SETTINGS = {
    "Comfy.TutorialCompleted": True,
    "Comfy.Workflow.ShowMissingModelsWarning": False,
    "Comfy.ReleaseNotes": "",
    "Comfy.Graph.CanvasInfo": False,
    "Comfy.Minimap.Visible": False,
}


def find_chromium() -> str | None:
    """Return the browser's path, or None when there is none on this machine."""
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
    return os.environ.get("REWARD_LAB_CHROMIUM") or next(filter(None, map(shutil.which, names)), None)


@contextlib.contextmanager
def open_front_end(
    url: str,
    *,
    chromium: str | None = None,
    width_px: int = 1600,
    height_px: int = 900,
    scale: float = 1.0,
    settings: dict[str, Any] | None = None,
) -> Iterator[Any]:
    """Open the front-end in a fresh browser profile and wait until its graph is there.

    Args:
        url: address of a running ComfyUI server.
        chromium: path of the browser; by default the one `find_chromium` finds.
        width_px, height_px: size of the window in CSS pixels.
        scale: device pixels per CSS pixel.
        settings: ComfyUI settings to store on the server first, on top of `QUIET_SETTINGS`.

    Yields:
        The playwright page. `page.reward_lab_errors` collects the page's uncaught errors.
    """
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright, tempfile.TemporaryDirectory(prefix="reward-lab-browser-") as profile:
        context = playwright.chromium.launch_persistent_context(
            profile,
            executable_path=chromium or find_chromium(),
            headless=True,
            args=list(CHROMIUM_FLAGS),
            viewport={"width": width_px, "height": height_px},
            device_scale_factor=scale,
        )
        try:
            context.request.post(f"{url}/api/settings", data=json.dumps({**QUIET_SETTINGS, **(settings or {})}), headers={"Content-Type": "application/json"})
            page = context.new_page()
            errors: list[str] = []
            page.on("pageerror", lambda error: errors.append(str(error)))
            page.reward_lab_errors = errors
            page.set_default_timeout(START_LIMIT_S * 1000)
            page.goto(url)
            page.wait_for_function(
                "() => window.app?.graph && window.app.extensionManager && window.LiteGraph?.registered_node_types['RewardLabLoadLoRAs']",
                timeout=START_LIMIT_S * 1000,
            )
            page.wait_for_timeout(500)
            page.set_default_timeout(ACTION_LIMIT_S * 1000)
            yield page
        finally:
            context.close()


def load_graph(page: Any, workflow: dict[str, Any], *, is_api: bool = False) -> None:
    """Load a workflow (front-end format, or API format with `is_api`) into the page and let it lay out."""
    if is_api:
        page.evaluate("async (graph) => { await window.app.loadApiJson(graph, 'workflow'); }", workflow)
    else:
        page.evaluate("async (graph) => { await window.app.loadGraphData(graph); }", workflow)
    page.wait_for_timeout(600)


def press_run(page: Any) -> str:
    """Click the front-end's own Run button; returns the id of the prompt that it queued.

    Raises:
        RuntimeError: the server refused the prompt.
    """
    with page.expect_response(lambda answer: answer.url.endswith("/api/prompt") and answer.request.method == "POST") as queued:
        page.get_by_test_id("queue-button").first.click()
    answer = queued.value.json()
    if not queued.value.ok:
        raise RuntimeError(f"the server refused the prompt: {json.dumps(answer)}")
    return answer["prompt_id"]


def wait_for_execution(page: Any, prompt_id: str, timeout_s: float) -> None:
    """Wait until a prompt has run, and everything that it queued behind itself.

    Raises:
        RuntimeError: the prompt failed.
        TimeoutError: it is not over in time.
    """
    # Not page.wait_for_function: the promise of an asynchronous condition counts as true for it, at once.
    ask = """async (id) => {
        const [history, queue] = await Promise.all(['/api/history/' + id, '/api/queue'].map(async (path) => (await fetch(path)).json()));
        return queue.queue_running.length + queue.queue_pending.length === 0 ? history[id]?.status ?? null : null;
    }"""
    deadline = time.monotonic() + timeout_s
    while (status := page.evaluate(ask, prompt_id)) is None:
        if time.monotonic() > deadline:
            raise TimeoutError(f"the prompt was not over within {timeout_s:.0f} s")
        page.wait_for_timeout(500)
    if status["status_str"] != "success":
        raise RuntimeError(f"the prompt failed: {json.dumps(status['messages'][-1:])}")


def wait_for_pictures(page: Any, timeout_s: float = 120.0) -> None:
    """Wait until every node that reported pictures shows them, on the canvas or in an element of its own."""
    page.wait_for_function(
        """() => {
            const isShown = (picture) => picture.complete !== false && (picture.naturalWidth || picture.videoWidth || 0) > 0;
            return window.app.graph.nodes.every((node) => {
                if (!window.app.nodeOutputs[node.id]?.images?.length) return true;
                const elements = (node.widgets ?? []).flatMap((widget) => [...(widget.element?.querySelectorAll?.('img, video') ?? [])]);
                const pictures = [...(node.imgs ?? []), ...elements];
                return pictures.length > 0 && pictures.every(isShown);
            });
        }""",
        timeout=timeout_s * 1000,
        polling=250,
    )


def node_widget(page: Any, node_type: str, widget: str) -> Any:
    """Return the value of a widget of the first node of a type."""
    return page.evaluate(
        "([type, name]) => window.app.graph.nodes.find((n) => n.type === type).widgets.find((w) => w.name === name).value", [node_type, widget]
    )


def fit_view(page: Any, margin_px: int = 30, timeout_s: float = 20.0) -> None:
    """Zoom and move the canvas so that the whole graph is in the free part of the window, and wait until it lies still there.

    A node grows when its elements have been laid out, some frames after it was made: the view is fitted again until nothing has moved for
    a while. What is clicked before that may move away under the mouse.

    Raises:
        TimeoutError: the graph does not come to rest.
    """
    deadline = time.monotonic() + timeout_s
    last, still = None, 0
    while still < 4:
        if time.monotonic() > deadline:
            raise TimeoutError(f"the graph did not come to rest within {timeout_s:.0f} s; last seen: {last}")
        places = page.evaluate(FIT_SCRIPT, margin_px)
        still = still + 1 if places == last else 0
        last = places
        page.wait_for_timeout(120)


# Fits the view and returns where the graph's elements now are in the window, after the frame that drew them.
FIT_SCRIPT = """async (margin) => {
    const boxes = [...window.app.graph.nodes.map((n) => n.getBounding()), ...window.app.graph.groups.map((g) => [...g.pos, ...g.size])];
    const x0 = Math.min(...boxes.map((b) => b[0])), y0 = Math.min(...boxes.map((b) => b[1]));
    const x1 = Math.max(...boxes.map((b) => b[0] + b[2])), y1 = Math.max(...boxes.map((b) => b[1] + b[3]));
    // The front-end's own bars lie over the canvas on the left, at the top and in the lower right corner.
    const left = 60 + margin, top = 96 + margin, bottom = 50 + margin;
    const w = window.innerWidth - left - margin, h = window.innerHeight - top - bottom;
    const scale = Math.min(w / (x1 - x0), h / (y1 - y0), 1.2);
    const ds = window.app.canvas.ds;
    ds.scale = scale;
    ds.offset[0] = left / scale - x0 + (w / scale - (x1 - x0)) / 2;
    ds.offset[1] = top / scale - y0 + (h / scale - (y1 - y0)) / 2;
    // What scrolled into view for a click before has shifted the elements against the canvas.
    for (let box = window.app.canvas.canvas; box; box = box.parentElement) box.scrollTo(0, 0);
    for (const box of document.querySelectorAll('.graph-canvas-container, .graph-canvas-container *')) if (box.scrollTop || box.scrollLeft) {
        if (!box.closest('.rl-rows, textarea')) box.scrollTo(0, 0);
    }
    window.app.graph.setDirtyCanvas(true, true);
    await new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)));
    const places = [...document.querySelectorAll('.dom-widget')].map((element) => element.getBoundingClientRect());
    return places.map((place) => [place.x, place.y, place.width, place.height].map(Math.round).join(' '));
}"""

"""The pack in the real front-end, in headless Chromium: templates, rows, the sidebar, and a workflow that is run with the Run button."""

from __future__ import annotations

import dataclasses
import json
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from reward_lab.host.block_strengths import PRESETS as BLOCK_PRESETS
from reward_lab.lora_train.events import Failed, Started, Step, to_line
from reward_lab.tests.browser import frontend

pytestmark = [pytest.mark.host, pytest.mark.browser]

EXAMPLES = ("1 load and sample", "2 testlab strengths", "3 train a reward lora")
HIGH, LOW = "Some-high-noise-HPS2.1.safetensors", "folder/Some-low-noise-MPS.safetensors"


@pytest.fixture(scope="module")
def page(server, chromium_path: str) -> Iterator[Any]:
    """One page for all tests of this file: opening the front-end is the slow part."""
    pytest.importorskip("playwright")
    with frontend.open_front_end(server.url, chromium=chromium_path, width_px=1600, height_px=950) as opened:
        yield opened
        assert opened.reward_lab_errors == []


@pytest.fixture
def rows_node(page) -> Any:
    """A fresh graph with one `Load Reward LoRAs` of two rows; the server's list of files is replaced."""
    page.route("**/reward_lab/loras", lambda route: route.fulfill(json=[HIGH, LOW, "Other.safetensors"]))
    rows = [{"on": True, "file": HIGH, "high": 0.5, "low": 0}, {"on": True, "file": LOW, "high": 0, "low": 0.5}]
    page.evaluate(
        """(rows) => {
            window.app.graph.clear();
            const node = window.LiteGraph.createNode('RewardLabLoadLoRAs');
            node.pos = [500, 150];
            window.app.graph.add(node);
            node.configure({ ...node.serialize(), widgets_values: [rows] });
        }""",
        json.dumps(rows),
    )
    page.wait_for_selector(".rl-row >> nth=1")
    frontend.fit_view(page)
    yield page
    page.unroute("**/reward_lab/loras")


def rows_of(page: Any) -> list[dict[str, Any]]:
    return json.loads(frontend.node_widget(page, "RewardLabLoadLoRAs", "rows"))


def unfold(page: Any, number: int) -> None:
    """Fold a row out and bring the whole node into view; playwright's own scrolling would shift the canvas for the tests after it."""
    page.get_by_label("Details").nth(number).evaluate("(button) => button.click()")
    page.wait_for_selector(".rl-details")
    frontend.fit_view(page)


def test_examples_are_templates_of_the_front_end(server, client) -> None:
    listed = client.get("/api/workflow_templates")
    module, names = next((module, names) for module, names in listed.items() if EXAMPLES[0] in names)
    for name in EXAMPLES:
        for stem in (name, f"{name} (Wan2.2 14B)"):
            assert stem in names
            path = f"/api/workflow_templates/{module}/{urllib.parse.quote(stem)}"
            assert client.get(f"{path}.json")["nodes"]
            assert client.fetch(f"{path}.jpg")[:3] == b"\xff\xd8\xff"


def test_template_browser_shows_the_examples(page) -> None:
    page.evaluate("() => window.app.extensionManager.command.execute('Comfy.BrowseTemplates')")
    dialog = page.locator("[role=dialog]").first
    dialog.wait_for()
    dialog.get_by_placeholder("Search").first.fill(EXAMPLES[2])
    found = dialog.get_by_text(EXAMPLES[2], exact=False).first
    found.wait_for()
    assert EXAMPLES[2] in found.inner_text()
    page.keyboard.press("Escape")
    dialog.wait_for(state="hidden")


def test_rows_show_and_edit_the_widget(rows_node) -> None:
    page = rows_node
    page.locator(".rl-toggle").nth(1).click()
    assert [row["on"] for row in rows_of(page)] == [True, False]
    page.get_by_label("Raise Strength on the high-noise expert").first.click()
    assert rows_of(page)[0]["high"] == 0.55
    field = page.get_by_label("Strength on the low-noise expert", exact=True).first
    field.click()
    page.keyboard.type("0.25")
    page.keyboard.press("Enter")
    assert rows_of(page)[0]["low"] == 0.25
    page.get_by_label("Remove").nth(1).click()
    assert [row["file"] for row in rows_of(page)] == [HIGH]


def test_a_strength_is_dragged(rows_node) -> None:
    page = rows_node
    box = page.get_by_label("Strength on the high-noise expert", exact=True).first.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x + 61, y, steps=6)
    page.mouse.up()
    assert rows_of(page)[0]["high"] == pytest.approx(1.0)


def test_a_file_is_searched_and_added(rows_node) -> None:
    page = rows_node
    page.get_by_role("button", name="Add LoRA").click()
    page.get_by_label("Search files").fill("low mps")
    assert page.locator(".rl-picker-option").count() == 1
    page.keyboard.press("Enter")
    assert rows_of(page)[2] == {"on": True, "file": LOW, "high": 0, "low": 0.5}


def test_rows_are_reordered_by_dragging(rows_node) -> None:
    page = rows_node
    first, second = (page.locator(".rl-handle").nth(i).bounding_box() for i in (0, 1))
    page.mouse.move(first["x"] + 5, first["y"] + 5)
    page.mouse.down()
    page.mouse.move(second["x"] + 5, second["y"] + 14, steps=5)
    page.mouse.up()
    assert [row["file"] for row in rows_of(page)] == [LOW, HIGH]


def test_reports_appear_on_the_rows(rows_node) -> None:
    page = rows_node
    page.evaluate(
        """([high, low]) => window.app.graph.nodes[0].onExecuted({ reward_lab_rows: [
            { file: high, on: true, high: 0.5, low: 0, applied_high: 40, applied_low: 0, total: 40, warnings: [] },
            { file: low, on: true, high: 0, low: 0.5, applied_high: 0, applied_low: 12, total: 40, warnings: ['28 keys are not in this model'] }] })""",
        [HIGH, LOW],
    )
    page.wait_for_selector(".rl-status >> nth=1")
    assert page.locator(".rl-status").all_inner_texts() == ["applied high 40 of 40", "applied low 12 of 40"]
    assert [page.locator(".rl-status").nth(i).get_attribute("data-tone") for i in (0, 1)] == ["good", "warn"]
    assert page.locator(".rl-row-warning").inner_text() == "28 keys are not in this model"


def test_a_curve_is_chosen_typed_and_drawn(rows_node) -> None:
    page = rows_node
    unfold(page, 0)
    picture = page.locator(".rl-curve")
    picture.wait_for()
    assert page.locator(".rl-curve-point").count() == 0
    page.get_by_label("Preset of the strength over sigma").select_option("above 0.875")
    assert rows_of(page)[0]["curve"] == "above 0.875"
    assert page.locator(".rl-curve-point").count() == 4
    page.get_by_label("Strength over sigma", exact=True).fill("1:0, 0.5:1, 0:0.5")
    page.keyboard.press("Enter")
    assert rows_of(page)[0]["curve"] == "1:0, 0.5:1, 0:0.5" and "curve" not in rows_of(page)[1]
    assert page.locator(".rl-more").first.locator("polyline").count() == 1  # the folded row shows it too
    # High and low each draw their side of the boundary.
    lines = page.locator(".rl-curve-line").evaluate_all("(all) => all.map((one) => [one.dataset.expert, one.getAttribute('points').split(' ').length])")
    assert dict(lines).keys() == {"high", "low"} and all(count > 5 for _, count in lines)
    page.get_by_label("Strength over sigma", exact=True).fill("2:0")
    page.keyboard.press("Enter")
    assert "0 to 1" in page.locator(".rl-curve-error").inner_text()


def test_points_of_a_curve_are_added_dragged_and_removed(rows_node) -> None:
    page = rows_node
    unfold(page, 0)
    page.get_by_label("Strength over sigma", exact=True).fill("1:0, 0.5:0, 0:1")
    page.keyboard.press("Enter")
    point = page.locator(".rl-curve-point").nth(1).bounding_box()
    x, y = point["x"] + point["width"] / 2, point["y"] + point["height"] / 2
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x, y - 400, steps=5)
    page.mouse.up()
    assert rows_of(page)[0]["curve"] == "1:0, 0.5:1, 0:1"
    box = page.locator(".rl-curve").bounding_box()
    page.mouse.click(box["x"] + box["width"] * 0.25, box["y"] + box["height"] * 0.5)
    assert len(rows_of(page)[0]["curve"].split(",")) == 4
    page.locator(".rl-curve-point").nth(1).click(button="right")
    assert rows_of(page)[0]["curve"] == "1:0, 0.5:1, 0:1"


def test_strengths_per_block_are_typed_or_chosen(rows_node) -> None:
    page = rows_node
    unfold(page, 1)
    page.get_by_label("Strengths per block", exact=True).fill("0-9:0.5, ffn:0")
    page.keyboard.press("Enter")
    assert rows_of(page)[1]["blocks"] == "0-9:0.5, ffn:0"
    page.get_by_label("Preset of the strengths per block").select_option("attention only")
    assert rows_of(page)[1]["blocks"] == "attention only"
    page.get_by_label("Preset of the strengths per block").select_option("")
    assert "blocks" not in rows_of(page)[1]


def test_presets_are_those_of_the_server() -> None:
    text = (Path(__file__).parents[2] / "web" / "row_details.js").read_text(encoding="utf-8")
    assert text.count(json.dumps(list(BLOCK_PRESETS[1:]))) == 1


def test_official_files_and_layouts_are_offered(rows_node, server) -> None:
    page = rows_node
    page.get_by_role("button", name="Official files…").click()
    entries = page.locator(".rl-picker-option")
    entries.nth(3).wait_for()
    assert entries.count() == 4 and "HPSv2.1, high noise" in entries.first.inner_text()
    page.keyboard.press("Escape")
    unfold(page, 0)
    page.get_by_role("button", name="Convert layout…").click()
    page.get_by_label("Search files").fill("peft")
    assert page.locator(".rl-picker-option").count() >= 1
    page.keyboard.press("Escape")


def test_text_that_is_not_rows_is_told_and_left_alone(rows_node) -> None:
    page = rows_node
    page.evaluate("() => { const n = window.app.graph.nodes[0]; n.configure({ ...n.serialize(), widgets_values: ['[{'] }); }")
    page.get_by_text("The rows are not JSON").wait_for()
    assert frontend.node_widget(page, "RewardLabLoadLoRAs", "rows") == "[{"


VISIBLE = """() => window.app.graph.nodes[0].widgets.filter((w) => !w.hidden && !w.options?.hidden && w.type !== 'reward_lab').map((w) => w.label ?? w.name)"""


def test_load_reward_model_shows_what_its_kind_reads(page) -> None:
    page.evaluate(
        """() => {
            window.app.graph.clear();
            const node = window.LiteGraph.createNode('RewardLabRewardModel');
            node.pos = [500, 150];
            window.app.graph.add(node);
        }"""
    )
    text = page.locator(".rl-text")
    text.filter(has_text="HPS_v2.1_compressed.pt").wait_for()
    choose = """([name, value]) => { const w = window.app.graph.nodes[0].widgets.find((one) => one.name === name); w.value = value; w.callback?.(value); }"""
    page.evaluate(choose, ["file", "(none)"])
    assert "switch download on" in text.inner_text() and "1.97 GB; sha256 c57a38fb" in text.inner_text()
    hps = page.evaluate(VISIBLE)
    assert hps == ["kind", "file", "resize", "antialias", "download", "stability"]
    *common, last = hps
    shown = {}
    for kind in ("mps", "aesthetic", "face", "pavrm", "flicker"):
        page.evaluate(choose, ["kind", kind])
        shown[kind] = page.evaluate(VISIBLE)
    assert shown["mps"] == [*common, "condition", "threshold", last]
    assert shown["aesthetic"] == [*common, "CLIP ViT-L/14 file", last]
    assert shown["face"] == ["kind", "file", "face detector file", "reference"]
    assert shown["pavrm"] == ["kind", "file", "query attention file", "score head file", "generator"]
    assert shown["flicker"] == ["kind"] and text.inner_text() == "flicker needs no weights."
    # What is hidden stays part of the workflow, and comes back with its value.
    page.evaluate("() => { const n = window.app.graph.nodes[0]; n.widgets.find((w) => w.name === 'condition').value = 'quality'; n.configure(n.serialize()); }")
    page.evaluate(choose, ["kind", "mps"])
    assert frontend.node_widget(page, "RewardLabRewardModel", "condition") == "quality" and "condition" in page.evaluate(VISIBLE)


def test_mix_rewards_shows_connected_rows_and_fills_in_what_was_measured(page) -> None:
    page.evaluate(
        """() => {
            window.app.graph.clear();
            const mix = window.LiteGraph.createNode('RewardLabMixRewards'), reward = window.LiteGraph.createNode('RewardLabRewardModel');
            for (const node of [mix, reward]) window.app.graph.add(node);
            mix.pos = [500, 150];
        }"""
    )
    assert page.evaluate(VISIBLE) == ["weight_1", "centre_1", "scale_1", "measure_baseline"]
    page.evaluate("() => { const [mix, reward] = window.app.graph.nodes; reward.connect(0, mix, 'reward_3'); }")
    page.evaluate("() => { const w = window.app.graph.nodes[0].widgets.find((one) => one.name === 'measure_baseline'); w.value = true; w.callback?.(true); }")
    rows = [f"{part}_{row}" for row in (1, 3) for part in ("weight", "centre", "scale")]
    assert page.evaluate(VISIBLE) == [*rows, "measure_baseline", "baseline_folder", "baseline_prompts"]
    measured = [{"row": 1, "centre": 0.2812, "scale": 0.0104}, {"row": 3, "centre": 1.25, "scale": 0.5}]
    output = {"text": ["measured"], "reward_lab_baseline": measured}
    page.evaluate("(output) => window.app.graph.nodes[0].onExecuted(output)", output)
    names = ("centre_1", "scale_1", "centre_3", "scale_3", "centre_2")
    assert [frontend.node_widget(page, "RewardLabMixRewards", name) for name in names] == [0.2812, 0.0104, 1.25, 0.5, 0]
    # When a workflow comes back to the front, its old outputs are shown again: a number that was edited since stays.
    page.evaluate("() => { window.app.graph.nodes[0].widgets.find((widget) => widget.name === 'centre_1').value = 0.4; }")
    page.evaluate("(output) => { window.app.nodeOutputs = { [window.app.graph.nodes[0].id]: output }; }", {**output, "text": ["shown again"]})
    page.locator(".rl-text", has_text="shown again").wait_for()
    assert [frontend.node_widget(page, "RewardLabMixRewards", name) for name in names] == [0.4, 0.0104, 1.25, 0.5, 0]
    saved = page.evaluate("() => window.app.graph.nodes[0].serialize().widgets_values")
    assert 0.0104 in saved and 1.25 in saved, "what was filled in is part of the workflow"
    page.evaluate("() => window.app.graph.nodes[0].disconnectInput(window.app.graph.nodes[0].inputs.findIndex((input) => input.name === 'reward_3'))")
    assert "scale_3" not in page.evaluate(VISIBLE)


def write_run(base: Path, run_id: str, events: list[Any]) -> None:
    folder = base / "output" / "reward_lab" / "runs" / run_id
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"name": run_id, "steps": 20, "expert": "low", "reward": {"kind": "hpsv2.1"}}), encoding="utf-8")
    (folder / "metrics.jsonl").write_text("".join(to_line(event) + "\n" for event in events), encoding="utf-8")
    (folder / "log.txt").write_text("step 9\nstep 10\nRuntimeError: out of memory\n", encoding="utf-8")


def test_the_sidebar_shows_runs_and_the_log_of_a_crash(server, page) -> None:
    step = Step(time=1.0, step=1, steps=20, reward=0.25, loss=0.75, grad_norm=1.0, sigma=0.02, seconds=1.0, expert="low")
    steps = [dataclasses.replace(step, step=i, reward=0.25 + i / 1000, held_out=0.25 if i % 5 == 0 else None) for i in range(1, 11)]
    failed = Failed(time=3.0, step=10, error="RuntimeError: out of memory", log_tail=["step 10", "RuntimeError: out of memory"])
    write_run(server.base, "crashed_run", [Started(time=0.0, steps=20, experts=["low"], reward="hpsv2.1", data_changed="2 gone (a, b)"), *steps, failed])
    page.evaluate("() => window.app.graph.clear()")
    page.evaluate("() => { const s = window.app.extensionManager.sidebarTab; if (s.activeSidebarTabId !== 'reward-lab') s.toggleSidebarTab('reward-lab'); }")
    page.wait_for_selector("[data-reward-lab=panel]")
    page.get_by_label("Refresh").click()
    card = page.locator("[data-run=crashed_run]")
    card.wait_for()
    assert card.locator(".rl-badge").inner_text() == "failed"
    if "rl-open" not in card.get_attribute("class"):
        card.locator(".rl-run-head").click()
    card.locator(".rl-log").wait_for()
    assert "out of memory" in card.locator(".rl-failure-head").inner_text()
    assert "step 10" in card.locator(".rl-log").inner_text()
    assert "2 gone (a, b)" in card.locator(".rl-figures").inner_text()
    assert "step 10 of 20" in card.locator(".rl-run-line").inner_text()
    is_drawn = "(c) => c.getContext('2d').getImageData(0, 0, c.width, c.height).data.some((v) => v > 0)"
    page.wait_for_function(f"() => {{ const c = document.querySelector('[data-run=crashed_run] canvas'); return c?.width && ({is_drawn})(c); }}")


@pytest.mark.workflow
def test_run_button_runs_the_first_example(repo, pocket_server, page) -> None:
    frontend.load_graph(page, json.loads((repo / "example_workflows" / f"{EXAMPLES[0]}.json").read_text(encoding="utf-8")))
    frontend.fit_view(page)
    frontend.press_run(page)
    page.wait_for_selector(".rl-status >> nth=1", timeout=300_000)
    assert all(tone == "good" for tone in page.locator(".rl-status").evaluate_all("(all) => all.map((one) => one.dataset.tone)"))
    shows_score = "() => window.app.nodeOutputs && window.app.graph.nodes.find((n) => n.type === 'RewardLabScoreVideo')?.imgs?.length > 0"
    page.wait_for_function(shows_score, timeout=300_000)
    texts = page.locator(".rl-text").all_inner_texts()
    assert any("switch" in text.lower() for text in texts), texts
    assert any("0." in text for text in texts), texts


@pytest.mark.workflow
def test_curve_report_conversion_and_heat_map_in_a_real_run(repo, pocket_server, page) -> None:
    frontend.load_graph(page, json.loads((repo / "example_workflows" / f"{EXAMPLES[0]}.json").read_text(encoding="utf-8")))
    file = rows_of(page)[0]["file"]
    page.evaluate(
        """(file) => {
            const node = window.LiteGraph.createNode('RewardLabInspectLoRA');
            window.app.graph.add(node);
            const loader = window.app.graph.nodes.find((n) => n.type === 'RewardLabLoadLoRAs');
            node.pos = [loader.pos[0], loader.pos[1] + 500];
            node.widgets.find((w) => w.name === 'lora').value = file;
            loader.getInputNode(0).connect(loader.getInputLink(0).origin_slot, node, 'model_high');
        }""",
        file,
    )
    frontend.fit_view(page)
    unfold(page, 0)
    page.get_by_label("Preset of the strength over sigma").select_option("ramp")
    frontend.press_run(page)
    page.wait_for_selector(".rl-fact >> nth=1", timeout=300_000)
    facts = page.locator(".rl-fact").all_inner_texts()
    assert any("unmerged on high noise" in fact for fact in facts), facts
    heat_map = "() => { const i = window.app.graph.nodes.find((n) => n.type === 'RewardLabInspectLoRA')?.imgs?.[0]; return i?.naturalWidth > 100; }"
    page.wait_for_function(heat_map, timeout=300_000)
    page.get_by_role("button", name="Convert layout…").click()
    page.get_by_label("Search files").fill("peft")
    page.keyboard.press("Enter")
    page.wait_for_function(
        "(file) => JSON.parse(window.app.graph.nodes.find((n) => n.type === 'RewardLabLoadLoRAs').widgets[0].value)[0].file !== file", arg=file
    )
    assert (pocket_server.base / "models" / "loras" / rows_of(page)[0]["file"]).is_file()

"""Make `example_workflows/` with the real front-end: build each graph in the browser, lay it out, serialise it, take its thumbnail.

    python tests/browser/workflow_builder.py URL [--run] [--only TEXT] [--images docs/images]

URL is a running ComfyUI with this pack. `--run` presses Run on the pocket examples first, so that the pictures show results; with `--images` those
pictures are written there as `workflow_N.jpg` too.
"""

from __future__ import annotations

import argparse
import json
import sys
import uuid
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import frontend  # noqa: E402
from workflow_specs import Workflow, all_workflows  # noqa: E402

REPO = Path(__file__).resolve().parents[2]
FOLDER = REPO / "example_workflows"
RUN_LIMIT_S = 900.0
# Smooth zooming and the last redraw after a result.
SETTLE_MS = 1500
# The layer of the front-end that holds its menus, sidebar and zoom buttons; the graph and the elements on nodes are outside of it.
WITHOUT_BARS = ".graph-canvas-container > .z-999 { opacity: 0 !important; }"

BUILD = """async (spec) => {
    const { app, LiteGraph } = window;
    await app.loadGraphData({ last_node_id: 0, last_link_id: 0, nodes: [], links: [], groups: [], config: {}, extra: {}, version: 0.4 });
    const made = {};
    for (const [key, wanted] of Object.entries(spec.nodes)) {
        const node = LiteGraph.createNode(wanted.kind);
        if (!node) throw new Error(`the server has no node ${wanted.kind}`);
        if (wanted.title) node.title = wanted.title;
        app.graph.add(node);
        for (const [name, value] of Object.entries(wanted.values)) {
            // The widget that redraws a seed bears different names; it is the one linked to the seed.
            const control = name === 'control_after_generate' ? node.widgets.find((w) => w.name === 'seed')?.linkedWidgets?.[0] : null;
            const widget = control ?? (name ? node.widgets.find((w) => w.name === name) : node.widgets[0]);
            if (!widget) throw new Error(`${wanted.kind} has no widget ${name}`);
            widget.value = value;
        }
        node.onConfigure?.({});
        made[key] = node;
    }
    for (const [key, wanted] of Object.entries(spec.nodes)) {
        for (const [input, [from, output]] of Object.entries(wanted.links)) {
            const source = made[from];
            const out = source.outputs.findIndex((slot) => slot.name === output || slot.label === output || slot.type === output);
            const slot = made[key].inputs.findIndex((candidate) => candidate.name === input);
            if (out < 0 || slot < 0) throw new Error(`no link ${from}.${output} -> ${key}.${input}`);
            source.connect(out, made[key], slot);
        }
    }
    window.rewardLabMade = made;
    return Object.fromEntries(Object.entries(made).map(([key, node]) => [key, node.id]));
}"""

LAYOUT = """(spec) => {
    const { app, LiteGraph, rewardLabMade: made } = window;
    const GAP = 40, TITLE = 30, PAD = 20, HEAD = 40;
    let x = 0;
    app.graph.groups.slice().forEach((group) => app.graph.remove(group));
    for (const column of spec.columns) {
        const width = Math.max(...column.flatMap(([, keys]) => keys).map((key) => spec.nodes[key].width_px)) + 2 * PAD;
        let top = 0;
        for (const [title, keys] of column) {
            let y = top + (title ? HEAD + TITLE : TITLE);
            for (const key of keys) {
                const node = made[key], wanted = spec.nodes[key];
                node.pos = [x + (title ? PAD : 0), y];
                node.setSize([width - (title ? 2 * PAD : 0), Math.max(node.computeSize()[1], wanted.height_px)]);
                y += node.size[1] + GAP + TITLE;
            }
            const bottom = y - GAP - TITLE + (title ? PAD : 0);
            if (title) {
                const group = new LiteGraph.LGraphGroup(title);
                group.pos = [x, top];
                group.size = [width, bottom - top];
                group.color = '#5f83b5';
                app.graph.add(group);
            }
            top = bottom + GAP;
        }
        x += width + GAP;
    }
    app.graph.setDirtyCanvas(true, true);
}"""

SERIALISE = "() => window.app.graph.serialize()"


def build(page: Any, workflow: Workflow) -> dict[str, Any]:
    """Build one workflow in the page and return it as the front-end serialises it."""
    spec = asdict(workflow)
    page.evaluate(BUILD, spec)
    page.wait_for_timeout(700)
    page.evaluate(LAYOUT, spec)
    page.wait_for_timeout(700)
    page.evaluate(LAYOUT, spec)
    # Once through loading, as a user does: what is written is what comes back.
    frontend.load_graph(page, page.evaluate(SERIALISE))
    page.wait_for_timeout(700)
    return stable(page.evaluate(SERIALISE), workflow.name)


def stable(graph: dict[str, Any], name: str) -> dict[str, Any]:
    """Remove what differs from one building to the next: random ids, the view, versions of packs."""
    graph["id"] = str(uuid.uuid5(uuid.NAMESPACE_URL, f"reward-lab/{name}"))
    graph["revision"] = 0
    graph["extra"] = {}
    for node in graph["nodes"]:
        node["pos"] = [round(value) for value in node["pos"]]
        node["size"] = [round(value) for value in node["size"]]
        node.get("properties", {}).pop("reward_lab_run", None)
    for group in graph.get("groups", []):
        group["bounding"] = [round(value) for value in group["bounding"]]
    return graph


def run(page: Any) -> None:
    """Press Run and wait until every node shows its result: pictures, the grid, the curve of a run that has ended."""
    prompt_id = frontend.press_run(page)
    frontend.wait_for_execution(page, prompt_id, RUN_LIMIT_S)
    frontend.wait_for_pictures(page)
    if any(kind == "RewardLabTrainLoRA" for kind in page.evaluate("() => window.app.graph.nodes.map((node) => node.type)")):
        page.wait_for_selector(".rl-node-run[data-state=finished]", timeout=RUN_LIMIT_S * 1000)
    page.wait_for_timeout(SETTLE_MS)


def picture(page: Any, target: Path, quality: int, clip: dict[str, float]) -> None:
    """Write a part of the page as a JPEG, without the front-end's bars, which lie over the graph."""
    target.parent.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=str(target), type="jpeg", quality=quality, clip=clip, style=WITHOUT_BARS)


def graph_clip(page: Any) -> dict[str, float]:
    """Return the part of the window that the graph fills, with a margin."""
    return page.evaluate(
        """() => {
            const ds = window.app.canvas.ds, rect = window.app.canvas.canvas.getBoundingClientRect();
            const boxes = [...window.app.graph.nodes.map((n) => n.getBounding()), ...window.app.graph.groups.map((g) => [...g.pos, ...g.size])];
            const x0 = Math.min(...boxes.map((b) => b[0])), y0 = Math.min(...boxes.map((b) => b[1]));
            const x1 = Math.max(...boxes.map((b) => b[0] + b[2])), y1 = Math.max(...boxes.map((b) => b[1] + b[3]));
            const at = (x, y) => [(x + ds.offset[0]) * ds.scale + rect.left, (y + ds.offset[1]) * ds.scale + rect.top];
            const [left, top] = at(x0, y0), [right, bottom] = at(x1, y1);
            return { x: Math.max(0, left - 16), y: Math.max(0, top - 16), width: right - left + 32, height: bottom - top + 32 };
        }"""
    )


def main() -> None:
    """Build every example; see the module's text for the arguments."""
    parser = argparse.ArgumentParser(description="Make example_workflows/ with the real front-end.")
    parser.add_argument("url")
    parser.add_argument("--run", action="store_true", help="press Run on the pocket examples before their picture is taken")
    parser.add_argument("--only", default="", help="build only examples whose name contains this")
    parser.add_argument("--images", type=Path, help="also write the pocket pictures here, for README")
    parser.add_argument("--scale", type=float, default=1.0, help="device pixels per CSS pixel of the pictures")
    arguments = parser.parse_args()
    FOLDER.mkdir(exist_ok=True)
    with frontend.open_front_end(arguments.url, width_px=1920, height_px=1080, scale=arguments.scale) as page:
        for workflow in [candidate for candidate in all_workflows() if arguments.only in candidate.name]:
            is_pocket = "14B" not in workflow.name
            graph = build(page, workflow)
            (FOLDER / f"{workflow.name}.json").write_text(json.dumps(graph, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
            frontend.fit_view(page)
            if arguments.run and is_pocket:
                run(page)
                frontend.fit_view(page)
            clip = graph_clip(page)
            if arguments.images and is_pocket:
                picture(page, arguments.images / f"workflow_{workflow.name[0]}.jpg", 80, clip)
            picture(page, FOLDER / f"{workflow.name}.jpg", 70, clip)
            print(f"{workflow.name}: {len(graph['nodes'])} nodes, page errors: {page.reward_lab_errors or 'none'}", flush=True)


if __name__ == "__main__":
    main()

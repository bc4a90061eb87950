"""Takes the pictures of the help pages in the real front-end, after a real run on the pocket models.

    python tests/browser/doc_pictures.py URL [loras] [rewards] [plan] [--input FOLDER] [--output FOLDER]

URL is a running server with the pack and the pocket models (`python lab.py serve`). Writes web/docs/images/*.jpg. `--input` is the server's input folder:
base videos for Mix Rewards are made there. With `--output`, the server's output folder, where a dataset and a sweep are made, only the pictures of the
labelling page are taken.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import json
import random
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[2]
IMAGES = REPO / "web" / "docs" / "images"
RUN_LIMIT_S = 900.0
SCALE = 1.5  # of the pictures: sharp on screens with small pixels too
MARGIN_PX, BADGE_PX = 14, 24  # above the node stands the badge of its pack

# Which cell stands on which side is drawn at each asking, so what the page was told is kept.
KEEP_QUESTION = """() => {
    const original = window.fetch;
    window.fetch = async (...call) => {
        const answer = await original(...call);
        if (/\\/reward_lab\\/vote\\/[^/]*\\?/.test(String(call[0]))) window.shownQuestion = (await answer.clone().json()).question;
        return answer;
    };
}"""

ROWS = [
    {"on": True, "file": "Pocket-Wan2.2-Fun-A14B-high-noise-HPS2.1.safetensors", "high": 0.6, "low": 0, "curve": "1:0, 0.95:1, 0.875:0.5, 0:0.3"},
    {"on": True, "file": "Pocket-Wan2.2-Fun-A14B-low-noise-HPS2.1.safetensors", "high": 0, "low": 0.5},
    {"on": False, "file": "Pocket-Wan2.2-Fun-A14B-low-noise-MPS.safetensors", "high": 0, "low": 0.3},
]


def _frontend() -> Any:
    spec = importlib.util.spec_from_file_location("reward_lab_frontend", Path(__file__).with_name("frontend.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def build(page: Any) -> None:
    """Put the rows into the first example and the other nodes for LoRA files beside them; nothing else of it is kept but the models."""
    page.evaluate(
        """(rows) => {
            const graph = window.app.graph, rowsNode = graph.nodes.find((n) => n.type === 'RewardLabLoadLoRAs');
            const models = rowsNode.getInputNode(0);
            for (const node of [...graph.nodes]) if (node !== rowsNode && node !== models) graph.remove(node);
            for (const group of [...graph.groups]) graph.remove(group);
            rowsNode.widgets.find((w) => w.name === 'rows').value = rows;
            rowsNode.configure(rowsNode.serialize());
            rowsNode.pos = [0, 0];
            models.pos = [-500, 0];
            const inspect = window.LiteGraph.createNode('RewardLabInspectLoRA');
            graph.add(inspect);
            inspect.pos = [700, 0];
            inspect.setSize([620, 690]);
            inspect.widgets.find((w) => w.name === 'lora').value = JSON.parse(rows)[0].file;
            models.connect(0, inspect, 'model_high');
            const merge = window.LiteGraph.createNode('RewardLabMergeLoRA');
            graph.add(merge);
            merge.pos = [1400, 0];
            const settings = { base: 'pocket_wan2.2_t2v_high_noise_14B.safetensors', overwrite: true };
            const plain = JSON.parse(rows).filter((row) => row.high && row.on).map(({ curve, ...row }) => row);
            for (const [name, value] of Object.entries({ ...settings, rows: JSON.stringify(plain) })) merge.widgets.find((w) => w.name === name).value = value;
            merge.configure(merge.serialize());
            const show = window.LiteGraph.createNode('PreviewAny');
            graph.add(show);
            show.pos = [0, 700];
            rowsNode.connect(2, show, 0);
        }""",
        json.dumps(ROWS),
    )


def picture_of(page: Any, node_type: str, path: Path) -> None:
    """Save the part of the window in which a node is."""
    box = page.evaluate(
        """(type) => {
            const node = window.app.graph.nodes.find((n) => n.type === type), [x, y, w, h] = node.getBounding(), ds = window.app.canvas.ds;
            const at = window.app.canvas.canvas.getBoundingClientRect();
            return { x: at.x + (x + ds.offset[0]) * ds.scale, y: at.y + (y + ds.offset[1]) * ds.scale, width: w * ds.scale, height: h * ds.scale };
        }""",
        node_type,
    )
    top = MARGIN_PX + BADGE_PX
    clip = {"x": box["x"] - MARGIN_PX, "y": box["y"] - top, "width": box["width"] + 2 * MARGIN_PX, "height": box["height"] + top + MARGIN_PX}
    path.parent.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=str(path), type="jpeg", quality=82, clip=clip)


def show_node(page: Any, node_type: str, scale: float) -> None:
    """Move the canvas so that a node stands in the free part of the window."""
    page.evaluate(
        """([type, scale]) => {
            const node = window.app.graph.nodes.find((n) => n.type === type), ds = window.app.canvas.ds;
            ds.scale = scale;
            ds.offset[0] = 120 / scale - node.pos[0];
            ds.offset[1] = 150 / scale - node.pos[1];
            window.app.canvas.deselectAll();  // a selected node has a toolbox above it
            window.app.graph.setDirtyCanvas(true, true);
        }""",
        [node_type, scale],
    )
    page.wait_for_timeout(1500)


def _livelier_side(page: Any, label_scene: Any) -> str:
    """Return the key for the video of the larger strength, which moves more: a viewer who likes motion."""
    question = page.evaluate("() => window.shownQuestion")
    left, right = (label_scene.VALUES[int(question[side]["key"], 16) % len(label_scene.VALUES)] for side in ("left", "right"))
    return "ArrowLeft" if left > right else "ArrowRight"


def _register() -> None:
    """Make the repository importable as `reward_lab`."""
    spec = importlib.util.spec_from_file_location("reward_lab_alias", REPO / "labtools" / "alias.py")
    alias = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(alias)
    alias.register(REPO)


def base_videos(folder: Path, count: int = 16) -> None:
    """Pocket videos and their captions, for Mix Rewards to measure."""
    _register()
    import numpy as np
    from PIL import Image

    from reward_lab.pocket import world

    folder.mkdir(parents=True, exist_ok=True)
    rng, rows = random.Random(5), []
    for index in range(count):
        scene = world.sample_scene(rng, held_out=True)
        frames = [Image.fromarray((frame * 255).round().astype(np.uint8)) for frame in world.render(scene)]
        frames[0].save(folder / f"base_{index:02d}.webp", save_all=True, append_images=frames[1:], duration=125, lossless=True)
        rows.append((f"base_{index:02d}.webp", world.caption(scene)))
    with (folder / "prompts.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("file", "prompt"), *rows])


def label_pictures(url: str, output: Path) -> None:
    """Label and vote a little, and take pictures of both."""
    _register()
    from reward_lab.tests.browser import frontend, label_scene
    from reward_lab.tests.browser.test_label_page import open_page, wait_for_progress

    label_scene.fill(output)
    with frontend.open_front_end(url, width_px=1200, height_px=760, scale=SCALE) as page:
        open_page(page, label_scene.DATASET)
        page.keyboard.press("g")
        wait_for_progress(page, "1 of 4")
        page.keyboard.press("b")
        wait_for_progress(page, "2 of 4")
        page.wait_for_timeout(1200)
        page.screenshot(path=str(IMAGES / "label_page.jpg"), type="jpeg", quality=82)
        page.keyboard.press("Escape")
        page.evaluate(KEEP_QUESTION)
        open_page(page, label_scene.SWEEP)
        for number in range(1, 9):
            page.keyboard.press(_livelier_side(page, label_scene))
            wait_for_progress(page, f"{number} votes")
        page.get_by_role("button", name="Ranking").click()
        page.locator(".rl-ranking tbody tr").first.wait_for()
        page.wait_for_timeout(1200)
        page.screenshot(path=str(IMAGES / "vote_page.jpg"), type="jpeg", quality=82)


def take_loras(frontend: Any, page: Any, _input: Path | None) -> None:
    """Rows and a heat map, after a real run."""
    frontend.load_graph(page, json.loads((REPO / "example_workflows" / "1 load and sample.json").read_text(encoding="utf-8")))
    build(page)
    show_node(page, "RewardLabLoadLoRAs", 1.0)
    page.get_by_label("Details").first.click()
    frontend.press_run(page)
    page.wait_for_selector(".rl-fact", timeout=RUN_LIMIT_S * 1000)
    heat_map = "() => window.app.graph.nodes.find((n) => n.type === 'RewardLabInspectLoRA').imgs?.[0]?.naturalWidth > 0"
    page.wait_for_function(heat_map, timeout=RUN_LIMIT_S * 1000)
    show_node(page, "RewardLabLoadLoRAs", 1.1)
    picture_of(page, "RewardLabLoadLoRAs", IMAGES / "lora_rows.jpg")
    show_node(page, "RewardLabInspectLoRA", 1.0)
    picture_of(page, "RewardLabInspectLoRA", IMAGES / "inspect_lora.jpg")
    merged = "() => [...document.querySelectorAll('.rl-text')].some((text) => /weights changed|was there/.test(text.textContent))"
    page.wait_for_function(merged, timeout=RUN_LIMIT_S * 1000)
    show_node(page, "RewardLabMergeLoRA", 1.0)
    picture_of(page, "RewardLabMergeLoRA", IMAGES / "merge_lora.jpg")


MIX = """() => {
    const { app, LiteGraph } = window, first = (type) => app.graph.nodes.find((n) => n.type === type);
    const make = (type, pos, size, values) => {
        const node = LiteGraph.createNode(type);
        app.graph.add(node);
        node.pos = pos;
        for (const [name, value] of Object.entries(values)) node.widgets.find((w) => w.name === name).value = value;
        node.configure(node.serialize());
        node.setSize(size);
        return node;
    };
    const hps = first('RewardLabRewardModel'), score = first('RewardLabScoreVideo');
    const motion = make('RewardLabRewardModel', [2200, 0], [420, 260], { kind: 'dynamic_degree', file: '(none)' });
    const measured = { weight_2: 0.2, measure_baseline: true, baseline_folder: 'base_videos', baseline_prompts: 'base_videos/prompts.csv' };
    const mix = make('RewardLabMixRewards', [2700, 0], [460, 100], measured);
    hps.connect(0, mix, 'reward_1');
    motion.connect(0, mix, 'reward_2');
    mix.connect(0, score, 'reward_model');
    const prompt = first('PrimitiveStringMultiline').widgets[0].value;
    score.disconnectInput(score.inputs.findIndex((input) => input.name === 'prompt'));
    score.widgets.find((w) => w.name === 'prompt').value = prompt;
    score.setSize([520, 720]);
    const pavrm = make('RewardLabRewardModel', [3300, 0], [420, 300], { kind: 'pavrm', file: 'pocket_PAVRM.safetensors' });
    const latent = make('RewardLabScoreLatent', [3800, 0], [520, 520], { sigmas: '0.1, 0.3, 0.5, 0.7, 0.9', seed: 0 });
    pavrm.connect(0, latent, 'reward_model');
    first('CLIPTextEncode').connect(0, latent, 'positive');
    first('RewardLabSampleWan22').connect(0, latent, 'latent');
}"""


def take_rewards(frontend: Any, page: Any, input_folder: Path | None) -> None:
    """Load Reward Model as it stands in the first example, before anything runs; and a measured mix, Score Video and Score Latent after a real run.

    Raises:
        ValueError: no input folder is given.
    """
    if input_folder is None:
        raise ValueError("The pictures of rewards need --input, the server's input folder, for base videos.")
    base_videos(input_folder / "base_videos")
    frontend.load_graph(page, json.loads((REPO / "example_workflows" / "1 load and sample.json").read_text(encoding="utf-8")))
    show_node(page, "RewardLabRewardModel", 1.2)
    page.locator(".rl-text").filter(has_text="HPS_v2.1_compressed.pt").wait_for()
    picture_of(page, "RewardLabRewardModel", IMAGES / "reward_model.jpg")
    page.evaluate(MIX)
    # Nodes outside of the window are not drawn and do not load their pictures.
    frontend.fit_view(page)
    frontend.wait_for_execution(page, frontend.press_run(page), RUN_LIMIT_S)
    frontend.wait_for_pictures(page)
    for node_type, name in (("RewardLabMixRewards", "mix_rewards"), ("RewardLabScoreVideo", "score_video"), ("RewardLabScoreLatent", "score_latent")):
        show_node(page, node_type, 1.0)
        picture_of(page, node_type, IMAGES / f"{name}.jpg")


PLANNED = {"preset": "videox-fun", "expert": "high", "rank": 128, "alpha": 64, "batch": 1, "width": 832, "height": 480, "frames": 81, "sampling_steps": 40,
           "guidance": 6, "advanced": "{}", "shape": "wan-14b", "card": "rtx 4090", "ram_gb": 96}  # fmt: skip


def take_plan(frontend: Any, page: Any, _input: Path | None) -> None:
    """Memory Plan of a 14B run beside the third example's nodes, after a real run of it."""
    frontend.load_graph(page, json.loads((REPO / "example_workflows" / "3 train a reward lora.json").read_text(encoding="utf-8")))
    page.evaluate(
        """(settings) => {
            const graph = window.app.graph, train = graph.nodes.find((n) => n.type === 'RewardLabTrainLoRA');
            const sources = train.inputs.slice(0, 3).map((_, index) => [train.getInputNode(index), train.getInputLink(index).origin_slot]);
            for (const node of [...graph.nodes]) if (!sources.some(([source]) => source === node)) graph.remove(node);
            for (const group of [...graph.groups]) graph.remove(group);
            const plan = window.LiteGraph.createNode('RewardLabMemoryPlan');
            graph.add(plan);
            plan.pos = [4000, 0];
            plan.setSize([620, 1030]);
            sources.forEach(([source, slot], index) => source.connect(slot, plan, index));
            for (const [name, value] of Object.entries(settings)) plan.widgets.find((w) => w.name === name).value = value;
        }""",
        PLANNED,
    )
    frontend.press_run(page)
    drawn = "() => window.app.graph.nodes.find((n) => n.type === 'RewardLabMemoryPlan').imgs?.[0]?.naturalWidth > 0"
    page.wait_for_function(drawn, timeout=RUN_LIMIT_S * 1000)
    show_node(page, "RewardLabMemoryPlan", 0.8)
    picture_of(page, "RewardLabMemoryPlan", IMAGES / "memory_plan.jpg")


TAKE = {"loras": take_loras, "rewards": take_rewards, "plan": take_plan}


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description="Takes the pictures of the help pages.")
    parser.add_argument("url")
    parser.add_argument("names", nargs="*", help=f"of {', '.join(TAKE)}; by default all of these")
    parser.add_argument("--input", type=Path, help="the server's input folder, for the pictures of rewards")
    parser.add_argument("--output", type=Path, help="the server's output folder, for the labelling page")
    arguments = parser.parse_args()
    if arguments.output:
        label_pictures(arguments.url, arguments.output)
        return
    frontend = _frontend()
    with frontend.open_front_end(arguments.url, width_px=1500, height_px=1000, scale=SCALE) as page:
        for name in arguments.names or TAKE:
            TAKE[name](frontend, page, arguments.input)


if __name__ == "__main__":
    main()

"""Axes, plan, cells, grid and report of a sweep, without the host."""

from __future__ import annotations

import csv
import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from reward_lab.testlab import axes as axes_module
from reward_lab.testlab import cells, report, sweep, video_grid
from reward_lab.testlab.axes import Axis, parse_axes, parse_values, with_value

ROWS = json.dumps([{"on": True, "file": "a.safetensors", "high": 0.5, "low": 0.0}, {"on": True, "file": "b.safetensors", "high": 0.0, "low": 0.5}])
WORKFLOW = {
    "1": {"class_type": "RewardLabWanModels", "inputs": {"vae": "x"}, "_meta": {"title": "Models"}},
    "5": {"class_type": "RewardLabLoadLoRAs", "inputs": {"model_high": ["1", 0], "model_low": ["1", 1], "rows": ROWS}, "_meta": {"title": "Load Reward LoRAs"}},
    "6": {
        "class_type": "RewardLabSampleWan22",
        "inputs": {"model_high": ["5", 0], "seed": 1, "shift": 5.0, "scheduler": "simple", "flag": True},
        "_meta": {"title": "Sample Wan2.2 (two experts)"},
    },
    "7": {"class_type": "CLIPTextEncode", "inputs": {"text": "a cat", "clip": ["1", 2]}, "_meta": {"title": "Prompt"}},
    "8": {"class_type": "RewardLabTestLabCell", "inputs": {"images": ["6", 0], "prompt": ["7", 0], "sweep": "s", "applied": "", "frame_rate": 8.0}},
    "9": {"class_type": "RewardLabTestLabGrid", "inputs": {"sweep": "s", "axes": ""}},
}


def make(text: str, workflow: dict = WORKFLOW) -> sweep.Sweep:
    return sweep.plan("s", parse_axes(text, workflow), workflow)


def test_values_are_json_or_text() -> None:
    assert parse_values('0, 0.5, 1, true, plain text, "a, b", [1, 2]') == (0, 0.5, 1, True, "plain text", "a, b", [1, 2])


@pytest.mark.parametrize("target", ["5.rows[0].high", "Load Reward LoRAs.rows[0].high", "RewardLabLoadLoRAs.rows[0].high"])
def test_node_by_id_title_or_class(target: str) -> None:
    axis = parse_axes(f"# comment\n\n{target} = 0, 0.5, 1\n", WORKFLOW)[0]
    assert (axis.node_id, axis.widget, axis.path, axis.values, axis.short_label) == ("5", "rows", (0, "high"), (0, 0.5, 1), "rows[0].high")


def test_title_with_dots_and_value_put_in() -> None:
    axis = parse_axes("Sample Wan2.2 (two experts).seed = 1, 2", WORKFLOW)[0]
    assert with_value(WORKFLOW, axis, 2)["6"]["inputs"]["seed"] == 2
    high = parse_axes("5.rows[1].low = 0.25", WORKFLOW)[0]
    changed = json.loads(with_value(WORKFLOW, high, 0.25)["5"]["inputs"]["rows"])
    assert [row["low"] for row in changed] == [0.0, 0.25] and WORKFLOW["5"]["inputs"]["rows"] == ROWS


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no axes"),
        ("5.rows[0].high 0, 1", "no '='"),
        ("5.rows[0].high = ", "no values"),
        ("5.rows[0].high = 0.5, 0.5", "twice"),
        ("5.rows[2].high = 1", "there are 2 entries"),
        ("5.rows[0].hihg = 1", "there are on, file, high, low"),
        ("5.rows[0].high = much", "wrong kind"),
        ("5.rows[0].high = nan", "finite"),
        ("5.nothing = 1", "it has rows"),
        ("Nobody.seed = 1", "no node of this workflow"),
        ("6.model_high = 1", "connected to another node"),
        ("6.seed = 1\n6.seed = 2", "Two axes"),
        ("6.flag = 1", "wrong kind"),
        ('6.scheduler = "open', "not closed"),
    ],
)
def test_bad_axes_say_what_is_wrong(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(text)


def test_cells_in_order_with_the_first_axis_fastest() -> None:
    made = make("5.rows[0].high = 0, 0.5, 1\n6.seed = 1, 2")
    assert (made.columns, made.rows, len(made.cells)) == (3, 2, 6)
    assert [cell.values for cell in made.cells] == [(0, 1), (0.5, 1), (1, 1), (0, 2), (0.5, 2), (1, 2)]
    assert len({cell.key for cell in made.cells}) == 6
    assert set(made.cells[0].prompt) == {"1", "5", "6", "7", "8"}, "the grid itself is in no cell's prompt"
    for cell in made.cells:
        applied = json.loads(cell.prompt["8"]["inputs"]["applied"])
        assert applied["key"] == cell.key
        assert [entry["value"] for entry in sweep.applied_values(cell.prompt, applied["axes"])] == list(cell.values)


def test_key_follows_what_makes_the_cell() -> None:
    first = make("6.seed = 1, 2")
    longer = make("6.seed = 1, 2, 3")
    assert [cell.key for cell in longer.cells[:2]] == [cell.key for cell in first.cells]
    renumbered = json.loads(json.dumps(WORKFLOW).replace('"6"', '"66"'))
    renumbered["66"]["_meta"] = {"title": "other title"}
    assert [cell.key for cell in make("66.seed = 1, 2", renumbered).cells] == [cell.key for cell in first.cells]
    other = json.loads(json.dumps(WORKFLOW))
    other["7"]["inputs"]["text"] = "a dog"
    assert not {cell.key for cell in make("6.seed = 1, 2", other).cells} & {cell.key for cell in first.cells}
    axes = parse_axes("6.seed = 1, 2", WORKFLOW)
    stamped = sweep.plan("s", axes, WORKFLOW, stamp=lambda value: "new" if value == "x" else "")
    assert not {cell.key for cell in stamped.cells} & {cell.key for cell in first.cells}


def test_sweeps_that_cannot_work() -> None:
    with pytest.raises(ValueError, match="does not change what reaches"):
        make("9.axes = 1")
    with pytest.raises(ValueError, match="No TestLab Cell has the sweep name"):
        sweep.plan("t", parse_axes("6.seed = 1", WORKFLOW), WORKFLOW)
    with pytest.raises(ValueError, match="at most 2500"):
        make(f"6.seed = {', '.join(map(str, range(100)))}\n6.shift = {', '.join(str(n + 0.5) for n in range(100))}")
    for name in ("", "../x", "a/b", ".hidden", "x" * 101, "a\0b"):
        with pytest.raises(ValueError, match="cannot name a sweep"):
            sweep.check_name(name)
    with pytest.raises(ValueError, match="no cell key"):
        cells.cell_folder(Path("x"), "../../etc")


def frames(seed: int, count: int = 9, size: int = 64) -> np.ndarray:
    """A grey square that moves over a coloured background."""
    made = np.full((count, size, size, 3), (40 + 30 * seed % 200, 90, 160), np.uint8)
    for number in range(count):
        made[number, 20:40, 4 + 4 * number : 20 + 4 * number] = 230
    return made


def record_all(folder: Path, made: sweep.Sweep, skip: tuple[int, ...] = (), count: int = 9) -> dict[str, cells.RecordedCell]:
    for cell in made.cells:
        if cell.index not in skip:
            applied = sweep.applied_values(cell.prompt, json.loads(cell.prompt["8"]["inputs"]["applied"])["axes"])
            scores = {"reward_model": "hpsv2.1", "reward": 0.2 + 0.01 * cell.index, "per_frame": [0.2, 0.25, 0.21]}
            cells.record(folder, cell.key, frames(cell.index, count), applied=applied, prompt="a cat", frame_rate=8.0, scores=scores)
    found = {cell.key: cells.load(folder, cell.key) for cell in made.cells}
    return {key: cell for key, cell in found.items() if cell}


def test_recorded_video_is_the_frames(tmp_path: Path) -> None:
    cell = cells.record(tmp_path, "a" * 40, frames(1), applied=[], prompt="", frame_rate=8.0, scores={})
    read = list(cells.read_frames(cells.cell_folder(tmp_path, "a" * 40) / cells.VIDEO_FILE))
    assert (len(read), cell.scale, cell.width_px, cell.height_px) == (9, 4, 256, 256)
    error = np.abs(np.stack(read)[:, 2::4, 2::4].astype(int) - frames(1)).mean()
    assert error < 3.0
    with pytest.raises(ValueError, match="at least one RGB frame"):
        cells.record(tmp_path, "b" * 40, frames(1)[:0], applied=[], prompt="", frame_rate=8.0, scores={})
    (cells.cell_folder(tmp_path, "a" * 40) / cells.CELL_FILE).write_text("{")
    assert cells.load(tmp_path, "a" * 40) is None


def test_grid_shows_every_cell_at_its_place(tmp_path: Path) -> None:
    made = make("5.rows[0].high = 0, 0.5, 1\n6.seed = 1, 2")
    recorded = record_all(tmp_path, made, skip=(4,))
    grid = video_grid.render(made, tmp_path, recorded, {made.cells[4].key: "CUDA out of memory"})
    layout = video_grid.make_layout(made, list(recorded.values()), recorded)
    pictures = list(cells.read_frames(grid.video))
    assert len(pictures) == grid.frames == 9 and (pictures[0].shape[1], pictures[0].shape[0]) == layout.size
    for cell in made.cells:
        x, y = layout.corner(cell.index)
        seen = pictures[-1][y + 8, x + layout.tile_width // 2].astype(int)
        expected = np.array(frames(cell.index)[0, 0, 0] if cell.index != 4 else (28, 31, 38), int)
        assert np.abs(seen - expected).max() < 12, (cell.index, seen, expected)
    assert video_grid.column_label(made, 1, recorded) == "rows[0].high = 0.5"
    assert video_grid.row_labels(made, 1, recorded) == ["seed = 2"]
    assert cells.recorded_keys(tmp_path) == set(recorded) and cells.recorded_keys(tmp_path / "none") == set()
    assert not list(tmp_path.glob(".render-*")) and grid.preview.stat().st_size > 0


def test_best_cell_is_one_of_its_prompt(tmp_path: Path) -> None:
    made = {}
    for key, prompt, reward in (
        ("a" * 8, "cat", 0.3),
        ("b" * 8, "cat", 0.2),
        ("c" * 8, "dog", 0.1),
        ("d" * 8, "dog", -0.1),
        ("e" * 8, "fox", 0.9),
        ("f" * 8, "", None),
    ):
        scores = {} if reward is None else {"reward_model": "hpsv2.1", "reward": reward}
        made[key] = cells.record(tmp_path, key, frames(0, 1), applied=[], prompt=prompt, frame_rate=8.0, scores=scores)
    assert cells.best_keys(made.values()) == {"a" * 8, "c" * 8}


def test_cells_of_different_settings_have_no_best_in_common(tmp_path: Path) -> None:
    """A sweep over resize or the weights of a mix changes the scale of the rewards, not the videos."""
    mix = {"reward_model": "mix", "options": {}}
    made = {}
    for key, reward, scored_by in (
        ("a" * 8, 0.3, {"reward_model": "hpsv2.1", "options": {"resize": "crop", "antialias": True}}),
        ("b" * 8, 0.2, {"reward_model": "hpsv2.1", "options": {"antialias": True, "resize": "crop"}}),
        ("c" * 8, 0.9, {"reward_model": "hpsv2.1", "options": {"resize": "squash", "antialias": True}}),
        ("d" * 8, 5.0, {**mix, "rows": [{"name": "mps", "weight": 1.0}]}),
        ("e" * 8, 9.0, {**mix, "rows": [{"name": "mps", "weight": 2.0}]}),
    ):
        scores = {**scored_by, "reward": reward}
        made[key] = cells.record(tmp_path, key, frames(0, 1), applied=[], prompt="cat", frame_rate=8.0, scores=scores)
    assert cells.best_keys(made.values()) == {"a" * 8}


def test_labels_come_from_applied_values(tmp_path: Path) -> None:
    made = make("6.seed = 1, 2")
    recorded = record_all(tmp_path, made)
    lying = recorded[made.cells[1].key]
    lying.applied[0]["value"] = 77
    assert video_grid.column_label(made, 1, recorded) == "seed = 77"


def test_memory_does_not_grow_with_cells(tmp_path: Path) -> None:
    peaks = []
    for count in (4, 16):
        made = make(f"6.seed = {', '.join(map(str, range(count)))}\n5.rows[0].high = 0.5")
        folder = tmp_path / str(count)
        recorded = record_all(folder, made, count=33)
        tracemalloc.start()
        grid = video_grid.render(made, folder, recorded, {})
        peaks.append(tracemalloc.get_traced_memory()[1] / (grid.size_px[0] * grid.size_px[1] * 3))
        tracemalloc.stop()
    assert peaks[1] < peaks[0] * 1.3, f"peaks in units of one grid picture: {peaks}"


def test_report_and_table(tmp_path: Path) -> None:
    workflow = json.loads(json.dumps(WORKFLOW))
    workflow["6"]["inputs"]["scheduler"] = "x"
    made = make('6.scheduler = "<script>alert(1)</script>", =SUM(A1)', workflow)
    recorded = record_all(tmp_path, made, skip=(1,))
    page = report.write_report(made, tmp_path, recorded, {made.cells[1].key: "it <failed>"}).read_text()
    assert "<script>alert" not in page and "it &lt;failed&gt;" in page and page.count("<video") == 1 and "data:video/mp4;base64," in page
    lines = list(csv.reader(report.write_table(made, tmp_path, recorded, {}).open()))
    assert lines[0][:2] == ["cell", "6.scheduler"] and lines[1][3] == "0.2" and lines[2][1] == "'=SUM(A1)"


def test_manifest_round_trip_and_damage(tmp_path: Path) -> None:
    manifest = sweep.read_manifest(tmp_path)
    manifest["queued"]["abc"] = {"attempts": 1}
    sweep.write_manifest(tmp_path, manifest)
    assert sweep.read_manifest(tmp_path) == manifest and [path.name for path in tmp_path.iterdir()] == [sweep.MANIFEST]
    (tmp_path / sweep.MANIFEST).write_text("{")
    with pytest.raises(ValueError, match="Delete it"):
        sweep.read_manifest(tmp_path)


def test_links_are_told_from_lists() -> None:
    assert axes_module.is_link(["1", 0]) and not axes_module.is_link([1, 0]) and not axes_module.is_link(["1", "x"])


def test_an_axis_may_have_a_word_of_its_own() -> None:
    named, plain = parse_axes("strength of HPS: Load Reward LoRAs.rows[0].high = 0, 1\n6.seed = 1, 2", WORKFLOW)
    assert (named.name, named.label, named.heading, named.values) == ("strength of HPS", "Load Reward LoRAs.rows[0].high", "strength of HPS", (0, 1))
    assert plain.heading == "seed"
    assert Axis.from_dict(json.loads(json.dumps(named.to_dict()))) == named
    titled = {**WORKFLOW, "5": {**WORKFLOW["5"], "_meta": {"title": "LoRAs: mine"}}}
    (axis,) = parse_axes("LoRAs: mine.rows[0].high = 0, 1", titled)
    assert axis.name == "" and axis.node_id == "5"

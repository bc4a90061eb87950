"""The plan of a sweep: its cells in order, the prompt of each, and the manifest on disk.

A cell is known by a hash of the prompt that makes it, so a sweep that was stopped goes on, a longer one makes only the cells it lacks,
and a cell of a changed workflow is not taken for one of the old. Whether a cell exists is seen from its folder, not from the manifest:
see cells.py.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .axes import Axis, Workflow, is_link, read_widget, with_value

MAX_CELLS = 2500
MANIFEST = "manifest.json"
MANIFEST_VERSION = 1
CELL_CLASS = "RewardLabTestLabCell"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9 ._-]{0,99}")


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One cell: its place on each axis, its prompt and the hash of that prompt."""

    index: int
    place: tuple[int, ...]
    values: tuple[Any, ...]
    key: str
    prompt: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """A sweep that fits a workflow. Cells are ordered with the first axis (columns) fastest."""

    name: str
    axes: tuple[Axis, ...]
    cell_node: str
    cells: tuple[Cell, ...]

    @property
    def columns(self) -> int:
        """Cells in a row of the grid."""
        return len(self.axes[0].values)

    @property
    def rows(self) -> int:
        """Rows of the grid: every combination of the axes after the first."""
        return len(self.cells) // self.columns


def check_name(name: str) -> str:
    """Return a sweep's name when it can be a folder.

    Raises:
        ValueError: Empty, too long, or with characters that could leave the folder.
    """
    name = name.strip()
    if not _NAME.fullmatch(name) or name.endswith("."):
        raise ValueError(f"{name!r} cannot name a sweep: use up to 100 letters, digits, blanks, '.', '_' or '-', starting with a letter or digit.")
    return name


def no_stamp(_value: Any) -> str:
    """Return no stamp: values alone make the key of a cell."""
    return ""


def plan(name: str, axes: Sequence[Axis], workflow: Workflow, stamp: Callable[[Any], str] = no_stamp) -> Sweep:
    """Make the cells of a sweep.

    Args:
        name: The sweep's name; the same as on its TestLab Cell.
        axes: From `axes.parse_axes`.
        workflow: The API prompt of the whole workflow.
        stamp: Gives, for a widget's value that names a file, a text that changes when the file does; empty for any other value.

    Returns:
        The sweep.

    Raises:
        ValueError: No TestLab Cell of that name, several, too many cells, or an axis that the cell does not depend on.
    """
    name = check_name(name)
    cell_node = find_cell_node(name, workflow)
    count = math.prod(len(axis.values) for axis in axes)
    if count > MAX_CELLS:
        raise ValueError(f"The sweep has {count} cells; at most {MAX_CELLS} are possible. Shorten an axis.")
    workflow = plain(workflow)
    needed = ancestors(workflow, cell_node)
    for axis in axes:
        if axis.node_id not in needed or axis.node_id == cell_node:
            raise ValueError(f"{axis.label} does not change what reaches TestLab Cell (node {cell_node}); sweep a widget of a node before it.")
    cells = []
    for index, place in enumerate(itertools.product(*(range(len(axis.values)) for axis in reversed(axes)))):
        place = place[::-1]
        values = tuple(axis.values[position] for axis, position in zip(axes, place, strict=True))
        prompt: dict[str, Any] = {node_id: dict(workflow[node_id]) for node_id in needed}
        for axis, value in zip(axes, values, strict=True):
            prompt = with_value(prompt, axis, value)
        key = cell_key(prompt, cell_node, stamp)
        cells.append(Cell(index=index, place=place, values=values, key=key, prompt=_with_applied(prompt, cell_node, name, key, axes)))
    return Sweep(name=name, axes=tuple(axes), cell_node=cell_node, cells=tuple(cells))


def plain(workflow: Workflow) -> dict[str, dict[str, Any]]:
    """Return a workflow with what the user made of it only: the host notes `is_changed` in the prompts it runs, and would believe its old note."""
    return {node_id: {name: node[name] for name in ("class_type", "inputs", "_meta") if name in node} for node_id, node in workflow.items()}


def find_cell_node(name: str, workflow: Workflow) -> str:
    """Return the id of the TestLab Cell of a sweep.

    Raises:
        ValueError: There is none, or more than one.
    """
    cells = {node_id: (node.get("inputs") or {}).get("sweep") for node_id, node in workflow.items() if node.get("class_type") == CELL_CLASS}
    named = [node_id for node_id, sweep in cells.items() if isinstance(sweep, str) and sweep.strip() == name]
    if len(named) == 1:
        return named[0]
    if not cells:
        raise ValueError("This workflow has no TestLab Cell. Put one at its end and connect the decoded frames.")
    if not named:
        raise ValueError(
            f"No TestLab Cell has the sweep name {name!r}; there are {', '.join(repr(sweep) for sweep in cells.values())}. Use the same name on both nodes."
        )
    raise ValueError(f"{len(named)} TestLab Cells have the sweep name {name!r} (nodes {', '.join(named)}). Give each its own sweep name.")


def ancestors(workflow: Workflow, node_id: str) -> list[str]:
    """Return a node and everything it depends on, in the workflow's order."""
    needed, waiting = set(), [node_id]
    while waiting:
        current = waiting.pop()
        if current in needed or current not in workflow:
            continue
        needed.add(current)
        waiting.extend(value[0] for value in (workflow[current].get("inputs") or {}).values() if is_link(value))
    return [current for current in workflow if current in needed]


def cell_key(prompt: Workflow, cell_node: str, stamp: Callable[[Any], str] = no_stamp) -> str:
    """Return the hash of what makes a cell: classes, inputs and links; neither titles nor node ids count.

    Args:
        prompt: The cell's prompt.
        cell_node: The id of its TestLab Cell, whose `applied` and `sweep` widgets do not count.
        stamp: See `plan`.

    Returns:
        40 hexadecimal digits.
    """
    digests: dict[str, str] = {}

    def digest(node_id: str) -> str:
        if node_id not in digests:
            digests[node_id] = ""  # a loop of links, which the host refuses, must not hang here
            inputs = dict(prompt[node_id].get("inputs") or {})
            if node_id == cell_node:
                inputs = {name: value for name, value in inputs.items() if name not in ("applied", "sweep")}
            links = {name: [digest(value[0]), value[1]] for name, value in inputs.items() if is_link(value) and value[0] in prompt}
            widgets = {name: [value, stamp(value)] for name, value in inputs.items() if name not in links}
            text = json.dumps([prompt[node_id].get("class_type"), links, widgets], sort_keys=True)
            digests[node_id] = hashlib.sha256(text.encode()).hexdigest()
        return digests[node_id]

    return digest(cell_node)[:40]


def applied_values(prompt: Workflow, axes: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Read from the prompt that is being executed what stands at the places of the axes: the labels of a cell come from here.

    Args:
        prompt: The executed API prompt.
        axes: As `Axis.to_dict` gives them.

    Returns:
        One `{"label", "widget", "value"}` per axis.
    """
    values = []
    for entry in axes:
        axis = Axis.from_dict(entry)
        values.append({"label": axis.label, "widget": axis.heading, "value": read_widget(prompt, axis)})
    return values


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return the manifest of a sweep; an empty one when there is none yet.

    Raises:
        ValueError: It is there and cannot be read.
    """
    path = folder / MANIFEST
    if not path.is_file():
        return {"version": MANIFEST_VERSION, "queued": {}, "grid_prompts": []}
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read ({error}). Delete it: the recorded cells stay and are found again.") from error
    if not isinstance(manifest, dict) or manifest.get("version") != MANIFEST_VERSION:
        raise ValueError(f"{path} is of another version. Delete it: the recorded cells stay and are found again.")
    return manifest


def write_atomic(path: Path, text: str) -> None:
    """Write a text file so that at no instant a half-written one stands under its name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(temporary, 0o644)  # mkstemp makes files that nobody else may read
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Write the manifest of a sweep atomically."""
    write_atomic(folder / MANIFEST, json.dumps(manifest, indent=1))


def _with_applied(prompt: Workflow, cell_node: str, name: str, key: str, axes: Sequence[Axis]) -> dict[str, Any]:
    """Fill in the `applied` widget of the cell: which sweep and cell it is, and where to read the applied values."""
    places = [{**axis.to_dict(), "values": []} for axis in axes]
    node = dict(prompt[cell_node])
    node["inputs"] = {**node["inputs"], "applied": json.dumps({"sweep": name, "key": key, "axes": places})}
    return {**prompt, cell_node: node}

"""Axes of a sweep: reading them from text, fitting them to a workflow, and putting a value into it.

A workflow is the host's API prompt: node id -> {"class_type", "inputs", "_meta": {"title"}}. Nothing here runs it.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

Workflow = Mapping[str, Mapping[str, Any]]

MAX_AXES = 6
MAX_VALUES = 200
_PATH_PART = re.compile(r"\[(\d+)\]|\.([A-Za-z_][\w-]*)")


@dataclass(frozen=True, kw_only=True)
class Axis:
    """One axis of a sweep.

    Attributes:
        label: What the user wrote left of the equals sign, without the name.
        node_id: The node.
        widget: Its widget.
        path: Place inside the widget's JSON; empty for the whole widget.
        values: The values, in order.
        name: The user's own word for the axis; empty for none.
    """

    label: str
    node_id: str
    widget: str
    path: tuple[str | int, ...] = ()
    values: tuple[Any, ...] = ()
    name: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return the axis as plain data."""
        return {"label": self.label, "node_id": self.node_id, "widget": self.widget, "path": list(self.path), "values": list(self.values), "name": self.name}

    @classmethod
    def from_dict(cls, entry: Mapping[str, Any]) -> Axis:
        """Return the axis that `to_dict` wrote."""
        return cls(**{**entry, "path": tuple(entry["path"]), "values": tuple(entry["values"])})

    @property
    def heading(self) -> str:
        """What stands before the values in a grid: the user's word, else the widget."""
        return self.name or self.short_label

    @property
    def short_label(self) -> str:
        """The last part of the label, for headers: `rows[0].high`."""
        return self.widget + "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in self.path)


def parse_axes(text: str, workflow: Workflow) -> list[Axis]:
    """Read axes and fit them to a workflow.

    Args:
        text: One axis a line: `node.widget = value, value`; node is a title, an id or a class name; the widget may be followed by a path
            into its JSON, such as `rows[0].high`. `word: node.widget = ...` gives the axis a word of your own, which the grid shows. Values are
            JSON (numbers, true, "quoted text") or plain text. `#` starts a comment line.
        workflow: The API prompt.

    Returns:
        The axes in order.

    Raises:
        ValueError: Names the line and what is wrong with it.
    """
    axes = []
    for number, line in enumerate(text.splitlines(), start=1):
        line = line.strip().lstrip("\ufeff")
        if not line or line.startswith("#"):
            continue
        target, equals, values_text = line.partition("=")
        if not equals or not target.strip():
            raise ValueError(
                f"Axes line {number}: {line!r} has no '='. Write: node title or id, dot, widget, =, values; for example 5.rows[0].high = 0, 0.5, 1"
            )
        try:
            axes.append(_axis(target.strip(), parse_values(values_text), workflow))
        except ValueError as error:
            raise ValueError(f"Axes line {number}: {error}") from error
    if not axes:
        raise ValueError("The sweep has no axes. Write one a line, for example: Load Reward LoRAs.rows[0].high = 0, 0.5, 1")
    if len(axes) > MAX_AXES:
        raise ValueError(f"The sweep has {len(axes)} axes; at most {MAX_AXES} are possible. Remove some.")
    targets = [(axis.node_id, axis.widget, axis.path) for axis in axes]
    for axis, target in zip(axes, targets, strict=True):
        if targets.count(target) > 1:
            raise ValueError(f"Two axes change {axis.label}. Put their values into one line.")
    return axes


def parse_values(text: str) -> tuple[Any, ...]:
    """Read comma-separated values; a part that is valid JSON counts as such, anything else as text.

    Raises:
        ValueError: No value, too many, one twice, a number that is not finite, or a quote that is not closed.
    """
    parts = _split(text)
    values = [_value(part) for part in parts]
    if not values:
        raise ValueError("there are no values after '='.")
    if len(values) > MAX_VALUES:
        raise ValueError(f"{len(values)} values; at most {MAX_VALUES} are possible on one axis.")
    keys = [json.dumps(value) for value in values]
    for key in keys:
        if keys.count(key) > 1:
            raise ValueError(f"the value {key} stands there twice; every cell would be made twice.")
    return tuple(values)


def read_widget(workflow: Workflow, axis: Axis) -> Any:
    """Return the value that a workflow has at the place of an axis.

    Raises:
        ValueError: There is no such place.
    """
    value = _inputs(workflow, axis.node_id).get(axis.widget)
    value = _container(value) if axis.path else value
    for part in axis.path:
        value = _step(value, part, axis.short_label)
    return value


def with_value(workflow: Workflow, axis: Axis, value: Any) -> dict[str, Any]:
    """Return a copy of a workflow with one value put in.

    Raises:
        ValueError: There is no such place, or the value is of another kind than what stands there.
    """
    changed = copy.deepcopy({node_id: dict(node) for node_id, node in workflow.items()})
    inputs = changed[axis.node_id]["inputs"]
    value = _like(read_widget(workflow, axis), value, axis)
    if not axis.path:
        inputs[axis.widget] = value
        return changed
    is_text = isinstance(inputs[axis.widget], str)
    root = _container(inputs[axis.widget])
    place = root
    for part in axis.path[:-1]:
        place = _step(place, part, axis.short_label)
    place[axis.path[-1]] = value
    inputs[axis.widget] = json.dumps(root) if is_text else root
    return changed


def find_nodes(workflow: Workflow, name: str) -> list[str]:
    """Return the ids of the nodes with a title, else with an id, else of a class.

    Args:
        workflow: The API prompt.
        name: Title, id or class name; titles and classes may occur several times.
    """
    if name in workflow:
        return [name]
    titled = [node_id for node_id, node in workflow.items() if (node.get("_meta") or {}).get("title", "").strip() == name]
    return titled or [node_id for node_id, node in workflow.items() if node.get("class_type") == name]


def _axis(target: str, values: Sequence[Any], workflow: Workflow) -> Axis:
    """Find node, widget and path in `node.widget[path]`; titles may hold dots, so every dot is tried, longest title first."""
    problem = ""
    for dot in sorted((match.start() for match in re.finditer(r"\.", target)), reverse=True):
        name, rest = target[:dot].strip(), target[dot + 1 :]
        node_ids = find_nodes(workflow, name)
        if len(node_ids) > 1:
            raise ValueError(f"{len(node_ids)} nodes are called {name!r} (ids {', '.join(node_ids)}). Use the id instead.")
        if not node_ids:
            continue
        match = re.match(r"[A-Za-z_]\w*", rest)
        widget = match.group() if match else ""
        inputs = _inputs(workflow, node_ids[0])
        if widget not in inputs:
            widgets = [key for key, value in inputs.items() if not is_link(value)]
            problem = f"node {name!r} has no widget {widget or rest!r}; it has {', '.join(widgets) or 'none'}."
            continue
        if is_link(inputs[widget]):
            raise ValueError(f"{name}.{widget} is connected to another node; sweep a widget of that node ({inputs[widget][0]}).")
        axis = Axis(label=target, node_id=node_ids[0], widget=widget, path=_path(rest[len(widget) :]), values=tuple(values))
        for value in values:
            _like(read_widget(workflow, axis), value, axis)
        return axis
    name, colon, after = target.partition(":")
    if colon and name.strip() and after.strip() and not problem:
        return replace(_axis(after.strip(), values, workflow), name=name.strip())
    titles = [(node.get("_meta") or {}).get("title") or node.get("class_type", "?") for node in workflow.values()]
    raise ValueError(problem or f"no node of this workflow is called {target.rpartition('.')[0] or target!r}. Nodes: {', '.join(titles)}.")


def _path(text: str) -> tuple[str | int, ...]:
    """Read `[0].high` as `(0, "high")`."""
    parts: list[str | int] = []
    position = 0
    while position < len(text):
        match = _PATH_PART.match(text, position)
        if not match:
            raise ValueError(f"{text!r} is no path. Write [number] or .name, for example rows[0].high")
        parts.append(int(match.group(1)) if match.group(1) is not None else match.group(2))
        position = match.end()
    return tuple(parts)


def _container(value: Any) -> Any:
    """Return the JSON inside a widget."""
    if not isinstance(value, str):
        return copy.deepcopy(value)
    try:
        return json.loads(value)
    except json.JSONDecodeError as error:
        raise ValueError(f"the widget holds no JSON to look into ({error}).") from error


def _step(container: Any, part: str | int, label: str) -> Any:
    """Go one step into JSON."""
    if isinstance(part, int) and isinstance(container, list):
        if part < len(container):
            return container[part]
        raise ValueError(f"{label}: there are {len(container)} entries, so [{part}] does not exist; the first is [0].")
    if isinstance(part, str) and isinstance(container, dict):
        if part in container:
            return container[part]
        raise ValueError(f"{label}: there is no {part!r}; there are {', '.join(container)}.")
    raise ValueError(f"{label}: {part!r} does not lead into a {type(container).__name__}.")


def _like(current: Any, value: Any, axis: Axis) -> Any:
    """Return a value as the kind that stands there: a number for a number, text for text, true or false for a switch."""
    fits = True
    if isinstance(current, bool):
        fits = isinstance(value, bool)
    elif isinstance(current, (int, float)):
        fits = isinstance(value, (int, float)) and not isinstance(value, bool)
    elif isinstance(current, str):
        value = value if isinstance(value, str) else json.dumps(value)
    if not fits:
        raise ValueError(f"{axis.short_label} is {json.dumps(current)} now, so {json.dumps(value)} is of the wrong kind.")
    return value


def _split(text: str) -> list[str]:
    """Split at commas outside of double quotes and brackets."""
    parts, part, depth, quoted, escaped = [], "", 0, False, False
    for character in text:
        if character == "," and not quoted and depth == 0:
            parts.append(part.strip())
            part = ""
            continue
        part += character
        if escaped:
            escaped = False
        elif character == "\\" and quoted:
            escaped = True
        elif character == '"':
            quoted = not quoted
        elif not quoted and character in "[{":
            depth += 1
        elif not quoted and character in "]}":
            depth -= 1
    if quoted:
        raise ValueError(f"a quote is not closed in {text.strip()!r}.")
    return [entry for entry in [*parts, part.strip()] if entry]


def _value(text: str) -> Any:
    """Read one value."""
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except json.JSONDecodeError:
        pass
    if text.lower() in ("nan", "inf", "-inf", "+inf", "infinity", "-infinity"):
        _refuse_constant(text)
    return text


def _refuse_constant(text: str) -> None:
    raise ValueError(f"{text} is no value to sweep over; give finite numbers.")


def _inputs(workflow: Workflow, node_id: str) -> Mapping[str, Any]:
    return workflow[node_id].get("inputs") or {}


def is_link(value: Any) -> bool:
    """Tell whether an input is a link to another node: `[node id, output number]`."""
    return isinstance(value, list) and len(value) == 2 and isinstance(value[0], str) and isinstance(value[1], int)

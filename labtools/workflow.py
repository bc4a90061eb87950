"""Turns a workflow as the front-end saves it (a graph with positions) into the prompt that ComfyUI's API runs.

The front-end does this in the browser; scripts, the demo and the tests need it without one. Covered: links, widgets in
schema order, `control_after_generate` values, combos, muted and bypassed nodes (refused with their names), Note nodes, Reroutes.
Not covered: subgraphs and group nodes.
"""

from __future__ import annotations

_WIDGET_TYPES = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"}
_NOT_RUN = {"Note", "MarkdownNote"}
_MUTED, _BYPASSED = 2, 4


def _is_widget(spec: list) -> bool:
    kind, options = spec[0], spec[1] if len(spec) > 1 else {}
    if options.get("forceInput"):
        return False
    return isinstance(kind, list) or kind in _WIDGET_TYPES


def _widget_names(schema: dict) -> list[str]:
    """Names of a node's widgets in the order of `widgets_values`; "" stands for a value the API does not take."""
    names = []
    for group in ("required", "optional"):
        order = schema.get("input_order", {}).get(group) or list(schema["input"].get(group, {}))
        for name in order:
            spec = schema["input"][group][name]
            if not _is_widget(spec):
                continue
            names.append(name)
            options = spec[1] if len(spec) > 1 else {}
            if options.get("control_after_generate"):
                names.append("")
            if options.get("image_upload") or options.get("video_upload"):
                names.append("")
    return names


def to_prompt(graph: dict, object_info: dict) -> dict:
    """Convert a saved graph.

    Args:
        graph: the parsed workflow file.
        object_info: what GET /object_info returns.

    Returns:
        API prompt: node id -> {"class_type", "inputs", "_meta"}.

    Raises:
        ValueError: a node is unknown to the server, muted or bypassed, or a link points nowhere.
    """
    nodes = {node["id"]: node for node in graph["nodes"]}
    links = {link[0]: (link[1], link[2]) for link in graph["links"]}

    def source(link_id: int) -> list:
        node_id, slot = links[link_id]
        if nodes[node_id]["type"] == "Reroute":
            return source(nodes[node_id]["inputs"][0]["link"])
        return [str(node_id), slot]

    prompt = {}
    for node in graph["nodes"]:
        kind = node["type"]
        if kind in _NOT_RUN or kind == "Reroute":
            continue
        if kind not in object_info:
            raise ValueError(f"node {node['id']} is of type {kind!r}, which this server does not have; install the pack that brings it")
        if node.get("mode") in (_MUTED, _BYPASSED):
            raise ValueError(f"node {node['id']} ({kind}) is muted or bypassed; switch it on or remove it")
        values = node.get("widgets_values") or []
        inputs = dict(values) if isinstance(values, dict) else dict(zip(_widget_names(object_info[kind]), values, strict=False))
        inputs.pop("", None)
        for slot in node.get("inputs", []):
            if slot.get("link") is not None:
                inputs[slot["name"]] = source(slot["link"])
        prompt[str(node["id"])] = {"class_type": kind, "inputs": inputs, "_meta": {"title": node.get("title") or object_info[kind]["display_name"]}}
    return prompt

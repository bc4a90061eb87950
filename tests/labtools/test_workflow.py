"""Saved graphs turned into prompts of the API."""

from __future__ import annotations

import copy

import pytest

from reward_lab.labtools.workflow import to_prompt

OBJECT_INFO = {
    "Sampler": {
        "display_name": "Sampler",
        "input": {
            "required": {
                "model": ["MODEL"],
                "seed": ["INT", {"control_after_generate": True}],
                "kind": [["euler", "heun"]],
                "strength": ["FLOAT", {"forceInput": True}],
            },
            "optional": {"note": ["STRING", {}]},
        },
        "input_order": {"required": ["model", "seed", "kind", "strength"], "optional": ["note"]},
    },
    "Loader": {"display_name": "Load", "input": {"required": {"file": ["COMBO", {"options": ["a"]}]}}, "input_order": {"required": ["file"]}},
}
GRAPH = {
    "nodes": [
        {"id": 1, "type": "Loader", "widgets_values": ["a"], "inputs": []},
        {"id": 2, "type": "Reroute", "inputs": [{"name": "", "link": 10}]},
        {
            "id": 3,
            "type": "Sampler",
            "title": "Mine",
            "widgets_values": [7, "randomize", "heun", "text"],
            "inputs": [{"name": "model", "link": 11}, {"name": "x", "link": None}],
        },
        {"id": 4, "type": "MarkdownNote", "widgets_values": ["words"]},
    ],
    "links": [[10, 1, 0, 2, 0, "MODEL"], [11, 2, 0, 3, 0, "MODEL"]],
}


def test_links_widgets_and_notes() -> None:
    assert to_prompt(GRAPH, OBJECT_INFO) == {
        "1": {"class_type": "Loader", "inputs": {"file": "a"}, "_meta": {"title": "Load"}},
        "3": {"class_type": "Sampler", "inputs": {"model": ["1", 0], "seed": 7, "kind": "heun", "note": "text"}, "_meta": {"title": "Mine"}},
    }


def test_what_it_cannot_run_is_named() -> None:
    unknown, muted = copy.deepcopy(GRAPH), copy.deepcopy(GRAPH)
    unknown["nodes"][0]["type"] = "Elsewhere"
    muted["nodes"][2]["mode"] = 2
    with pytest.raises(ValueError, match="node 1 is of type 'Elsewhere'"):
        to_prompt(unknown, OBJECT_INFO)
    with pytest.raises(ValueError, match=r"node 3 \(Sampler\) is muted"):
        to_prompt(muted, OBJECT_INFO)

"""HTTP routes of the labelling page; what they do is in labelling.py. With `--listen` others reach them: names are checked there."""

from __future__ import annotations

import asyncio
from dataclasses import asdict
from typing import Any

from aiohttp import web

from ..lora_train.labels import QUALITIES
from . import labelling


async def list_sources(_request: web.Request) -> web.Response:
    """Return what can be labelled, and the qualities."""
    return web.json_response({"sources": await asyncio.to_thread(labelling.sources), "qualities": list(QUALITIES)})


async def list_items(request: web.Request) -> web.Response:
    """Return the videos of a source with their labels for `quality`."""
    kind, name, quality = request.match_info["kind"], request.match_info["name"], request.query.get("quality", "motion_quality")
    found = await asyncio.to_thread(labelling.items, kind, name, quality)
    return web.json_response({"quality": quality, "items": [asdict(item) for item in found]})


async def set_label(request: web.Request) -> web.Response:
    """Write the label of the JSON body: `id`, `quality`, `label` (good, bad, skip, or null to take it back)."""
    body = await _body(request)
    kind, name = request.match_info["kind"], request.match_info["name"]
    await asyncio.to_thread(labelling.label, kind, name, str(body.get("id", "")), str(body.get("quality", "")), body.get("label"))
    return web.json_response({"ok": True})


async def ask(request: web.Request) -> web.Response:
    """Return the next blind pair of a sweep for the axis number `axis`."""
    return web.json_response(await asyncio.to_thread(labelling.question, request.match_info["name"], _axis(request)))


async def take_vote(request: web.Request) -> web.Response:
    """Write the vote of the JSON body: `left`, `right` (cell keys), `result` (left, right, tie, skip)."""
    body = await _body(request)
    await asyncio.to_thread(labelling.vote, request.match_info["name"], *(str(body.get(name, "")) for name in ("left", "right", "result")))
    return web.json_response({"ok": True})


async def undo(request: web.Request) -> web.Response:
    """Take the last vote back."""
    return web.json_response({"undone": await asyncio.to_thread(labelling.undo_vote, request.match_info["name"])})


async def rank(request: web.Request) -> web.Response:
    """Return the ranking along the axis number `axis`."""
    return web.json_response(await asyncio.to_thread(labelling.standings, request.match_info["name"], _axis(request)))


GET_ROUTES = (
    ("/reward_lab/label", list_sources),
    ("/reward_lab/label/{kind}/{name}", list_items),
    ("/reward_lab/vote/{name}", ask),
    ("/reward_lab/vote/{name}/ranking", rank),
)
POST_ROUTES = (
    ("/reward_lab/label/{kind}/{name}", set_label),
    ("/reward_lab/vote/{name}", take_vote),
    ("/reward_lab/vote/{name}/undo", undo),
)


def _axis(request: web.Request) -> int:
    text = request.query.get("axis", "0")
    if not text.isdecimal() or len(text) > 3:
        raise ValueError(f"axis is {text[:40]!r}; it must be the number of an axis, from 0 on")
    return int(text)


async def _body(request: web.Request) -> dict[str, Any]:
    """Read a JSON object from a request."""
    try:
        body = await request.json()
    except ValueError as error:
        raise ValueError(f"the body is not JSON ({error})") from error
    if not isinstance(body, dict):
        raise ValueError("the body must be a JSON object")
    return body

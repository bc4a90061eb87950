"""HTTP routes of the pack, for the page: runs, LoRA files, reward models, and the results of sweeps.

With `--listen` others on the network reach these, so every id is checked and no path leaves its folder. Nothing here starts a process.
"""

from __future__ import annotations

import functools
import mimetypes
from collections.abc import Awaitable, Callable
from pathlib import Path

import folder_paths
from aiohttp import web
from server import PromptServer

from ..testlab import sweep
from . import label_routes, lora_routes, paths, reward_files, training

RUN_FILE_FOLDERS = ("samples", "checkpoints")
MAX_LOG_LINES = 2000
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

_is_registered = False


def register() -> None:
    """Add the routes to the host's server; once, and not at all where there is no server (tests, the training process)."""
    global _is_registered
    server = getattr(PromptServer, "instance", None)
    if server is None or _is_registered:
        return
    _is_registered = True
    for path, handler in (
        ("/reward_lab/runs", list_runs),
        ("/reward_lab/runs/{id}", show_run),
        ("/reward_lab/runs/{id}/events", show_events),
        ("/reward_lab/runs/{id}/log", show_log),
        ("/reward_lab/runs/{id}/files/{name:.+}", send_run_file),
        ("/reward_lab/loras", list_loras),
        ("/reward_lab/reward_models", show_reward_models),
        ("/reward_lab/sweeps/{name}/{path:.+}", send_sweep_file),
        ("/reward_lab/datasets/{name}/{path:.+}", send_dataset_file),
        *lora_routes.GET_ROUTES,
        *label_routes.GET_ROUTES,
    ):
        server.routes.get(path)(_answering_errors(handler))
    for path, handler in (("/reward_lab/runs/{id}/stop", stop_run), *lora_routes.POST_ROUTES, *label_routes.POST_ROUTES):
        server.routes.post(path)(_answering_errors(handler))


def _answering_errors(handler: Handler) -> Handler:
    """Turn the ValueErrors of a handler into a 404 with their text; anything else is the server's to log."""

    @functools.wraps(handler)
    async def answer(request: web.Request) -> web.StreamResponse:
        try:
            return await handler(request)
        except ValueError as error:
            return web.json_response({"error": str(error)}, status=404)

    return answer


async def list_runs(_request: web.Request) -> web.Response:
    """Return all runs, newest first."""
    return web.json_response([info.to_dict() for info in training.store().list()])


async def show_run(request: web.Request) -> web.Response:
    """Return one run."""
    return web.json_response(training.store().get(request.match_info["id"]).to_dict())


async def show_events(request: web.Request) -> web.Response:
    """Return the events of a run from number `start` of `file` on; see `RunStore.new_events`."""
    text = request.query.get("start", "0")
    if not text.isdecimal() or len(text) > 12:
        raise ValueError(f"start is {text[:40]!r}; it must be a whole number from 0 on.")
    new = training.store().new_events(request.match_info["id"], int(text), request.query.get("file", ""))
    return web.json_response(new.to_dict())


async def show_log(request: web.Request) -> web.Response:
    """Return the last lines of a run's log as text."""
    text = request.query.get("lines", "200")
    lines = min(int(text), MAX_LOG_LINES) if text.isdecimal() and len(text) < 9 else 200
    return web.Response(text="\n".join(training.store().log_tail(request.match_info["id"], lines)))


async def stop_run(request: web.Request) -> web.Response:
    """Ask a run to stop and return it as it is now."""
    return web.json_response(training.stop_run(request.match_info["id"]).to_dict())


async def send_run_file(request: web.Request) -> web.StreamResponse:
    """Send a sample or a checkpoint of a run."""
    folder = training.store().folder(request.match_info["id"])
    path = inside(folder, request.match_info["name"])
    if path.relative_to(folder.resolve()).parts[0] not in RUN_FILE_FOLDERS:
        raise ValueError(f"{request.match_info['name']!r} is not in {' or '.join(RUN_FILE_FOLDERS)}.")
    return _file_response(path)


async def show_reward_models(_request: web.Request) -> web.Response:
    """Return what Load Reward Model can show: kinds with their widgets and published files, and the files on disk."""
    return web.json_response(reward_files.catalogue())


async def list_loras(_request: web.Request) -> web.Response:
    """Return the names of the LoRA files, for the row editor."""
    return web.json_response(folder_paths.get_filename_list("loras"))


async def send_sweep_file(request: web.Request) -> web.StreamResponse:
    """Send a result of a sweep: the report, the grid, a cell's video."""
    folder = paths.sweeps_folder() / sweep.check_name(request.match_info["name"])
    return _file_response(inside(folder, request.match_info["path"]))


async def send_dataset_file(request: web.Request) -> web.StreamResponse:
    """Send a preview of a dataset."""
    folder = paths.datasets_folder() / sweep.check_name(request.match_info["name"])
    path = inside(folder, request.match_info["path"])
    if path.parent != (folder / "previews").resolve():
        raise ValueError(f"{request.match_info['path'][:200]!r} is no preview.")
    return _file_response(path)


def inside(folder: Path, name: str) -> Path:
    """Return the path of an existing file in a folder.

    Args:
        folder: The folder.
        name: Relative path from outside.

    Raises:
        ValueError: It leaves the folder, also by a link, is hidden, or is not there.
    """
    root = folder.resolve()
    parts = name.split("/")
    is_plain = len(parts) <= 8 and all(0 < len(part) <= 200 and not part.startswith(".") and not set(part) & set("\\:\0") for part in parts)
    path = root.joinpath(*parts).resolve() if is_plain else root
    if not is_plain or not path.is_relative_to(root) or not path.is_file():
        raise ValueError(f"{name[:200]!r} is not here.")
    return path


def _file_response(path: Path) -> web.FileResponse:
    """Send a file with its type. Pages may not reach out, so that a report shows nothing but itself."""
    kind = mimetypes.guess_type(path.name)[0] or "application/octet-stream"
    policy = "default-src 'none'; img-src 'self' data:; media-src 'self' data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
    return web.FileResponse(path, headers={"Content-Type": kind, "X-Content-Type-Options": "nosniff", "Content-Security-Policy": policy})

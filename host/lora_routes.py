"""HTTP routes about LoRA files: what the official ones are, their download, conversion between layouts, a file's report.

With `--listen` others on the network reach these: files are named as the host lists them, and what is written goes into the host's LoRA folder
under a name made here. Nothing is downloaded but the official files, and only when asked.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from pathlib import Path
from typing import Any

import folder_paths
from aiohttp import web

from . import paths
from .lora_convert import convert
from .lora_download import download
from .lora_keys import LAYOUTS, layout_named
from .lora_report import inspect
from .official_loras import OFFICIAL, OfficialLora, official_named

log = logging.getLogger("reward_lab")
_jobs: dict[str, dict[str, Any]] = {}
_jobs_lock = threading.Lock()


async def list_official(_request: web.Request) -> web.Response:
    """Return the official reward LoRAs with their state: `absent`, `downloading`, `present` or `failed`."""
    return web.json_response([_state(lora) for lora in OFFICIAL])


async def list_layouts(_request: web.Request) -> web.Response:
    """Return the key layouts that files can be converted to."""
    return web.json_response(
        [{"name": layout.name, "made_by": layout.made_by, "example": layout.key("blocks.0.self_attn.q", "lora_down.weight")} for layout in LAYOUTS]
    )


async def show_report(request: web.Request) -> web.Response:
    """Return the report of the LoRA file named by `file`."""
    path = paths.model_path("loras", request.query.get("file", ""))
    report = await asyncio.to_thread(inspect, path)
    return web.json_response({**report.to_dict(), "text": report.text()})


async def start_download(request: web.Request) -> web.Response:
    """Start the download of the official file `name` of the JSON body, and return its state; asking again while it runs changes nothing."""
    lora = official_named(str((await _body(request)).get("name", "")))
    with _jobs_lock:
        is_running = any(job["state"] == "downloading" for job in _jobs.values())
        if is_running and _jobs.get(lora.name, {}).get("state") != "downloading":
            raise ValueError("Another official file is being downloaded; wait until it is there.")
        if not is_running:
            _jobs[lora.name] = {"state": "downloading"}
            threading.Thread(target=_download, args=(lora, lora_folder()), name="reward-lab-download", daemon=True).start()
    return web.json_response(_state(lora))


async def convert_file(request: web.Request) -> web.Response:
    """Convert the LoRA `file` of the JSON body to `layout`, beside it as `<name>.<layout>.safetensors`, and return the new name."""
    body = await _body(request)
    name, layout = str(body.get("file", "")), layout_named(str(body.get("layout", "")))
    source = paths.model_path("loras", name)
    target = source.with_name(f"{source.stem}.{layout.name}.safetensors")
    done = await asyncio.to_thread(convert, source, target, layout.name)
    new_name = str(Path(name).with_name(target.name))
    return web.json_response({"file": new_name, "keys": done.keys, "source_layout": done.source_layout, "layout": done.layout, "notes": list(done.notes)})


GET_ROUTES = (
    ("/reward_lab/official_loras", list_official),
    ("/reward_lab/lora_layouts", list_layouts),
    ("/reward_lab/lora_report", show_report),
)
POST_ROUTES = (
    ("/reward_lab/official_loras/download", start_download),
    ("/reward_lab/loras/convert", convert_file),
)


def lora_folder() -> Path:
    """Return the first of the host's LoRA folders."""
    return Path(folder_paths.get_folder_paths("loras")[0])


def _download(lora: OfficialLora, folder: Path) -> None:
    """Body of the download's thread; whatever happens, the job does not stay `downloading`."""
    outcome: dict[str, Any] = {"state": "failed", "error": "The download ended with an error; ComfyUI's log tells which."}
    try:
        done = download(lora, folder)
        outcome = {"state": "present", "warnings": list(done.warnings), "sha256_of_hub": done.sha256}
    except (ValueError, OSError) as error:
        log.warning("Download of %s: %s", lora.name, error)
        outcome = {"state": "failed", "error": str(error)}
    finally:
        with _jobs_lock:
            _jobs[lora.name] = outcome


def _state(lora: OfficialLora) -> dict[str, Any]:
    """Describe one official file as it is now."""
    with _jobs_lock:
        job = dict(_jobs.get(lora.name, {}))
    installed = next((name for name in paths.model_files("loras") if Path(name).name == lora.name), None)
    if job.get("state") != "downloading" and installed:
        job["state"] = "present"
    elif job.get("state") == "present":
        job = {}
    parts = lora_folder().glob(f"{lora.name}.*.part")
    done_bytes = max((part.stat().st_size for part in parts), default=0)
    return {**lora.to_dict(), "state": "absent", "file": installed, "done_bytes": done_bytes, **job}


async def _body(request: web.Request) -> dict[str, Any]:
    """Read a JSON object from a request."""
    body = await request.json()
    if not isinstance(body, dict):
        raise ValueError("The body must be a JSON object.")
    return body

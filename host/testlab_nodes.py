"""What the TestLab nodes do: a cell records itself; the grid queues what is missing, queues itself behind, and renders at the end.

The grid queues itself once per press of Run. When it comes up again it renders what is there and reports what failed, so a failing cell can
never make it queue for ever; pressing Run again tries the failed cells again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import comfy.utils
import numpy as np
import torch
from comfy_api.latest import InputImpl
from PIL import Image

from ..reward_models.spec import RewardModelSpec
from ..testlab import cells, report, sweep, video_grid
from ..testlab.axes import parse_axes
from . import paths, queue, scoring

GRID_CLASS = "RewardLabTestLabGrid"
WEIGHT_FOLDERS = (paths.EXPERT_FOLDER, paths.GGUF_FOLDER, "text_encoders", "vae", "loras", paths.REWARD_MODEL_FOLDER)
WEIGHT_ENDINGS = (".safetensors", ".sft", ".pt", ".pth", ".ckpt", ".bin", ".gguf")


@dataclass(frozen=True, kw_only=True)
class CellResult:
    """What the cell node gives out."""

    scores_json: str
    message: str


@dataclass(frozen=True, kw_only=True)
class GridStep:
    """What the grid node gives out; `grid` is None while cells are missing."""

    message: str
    grid: torch.Tensor | None = None
    video: Any = None
    report_path: str = ""
    ui: dict[str, Any] = field(default_factory=dict)


def is_left_to_grid(prompt: Mapping[str, Any] | None, sweep_name: str, applied: str) -> bool:
    """Tell whether a TestLab Grid in the same prompt will queue this cell, so that running it now would be one video too many."""
    if applied and applied.strip():
        return False
    grids = [(node.get("inputs") or {}).get("sweep") for node in (prompt or {}).values() if node.get("class_type") == GRID_CLASS]
    return any(isinstance(name, str) and name.strip() == (sweep_name or "").strip() for name in grids)


def record(
    images_FHWC: torch.Tensor, sweep_name: str, prompt: str, spec: RewardModelSpec | None, frame_rate: float, applied: str, executed: Mapping[str, Any]
) -> CellResult:
    """Score the frames, and record them when the prompt was queued by a sweep.

    Args:
        images_FHWC: IMAGE batch.
        sweep_name: The sweep widget.
        prompt: What the frames are scored against.
        spec: The reward model; None for no scores.
        frame_rate: Frames per second.
        applied: JSON that the sweep filled in; empty outside of a sweep.
        executed: The API prompt that is being executed; the applied values are read from it.

    Raises:
        ValueError: No frames, NaN in them, or `applied` is broken.
    """
    if images_FHWC.ndim != 4 or images_FHWC.shape[0] == 0:
        raise ValueError(f"The video has no frames (shape {tuple(images_FHWC.shape)}). Connect the decoded frames of one video.")
    if not torch.isfinite(images_FHWC).all():
        raise ValueError("The frames hold NaN or infinity: sampling or decoding failed. Check the LoRA strengths and the precision of the models.")
    score = scoring.score_images(images_FHWC, spec, prompt) if spec is not None else None
    scores = score.to_dict() if score is not None else {}
    if not applied.strip():
        return CellResult(scores_json=json.dumps(scores), message=score.summary() if score else "No sweep is running; the frames pass through.")
    job = _job(applied)
    frames = (images_FHWC[..., :3].clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy()
    folder = paths.sweeps_folder() / sweep.check_name(job["sweep"])
    values = sweep.applied_values(executed, job["axes"])
    cells.record(folder, job["key"], np.ascontiguousarray(frames), applied=values, prompt=prompt, frame_rate=frame_rate, scores=scores)
    shown = ", ".join(f"{entry['widget']} = {video_grid.show_value(entry['value'])}" for entry in values)
    _show_progress(folder)
    return CellResult(scores_json=json.dumps(scores), message=f"recorded {shown}" + (f": {score.reward:.4f}" if score else ""))


async def advance(sweep_name: str, axes_text: str, workflow: Mapping[str, Any], grid_node: str) -> GridStep:
    """Queue the missing cells and the grid itself, or render when nothing is left to wait for.

    Args:
        sweep_name: The sweep widget.
        axes_text: The axes widget.
        workflow: The API prompt that is being executed.
        grid_node: Id of the grid node.

    Raises:
        ValueError: The axes do not fit the workflow, the host refuses a cell, or every cell failed.
    """
    name = sweep.check_name(sweep_name)
    workflow = sweep.plain(workflow)
    plan = sweep.plan(name, parse_axes(axes_text, workflow), workflow, stamp=_FileStamps())
    folder = paths.sweeps_folder() / name
    manifest = sweep.read_manifest(folder)
    recorded = {cell.key: found for cell in plan.cells if (found := cells.load(folder, cell.key)) is not None}
    missing = {cell.key: cell for cell in plan.cells if cell.key not in recorded}
    waiting = queue.waiting_ids()
    queued_now = {key for key in missing if manifest["queued"].get(key, {}).get("prompt_id") in waiting}
    is_continued = queue.current_prompt_id() in manifest["grid_prompts"]
    if missing and (not is_continued or queued_now):
        fresh = [] if is_continued else [cell for key, cell in missing.items() if key not in queued_now]
        return await _queue_cells(plan, folder, manifest, workflow, grid_node, fresh, len(recorded), len(queued_now))
    failures = {key: queue.failure_of(manifest["queued"].get(key, {}).get("prompt_id", "")) for key in missing}
    if not recorded:
        first = next(iter(failures.values()), "")
        raise ValueError(f"All {len(plan.cells)} cells of sweep {name!r} failed. Repair what the first one says and press Run again: {first}")
    return _render(plan, folder, recorded, failures, grid_node)


async def _queue_cells(
    plan: sweep.Sweep, folder: Path, manifest: dict[str, Any], workflow: Mapping[str, Any], grid_node: str, fresh: list[sweep.Cell], done: int, waiting: int
) -> GridStep:
    """Queue cells and the grid behind them. Everything is validated before the first is queued."""
    checked = [(cell, await queue.check(cell.prompt, [plan.cell_node])) for cell in fresh]
    again = await queue.check(workflow, queue.outputs_behind(workflow, grid_node))
    for cell, prompt in checked:
        attempts = manifest["queued"].get(cell.key, {}).get("attempts", 0) + 1
        manifest["queued"][cell.key] = {"index": cell.index, "values": list(cell.values), "prompt_id": prompt.prompt_id, "attempts": attempts}
    manifest.update(
        sweep=plan.name,
        grid_node=grid_node,
        axes=[axis.to_dict() for axis in plan.axes],
        cells=[{"index": cell.index, "key": cell.key, "values": list(cell.values)} for cell in plan.cells],
        grid_prompts=[*manifest["grid_prompts"][-19:], again.prompt_id],
    )
    sweep.write_manifest(folder, manifest)
    for _, prompt in checked:
        queue.put(prompt)
    queue.put(again)
    message = f"Queued {len(fresh)} of {len(plan.cells)} cells ({done} recorded before, {waiting} already waiting). The grid follows when they are done."
    stored = cells.recorded_keys(folder)
    if stored and not stored & {cell.key for cell in plan.cells}:
        # The usual cause: the page draws a new seed after every press of Run.
        message += f" {len(stored)} recorded cells are of another workflow; if only a seed changed, set its control to 'fixed'."
    queue.show_text(grid_node, message)
    return GridStep(message=message)


def _render(plan: sweep.Sweep, folder: Path, recorded: dict[str, cells.RecordedCell], failures: dict[str, str], grid_node: str) -> GridStep:
    """Render grid, table and report, and say what failed."""
    progress = comfy.utils.ProgressBar(1)
    grid = video_grid.render(plan, folder, recorded, failures, on_progress=progress.update_absolute)
    report.write_table(plan, folder, recorded, failures)
    page = report.write_report(plan, folder, recorded, failures)
    message = f"{len(recorded)} of {len(plan.cells)} cells in the grid."
    if failures:
        message += f" {len(failures)} failed; press Run to try them again. The first: {next(iter(failures.values()))}"
    queue.show_text(grid_node, message)
    ui = {
        "images": [paths.output_result(grid.preview)],
        "animated": [True],
        "text": [message],
        "reward_lab_sweep": [{"name": plan.name, "report": f"/reward_lab/sweeps/{plan.name}/{report.REPORT}", "failed": len(failures)}],
    }
    with Image.open(grid.picture) as picture:
        image = paths.image_tensor(picture)
    return GridStep(message=message, grid=image, video=InputImpl.VideoFromFile(str(grid.video)), report_path=str(page), ui=ui)


def _job(applied: str) -> dict[str, Any]:
    """Read the `applied` widget."""
    try:
        job = json.loads(applied)
        if not (isinstance(job["sweep"], str) and isinstance(job["key"], str) and isinstance(job["axes"], list)):
            raise TypeError("wrong kinds")
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"The 'applied' widget of TestLab Cell is filled in by TestLab Grid; this text is not from it ({error}). Empty it.") from error
    return job


def _show_progress(folder: Path) -> None:
    """Tell the grid node how many cells are recorded."""
    manifest = sweep.read_manifest(folder)
    keys = [cell["key"] for cell in manifest.get("cells", [])]
    done = sum((cells.cell_folder(folder, key) / cells.CELL_FILE).is_file() for key in keys)
    if keys:
        queue.show_text(manifest.get("grid_node"), f"{done} of {len(keys)} cells recorded")


class _FileStamps:
    """Gives, for a widget's value that names weight files, their size and time: a LoRA trained anew under its old name makes new cells."""

    def __init__(self) -> None:
        self._known: dict[str, str] = {}

    def __call__(self, value: Any) -> str:
        return "|".join(filter(None, (self._stamp(name) for name in _strings(value))))

    def _stamp(self, name: str) -> str:
        if not name.lower().endswith(WEIGHT_ENDINGS):
            return ""
        if name not in self._known:
            self._known[name] = ""
            for folder in WEIGHT_FOLDERS:
                if name in paths.model_files(folder):
                    status = paths.model_path(folder, name).stat()
                    self._known[name] = f"{status.st_size}:{status.st_mtime_ns}"
                    break
        return self._known[name]


def _strings(value: Any) -> list[str]:
    """Return all texts in a value, those inside of JSON text too."""
    if isinstance(value, str):
        if value.lstrip()[:1] not in ("[", "{"):
            return [value]
        try:
            return _strings(json.loads(value))
        except json.JSONDecodeError:
            return [value]
    if isinstance(value, Mapping):
        return [text for entry in value.values() for text in _strings(entry)]
    if isinstance(value, list):
        return [text for entry in value for text in _strings(entry)]
    return []

"""Starts training runs from the node, follows them for the page, and fetches what they made."""

from __future__ import annotations

import json
import logging
import subprocess
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.utils
import folder_paths
import torch

from ..lora_train.config import TrainConfig
from ..lora_train.pavrm_config import KIND as PAVRM
from ..lora_train.run_config import RunConfig
from ..lora_train.safetensors_file import read_header
from ..reward_models.spec import RewardModelSpec
from ..runs import process
from ..runs.store import RunInfo, RunStore, read_config
from . import courtesy, events, paths, preflight, run_files, score_pictures
from .experts import EXPERTS, guess_expert
from .lora_keys import normalise, split_key

logger = logging.getLogger("reward_lab")

PRESETS = ("reward-lab", "reward-lab-backprop", "reward-lab-prfl", "videox-fun", "hy-video-prfl", "roll-reward-flow", "pocket")
ACTIVE_STATES = ("created", "running", "stopping")
POLL_S = 0.25
# How long a run that was asked to stop may take for its step, checkpoint and LoRA before it is ended by force: a step of a 14B model takes minutes.
STOP_GRACE_S = 300.0
STOP_GRACE_STEPS = 20
LOG_LINES = 15

_processes: dict[str, subprocess.Popen] = {}
_followed: list[threading.Thread] = []

# Looks at held-out prompts in a run of the node.
_LOOKS = 10


@dataclass(frozen=True, kw_only=True)
class StartedRun:
    """A run that has just been started."""

    run_id: str
    message: str


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """What a run has made so far. `loras` and `files` have an entry for each expert that was trained (`high`, `low`).

    The LoRAs are in the host's LORA_MODEL layout, `loss_map` is in its LOSS_MAP layout.
    """

    loras: dict[str, dict[str, torch.Tensor]]
    files: dict[str, Path]
    loss_map: dict[str, list[float]]
    chart: torch.Tensor
    chart_files: list[dict[str, str]]
    message: str


def store() -> RunStore:
    """Return the store of this host's runs."""
    return RunStore(paths.runs_folder())


def make_config(wan_files: Mapping[str, str], prompts: list[dict], reward_model: RewardModelSpec, settings: Mapping[str, Any]) -> TrainConfig:
    """Turn the node's inputs into a training config.

    Args:
        wan_files: WAN_FILES.
        prompts: PROMPTS.
        reward_model: Which reward.
        settings: The node's widgets by name; `advanced` is JSON laid over everything else. `held_out`: PROMPTS, where there are some.

    Raises:
        ValueError: A value is out of range, or `advanced` is no JSON object or has an unknown name.
    """
    values: dict[str, Any] = {
        "preset": settings["preset"],
        "name": settings["name"],
        "models": {role: wan_files[role] for role in ("high", "low", "text_encoder", "vae")},
        "reward": reward_model.to_dict(),
        "prompts": [_prompt(prompt) for prompt in prompts],
        # A model without experts is given in the place of the high-noise one.
        "expert": settings["expert"] if wan_files["low"] else "high",
        "video": {"width_px": settings["width"], "height_px": settings["height"], "frames": settings["frames"], "vae": wan_files.get("latents", "wan2.1")},
        "sampling": {"steps": settings["sampling_steps"], "guidance": settings["guidance"]},
        "lora": {"rank": settings["rank"], "alpha": settings["alpha"]},
        "optimiser": {"lr": settings["learning_rate"]},
        "steps": settings["steps"],
        "batch": settings["batch"],
        "seed": settings["seed"],
        "output_folder": str(Path(folder_paths.get_output_directory()) / "loras"),
    }
    if settings.get("held_out"):
        values["held_out"] = {"every": max(1, settings["steps"] // _LOOKS), "prompts": [_prompt(prompt) for prompt in settings["held_out"]]}
    return TrainConfig.from_dict(run_files.located(laid_over(values, advanced_settings(settings["advanced"]))))


def _prompt(prompt: Mapping[str, Any]) -> dict[str, Any]:
    return {"text": prompt["text"], "weight": prompt.get("weight", 1.0), "image": prompt.get("image", "")}


def start_run(wan_files: Mapping[str, str], prompts: list[dict], reward_model: RewardModelSpec, settings: Mapping[str, Any]) -> StartedRun:
    """Check everything, make the run folder, start the worker and return.

    A run with the very same settings that trains or has finished is given back instead: pressing Run once more, to fetch a result, must not
    train again.

    Raises:
        ValueError: See `make_config`; a file is missing or broken; not enough disk.
    """
    config = make_config(wan_files, prompts, reward_model, settings)
    runs = store()
    runs.root.mkdir(parents=True, exist_ok=True)
    preflight.check(config, runs.root)
    return launch(config, f"{config.steps} steps, {config.expert} noise")


def launch(config: RunConfig, what: str) -> StartedRun:
    """Make the run folder of a checked config and start its worker; a run of the same settings is given back instead, see `start_run`.

    Args:
        what: for the message.
    """
    runs = store()
    runs.root.mkdir(parents=True, exist_ok=True)
    same = _same_run(runs, config)
    if same is not None:
        return StartedRun(
            run_id=same.id, message=f"Run {same.id} has these settings ({same.state}, step {same.step}). Change the seed or the name to train another."
        )
    run_id = runs.create(config)
    # The worker needs the card; the host loads its models again when it needs them.
    comfy.model_management.unload_all_models()
    comfy.model_management.soft_empty_cache()
    # Not folder_paths.base_path, which --base-directory moves away from the source.
    worker = process.start(runs.folder(run_id), Path(folder_paths.__file__).resolve().parent)
    _processes[run_id] = worker
    _follow(runs, run_id, worker)
    return StartedRun(
        run_id=run_id, message=f"Run {run_id} started: {what}. Follow it in the Reward Lab tab of the sidebar."
    )


def follow_living_runs() -> None:
    """Follow runs that another server started and that still train; called once when this one starts.

    A folder that cannot be listed is logged and left alone: it must not keep the nodes from being registered.
    """
    runs = store()
    try:
        for info in runs.list():
            if info.state in ("running", "stopping"):
                _follow(runs, info.id, None, skip=len(runs.events(info.id)))
    except (OSError, ValueError):
        logger.exception("the runs in %s cannot be read", runs.root)


def _same_run(runs: RunStore, config: RunConfig) -> RunInfo | None:
    """Return a run of these settings that is active or finished, made after the files that it was trained on."""
    wanted = config.to_dict()
    newest_input = max((path.stat().st_mtime for path in map(Path, run_files.inputs(config)) if path.exists()), default=0.0)
    for info in runs.list():
        is_finished = info.state == "finished" and info.files and all(Path(file).is_file() for file in info.files)
        if (info.state in ACTIVE_STATES or is_finished) and info.created > newest_input and read_config(runs.folder(info.id)) == wanted:
            return info
    return None


def _follow(runs: RunStore, run_id: str, worker: subprocess.Popen | None, skip: int = 0) -> None:
    """Push a run's events to the page until it ends, and let it pause while prompts are executed."""
    followed = process.watch(runs.folder(run_id), worker, lambda event: _tell_page(run_id, event), skip=skip)
    _followed[:] = [thread for thread in _followed if thread.is_alive()] + [followed]
    courtesy.start(runs.root, lambda: any(thread.is_alive() for thread in _followed))


def stop_run(run_id: str) -> RunInfo:
    """Ask a run to stop; it writes a checkpoint and a LoRA first, and is ended by force only when it does not react.

    Raises:
        ValueError: No such run.
    """
    runs = store()
    folder = runs.folder(run_id)
    runs.request_stop(run_id)
    info = runs.get(run_id)
    grace_s = max(STOP_GRACE_S, STOP_GRACE_STEPS * (info.seconds_per_step or 0.0))
    # process.stop waits for the worker, so it has a thread of its own; the route answers at once.
    threading.Thread(target=process.stop, args=(folder, _processes.get(run_id), grace_s), daemon=True, name="reward_lab_stop").start()
    return info


def run_result(run_id: str, wait: bool) -> RunResult:
    """Fetch what a run has made.

    Args:
        run_id: The run.
        wait: Wait for its end first, with progress; cancelling the prompt ends the waiting only.

    Raises:
        ValueError: No such run, its files cannot be read, or it has written no LoRA yet.
        RuntimeError: The run failed; carries its error and the end of its log.
    """
    runs = store()
    info = runs.get(run_id)
    if wait:
        info = _wait(runs, run_id)
    if info.state == "failed":
        raise RuntimeError(f"Run {run_id} failed: {info.error}\n" + "\n".join(runs.log_tail(run_id, LOG_LINES)))
    if info.state == "broken":
        raise ValueError(f"Run {run_id} cannot be read: {info.error}.")
    is_pavrm = read_config(runs.folder(run_id)).get("kind") == PAVRM
    files = _finished_pavrm(info) if is_pavrm else _newest_loras(runs.folder(run_id), info)
    if not files and is_pavrm:
        raise ValueError(f"Run {run_id} has written no PAVRM yet (step {info.step} of {info.steps}, {info.state}). It does when it ends or is stopped.")
    if not files:
        raise ValueError(f"Run {run_id} has written no LoRA yet (step {info.step} of {info.steps}, {info.state}). Switch 'wait' on, or run this node later.")
    steps = [event for event in runs.events(run_id) if event.get("event") == "step"]
    loss_map = {"loss": _numbers(steps, "loss"), "reward": _numbers(steps, "reward")}
    chart = score_pictures.plot_run(steps, f"{info.name}: {info.state}, step {info.step} of {info.steps}")
    reward = f", reward {info.reward:.4f}" if info.reward is not None else ""
    return RunResult(
        loras={} if is_pavrm else {expert: host_lora(file) for expert, file in files.items()},
        files=files,
        loss_map=loss_map,
        chart=chart,
        chart_files=paths.save_temp_images(chart),
        message="\n".join([f"{info.state}, step {info.step} of {info.steps}{reward}", *map(str, files.values())]),
    )


def not_trained(run_id: str, expert: str) -> str:
    """Say why a run has no LoRA for an expert."""
    return f"Run {run_id} has no LoRA for the {expert}-noise expert, since it does not train that one. Use the other output, or train with expert = both."


def host_lora(file: Path) -> dict[str, torch.Tensor]:
    """Read a LoRA file into the host's LORA_MODEL layout: `diffusion_model.<layer>.lora_up.weight` and so on.

    Args:
        file: A LoRA in any layout that lora_keys knows.
    """
    tensors = comfy.utils.load_torch_file(str(file), safe_load=True)
    flat = {split[0]: _dotted(split[0]) for key in tensors if (split := split_key(key)) is not None}
    layers = normalise(tensors, flat.values()).layers
    return {f"diffusion_model.{layer}.{part}": tensors[key] for layer, parts in layers.items() for part, key in parts.items()}


def _dotted(flat: str) -> str:
    """Write a flattened layer name of Wan with dots: blocks_0_self_attn_q becomes blocks.0.self_attn.q."""
    words = flat.split("_")
    if words[0] == "blocks" and len(words) > 3:
        rest = "_".join(words[2:])
        for group in ("self_attn", "cross_attn", "ffn"):
            if rest.startswith(group + "_"):
                return f"blocks.{words[1]}.{group}.{rest[len(group) + 1 :]}"
    for group in ("text_embedding", "time_embedding", "time_projection", "head"):
        if flat.startswith(group + "_"):
            return f"{group}.{flat[len(group) + 1 :]}"
    return flat


def _tell_page(run_id: str, event: dict[str, Any]) -> None:
    """Push an event of a run to every open page."""
    from server import PromptServer

    server = getattr(PromptServer, "instance", None)
    if server is not None:
        server.send_sync(events.RUN_EVENT, events.run_payload(store().get(run_id), event))


def _wait(runs: RunStore, run_id: str) -> RunInfo:
    """Wait for the end of a run, showing its progress."""
    info = runs.get(run_id)
    progress = comfy.utils.ProgressBar(max(1, info.steps))
    with courtesy.waiting_for_run():
        while info.state in ACTIVE_STATES:
            comfy.model_management.throw_exception_if_processing_interrupted()
            progress.update_absolute(info.step, max(1, info.steps))
            time.sleep(POLL_S)
            info = runs.get(run_id)
    return info


def _newest_loras(folder: Path, info: RunInfo) -> dict[str, Path]:
    """Return the newest LoRA of each expert that a run trained; finished ones count, and checkpoints only where there are none."""
    finished = [Path(file) for file in info.files if Path(file).is_file()]
    checkpoints = sorted((folder / "checkpoints").glob("*-step*.safetensors"), key=lambda file: file.stat().st_mtime_ns)
    found = {guess_expert(file.name, read_header(file, "LoRA").metadata).expert or info.expert: file for file in finished or checkpoints}
    return {expert: found[expert] for expert in EXPERTS if expert in found}


def _finished_pavrm(info: RunInfo) -> dict[str, Path]:
    """Return the PAVRM of a finished run: the copy that Load Reward Model lists, which was written last; nothing before the end."""
    files = [Path(file) for file in info.files if Path(file).name == f"{info.name}.safetensors" and Path(file).is_file()]
    return {PAVRM: files[-1]} if files else {}


def advanced_settings(text: str) -> dict[str, Any]:
    """Read the advanced widget."""
    try:
        values = json.loads(text) if text.strip() else {}
    except json.JSONDecodeError as error:
        raise ValueError(f'\'advanced\' is not JSON ({error}). Write an object such as {{"objective": {{"kl_weight": 0.1}}}}.') from error
    if not isinstance(values, dict):
        raise ValueError(f"'advanced' must be a JSON object, not {type(values).__name__}.")
    return values


def laid_over(under: dict[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Lay one set of settings over another, section by section."""
    merged = dict(under)
    for key, value in over.items():
        is_section = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = laid_over(dict(merged[key]), value) if is_section else value
    return merged


def _numbers(steps: list[dict[str, Any]], name: str) -> list[float]:
    """Return one series of a run; a number that was not finite is missing in JSON, and the one before it stands in: charts cannot draw NaN."""
    values: list[float] = []
    for step in steps:
        value = step.get(name)
        values.append(float(value) if value is not None else values[-1] if values else 0.0)
    return values

"""The training process: `python host/worker.py RUN_FOLDER --comfyui PATH [--resume] [--nice N]`.

A launcher may start it as well, as one process: `torchrun --nproc_per_node 1 host/worker.py ...`; several are refused.
Reads `config.json`, loads the models through the host, trains, and writes events to `metrics.jsonl`. A `stop` file or SIGTERM / SIGINT ends the run in
order. Exit status: 0 finished or stopped, 2 failed (the reason stands in the last event).
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import importlib.util
import logging
import math
import os
import signal
import sys
import time
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

# Started as a script, this module has its own folder first on the path, where `queue.py` hides the standard library's: until `_register_pack` has
# mended the path, nothing may be imported that needs that one (concurrent.futures, torch, ...).
ROOT = Path(__file__).resolve().parent.parent
logger = logging.getLogger("reward_lab")


def main(argv: list[str]) -> int:
    """Entry of the process; see the module's docstring."""
    parser = argparse.ArgumentParser(prog="worker.py", description="Trains the run in RUN_FOLDER.")
    parser.add_argument("run_folder", type=Path)
    parser.add_argument("--comfyui", type=Path, required=True, help="ComfyUI's root folder")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint")
    parser.add_argument("--nice", type=int, default=0, help="lower this process's priority")
    options = parser.parse_args(argv)
    processes = int(os.environ.get("WORLD_SIZE") or 1)
    if processes > 1:
        # Each of them would train the whole run, and all but one find its folder taken.
        print(
            f"error: a launcher started {processes} processes (WORLD_SIZE), but a run is trained by one process on one card; start it with one process "
            "(torchrun --nproc_per_node 1), or a run of its own per card with CUDA_VISIBLE_DEVICES",
            file=sys.stderr,
        )
        return 2
    _register_pack(options.comfyui.resolve())
    # The host reports much at INFO that has no place in a run's log.
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr, force=True)
    logger.setLevel(logging.INFO)
    if options.nice and hasattr(os, "nice"):
        os.nice(options.nice)

    # Under this name the pack's relative imports work whatever its folder is called.
    from reward_lab.host.worker import run

    return run(options.run_folder.resolve(), resume=options.resume)


def _register_pack(comfyui: Path) -> None:
    # A script's own folder stands first on the path; its modules would hide others of their names.
    here = Path(__file__).resolve().parent
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != here]
    sys.path.insert(0, str(comfyui))
    spec = importlib.util.spec_from_file_location("reward_lab_alias", ROOT / "labtools" / "alias.py")
    alias = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(alias)
    alias.register(ROOT)


def run(folder: Path, *, resume: bool = False) -> int:
    """Train the run in `folder`; reports failures as an event and returns the exit status."""
    from ..lora_train import events
    from ..runs import lock
    from ..runs.store import append_event, log_tail

    stop = _StopSignal(folder)
    with ExitStack() as held:
        try:
            held.enter_context(lock.hold(folder))
        except lock.RunInUseError as error:
            # Not an event: metrics.jsonl belongs to the run that owns the folder.
            logger.error("%s", error)
            return 2
        try:
            _train(folder, stop, resume)
        except Exception as error:  # the process ends here; whatever it was must reach the page
            logger.exception("the run failed")
            from ..lora_train.recovery import explain

            append_event(folder, events.Failed(time=time.time(), error=explain(error, folder), log_tail=log_tail(folder)))
            return 2
    return 0


class _StopSignal:
    """True once the stop file exists or the process was asked to end."""

    def __init__(self, folder: Path) -> None:
        from ..runs.store import STOP

        self._file = folder / STOP
        self._is_asked = False
        for name in ("SIGTERM", "SIGINT"):
            signal.signal(getattr(signal, name), self._ask)

    def _ask(self, number: int, _frame: object) -> None:
        logger.info("signal %d: stopping after this step", number)
        self._is_asked = True
        # A second signal ends the process at once.
        signal.signal(number, signal.SIG_DFL)

    def __call__(self) -> bool:
        return self._is_asked or self._file.exists()


def _train(folder: Path, stop: _StopSignal, resume: bool) -> None:
    from ..lora_train import run_config
    from ..runs.store import CONFIG, METRICS, STOP, read_config
    from . import pavrm_worker, preflight

    if not (folder / CONFIG).is_file():
        raise ValueError(f"{folder / CONFIG} does not exist; write the settings of the run there")
    config = run_config.read(read_config(folder))
    is_pavrm = isinstance(config, run_config.PavrmConfig)
    if (folder / METRICS).exists() and not resume:
        raise ValueError(f"the run folder {folder} already holds a run; resume it (--resume) or start a new one")
    if is_pavrm:
        preflight.check_pavrm(config)
    else:
        preflight.check(config, folder)

    import comfy.cli_args
    import torch

    has_gpu = torch.cuda.is_available()
    comfy.cli_args.args.cpu = not has_gpu
    device = torch.device("cuda" if has_gpu else "cpu")
    if config.dtype == "auto":
        dtype = torch.bfloat16 if has_gpu else torch.float32
    else:
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[config.dtype]
    logger.info("run %s: training %s on %s in %s", folder.name, "a PAVRM" if is_pavrm else " and ".join(config.trained_experts), device, dtype)
    if resume:
        from ..lora_train import checkpoint

        checkpoint.check_settings(folder, config)
        (folder / STOP).unlink(missing_ok=True)
    if is_pavrm:
        pavrm_worker.train(config, folder, stop, resume, device, dtype)
        return
    _train_with_models(config, folder, stop, resume, device, dtype)


def _train_with_models(config, folder: Path, stop: _StopSignal, resume: bool, device, dtype) -> None:
    from concurrent.futures import ThreadPoolExecutor

    from ..lora_train import checkpoint, needs, objectives, replay
    from ..lora_train.rollout import ContextCache, Experts
    from ..lora_train.run import Parts, train
    from ..runs import lease
    from ..runs.store import append_event, cut_after
    from . import memory_meter, start_images
    from .engine import FreeMemory, engines
    from .samples import SampleFiles
    from .training_mode import training_mode
    from .wan import load_backbone

    free = FreeMemory.of(config, device)
    real = _real_clips(config, folder) if needs.real_latents(config) else None
    contexts, negative = _encode(config, real)
    backbones = {
        expert: load_backbone(getattr(config.models, expert), dtype=dtype, device=device, role=f"{expert}-noise expert", on_host=True)
        for expert in needs.experts(config)
    }
    scorers = _load_scorers(config, backbones, device, dtype)
    logger.info("loaded %s", ", ".join([*(f"the {expert}-noise expert" for expert in backbones), *(name for name, part in scorers.items() if part)]))

    with ExitStack() as stack:
        pool = stack.enter_context(ThreadPoolExecutor(1))
        hashes = {expert: pool.submit(_sha256, getattr(config.models, expert)) for expert in config.trained_experts}
        stack.enter_context(training_mode())
        meter = memory_meter.meter_of(config, device, free, lambda: engine.knobs)
        engine = stack.enter_context(engines(config, backbones, device, dtype, decoder=scorers["decoder"], latent_reward=scorers["latent_reward"], free=free))
        if meter is not None:
            stack.enter_context(meter)

        def sink(event) -> None:
            append_event(folder, event)
            _log(event)

        told = start_images.given(config, needs.start_images(config), backbones, scorers["decoder"])
        start_images.check_clips(config, real, told)
        parts = Parts(
            experts=Experts(backbones=backbones, sampling=config.sampling),
            contexts=ContextCache(contexts, negative, device, **told),
            sink=sink,
            stop_requested=stop,
            writer=SampleFiles(folder, config.frame_rate),
            pause=lambda: lease.wait_until_free(folder.parent, stop),
            meter=meter,
            base_sha256=lambda expert: hashes[expert].result(),
            shrink=engine.shrink,
            device=device,
            real=real,
            **scorers,
        )
        if resume:
            # Whatever could be refused has been: until here, the run that there is stands as it was.
            cut_after(folder, checkpoint.latest_step(folder))
        parts = replay.with_clips(config, parts, folder)
        train(config, parts, objectives.create(config, parts), folder, resume=resume)


def _real_clips(config, folder: Path):
    """The real clips that a run may learn from.

    Raises:
        ValueError: see `_open_real`, `_not_held_out` and `picking.known_rows`: before any model is loaded.
    """
    from ..lora_train import picking

    real = _not_held_out(config, _open_real(config))
    picking.known_rows(config, real, folder)
    return real


def _open_real(config):
    """Real latents of a file, or of a dataset of encoded videos.

    Raises:
        ValueError: they cannot be read, or are those of another VAE or of another size than the run's videos.
    """
    from ..lora_train.input_config import LATENTS
    from ..lora_train.real import RealLatents, RealSamples
    from . import datasets

    path = config.real.path
    is_file = Path(path).is_file() and path.endswith(".safetensors")
    dataset = None if is_file else datasets.read(path, with_numbers=True)
    real = RealLatents(path) if dataset is None else RealSamples(dataset.samples)
    for note in dataset.notes if dataset else ():
        logger.info("%s", note)
    if dataset and real.left_out:
        logger.warning("%d of the real videos have no caption or another size than most, and are left out", real.left_out)
    if real.shape[0] != config.video.latent_channels:
        raise ValueError(
            f"the real latents {path} have {real.shape[0]} channels, but video.vae is {config.video.vae!r}, which has {config.video.latent_channels}: "
            "encode the videos with the VAE of these models"
        )
    wanted, cell = config.video.latent_shape(1)[1:], LATENTS[config.video.vae].pixels
    is_larger = math.prod(real.shape) > math.prod(wanted)
    # What starts from clips has their size; beside rollouts, smaller ones do no harm. The plan and everything else reckon with video.*.
    if real.shape != wanted and (is_larger or config.starts_from_clips):
        (width, height, frames), video = _video_size(real.shape, cell), config.video
        raise ValueError(
            f"the real latents {path} are of videos of {width} x {height} px and {frames} frames, but video says {video.width_px} x {video.height_px} px and "
            f"{video.frames} frames; set video.width_px {width}, height_px {height} and frames {frames}, or encode the videos at the size of video"
        )
    return real


def _not_held_out(config, real):
    """The clips without those whose caption is a held-out prompt: what is held out is never trained on."""
    from ..lora_train.real import Chosen

    held_out = {prompt.text.strip() for prompt in config.held_out.prompts} if config.held_out.every else set()
    kept = [number for number, caption in enumerate(real.prompts) if caption.strip() not in held_out]
    if not kept:
        raise ValueError(f"all {len(real.prompts)} clips of {config.real.path} have captions that are held out; take these out of held_out.prompts")
    if len(kept) < len(real.prompts):
        logger.warning("%d of %d clips have captions that are held-out prompts, and are not trained on", len(real.prompts) - len(kept), len(real.prompts))
    return Chosen(real, kept, is_choice=False) if len(kept) < len(real.prompts) else real


def _video_size(shape_CFHW, cell_px: int) -> tuple[int, int, int]:
    """Width, height and frames of a latent's video."""
    _, frames, height, width = shape_CFHW
    return width * cell_px, height * cell_px, 4 * (frames - 1) + 1


def _encode(config, real) -> tuple[dict, object]:
    """Contexts of every prompt, and of the negative one; the text encoder is gone afterwards."""
    from ..lora_train.evaluation import all_prompts
    from .text import PromptEncoder, load_text_encoder

    prompts = list(dict.fromkeys([*all_prompts(config), *(real.prompts if real else ())]))
    encoder = PromptEncoder(load_text_encoder(config.models.text_encoder))
    contexts = dict(zip(prompts, encoder.encode(prompts), strict=True))
    (negative,) = encoder.encode([config.sampling.negative_prompt])
    del encoder
    _free_memory()
    logger.info("encoded %d prompts", len(prompts))
    return contexts, negative


def _load_scorers(config, backbones: dict, device, dtype) -> dict:
    """Decoder and rewards by their name in `Parts`; None is what this run has no use for."""
    import torch

    from ..lora_train import needs
    from ..reward_models.spec import RewardModelSpec
    from . import latent_reward, reward_loading
    from .vae import load_decoder

    judge, pavrm = config.held_out.judge, needs.pavrm(config)
    files = {expert: getattr(config.models, expert) for expert in backbones}
    is_latent = needs.scores_latents(config)
    return {
        "decoder": load_decoder(config.models.vae, dtype=dtype, device=device) if needs.decodes(config) else None,
        "reward": None if is_latent else reward_loading.load(_spec(config.reward), device),
        # On the host: the engine brings its trunk to the device, or streams it.
        "latent_reward": latent_reward.load(_spec(pavrm), backbones, files, device=torch.device("cpu"), dtype=dtype) if pavrm else None,
        "motion": reward_loading.load(RewardModelSpec(kind="dynamic_degree", path=""), device) if config.guards.motion_floor > 0 else None,
        "judge": reward_loading.load(_spec(judge), device) if judge else None,
    }


def _spec(source):
    from ..reward_models.spec import RewardModelSpec

    return RewardModelSpec.from_dict(asdict(source))


def _log(event) -> None:
    if event.name == "step":
        held_out = f"  held-out {event.held_out:.4f}" if event.held_out is not None else ""
        numbers = f"reward {event.reward:.4f}  loss {event.loss:.4f}  grad {event.grad_norm:.3g}  sigma {event.sigma:.3f}  {event.seconds:.2f} s"
        logger.info("step %d/%d  %s  %s%s", event.step, event.steps, event.expert, numbers, held_out)
    elif event.name == "preparing":
        logger.info("%s: %d of %d", event.what, event.done, event.total)
    elif event.name in ("finished", "checkpoint"):
        logger.info("%s at step %d: %s", event.name, event.step, ", ".join(event.files))
    if event.name == "finished" and event.detail:
        logger.info("%s: %s", event.reason, event.detail)


def _sha256(path: str) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while part := file.read(1 << 24):
            digest.update(part)
    return digest.hexdigest()


def _free_memory() -> None:
    import comfy.model_management

    comfy.model_management.unload_all_models()
    gc.collect()
    comfy.model_management.soft_empty_cache()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""The training loop of a PAVRM: draw, gradient, update, validate, save. Its own loop because nothing is generated: no experts, decoder or LoRA.

Checkpoints, events and their order are those of `run.py`; a resumed run gives the same bytes as an uninterrupted one.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError

from . import checkpoint, events, recovery
from .objectives.pavrm import Batch, LatentScorer, PavrmObjective
from .pavrm_config import PavrmConfig
from .pavrm_data import Draws, Learnable
from .pavrm_trainee import PavrmTrainee, new_trainee
from .pavrm_validation import summary, validate
from .protocols import EventSink, StopRequested
from .run import NonFiniteError

logger = logging.getLogger("reward_lab")
VALIDATION_FOLDER = "samples"
_REMEDY = "Take a smaller batch, shape.blocks or videos, set gradient_checkpointing true, or close what else uses the card; then resume from the checkpoint"
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class PavrmParts:
    """What the loop is wired with.

    data_changed: see `learned_from.py`.
    write: `write(folder, step)` saves the scorer as it is now and returns the files. draw: draws a report as a picture at a path.
    """

    scorer: LatentScorer
    learnable: Learnable
    sink: EventSink
    stop_requested: StopRequested
    write: Callable[[Path, int], list[Path]]
    data_changed: str = ""
    draw: Callable[[dict[str, Any], Path], None] | None = None
    pause: Callable[[], None] = lambda: None
    clock: Callable[[], float] = time.time


def train(config: PavrmConfig, parts: PavrmParts, folder: Path, *, resume: bool = False) -> events.Finished:
    """Run the whole training.

    Args:
        config: checked settings.
        parts: network, data and connections; the network must be in training mode (host) for the whole call.
        folder: run folder, for checkpoints, reports and the PAVRM.
        resume: go on from the newest checkpoint there.

    Returns:
        The last event, which was also sent to the sink.

    Raises:
        NonFiniteError: the loss or gradient became NaN or infinite; names step, sigma and the last three accuracies.
        CardFullError: the card's memory ended twice in one step; a checkpoint was written.
        DamagedError: it ended when an update had begun to write; the last checkpoint is good.

    Whatever it raises, the PAVRM of the last checkpoint is written into the run folder first.
    """
    trainee = new_trainee(parts.scorer.groups(), config.optimiser, config.steps)
    objective = PavrmObjective(config, parts.scorer, Draws(parts.learnable, config.data, config.seed))
    progress = checkpoint.load_latest(folder, config, [trainee]) if resume else checkpoint.Progress()
    parts.sink(_started(config, parts, trainee, progress))
    has_held_out = bool(parts.learnable.held_out or parts.learnable.held_out_pairs)
    try:
        progress, reason = _trained(config, parts, objective, trainee, folder, progress, has_held_out=has_held_out)
    except Exception:
        _write_last(config, parts, folder, trainee)
        raise
    with trainee.averaged():
        own = parts.write(folder, progress.step)
        copies, note = checkpoint.written_also(lambda target: parts.write(target, progress.step), config.output_folder)
    files = [str(file.resolve()) for file in (*own, *copies)]
    finished = events.Finished(time=parts.clock(), step=progress.step, files=files, reason=reason, detail=note)
    parts.sink(finished)
    return finished


def _trained(
    config: PavrmConfig, parts: PavrmParts, objective: PavrmObjective, trainee: PavrmTrainee, folder: Path, progress: checkpoint.Progress, *, has_held_out: bool
) -> tuple[checkpoint.Progress, str]:
    """Make the updates that are left; returns where the run stands, saved, and why it ended."""
    if config.validate_every and has_held_out and progress.step == 0:
        progress = replace(progress, held_out_base=_validated(config, parts, objective, trainee, folder, 0)[0])
    reason, saved_at = "completed", progress.step
    for step in range(progress.step + 1, config.steps + 1):
        parts.pause()
        if parts.stop_requested():
            reason = "stopped"
            break
        begun, held_out = time.perf_counter(), None
        try:
            batch, grad_norm = _again(lambda: _updated(config, objective, trainee, progress, step), parts, objective, trainee, step)  # noqa: B023
            forwards = progress.forwards + config.optimiser.accumulate * config.batch
            progress = replace(progress, step=step, forwards=forwards, last_rewards=(*progress.last_rewards[-2:], batch.correct))
            if config.validate_every and has_held_out and (step % config.validate_every == 0 or step == config.steps):
                held_out = _validated(config, parts, objective, trainee, folder, step)
        except recovery.CardFullError:
            # What is in memory is the last update.
            if saved_at != progress.step:
                _save(config, parts, folder, trainee, progress)
            raise
        parts.sink(_step_event(config, parts, trainee, progress, batch, grad_norm, held_out, time.perf_counter() - begun))
        if config.checkpoint_every and step % config.checkpoint_every == 0:
            _save(config, parts, folder, trainee, progress)
            saved_at = step

    if saved_at != progress.step or not checkpoint.states(folder):
        _save(config, parts, folder, trainee, progress)
    return progress, reason


def _write_last(config: PavrmConfig, parts: PavrmParts, folder: Path, trainee: PavrmTrainee) -> None:
    """After a failure: the PAVRM of the newest checkpoint, since a state alone cannot be scored with."""
    try:
        if not checkpoint.states(folder):
            return
        # Read back: what is in memory may be half an update.
        step = checkpoint.load_latest(folder, config, [trainee]).step
        with trainee.averaged():
            files = parts.write(folder, step)
        logger.warning("the run ends here; the PAVRM of update %d, its last checkpoint, is in %s", step, files[0])
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:  # what ended the run is what must be told
        logger.warning("the PAVRM of the last checkpoint could not be written (%s); resume the run to get it", error)


def _again(compute: Callable[[], T], parts: PavrmParts, objective: PavrmObjective, trainee: PavrmTrainee, step: int) -> T:
    """Once more, with one latent at a time, where the card's memory ends."""

    def tell(detail: str) -> None:
        parts.sink(events.Replanned(time=parts.clock(), step=step, detail=detail))

    return recovery.again(compute, [trainee], objective.shrink, tell, step, _REMEDY)


def _updated(config: PavrmConfig, objective: PavrmObjective, trainee: PavrmTrainee, progress: checkpoint.Progress, step: int) -> tuple[Batch, float]:
    """Make update `step`; returns the means over its micro-batches and the gradient's norm."""
    batches = [objective.add_gradient(step, micro) for micro in range(config.optimiser.accumulate)]
    mean = Batch(**{name: sum(getattr(batch, name) for batch in batches) / len(batches) for name in ("loss", "correct", "sigma")})
    grad_norm = trainee.update(step) if math.isfinite(mean.loss) else math.nan
    if not math.isfinite(grad_norm):
        remedy = "smaller learning rates (optimiser.block_lr, optimiser.head_lr)"
        raise NonFiniteError(step, f"mean sigma {mean.sigma:.4f}", mean.loss, grad_norm, (*progress.last_rewards, mean.correct), "batch accuracies", remedy)
    return mean, grad_norm


def _started(config: PavrmConfig, parts: PavrmParts, trainee: PavrmTrainee, progress: checkpoint.Progress) -> events.Started:
    return events.Started(
        time=parts.clock(),
        steps=config.steps,
        first_step=progress.step,
        experts=[trainee.expert],
        reward=f"PAVRM, {config.data.quality}",
        parameters=sum(parameter.numel() for parameter in trainee.parameters.values()),
        device=str(parts.scorer.device),
        measure="accuracy",
        data_changed=parts.data_changed,
    )


def _step_event(
    config: PavrmConfig, parts: PavrmParts, trainee: PavrmTrainee, progress: checkpoint.Progress, batch: Batch, grad_norm: float,
    held_out: tuple[float, float] | None, seconds: float,
) -> events.Step:  # fmt: skip
    return events.Step(
        time=parts.clock(),
        step=progress.step,
        steps=config.steps,
        reward=batch.correct,
        loss=batch.loss,
        grad_norm=grad_norm,
        sigma=batch.sigma,
        seconds=seconds,
        expert=trainee.expert,
        learning_rate=trainee.learning_rate(progress.step),
        forwards=progress.forwards,
        held_out=held_out[0] if held_out else None,
        held_out_error=held_out[1] if held_out else None,
        held_out_base=progress.held_out_base if held_out else None,
    )


def _validated(
    config: PavrmConfig, parts: PavrmParts, objective: PavrmObjective, trainee: PavrmTrainee, folder: Path, step: int
) -> tuple[float, float]:
    """Write the report of a step, tell of it, and return accuracy and its standard error."""
    with trainee.averaged():
        # The average is in the weights' place by now: a second try writes nothing.
        report = _again(lambda: validate(config, objective, parts.learnable), parts, objective, trainee, step)
    accuracy, error = summary(report)
    target = folder / VALIDATION_FOLDER
    target.mkdir(parents=True, exist_ok=True)
    document = {"step": step, "quality": config.data.quality, "loss": config.loss, "accuracy": accuracy, "standard_error": error, **report}
    path = target / f"validation-{step:06d}.json"
    path.write_text(json.dumps(document, indent=1), encoding="utf-8")
    if parts.draw is not None:
        picture = path.with_suffix(".png")
        parts.draw(document, picture)
        files = [picture.relative_to(folder).as_posix()]
        parts.sink(events.Sample(time=parts.clock(), step=step, files=files, prompts=[f"accuracy {accuracy:.3f} on held-out videos, {path.name}"]))
    return accuracy, error


def _save(config: PavrmConfig, parts: PavrmParts, folder: Path, trainee: PavrmTrainee, progress: checkpoint.Progress) -> None:
    state = checkpoint.save_state(folder, config, [trainee], progress)
    checkpoint.prune(folder, config.keep_checkpoints)
    parts.sink(events.Checkpoint(time=parts.clock(), step=progress.step, files=[state.relative_to(folder).as_posix()]))

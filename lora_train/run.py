"""The training loop that all objectives share: draw, gradient, update, look, save.

An objective (`objectives/`) adds the gradient of one micro-batch to the LoRA in training; everything else is here. Memory, precision and devices are the
backbones' business.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from ..reward_models.base import RewardModel
from . import checkpoint, events, guards, recovery, rehearsal
from .config import TrainConfig
from .evaluation import Evaluation, evaluate, show_samples
from .flow import steps_of_expert
from .guards import Stop
from .lora.adapter import new_adapter
from .lora.linears import install
from .lora.targets import select_targets
from .prompts import derived_seed
from .protocols import Decoder, EventSink, LatentReward, Objective, Outcome, SampleWriter, Shrunk, StopRequested
from .real import Clips
from .rehearsal import MemoryMeter
from .rollout import ContextCache, Experts
from .trainee import Trainee, averaged, new_trainee


class NonFiniteError(RuntimeError):
    """The loss or its gradient is not finite; the last checkpoint is good."""

    def __init__(self, step: int, where: str, loss: float, grad_norm: float, recent: Sequence[float], what: str, remedy: str) -> None:
        """Args:
        where: noise level, and what is trained.
        recent: last rewards or accuracies, the present one last; `what` says which.
        remedy: what to make smaller.
        """
        shown = ", ".join(f"{value:.6g}" for value in recent[-3:])
        facts = f"step {step} at {where}: loss {loss}, gradient norm {grad_norm}; last three {what}: {shown}"
        super().__init__(f"{facts}. The last checkpoint is good; resume from it with {remedy}")


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What the loop is wired with; `pause` is called between updates and may wait, to leave the card to somebody else. `shrink` goes to the next smaller
    plan and says what changed, or None where there is none. With a `meter` the largest step is rehearsed before the first one.

    None is what the config has no use for: decoder and reward without videos, latent_reward without a PAVRM, motion and judge without their guards.
    clip_forwards: what the clips of `real` cost that the base model made for this run (`replay.py`). data_changed: see `learned_from.py`.
    """

    experts: Experts
    contexts: ContextCache
    sink: EventSink
    stop_requested: StopRequested
    decoder: Decoder | None = None
    reward: RewardModel | None = None
    latent_reward: LatentReward | None = None
    motion: RewardModel | None = None
    judge: RewardModel | None = None
    real: Clips | None = None
    clip_forwards: float = 0.0
    data_changed: str = ""
    writer: SampleWriter | None = None
    pause: Callable[[], None] = lambda: None
    shrink: Callable[[], Shrunk | None] | None = None
    meter: MemoryMeter | None = None
    base_sha256: Callable[[str], str] = lambda expert: ""
    clock: Callable[[], float] = time.time
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))


@dataclass(frozen=True, kw_only=True)
class Update:
    """One update, in means over its micro-batches; `grad_norm` before clipping."""

    expert: str
    reward: float
    loss: float
    kl: float
    sigma: float
    grad_norm: float


def train(config: TrainConfig, parts: Parts, objective: Objective, folder: Path, *, resume: bool = False) -> events.Finished:
    """Run the whole training.

    Args:
        config: checked settings.
        parts: models and connections; backbones must be in training mode (host) for the whole call.
        objective: what is learned.
        folder: run folder, for checkpoints and LoRAs.
        resume: go on from the newest checkpoint there; the result has the same bytes as an uninterrupted run.

    Returns:
        The last event, which was also sent to the sink.

    Raises:
        NonFiniteError: the loss or gradient became NaN or infinite; names step, sigma and the last three rewards.
        CardFullError: the card's memory ended twice in one step; a checkpoint was written.
    """
    with ExitStack() as installed:
        trainees, progress = _begin(config, parts, objective, folder, installed, resume=resume)
        otherwise, begun_run, saved_at = "completed", time.perf_counter(), progress.step
        # A run that a guard ended stays ended: resumed, it only writes its files again.
        for step in range(progress.step + 1, config.steps + 1) if progress.ended is None else ():
            parts.pause()
            if parts.stop_requested():
                otherwise = "stopped"
                break
            begun = time.perf_counter()
            try:
                update = recovery.twice(lambda: _updated(config, objective, trainees, progress, step), parts, trainees.values(), step)  # noqa: B023
                progress, stop = _after_update(config, parts, progress, step, update)
                is_last = step == config.steps or stop is not None
                held_out = None
                if config.held_out.every and (step % config.held_out.every == 0 or is_last):
                    held_out, progress, stop = _looked(config, parts, trainees, progress, stop)
                parts.sink(_step_event(config, parts, trainees, progress, update, held_out, time.perf_counter() - begun))
                if config.sample_every and (step % config.sample_every == 0 or is_last):
                    _shown(config, parts, trainees, step)
            except recovery.CardFullError:
                # What is in memory is the last update; half-made gradients are gone.
                if saved_at != progress.step:
                    _save(config, parts, folder, trainees, progress)
                raise
            progress = replace(progress, ended=stop)
            if config.checkpoint_every and step % config.checkpoint_every == 0:
                _save(config, parts, folder, trainees, progress)
                saved_at = step
            if stop is not None:
                break

        if saved_at != progress.step or not checkpoint.states(folder):
            _save(config, parts, folder, trainees, progress)
        if parts.meter is not None:
            rehearsal.report(parts, "run", parts.meter.peak_bytes(), time.perf_counter() - begun_run)
        finished = _finish(config, parts, folder, trainees, progress, progress.ended or Stop(reason=otherwise, detail=""))
    parts.sink(finished)
    return finished


def _begin(
    config: TrainConfig, parts: Parts, objective: Objective, folder: Path, installed: ExitStack, *, resume: bool
) -> tuple[dict[str, Trainee], checkpoint.Progress]:
    """LoRAs in place, as new or as the newest checkpoint has them; the largest step rehearsed, the base looked at."""
    trainees = {expert: _new_trainee(config, parts, expert, installed) for expert in config.trained_experts}
    progress = checkpoint.load_latest(folder, config, list(trainees.values())) if resume else checkpoint.Progress()
    parts.experts.count.total = progress.forwards if progress.step else parts.clip_forwards
    parts.sink(_started(config, parts, trainees, progress))
    if parts.stop_requested():
        return trainees, progress  # a resumed run does all this
    # What takes too much counts as out of memory: the next smaller plan is rehearsed in its place.
    recovery.twice(lambda: rehearsal.rehearse(config, parts, objective, trainees), parts, trainees.values(), progress.step)
    if progress.step == 0:
        progress = _look_at_base(config, parts, objective, trainees, progress)
    objective.use(progress.measured)
    return trainees, progress


def _new_trainee(config: TrainConfig, parts: Parts, expert: str, installed: ExitStack) -> Trainee:
    linears = parts.experts.backbones[expert].linears()
    paths = select_targets(linears, config.lora.targets, config.lora.skip)
    seed = derived_seed(config.seed, "lora", expert)
    adapter = new_adapter(linears, paths, rank=config.lora.rank, alpha=config.lora.effective_alpha, seed=seed, device=parts.device)
    return new_trainee(expert, adapter, installed.enter_context(install(linears, adapter)), config.optimiser, config.steps)


def _updated(config: TrainConfig, objective: Objective, trainees: Mapping[str, Trainee], progress: checkpoint.Progress, step: int) -> Update:
    """Make update `step` of the expert whose turn it is."""
    expert = config.trained_experts[(step - 1) % len(trainees)]
    outcomes = _add_gradients(config, objective, trainees, expert, step)
    reward, loss, kl, sigma = (sum(getattr(outcome, name) for outcome in outcomes) / len(outcomes) for name in ("reward", "loss", "kl", "sigma"))
    grad_norm = trainees[expert].update(step) if math.isfinite(loss) else math.nan
    if not math.isfinite(grad_norm):
        where, remedy = f"sigma {sigma:.4f} ({expert}-noise expert)", "a smaller learning rate (optimiser.lr) or reward_scale"
        raise NonFiniteError(step, where, loss, grad_norm, (*progress.last_rewards, reward), "rewards", remedy)
    return Update(expert=expert, reward=reward, loss=loss, kl=kl, sigma=sigma, grad_norm=grad_norm)


def _add_gradients(config: TrainConfig, objective: Objective, trainees: Mapping[str, Trainee], expert: str, step: int) -> list[Outcome]:
    """The gradient of update `step`, by micro-batches."""
    outcomes = []
    for micro in range(config.optimiser.accumulate):
        with ExitStack() as merged:
            for other in trainees.values():
                merged.enter_context(other.switch.merged())
            outcomes.append(objective.add_gradient(trainees[expert], step, micro))
    return outcomes


def _after_update(config: TrainConfig, parts: Parts, progress: checkpoint.Progress, step: int, update: Update) -> tuple[checkpoint.Progress, Stop | None]:
    """Progress with an update, and what the guards say of it."""
    watch, stop = guards.after_update(config, progress.watch, update.kl)
    rewards = (*progress.last_rewards[-2:], update.reward)
    return replace(progress, step=step, forwards=parts.experts.count.total, last_rewards=rewards, watch=watch, last_look=None), stop


def _look_at_base(
    config: TrainConfig, parts: Parts, objective: Objective, trainees: Mapping[str, Trainee], progress: checkpoint.Progress
) -> checkpoint.Progress:
    """Measure and show the base model, before the first update."""
    progress = replace(progress, measured=recovery.twice(objective.measure, parts, trainees.values(), 0))
    if config.held_out.every:
        base = recovery.twice(lambda: evaluate(config, parts, trainees), parts, trainees.values(), 0)
        progress = replace(progress, held_out_base=base.mean, watch=guards.first_look(progress.watch, base))
        for trainee in trainees.values() if config.remembers_looks else ():
            trainee.remember()
    if config.sample_every:
        _shown(config, parts, trainees, 0)
    return progress


def _looked(
    config: TrainConfig, parts: Parts, trainees: Mapping[str, Trainee], progress: checkpoint.Progress, stop: Stop | None
) -> tuple[Evaluation, checkpoint.Progress, Stop | None]:
    """Look at the held-out prompts and let the guards see it; what ended the run before the look stands."""
    # Averages are in the masters' place before a first try: a second one writes nothing.
    with averaged(trainees.values()):
        held_out = recovery.twice(lambda: evaluate(config, parts, trainees), parts, trainees.values(), progress.step)
    # Only looks that a longer run would take as well may count, or resuming would not give the same.
    if progress.step % config.held_out.every != 0:
        return held_out, replace(progress, last_look=held_out), stop
    watch, looked, is_best = guards.after_look(config, progress.watch, held_out, progress.step)
    for trainee in trainees.values() if is_best and config.remembers_looks else ():
        trainee.remember()
    return held_out, replace(progress, watch=watch), stop or looked


def _shown(config: TrainConfig, parts: Parts, trainees: Mapping[str, Trainee], step: int) -> None:
    with averaged(trainees.values()):
        recovery.twice(lambda: show_samples(config, parts, trainees, step), parts, trainees.values(), step)


def _started(config: TrainConfig, parts: Parts, trainees: Mapping[str, Trainee], progress: checkpoint.Progress) -> events.Started:
    sigmas = config.sampling.sigmas()
    return events.Started(
        time=parts.clock(),
        steps=config.steps,
        first_step=progress.step,
        experts=list(trainees),
        reward=config.reward.kind,
        parameters=sum(parameter.numel() for trainee in trainees.values() for parameter in trainee.adapter.parameters()),
        device=str(parts.device),
        boundary_step=len(steps_of_expert(sigmas, config.sampling.boundary, "high")),
        sampling_steps=config.sampling.steps,
        clips=len(parts.real.prompts) if parts.real else 0,
        clips_offered=parts.real.offered if parts.real else 0,
        data_changed=parts.data_changed,
    )


def _step_event(
    config: TrainConfig,
    parts: Parts,
    trainees: Mapping[str, Trainee],
    progress: checkpoint.Progress,
    update: Update,
    held_out: Evaluation | None,
    seconds: float,
) -> events.Step:
    return events.Step(
        time=parts.clock(),
        step=progress.step,
        steps=config.steps,
        **vars(update),
        seconds=seconds,
        learning_rate=trainees[update.expert].learning_rate(progress.step),
        forwards=progress.forwards,
        held_out=held_out.mean if held_out else None,
        held_out_error=held_out.standard_error if held_out else None,
        held_out_base=progress.held_out_base if held_out else None,
        held_out_motion=held_out.motion if held_out else None,
        held_out_judge=held_out.judge if held_out else None,
    )


def _save(config: TrainConfig, parts: Parts, folder: Path, trainees: Mapping[str, Trainee], progress: checkpoint.Progress) -> None:
    # The state last: where there is one, its LoRAs are whole, whenever the process was killed.
    files = []
    (folder / checkpoint.FOLDER).mkdir(parents=True, exist_ok=True)
    for expert, trainee in trainees.items():
        name = checkpoint.lora_file_name(config, expert).removesuffix(".safetensors")
        path = folder / checkpoint.FOLDER / f"{name}-step{progress.step:06d}.safetensors"
        checkpoint.save_lora(path, config, trainee, progress.step, parts.base_sha256(expert))
        files.append(path)
    files.insert(0, checkpoint.save_state(folder, config, list(trainees.values()), progress))
    checkpoint.prune(folder, config.keep_checkpoints)
    parts.sink(events.Checkpoint(time=parts.clock(), step=progress.step, files=[path.relative_to(folder).as_posix() for path in files]))


def _finish(config: TrainConfig, parts: Parts, folder: Path, trainees: Mapping[str, Trainee], progress: checkpoint.Progress, ended: Stop) -> events.Finished:
    """Write the LoRAs: those of the last update, or of the best look where the run was guarded."""
    is_asked = config.guards.keep_best or ended.reason not in ("completed", "stopped")
    has_best = progress.watch.looks > 0 and all(trainee.best for trainee in trainees.values())
    # A look at the very end that a longer run would not take is not remembered, but may be the best.
    last_look = progress.last_look
    is_last_best = last_look is not None and guards.after_look(config, progress.watch, last_look, progress.step)[2]
    use_best = is_asked and has_best and not is_last_best
    step = progress.watch.best_step if use_best else progress.step

    def write(target: Path) -> list[Path]:
        target.mkdir(parents=True, exist_ok=True)
        paths = {expert: target / checkpoint.lora_file_name(config, expert) for expert in trainees}
        for expert, path in paths.items():
            checkpoint.save_lora(path, config, trainees[expert], step, parts.base_sha256(expert), best=use_best)
        return list(paths.values())

    own = write(folder)
    copies, note = checkpoint.written_also(write, config.output_folder)
    files = [str(path.resolve()) for path in (*own, *copies)]
    best = "the best look" if step else "the base model: no look was better, so it changes nothing"
    which = f"The LoRA is that of update {step}, {best if use_best else 'the last one'}." if is_asked else ""
    detail = " ".join(filter(None, (ended.detail and f"{ended.detail[0].upper()}{ended.detail[1:]}.", which, note)))
    return events.Finished(time=parts.clock(), step=progress.step, files=files, reason=ended.reason, detail=detail)

"""The PAVRM half of the training process: reads the dataset, builds the network, draws reports, and runs `lora_train/pavrm_run.py`. See worker.py."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..lora_train.pavrm_config import PavrmConfig
from ..lora_train.pavrm_data import Example, Learnable, Pair, Sample, labelled, require_both_classes, require_pairs, split

logger = logging.getLogger("reward_lab")
LOSER = "loser/"
_NOT_VALIDATED = "no labelled video is held out, so there is no validation; raise data.validation_share, or label videos of data.validation"
_STATE_COPIES = 4  # weights, two moments, and an average where there is one


def train(config: PavrmConfig, folder: Path, stop: Callable[[], bool], resume: bool, device, dtype) -> None:
    """Train the run in `folder`.

    Args:
        dtype: of the matmuls; weights are fp32.

    Raises:
        ValueError: see `learnable_of` and `pavrm_training.load`; not enough disk.
    """
    from ..lora_train import checkpoint, learned_from
    from ..lora_train.pavrm_run import PavrmParts
    from ..lora_train.pavrm_run import train as run_training
    from ..runs import lease
    from ..runs.store import append_event, cut_after
    from . import pavrm_training, score_pictures
    from .training_mode import training_mode

    learnable = learnable_of(config, with_numbers=True)
    for note in learnable.notes:
        logger.info("%s", note)
    changed = learned_from.changes(folder, learnable.facts())
    if changed:
        logger.warning("%s", changed)
    model = pavrm_training.load(config, device=device, autocast=dtype)
    check_disk(config, folder, sum(value.numel() for group in model.groups().values() for value in group.values()), _weight_bytes(model))

    def sink(event) -> None:
        append_event(folder, event)
        _log(event)

    with training_mode():
        check_fit(config, model, learnable)
        parts = PavrmParts(
            scorer=model,
            learnable=learnable,
            data_changed=changed,
            sink=sink,
            stop_requested=stop,
            write=lambda target, step: model.write(
                target, step, name=config.name, dtype=config.save_dtype, with_upstream=config.save_upstream, metadata=_metadata(config)
            ),
            draw=score_pictures.draw_validation,
            pause=lambda: lease.wait_until_free(folder.parent, stop),
        )
        if resume:
            # Whatever could be refused has been: until here, the run that there is stands as it was.
            cut_after(folder, checkpoint.latest_step(folder))
        run_training(config, parts, folder, resume=resume)


def learnable_of(config: PavrmConfig, *, with_numbers: bool = False) -> Learnable:
    """Read what a run learns from, and hold videos out.

    Args:
        with_numbers: see `datasets.read`.

    Raises:
        ValueError: see `datasets.read`; labels of one class; pairs that name no video of the dataset, or too few videos.
    """
    from . import datasets

    data = config.data
    if data.validation and Path(data.validation).resolve() == Path(data.source).resolve():
        raise ValueError(
            f"data.validation is data.source, {data.source}, so that accuracy would be that of what was learned; leave it empty: validation_share holds "
            "videos out"
        )
    dataset = datasets.read(data.source, data.annotations, with_numbers=with_numbers)
    notes = list(dataset.notes)
    train_ids, held_ids = split(dataset.samples, data.validation_share, config.seed, by_caption=data.split_by_caption)
    held_samples: Sequence[Sample] = [sample for sample in dataset.samples if sample.id in held_ids]
    if data.validation:
        validation = datasets.read(data.validation, with_numbers=with_numbers)
        train_ids, held_samples = {sample.id for sample in dataset.samples}, validation.samples
        notes += [*validation.notes, *_seen_in_training(train_ids, held_samples)]
    if not train_ids:
        raise ValueError(f"all {len(dataset.samples)} videos were held out for validation; lower data.validation_share or add videos")
    if data.losers:
        losers = datasets.read(data.losers, with_numbers=with_numbers)
        return _against_losers(config, dataset.samples, losers.samples, held_samples, [*notes, *losers.notes])
    train_pairs, held_pairs = (), ()
    if data.pairs:
        train_pairs, held_pairs, more = _pairs(data.pairs, dataset.samples, held_ids)
        notes += more
    if not data.pairs or config.trains_labels:
        examples, more = labelled(dataset.samples, data)
        notes += more
        train = [example for example in examples if example.sample.id in train_ids]
        require_both_classes(train, data.quality, f"the training part of {data.source}")
        notes += require_pairs(train) if config.trains_pairs and not data.pairs else []
        held_out, _ = labelled(held_samples, data)
    else:
        train, held_out = [], labelled(held_samples, data)[0] if any(sample.labels for sample in held_samples) else []
    if not held_out and not held_pairs:
        notes.append(_NOT_VALIDATED)
    return Learnable(train=tuple(train), held_out=tuple(held_out), given_pairs=train_pairs, held_out_pairs=held_pairs, notes=tuple(notes))


def _seen_in_training(train_ids: set[str], held_samples: Sequence[Sample]) -> list[str]:
    """A note on ids that two datasets share. It refuses nothing: ids may be plain numbers, and a generated video has that of the real one it was made after."""
    shared = [sample.id for sample in held_samples if sample.id in train_ids]
    told = f"{len(shared)} of {len(held_samples)} videos of data.validation have ids of data.source ({', '.join(shared[:3])})"
    return [f"{told}: if they are the same videos, accuracy is that of what was learned"] if shared else []


def _against_losers(
    config: PavrmConfig, winners: Sequence[Sample], losers: Sequence[Sample], held_samples: Sequence[Sample], notes: Sequence[str]
) -> Learnable:
    """Every video of `data.source` as good, every one of `data.losers` as bad; held out by id or caption, or the labelled ones of `data.validation` instead.

    Two lists are two namespaces: a real video and a generated one of the same caption have one source_id, and HY-Video-PRFL's shipped config names one
    list twice. So a loser is called `loser/<id>`. Both of an id (or caption) are held out together, for they mostly show the same thing.
    """
    data = config.data
    train, held_out = [], labelled(held_samples, data)[0] if data.validation else []
    for samples, label, prefix in ((winners, 1, ""), (losers, 0, LOSER)):
        held_ids = set() if data.validation else split(samples, data.validation_share, config.seed, by_caption=data.split_by_caption)[1]
        for sample in samples:
            (held_out if sample.id in held_ids else train).append(Example(sample=replace(sample, id=f"{prefix}{sample.id}"), label=label))
    told = [*notes, f"pairs: any of {len(winners)} videos wins over any of {len(losers)} losers"]
    shared = {sample.id for sample in winners} & {sample.id for sample in losers}
    if shared:
        told.append(f"{len(shared)} losers have the id of a winner; the report calls losers {LOSER}<id>")
    require_both_classes(train, "pairs", f"the dataset {data.source} with {data.losers}")
    told += require_pairs(train)
    if not held_out:
        told.append(_NOT_VALIDATED)
    return Learnable(train=tuple(train), held_out=tuple(held_out), notes=tuple(told))


def _pairs(source: str, samples: Sequence[Sample], held_ids: set[str]) -> tuple[tuple[Pair, ...], tuple[Pair, ...], list[str]]:
    """Pairs to train on and to hold out. A pair with one video on each side is used by neither."""
    known = {sample.id: sample for sample in samples}
    train, held_out, strange, crossing = [], [], 0, 0
    rows = read_pairs(Path(source).expanduser())
    for winner, loser, share in rows:
        if winner not in known or loser not in known:
            strange += 1
            continue
        if known[winner].shape != known[loser].shape:
            raise ValueError(f"the pair {winner}, {loser} has latents of {list(known[winner].shape)} and {list(known[loser].shape)}; make them of one size")
        pair = Pair(winner=known[winner], loser=known[loser], share=share)
        inside = (winner in held_ids) + (loser in held_ids)
        crossing += inside == 1
        if inside != 1:
            (held_out if inside else train).append(pair)
    if not train:
        raise ValueError(
            f"{source} holds {len(rows)} pairs, {strange} of them on videos that the dataset lacks and {crossing} between trained and held-out videos; none is "
            "left to train on: preprocess the sweep's videos, or lower data.validation_share"
        )
    notes = [f"{source}: {len(train)} pairs to train on, {len(held_out)} held out"]
    if crossing:
        notes.append(f"{crossing} pairs have one video on each side of the split and are used by neither")
    if strange:
        notes.append(f"{strange} pairs name videos that the dataset lacks")
    return tuple(train), tuple(held_out), notes


def read_pairs(path: Path) -> list[tuple[str, str, float]]:
    """Winner, loser and share of wins, from `votes.sqlite` or JSONL of `{"winner", "loser", "share"?}`.

    Raises:
        ValueError: missing, or a line is no pair.
    """
    if not path.is_file():
        raise ValueError(f"there is no file {path} with pairs; give votes.sqlite of a sweep, or JSONL")
    if path.suffix == ".sqlite":
        from ..testlab import votes

        return votes.read(path).pairs()
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").splitlines(), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            winner, loser, share = str(entry["winner"]), str(entry["loser"]), float(entry.get("share", 1.0))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f'{path} line {number} is no pair ({error}); write {{"winner": id, "loser": id}}') from error
        if not 0 <= share <= 1 or winner == loser:
            raise ValueError(f"{path} line {number} has share {share} of {winner} against {loser}; give two videos and a share from 0 to 1")
        rows.append((winner, loser, share))
    return rows


def check_fit(config: PavrmConfig, model, learnable: Learnable) -> None:
    """Score a video of each kind before anything is trained: what the network cannot take must not end the run when its turn comes.

    Raises:
        ValueError: text of another width, a caption that is not there, another latent, no image condition; names the video and how many are like it.
    """
    import torch

    samples = {example.sample.id: example.sample for example in (*learnable.train, *learnable.held_out)}
    samples |= {sample.id: sample for pair in (*learnable.given_pairs, *learnable.held_out_pairs) for sample in (pair.winner, pair.loser)}
    kinds: dict[tuple, list[Sample]] = {}
    for sample in samples.values():
        kinds.setdefault((sample.shape[0], sample.has_condition, *sorted(sample.text_widths.items())), []).append(sample)
    for alike in kinds.values():
        video = alike[0].read()
        for name in ("short", "long") if config.data.caption == "either" else (config.data.caption,):
            try:
                with torch.no_grad():
                    latent = video.latent_CFHW[None].to(model.device)
                    model.logits(latent, torch.zeros(1, dtype=torch.long, device=model.device), [video], [name])
            except ValueError as error:
                raise ValueError(f"{alike[0].id}, and {len(alike) - 1} like it of {len(samples)} videos: {error}") from error


def check_disk(config: PavrmConfig, folder: Path, trained: int, weight_bytes: int) -> None:
    """Refuse a run whose checkpoints do not fit.

    Raises:
        ValueError: not enough free space.
    """
    wanted_bytes = (config.keep_checkpoints + 1) * trained * 4 * (_STATE_COPIES if config.optimiser.ema_decay else _STATE_COPIES - 1) + 3 * weight_bytes
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    free_bytes = shutil.disk_usage(existing).free
    if free_bytes < wanted_bytes:
        raise ValueError(
            f"checkpoints and files of this run need {wanted_bytes / 1e9:.2f} GB, but {existing} has {free_bytes / 1e9:.2f} GB free; make room, or lower "
            "keep_checkpoints or shape.train_blocks"
        )


def _weight_bytes(model) -> int:
    return sum(value.numel() * 4 for value in model.weights().values())


def _metadata(config: PavrmConfig) -> dict[str, str]:
    return {"quality": config.data.quality, "loss": config.loss, "trunk_file": Path(config.models.trunk).name, "config_sha256": config.digest()}


def _log(event: Any) -> None:
    if event.name == "step":
        held_out = f"  held-out accuracy {event.held_out:.4f}" if event.held_out is not None else ""
        numbers = f"accuracy {event.reward:.3f}  loss {event.loss:.4f}  grad {event.grad_norm:.3g}  sigma {event.sigma:.3f}  {event.seconds:.2f} s"
        logger.info("step %d/%d  %s%s", event.step, event.steps, numbers, held_out)
    elif event.name in ("finished", "checkpoint"):
        logger.info("%s at step %d: %s", event.name, event.step, ", ".join(event.files))

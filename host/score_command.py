"""`lab.py score`, `score-latent` and `pavrm-lora`: options as JSON in, one JSON document or a table out. Entry of a process started by launch.py.

Exit status 0, or 2 when the input is refused; with `--json` the document then has `"verdict": "refused"` and the sentence as `reason`. Status 1 and the
verdict "incomplete": there are scores, but `errors` lists what could not be scored or measured.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import sys
from pathlib import Path
from typing import Any

from ..reward_models.spec import ALIASES, KINDS, OPTIONS, OPTIONS_OF, PATHLESS, RewardModelSpec, read_rows, refuse_unknown

INCOMPLETE, REFUSED = 1, 2
# Options that name what is read, and what is written.
_INPUTS = ("weights", "config", "clip", "detector", "landmarks", "reference", "prompts", "trunk", "query", "head", "generator", "input")
_OUTPUTS = ("csv", "gradients", "results", "baseline", "tensors", "out")
# What a folder of inputs may hold of ours from an earlier call.
_TABLES = (".csv", ".json", ".jsonl")


def main(argv: list[str]) -> int:
    """Run `score`, `score-latent` or `pavrm-lora` (first argument) with the options in the second, a JSON object; returns the exit status."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s", stream=sys.stderr)
    options = json.loads(argv[1])
    try:
        _check_outputs(options)
        document = {"score": _score, "score-latent": _score_latent, "pavrm-lora": _pavrm_lora}[argv[0]](options)
    except (ValueError, OSError) as error:
        print(f"Error: {error}", file=sys.stderr)
        if options.get("json"):
            print(json.dumps({"verdict": "refused", "reason": str(error)}))
        return REFUSED
    errors = document.get("errors")
    if options.get("json") or "videos" not in document:
        print(json.dumps({"verdict": "incomplete" if errors else "ok", **document}, allow_nan=False))
    else:
        print(_table(document))
    for error in errors or ():
        print(f"Error: {error['name']}: {error['reason']}", file=sys.stderr)
    return INCOMPLETE if errors else 0


def _check_outputs(options: dict[str, Any]) -> None:
    """Make the folders of files that are written at the end, so that a place that cannot be written to costs no finished scores.

    Raises:
        ValueError: such a place, a file that is read, or one place for two of them.
    """
    inputs = [Path(value) for value in (*options.get("paths", ()), *(options.get(name) for name in _INPUTS)) if value]
    outputs = {name: Path(options[name]) for name in _OUTPUTS if options.get(name)}
    names_of: dict[Path, str] = {}
    for name, path in outputs.items():
        other = names_of.setdefault(path.resolve(), name)
        if other != name:
            raise ValueError(f"--{other} and --{name} are both {path}, and the second would replace the first; choose another place for one of them.")
        if any(_is_part_of(path, given) for given in inputs):
            raise ValueError(f"--{name} {path} is one of the files that are read, and would be lost; choose another place.")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            is_writable = os.access(path.parent, os.W_OK) and not path.is_dir()
        except OSError:
            is_writable = False
        if not is_writable:
            raise ValueError(f"--{name} {path} cannot be written: it is a folder, or its folder cannot be made or written to; choose another place.")


def _is_part_of(path: Path, given: Path) -> bool:
    """Whether a file that is there is an input, or lies in a folder of inputs."""
    try:
        is_in_folder = given.is_dir() and path.resolve().is_relative_to(given.resolve()) and path.suffix.lower() not in _TABLES
        return path.is_file() and (is_in_folder or path.samefile(given))
    except OSError:
        return False


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() and os.environ.get("REWARD_LAB_CPU") != "1" else "cpu"


def _dtype(name: str | None):
    import torch

    return {None: torch.float32, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[name]


def _spec(options: dict[str, Any]) -> RewardModelSpec:
    kind = ALIASES.get(options["kind"], options["kind"])
    if kind == "pavrm":
        raise ValueError("A PAVRM scores latents, not frames: use `lab.py score-latent`.")
    if kind not in KINDS:
        raise ValueError(f"--kind {kind!r} is unknown; choose one of {', '.join(KINDS)}.")
    _refuse_foreign(kind, options)
    if kind == "mix":
        return _mix_spec(options)
    if not options.get("weights") and kind not in PATHLESS:
        raise ValueError(f"--kind {kind} needs --weights FILE.")
    given = {name: options[name] for name in OPTIONS_OF[kind] if _is_given(options, name)}
    if "antialias" in given:
        given["antialias"] = given["antialias"] == "on"
    return RewardModelSpec(kind=kind, path=options.get("weights") or "", options=given)


def _is_given(options: dict[str, Any], name: str) -> bool:
    return options.get(name) is not None and options[name] is not False


def _refuse_foreign(kind: str, options: dict[str, Any]) -> None:
    """Options that would change nothing are refused: whoever gives one believes that it does.

    Raises:
        ValueError: such an option, and why it has no effect.
    """
    known = ("config",) if kind == "mix" else OPTIONS_OF[kind]
    foreign = [name for name in OPTIONS if name not in known and _is_given(options, name)]
    if kind in PATHLESS:
        # A mix gives its dtype to every reward; a measure has no matrices.
        foreign += [name for name in ("weights", *(() if kind == "mix" else ("dtype",))) if _is_given(options, name)]
    if kind == "face" and options.get("dtype") not in (None, "fp32"):
        raise ValueError(f"--dtype {options['dtype']} cannot be set for face, whose recogniser runs in fp32; leave it out.")
    if foreign:
        reason = "each row of the mix has files and options of its own" if kind == "mix" else f"its options are {', '.join(known) or 'none'}"
        raise ValueError(f"{', '.join(f'--{name}' for name in foreign)} cannot be set for {kind}; {reason}.")


def _mix_spec(options: dict[str, Any]) -> RewardModelSpec:
    """A mix is described by a JSON file, {"rows": [...]} with rows as `spec.read_rows` takes them; paths start beside it."""
    if not options.get("config"):
        raise ValueError('--kind mix needs --config MIX.json: {"rows": [{"reward": {"kind": ..., "path": ...}, "weight": 1, "centre": 0, "scale": 1}, ...]}.')
    path = Path(options["config"])
    try:
        document = json.loads(path.read_text(encoding="utf-8-sig"))
        refuse_unknown(document, ("rows",), "The description of a mix")
        rows = read_rows(document.get("rows"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is not the description of a reward mix: {error}") from error
    here = [dataclasses.replace(row, reward=row.reward.beside(path.parent)).to_dict() for row in rows]
    return RewardModelSpec(kind="mix", path="", options={"rows": here})


def _score(options: dict[str, Any]) -> dict[str, Any]:
    import torch

    from . import media, score_files, score_settings, score_store, video_prompts

    spec = _spec(options)
    settings, about_files = score_settings.described(spec), score_settings.about_files(spec)
    gradients: dict[str, torch.Tensor] | None = {} if options.get("gradients") else None
    with torch.inference_mode(False), score_files.collected_warnings() as warnings:
        clips = media.find_clips(options["paths"], is_one_video=bool(options.get("as_video")))
        if options.get("baseline") and len(clips) < 2:
            raise ValueError("--baseline measures how far rewards spread and needs at least 2 videos (better 16 or more), got 1; give more, or leave it out.")
        prompts = _prompts(options, spec, clips, video_prompts.read)
        job = score_files.Job(clips=clips, prompts=prompts, spec=spec, device=_device(), dtype=_dtype(options.get("dtype")))
        store = score_store.ScoreStore(_store_path(options, clips), is_read=not options.get("no_resume"))
        scores = score_files.score(job, store, score_files.progress_bar(), gradients)
    videos, errors = scores.videos, list(scores.errors)
    if options.get("csv"):
        score_store.write_csv(options["csv"], videos)
    if gradients is not None:
        from safetensors.torch import save_file

        save_file(gradients, options["gradients"])
    document = {"kind": spec.kind, **settings, "videos": videos, "warnings": list(dict.fromkeys([*about_files, *warnings, *_kept_warnings(videos)]))}
    if options.get("baseline"):
        try:
            document["baseline"] = _baseline(options["baseline"], videos)
        except (ValueError, OSError) as error:
            errors.append({"name": "--baseline", "path": options["baseline"], "reason": str(error)})
    return {**document, "errors": errors}


def _kept_warnings(videos: list[dict[str, Any]]) -> list[str]:
    return [message for video in videos for message in video.get("warnings", [])]


def _store_path(options: dict[str, Any], clips: list) -> str | None:
    """Where scores are kept: a named file, else one in the cache when there is more than a handful of work to lose."""
    if options.get("results"):
        return options["results"]
    if options.get("no_resume") or not any(Path(path).is_dir() for path in options["paths"]):
        return None
    from .score_store import key_of

    folder = os.environ.get("REWARD_LAB_SCORES")
    return str(Path(folder) / f"{key_of([str(Path(path).resolve()) for path in options['paths']])[:24]}.jsonl") if folder else None


def _prompts(options: dict[str, Any], spec: RewardModelSpec, clips: list, read) -> list[str]:
    if options.get("prompts"):
        return read(options["prompts"], [clip.name for clip in clips], [clip.path.absolute() for clip in clips])
    if options.get("prompt") is not None:
        return [options["prompt"]] * len(clips)
    if not spec.reads_text:
        return [""] * len(clips)
    raise ValueError(f"{spec.kind} compares videos with a text: give --prompt TEXT or --prompts FILE.")


def _baseline(path: str, videos: list[dict[str, Any]]) -> dict[str, Any]:
    """Centre and scale of every reward over these videos, written as JSON."""
    from ..reward_models.mix import measure_baseline

    measured = measure_baseline(video["per_video"] for video in videos)
    values = {"centre": measured.centre, "scale": measured.scale, "videos": measured.videos}
    Path(path).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    return values


def _score_latent(options: dict[str, Any]) -> dict[str, Any]:
    from . import latent_files

    return latent_files.score(options, _device(), _dtype(options.get("dtype")))


def _pavrm_lora(options: dict[str, Any]) -> dict[str, Any]:
    from . import pavrm_lora

    heads = {name: options.get(name) for name in ("query", "head")}
    return pavrm_lora.convert(options["trunk"], options["generator"], options["out"], rank=options["rank"], overwrite=bool(options.get("force")), **heads)


def _table(document: dict[str, Any]) -> str:
    """The scores for people: a line per video."""
    lines = [f"{document['kind']}  {document.get('options', '')}"]
    for video in document["videos"]:
        if "logit" in video:
            lines.append(f"{video['name']}: sigma {video['sigma']:.3f}, logit {video['logit']:.4f}, probability {video['probability']:.4f}")
        else:
            best, worst = video["best_frame"], video["worst_frame"]
            ends = f"best frame {best} ({video['per_frame'][best]:.4f}), worst frame {worst} ({video['per_frame'][worst]:.4f})"
            lines.append(f"{video['name']}: {video['per_video']:.4f} over {len(video['per_frame'])} frames; {ends}")
    return "\n".join(lines)

"""The command line's `lab.py lora`: inspect, apply, convert, merge, extract, download. Exit status 0, or 2 when refused; `--json` prints one object.

A new verb is one function for its arguments, one that runs it and returns what to print, and one line in VERBS.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import comfy.model_management
from PIL import Image

from .lora_apply import apply_and_run, expert_to_take, parse_row
from .lora_base import base_from_file
from .lora_convert import convert
from .lora_download import download
from .lora_extract import DTYPES, extract
from .lora_inspect import inspect_files
from .lora_keys import LAYOUTS
from .lora_merge import MergeSettings, merge
from .merge_plan import DTYPES as MERGE_DTYPES
from .official_loras import OFFICIAL, STRENGTH_NOTE, official_named
from .rounding import ROUNDINGS
from .weight_source import open_source

REFUSED = 2


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a verb prints: text for people, data for programs, and whether it was refused."""

    text: str
    data: dict[str, Any]
    is_refused: bool = False


class _Parser(argparse.ArgumentParser):
    """A parser whose complaints are refusals like any other, so that a program that reads JSON gets them too."""

    def error(self, message: str) -> None:
        raise ValueError(f"{self.prog}: {message}. See {self.prog} --help.")


def main(argv: list[str]) -> int:
    """Run one verb and return the exit status."""
    try:
        options = _parse(argv)
        answer = VERBS[options.verb][1](options)
    except (ValueError, OSError) as error:
        answer = Answer(text=f"Error: {error}", data={"verdict": "refused", "reason": str(error)}, is_refused=True)
    if "--json" in argv:
        print(json.dumps(answer.data, allow_nan=False))
    else:
        print(answer.text, file=sys.stderr if answer.is_refused else sys.stdout)
    return REFUSED if answer.is_refused else 0


def run_inspect(options: argparse.Namespace) -> Answer:
    """Say what is in a LoRA file and what a model would take of it; with a second file, how the two differ."""
    if options.image:
        _check_image(Path(options.image))
    bases = [base_from_file(Path(options.base))] if options.base else []
    found = inspect_files([Path(file) for file in options.files], bases)
    if options.image:
        found.picture.save(options.image)
    refused = [report for report in found.reports if report.verdict == "refused"]
    return Answer(text=found.text(), data=found.to_dict(), is_refused=bool(refused))


def run_apply(options: argparse.Namespace) -> Answer:
    """Run one fp32 forward of a model with LoRA rows on given inputs, and write what it predicts."""
    done = apply_and_run(Path(options.base), options.row, Path(options.inputs), Path(options.out), overwrite=options.force)
    rows = [row.to_dict() for row in done.rows]
    data = {"verdict": "ok", "file": str(done.path), "expert": done.expert, "outputs": list(done.outputs), "rows": rows, "report": done.report}
    return Answer(text=f"{done.report}\n{done.path}: {', '.join(done.outputs)}", data=data)


def run_convert(options: argparse.Namespace) -> Answer:
    """Rewrite a LoRA file in another key layout."""
    done = convert(Path(options.source), Path(options.target), options.layout, overwrite=options.force)
    lines = [f"{done.path}: {done.keys} keys, {done.source_layout} -> {done.layout}", *(f"  {note}" for note in done.notes)]
    return Answer(
        text="\n".join(lines),
        data={
            "verdict": "ok",
            "file": str(done.path),
            "keys": done.keys,
            "source_layout": done.source_layout,
            "layout": done.layout,
            "notes": list(done.notes),
        },
    )


def run_merge(options: argparse.Namespace) -> Answer:
    """Merge LoRA rows into a model file, which is written anew; an interrupted run is taken up where it stopped."""
    if not 0.0 <= options.shard_gb < math.inf:
        raise ValueError(f"--shard-gb is {options.shard_gb:g}; it must be a size in GB, or 0 for one file.")
    settings = MergeSettings(
        dtype=options.dtype, rounding=options.rounding, seed=options.seed, shard_bytes=int(options.shard_gb * 1e9), overwrite=options.force
    )
    base, parsed = Path(options.base), [parse_row(row) for row in options.row]
    for text, row in zip(options.row, parsed, strict=True):
        if row.application == "bypass":
            raise ValueError(f"{text!r} asks for bypass, but a file can only have merged rows. Write FILE:STRENGTH.")
    expert = expert_to_take(base.name, open_source(base).metadata, parsed)
    rows = [replace(parse_row(row, expert), blocks=options.blocks) for row in options.row]
    device = comfy.model_management.get_torch_device()
    done = merge(base, rows, Path(options.out), settings, expert=expert, device=device, progress=_progress)
    return Answer(text=done.text(), data={"verdict": "ok", "expert": expert, **done.to_dict()})


def run_extract(options: argparse.Namespace) -> Answer:
    """Make a LoRA from a trained full model and the base it was trained from."""
    done = extract(
        Path(options.full),
        Path(options.base),
        Path(options.target),
        rank=options.rank,
        layout_name=options.layout,
        dtype=options.dtype,
        overwrite=options.force,
        device=comfy.model_management.get_torch_device(),
        progress=_progress,
    )
    data = {name: value for name, value in done.__dict__.items() if name != "path"}
    data.update(verdict="ok", file=str(done.path), worst=[list(entry) for entry in done.worst], missing=list(done.missing))
    return Answer(text=done.text(), data=data)


def run_download(options: argparse.Namespace) -> Answer:
    """Download an official reward LoRA; without a name, list them."""
    if not options.name:
        lines = [f"{lora.name}  {lora.reward}, {lora.expert} noise, {lora.steps} steps{'; ' + lora.advice if lora.advice else ''}" for lora in OFFICIAL]
        return Answer(text="\n".join([*lines, STRENGTH_NOTE]), data={"verdict": "ok", "official": [lora.to_dict() for lora in OFFICIAL]})
    lora = official_named(options.name)
    done = download(lora, Path(options.to))
    state = "was there already and is whole" if done.was_there else "is downloaded and checked"
    checked = f"sha256 {done.sha256} (from the hub)" if done.sha256 else "hash unknown"
    lines = [f"{done.path} {state}: {done.size_bytes} bytes, {checked}", *(f"  warning: {warning}" for warning in done.warnings)]
    data = {
        "verdict": "ok",
        "file": str(done.path),
        "bytes": done.size_bytes,
        "sha256": done.sha256,
        "was_there": done.was_there,
        "warnings": list(done.warnings),
    }
    return Answer(text="\n".join(lines), data=data)


def arguments_inspect(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", nargs="+", metavar="FILE", help="a LoRA file; a second one is compared with it")
    parser.add_argument("--base", metavar="MODEL", help="diffusion model to compare with: a safetensors file, an index of shards, or their folder")
    parser.add_argument("--image", metavar="PNG", help="also write the heat map")


def arguments_apply(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--base", required=True, metavar="MODEL", help="diffusion model file")
    parser.add_argument(
        "--row", action="append", default=[], metavar="FILE:STRENGTH[:merge|bypass]", help="a LoRA with its strength; may be given several times"
    )
    parser.add_argument("--inputs", required=True, metavar="IN", help="safetensors with latent, timestep, context and, if the model takes it, concat")
    parser.add_argument("--out", required=True, metavar="OUT", help="safetensors file to write")
    parser.add_argument("--force", action="store_true", help="replace OUT when it is there")


def arguments_convert(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="IN", help="a LoRA file in any layout")
    parser.add_argument("target", metavar="OUT", help="the file to write")
    parser.add_argument("--layout", required=True, help=f"one of {', '.join(layout.name for layout in LAYOUTS)}")
    parser.add_argument("--force", action="store_true", help="replace OUT when it is there")


def arguments_merge(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--base", required=True, metavar="MODEL", help="diffusion model: a safetensors file, an index of shards, or their folder")
    parser.add_argument("--row", action="append", default=[], metavar="FILE:STRENGTH", help="a LoRA with its strength; may be given several times")
    parser.add_argument("--blocks", default="", metavar="RULES", help="strengths per block for all rows, such as 0-9:0.5, ffn:0.8")
    parser.add_argument("--out", required=True, metavar="OUT", help="safetensors file to write")
    parser.add_argument("--dtype", default="same", choices=list(MERGE_DTYPES), help="type of the numbers (default: as in the base)")
    parser.add_argument("--rounding", default="nearest", choices=ROUNDINGS, help="stochastic keeps small changes on average (default: nearest)")
    parser.add_argument("--seed", type=int, default=0, help="of the stochastic rounding (default: 0)")
    parser.add_argument("--shard-gb", type=float, default=0.0, metavar="GB", help="write shards of at most this size and an index (default: one file)")
    parser.add_argument("--force", action="store_true", help="replace OUT when it is there")


def arguments_extract(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("full", metavar="FULL", help="the trained model: a safetensors file, an index of shards, or their folder")
    parser.add_argument("base", metavar="BASE", help="the model it was trained from, in the same forms")
    parser.add_argument("target", metavar="OUT", help="the LoRA to write")
    parser.add_argument("--rank", type=int, required=True, help="rank of every layer")
    parser.add_argument("--layout", default="videox-fun", help="key layout (default: videox-fun)")
    parser.add_argument("--dtype", default="bf16", choices=list(DTYPES), help="type of the numbers (default: bf16)")
    parser.add_argument("--force", action="store_true", help="replace OUT when it is there")


def arguments_download(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", metavar="NAME", help="an official reward LoRA, such as high-noise-HPS2.1; left out: list them")
    parser.add_argument("--to", required=True, metavar="FOLDER", help="where to put it")


Verb = tuple[Callable[[argparse.ArgumentParser], None], Callable[[argparse.Namespace], Answer]]
VERBS: dict[str, Verb] = {
    "inspect": (arguments_inspect, run_inspect),
    "apply": (arguments_apply, run_apply),
    "convert": (arguments_convert, run_convert),
    "merge": (arguments_merge, run_merge),
    "extract": (arguments_extract, run_extract),
    "download": (arguments_download, run_download),
}


def _parse(argv: list[str]) -> argparse.Namespace:
    """Read the arguments."""
    parser = _Parser(prog="lab.py lora", description=__doc__.split("\n\n")[0])
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for name, (add_arguments, run) in VERBS.items():
        sub = verbs.add_parser(name, help=run.__doc__, description=run.__doc__)
        sub.add_argument("--json", action="store_true", help="print one JSON object")
        add_arguments(sub)
    options = parser.parse_args(argv)
    if options.verb == "inspect" and len(options.files) > 2:
        parser.error("inspect takes one file, or two to compare")
    return options


def _check_image(path: Path) -> None:
    """Refuse a picture that could not be written, before the files are read."""
    if path.suffix.lower() not in Image.registered_extensions():
        raise ValueError(f"{path.name} must end in .png, .jpg or another kind of picture.")
    if not path.absolute().parent.is_dir() or path.is_dir():
        raise ValueError(f"{path} cannot be written: {'it is a folder' if path.is_dir() else 'its folder does not exist'}.")


def _progress(done: int, of: int) -> None:
    """Show how far a long verb is, on a terminal only; in weights or in bytes."""
    if sys.stderr.isatty():
        print(f"\r{100 * done // max(of, 1)} %", end="\n" if done == of else "", file=sys.stderr, flush=True)

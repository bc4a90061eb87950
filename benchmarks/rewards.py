"""How fast HPSv2.1 scores frames, beside the bare open_clip image tower and beside the hpsv2 package's way of one picture at a time.

    python lab.py bench rewards [--size ViT-H-14] [--frames 81] [--package FOLDER] [--out benchmarks/results/NAME.json]

Weights are random: time does not depend on them. Everything is measured in one run, in turns, so that ratios mean something where times do not:
- `ours`: `score_in_chunks` of float frames of any size, text cached: check, letterbox, normalise, tower, cosine;
- `bare_tower`: open_clip's own image tower, same dtype and chunk, on tensors that are prepared already;
- `per_picture`: what hpsv2/img_score.py does for every picture of a list (read a file, prepare it, tokenise, both towers, all logits), written anew from
  tgxs002/HPSv2@866735e:hpsv2/img_score.py (Apache-2.0) with this pack's own network; without the reading of the checkpoint that precedes each call;
- `package_list`, `package_call`: the package itself, where `--package` names a folder with it (`pip install --no-deps --target FOLDER hpsv2x clint args`):
  one call with a list of files, and one call per file, each of which reads the checkpoint.
A figure for 81 frames is made with 81 frames; nothing is extrapolated. Of several repeats the fastest counts: other work on the machine only adds. Each
repeat begins with another of the ways, so that none always runs on a warmer or fuller machine. On a CPU the ratios are of the process's CPU time, which
other work does not lengthen by being scheduled in between; wall times stand beside them. `bounds` tells what the matmul rate of the device allows at all.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg, convert_weights_to_lp
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ..reward_models import clip
from ..reward_models.base import score_in_chunks
from ..reward_models.loader import load_reward_model
from . import report

PROMPT = "a red square moves over green hills, oil painting"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MOST_OF_TOWER, LEAST_OVER_PACKAGE = 1.1, 10
_MATMUL_SIDE = {"cuda": 8192, "cpu": 2048}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """What is measured.

    Attributes:
        config: open_clip model config.
        frames, height_px, width_px: of the video.
        chunk: frames in one pass.
        repeats: times that everything is measured.
        device, dtype: of the towers.
        package: folder with the hpsv2 package, or None.
        singles: pictures that are scored one by one, at most `frames`.
    """

    config: dict[str, Any]
    frames: int
    height_px: int
    width_px: int
    chunk: int
    repeats: int
    device: str = "cpu"
    dtype: str = "float32"
    package: Path | None = None
    singles: int = 8


def pictures(case: Case) -> torch.Tensor:
    """A video [1, F, 3, H, W] in [0,1] of smooth waves, multiples of 1/255, so that files hold the same numbers."""
    rows, columns = torch.meshgrid(torch.linspace(0, 9, case.height_px), torch.linspace(0, 14, case.width_px), indexing="ij")
    frames = [
        torch.stack([(rows + index / 3).sin() * columns.cos(), (columns - index / 5).sin(), (rows * columns / 5 + index).cos()]) for index in range(case.frames)
    ]
    return ((torch.stack(frames) * 0.5 + 0.5) * 255).round()[None] / 255


def write_files(frames_1FCHW: torch.Tensor, folder: Path) -> list[str]:
    """The frames as PNG files."""
    names = []
    for index, frame_CHW in enumerate(frames_1FCHW[0]):
        names.append(str(folder / f"{index:03}.png"))
        Image.fromarray((frame_CHW * 255).round().byte().permute(1, 2, 0).numpy()).save(names[-1], compress_level=1)
    return names


def random_checkpoint(config: dict[str, Any], path: Path) -> None:
    """A file in the published form, `{'state_dict': fp16}`, with open_clip's own initialisation."""
    torch.manual_seed(0)
    network = CLIP(config["embed_dim"], CLIPVisionCfg(**config["vision_cfg"]), CLIPTextCfg(**config["text_cfg"]))
    state = {name: value.half() for name, value in network.state_dict().items() if name != "attn_mask"}
    torch.save({"state_dict": state}, path)


def bare_tower(config: dict[str, Any], checkpoint: Path, case: Case) -> torch.nn.Module:
    """open_clip's image tower, built by open_clip, cast by open_clip."""
    network = CLIP(config["embed_dim"], CLIPVisionCfg(**config["vision_cfg"]), CLIPTextCfg(**config["text_cfg"]), cast_dtype=DTYPES[case.dtype])
    network.load_state_dict(torch.load(checkpoint, weights_only=True)["state_dict"], strict=False)
    if case.dtype != "float32":
        convert_weights_to_lp(network, DTYPES[case.dtype])
    return network.visual.to(case.device).eval().requires_grad_(False)


def per_picture(model: Any, files: list[str]) -> list[float]:
    """See the module's docstring."""
    scores = []
    for file in files:
        pixels_HWC = torch.from_numpy(np.array(Image.open(file).convert("RGB")))
        prepared = model.prepare(pixels_HWC.permute(2, 0, 1)[None].float() / 255).to(model.device, clip.tower_dtype(model.network))
        ids = clip.tokenize([PROMPT]).to(model.device)
        with torch.no_grad():
            picture = model.network.encode_image(prepared, normalize=True)
            text = model.network.encode_text(ids, normalize=True)
            scores.append(float(torch.diagonal(picture @ text.T)[0]))
    return scores


@contextlib.contextmanager
def package(case: Case) -> Iterator[Any]:
    """The hpsv2 package's module `img_score` with its own network in place; the 3.9 GB that it would download first are overwritten by each call anyway.

    Raises:
        ValueError: the package is not in the folder.
    """
    sys.path.insert(0, str(case.package))
    try:
        from hpsv2 import img_score
        from hpsv2.src.open_clip import model as package_model
        from hpsv2.src.open_clip import transform
    except ImportError as error:
        raise ValueError(f"{case.package} does not hold the hpsv2 package and clint ({error}); pip install --no-deps --target it.") from error
    finally:
        sys.path.remove(str(case.package))
    network = package_model.CLIP(**case.config, output_dict=True).to(case.device)
    size_px = case.config["vision_cfg"]["image_size"]
    img_score.device = case.device
    img_score.model_dict.update(model=network, preprocess_val=transform.image_transform(size_px, is_train=False, resize_longest_max=True))
    yield img_score
    img_score.model_dict.clear()


def seconds(call: Callable[[], Any], device: str, clock: Callable[[], float] | None = None) -> tuple[float, Any]:
    """Time of a call, work on the device included, and what it returned; on a CPU its CPU time, unless `clock` is another one."""
    clock = clock or (time.perf_counter if device == "cuda" else time.process_time)
    if device == "cuda":
        torch.cuda.synchronize()
    begun = clock()
    result = call()
    if device == "cuda":
        torch.cuda.synchronize()
    return clock() - begun, result


def matmul_rate(device: str, dtype: str) -> float:
    """FLOP/s of a large square product on this device, the fastest of five."""
    side = _MATMUL_SIDE[device]
    one, other = (torch.randn(side, side, device=device).to(DTYPES[dtype]) for _ in range(2))
    times = [seconds(lambda: one @ other, device)[0] for _ in range(6)][1:]
    return 2 * side**3 / min(times)


def measure(case: Case, folder: Path) -> dict[str, Any]:
    """All figures of a case; files go into `folder`."""
    frames, checkpoint = pictures(case), folder / "random.pt"
    files = write_files(frames[:, : case.singles], folder)
    random_checkpoint(case.config, checkpoint)
    frames = frames.to(case.device)
    model = load_reward_model("hpsv2.1", checkpoint, config=case.config, device=case.device, dtype=DTYPES[case.dtype])
    tower = bare_tower(case.config, checkpoint, case)
    with torch.no_grad():
        prepared = [model.prepare(part).to(DTYPES[case.dtype]) for part in frames[0].split(case.chunk)]

    def bare() -> list[torch.Tensor]:
        with torch.no_grad():
            return [tower(part) for part in prepared]

    calls: dict[str, Callable[[], Any]] = {
        "ours": lambda: score_in_chunks(model, frames, [PROMPT], case.chunk).per_frame[0].tolist(),
        "bare_tower": bare,
        "preparation": lambda: [model.prepare(part) for part in frames[0].split(case.chunk)],
        "per_picture": lambda: per_picture(model, files),
    }
    first_s, _ = seconds(lambda: score_in_chunks(model, frames[:, : case.chunk], [PROMPT], case.chunk), case.device)
    misses = model._texts.misses
    with contextlib.ExitStack() as stack:
        if case.package:
            scorer = stack.enter_context(package(case))
            calls["package_list"] = lambda: scorer.score(files, PROMPT, str(checkpoint))
            calls["package_call"] = lambda: [scorer.score(file, PROMPT, str(checkpoint))[0] for file in files]
        times: dict[str, list[float]] = {name: [] for name in calls}
        wall: dict[str, list[float]] = {name: [] for name in calls}
        results: dict[str, Any] = {}
        names = list(calls)
        for repeat in range(case.repeats):
            first = repeat * len(names) // case.repeats
            for name in (*names[first:], *names[:first]):
                passed, (spent, results[name]) = seconds(lambda name=name: seconds(calls[name], case.device), case.device, time.perf_counter)
                times[name].append(spent)
                wall[name].append(passed)
    figures = _figures(case, {name: min(values) for name, values in times.items()}, len(files), tower_flops(tower, prepared[0][:1]))
    per_frame = results.pop("ours")
    others = {name: results[name] for name in ("per_picture", "package_list") if name in results}
    figures["largest_score_difference"] = {name: max(abs(float(a) - b) for a, b in zip(values, per_frame, strict=False)) for name, values in others.items()}
    return {**figures, "first_chunk_s": first_s, "text_encoder_calls_after_the_first_score": model._texts.misses - misses, "times_s": times, "wall_s": wall}


def tower_flops(tower: torch.nn.Module, one_picture: torch.Tensor) -> int:
    """Multiplications and additions of one picture, counted."""
    # The counter does not know the fused attention layer of inference, nor a CPU's fused attention.
    was_enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            tower(one_picture)
    finally:
        torch.backends.mha.set_fastpath_enabled(was_enabled)
    return counter.get_total_flops()


def _figures(case: Case, fastest_s: dict[str, float], singles: int, flops: int) -> dict[str, Any]:
    counts = {name: singles if name.startswith(("per_picture", "package")) else case.frames for name in fastest_s}
    per_frame_s = {name: fastest_s[name] / counts[name] for name in fastest_s}
    ours_s = per_frame_s["ours"]
    ratios = {"ours_to_bare_tower": ours_s / per_frame_s["bare_tower"]}
    ratios |= {f"{name}_to_ours": per_frame_s[name] / ours_s for name in per_frame_s if counts[name] == singles and name.startswith(("per_picture", "package"))}
    rates = {dtype: matmul_rate(case.device, dtype) for dtype in dict.fromkeys(("float32", case.dtype))}
    peak = rates[case.dtype]
    slowest = next(name for name in ("package_call", "per_picture") if name in per_frame_s)
    bounds = {"seconds_of_the_towers_products": flops / peak, f"most_that_{slowest}_to_ours_can_be": per_frame_s[slowest] * peak / flops}
    return {
        "pictures_timed": counts,
        "clock": "wall" if case.device == "cuda" else "CPU time of the process",
        "seconds_per_picture": per_frame_s,
        "ratios": ratios,
        "tower_flop_per_picture": flops,
        "matmul_flop_per_s": rates,
        "share_of_the_matmul_rate": {name: flops / per_frame_s[name] / peak for name in ("ours", "bare_tower")},
        "bounds": bounds,
    }


def goals_of(figures: dict[str, Any]) -> list[dict[str, Any]]:
    """What the ratios say about the goals."""
    tower, package_call = figures["ratios"]["ours_to_bare_tower"], figures["ratios"].get("package_call_to_ours")
    goals = [report.goal(f"time at most {MOST_OF_TOWER} x that of the bare image tower", f"{tower:.2f} x", tower <= MOST_OF_TOWER)]
    if package_call is not None:
        words = f"at least {LEAST_OVER_PACKAGE} x as fast as the hpsv2 package, picture by picture"
        goals.append(report.goal(words, f"{package_call:.2f} x", package_call >= LEAST_OVER_PACKAGE))
    return goals


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="lab.py bench rewards", description=__doc__.split("\n")[0])
    parser.add_argument("--size", default="ViT-H-14", help="an open_clip model name; HPSv2.1 is ViT-H-14 (default)")
    parser.add_argument("--frames", type=int, default=81)
    parser.add_argument("--height", type=int, default=480)
    parser.add_argument("--width", type=int, default=832)
    parser.add_argument("--chunk", type=int, default=16, help="frames in one pass (default: 16)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--singles", type=int, default=8, help="pictures that are scored one by one (default: 8)")
    parser.add_argument("--dtype", choices=list(DTYPES), help="default: bfloat16 on a GPU, float32 on a CPU")
    parser.add_argument("--package", type=Path, help="folder with the hpsv2 package")
    parser.add_argument("--out", type=Path, help="JSON file (default: in benchmarks/results, named after size, frames, device and dtype)")
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    """Measure, print and write."""
    options = parse(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = options.dtype or ("bfloat16" if device == "cuda" else "float32")
    config = open_clip.get_model_config(options.size)
    if config is None:
        raise ValueError(f"open_clip has no model {options.size!r}; choose one such as ViT-H-14 or ViT-B-16.")
    config = {key: config[key] for key in ("embed_dim", "vision_cfg", "text_cfg", "quick_gelu") if key in config}
    case = Case(
        config=config, frames=options.frames, height_px=options.height, width_px=options.width, chunk=options.chunk, repeats=options.repeats,
        device=device, dtype=dtype, package=options.package and options.package.absolute(), singles=min(options.singles, options.frames),
    )  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="reward-lab-bench-") as folder:
        figures = measure(case, Path(folder))
    settings = {name: getattr(case, name) for name in ("frames", "height_px", "width_px", "chunk", "repeats", "dtype")}
    where = report.machine(torch.device(device))
    result = {"benchmark": "rewards", "model": f"{options.size}, random weights", **settings, **where, "goals": goals_of(figures), **figures}
    out = options.out or report.RESULTS / f"rewards-{options.size}-{options.frames}-{device}-{dtype}.json"
    report.write(out, result)
    print(json.dumps(result, indent=1))
    print(f"wrote {out}", file=sys.stderr)
    return 0

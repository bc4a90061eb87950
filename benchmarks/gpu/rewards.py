"""HPSv2.1 on a card: speed beside the bare image tower, the hpsv2 package and the card's own matmul rate, and memory of the chunked gradient.

    python labtools/launch.py benchmarks.gpu.rewards [--device cuda] [--package FOLDER] [--out FILE]
    python labtools/launch.py benchmarks.gpu.rewards --device cpu --small

Speed is `benchmarks/rewards.py` (81 frames of 1280 x 720, ViT-H/14, bfloat16); what each way does stands there. Memory is `reward_and_frame_gradient` on
the same frames, and on one chunk of them, from the allocator's own peak; equality is measured in float32 on few frames, in chunks against in one piece.
`--small` takes a tiny model and few frames: it shows that everything runs, its figures mean nothing. On a CPU no memory is measured.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ...reward_models import clip
from ...reward_models.base import reward_and_frame_gradient
from ...reward_models.loader import load_reward_model
from .. import report, rewards

_SMALL = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 24, "head_width": 12, "patch_size": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2},
}
_EQUAL_FRAMES, _EQUAL_CHUNK = 8, 3
MIB = 2**20


def case_of(options: argparse.Namespace) -> rewards.Case:
    """What is measured."""
    common = {"device": options.device, "repeats": options.repeats, "package": options.package and options.package.absolute()}
    if options.small:
        return rewards.Case(config=_SMALL, frames=5, height_px=36, width_px=64, chunk=2, singles=2, dtype="bfloat16", **common)
    return rewards.Case(config=dict(clip.VIT_H_14), frames=81, height_px=720, width_px=1280, chunk=options.chunk, dtype="bfloat16", **common)


def gradient_memory(case: rewards.Case, checkpoint: Path) -> dict[str, float]:
    """Peak bytes of the gradient over weights, frames and result, in chunks and of one chunk alone, in MiB; and seconds."""
    model = load_reward_model("hpsv2.1", checkpoint, config=case.config, device=case.device, dtype=rewards.DTYPES[case.dtype])
    frames = rewards.pictures(case).to(case.device)
    peaks, spent = {}, 0.0
    for name, part in (("one_chunk", frames[:, : case.chunk]), ("all_frames", frames)):
        reward_and_frame_gradient(model, part[:, :1], [rewards.PROMPT], 1)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        spent, (_, gradient) = rewards.seconds(lambda part=part: reward_and_frame_gradient(model, part, [rewards.PROMPT], case.chunk), case.device)
        peaks[name] = (torch.cuda.max_memory_allocated() - before - gradient.nbytes) / MIB
    return {**{f"{name}_mib": value for name, value in peaks.items()}, "chunks": peaks["all_frames"] / peaks["one_chunk"], "all_frames_s": spent}


def gradient_difference(case: rewards.Case, checkpoint: Path) -> float:
    """Share by which the float32 gradient in chunks differs from the one in a piece."""
    exact = dataclasses.replace(case, frames=min(_EQUAL_FRAMES, case.frames), dtype="float32")
    model = load_reward_model("hpsv2.1", checkpoint, config=case.config, device=case.device, dtype=torch.float32)
    frames = rewards.pictures(exact).to(case.device)
    with torch.backends.cudnn.flags(allow_tf32=False):
        whole, cut = (reward_and_frame_gradient(model, frames, [rewards.PROMPT], count)[1] for count in (exact.frames, _EQUAL_CHUNK))
    return float((whole - cut).norm() / whole.norm())


def goals(speed: dict[str, Any], memory: dict[str, float] | None, difference: float, *, is_small: bool) -> list[dict[str, Any]]:
    """Every goal in the form of `report.goal`; not judged where nothing was measured, and on toy sizes."""
    ratios = speed["ratios"]
    rows: list[tuple[str, float | None, float, Callable[[float, float], bool]]] = [
        ("time over that of the bare image tower, at most", ratios["ours_to_bare_tower"], 1.1, float.__le__),
        ("times the speed of the hpsv2 package, a call per picture, at least", ratios.get("package_call_to_ours"), 10.0, float.__ge__),
        ("share of the bfloat16 matmul rate, at least", speed["share_of_the_matmul_rate"]["ours"], 0.45, float.__ge__),
        ("peak of the chunked gradient in chunks, at most", memory and memory["chunks"], 2.0, float.__le__),
        ("share by which the chunked gradient differs in float32, at most", difference, 1e-5, float.__le__),
    ]
    return [
        report.goal(
            f"HPSv2.1: {text} {limit:g}", "not measured" if value is None else f"{value:.3g}", None if value is None or is_small else compare(value, limit)
        )
        for text, value, limit, compare in rows
    ]


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All figures."""
    case = case_of(options)
    with tempfile.TemporaryDirectory(prefix="reward-lab-bench-") as folder:
        speed = rewards.measure(case, Path(folder))
        checkpoint = Path(folder) / "random.pt"
        memory = gradient_memory(case, checkpoint) if case.device == "cuda" else None
        difference = gradient_difference(case, checkpoint)
    card = torch.cuda.get_device_name() if case.device == "cuda" else "none, CPU"
    settings = {name: getattr(case, name) for name in ("frames", "height_px", "width_px", "chunk", "repeats", "dtype", "device")}
    return {
        "benchmark": "gpu/rewards",
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "card": card,
        "torch": torch.__version__,
        "hardware": report.hardware(torch.device(case.device)),
        "model": "tiny" if options.small else "ViT-H-14, random weights",
        "is_small": options.small,
        **settings,
        "goals": goals(speed, memory, difference, is_small=options.small),
        "gradient_memory": memory,
        "speed": speed,
    }


def main(argv: list[str]) -> int:
    """Measure, print and write; 2 where the asked device is not there."""
    parser = argparse.ArgumentParser(prog="benchmarks.gpu.rewards", description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--small", action="store_true", help="a tiny model and few frames: does it run at all")
    parser.add_argument("--chunk", type=int, default=16, help="frames in one pass (default: 16)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--package", type=Path, help="folder with the hpsv2 package (see benchmarks/rewards.py)")
    parser.add_argument("--ram-gb", type=float, default=0, help="taken as by the other benchmarks; this one has no use for it")
    parser.add_argument("--out", type=Path, help="JSON file")
    options = parser.parse_args(argv)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("Error: torch finds no CUDA device; run this where there is one, or with --device cpu --small.", file=sys.stderr)
        return 2
    result = json.dumps(measure(options), indent=1)
    print(result)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(result + "\n", encoding="utf-8")
    return 0

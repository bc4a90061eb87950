"""What a LoRA adds to a Linear of Wan 14B at 720p: exact and merged forward, backward, with torch's products and with Triton's kernels.

    python labtools/launch.py benchmarks.gpu.lora_linear --out OUT.json            (rehearsal: --device cpu --small)

Base: the bare GEMM in bf16 (with bias), x W^T forward and dY W backward. `merged` counts the GEMM and one merge of the weight, as a streamed rollout
makes it for every pass. `plain` is the separate down, up, scale, add of a usual LoRA layer. Goals hold for the worst of the three shapes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

from ...lora_train.kernels.lora_linear import Operands, kernels, merge_into
from ...lora_train.kernels.lora_linear.rows import empty_with_room, weight_buffer
from . import goals
from . import rig as rigs
from .rig import Rig

SHAPES = ((5120, 5120), (5120, 13824), (13824, 5120))  # (in, out)
SMALL_SHAPES = ((48, 48), (48, 96), (96, 48))
TOKENS, SMALL_TOKENS = 75_600, 40
LIMITS = {"exact": 6.0, "merged": 1.0, "backward": 11.0}


def measure_shape(rig: Rig, ins: int, outs: int, tokens: int) -> dict[str, Any]:
    """Milliseconds and percent over the base, of one Linear."""
    generator = torch.Generator(device=rig.device).manual_seed(0)

    def random(*shape: int, scale: float = 1.0, dtype: torch.dtype = rig.dtype) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=rig.device, dtype=dtype) * scale

    rank = rig.rank
    bias, down, up = random(outs), random(rank, ins, scale=ins**-0.5, dtype=torch.float32), random(outs, rank, scale=0.01, dtype=torch.float32)
    buffer = weight_buffer(outs, ins, rank, dtype=rig.dtype, device=rig.device)
    inside = buffer[:, :ins].copy_(random(outs, ins, scale=0.02))
    weight = inside.contiguous()
    x = empty_with_room((tokens, ins), rank, dtype=rig.dtype, device=rig.device).copy_(random(tokens, ins))
    grad, x_plain, target = random(tokens, outs), x.contiguous(), torch.empty_like(weight)
    separate, fused = Operands(weight, bias, down, up, 0.5, None), Operands(inside, bias, down, up, 0.5, buffer)
    hidden = x_plain @ separate.down.t()
    forward = {
        "base": lambda: functional.linear(x_plain, weight, bias),
        "plain": lambda: functional.linear(x_plain, weight, bias) + functional.linear(functional.linear(x_plain, separate.down), separate.up) * 0.5,
        "exact_addmm": lambda: separate.forward(x_plain, False),
        "exact_one_product": lambda: fused.forward(x, True),
        "merge": lambda: merge_into(target, weight, down, up, 0.5, 7),
    }
    backward = {
        "base": lambda: grad @ weight,
        "addmm": lambda: separate.backward(grad, x_plain, hidden, (True, True, True)),
    }
    times = {f"{phase}.{name}": rigs.milliseconds(rig, call) for phase, calls in (("forward", forward), ("backward", backward)) for name, call in calls.items()}
    trouble = ""
    if rig.device.type == "cuda" and kernels.has_triton():
        try:
            kernels.choose_kernels("triton", rig.device)
            for phase, name, call in (("forward", "merge", forward["merge"]), ("backward", "addmm", backward["addmm"])):
                times[f"{phase}.{name}.triton"] = rigs.milliseconds(rig, call)
        except Exception as error:  # noqa: BLE001 (whatever a compiler of kernels raises is told in the result; torch's figures stand)
            trouble = f"{type(error).__name__}: {str(error)[:300]}"
        finally:
            kernels.choose_kernels("torch", rig.device)
    found = {"in": ins, "out": outs, "milliseconds": times, "percent_over_base": percents(times), "triton_trouble": trouble}
    return {**found, "largest_difference": _check(separate, fused, x)}


def percents(times: dict[str, float]) -> dict[str, float]:
    """What each form costs over its base; merging beside the base's own product."""
    found = {}
    for name, value in times.items():
        phase, form = name.split(".", 1)
        base = times[f"{phase}.base"]
        if form.startswith("merge"):
            found[name.replace("merge", "merged", 1)] = 100 * value / base
        elif form != "base":
            found[name] = 100 * (value / base - 1)
    return found


def _check(separate: Operands, fused: Operands, x: torch.Tensor) -> float:
    """Relative difference between the two exact forms, so that what was timed has also computed the right thing."""
    one, other = separate.forward(x.contiguous(), False)[0].float(), fused.forward(x, True)[0].float()
    return float((one - other).norm() / one.norm())


def best(rows: list[dict[str, Any]], part: str) -> tuple[str, float]:
    """The form whose worst shape costs least, among those whose name holds `part`."""
    names = [name for name in rows[0]["percent_over_base"] if part in name and "plain" not in name]
    worst = {name: max(row["percent_over_base"][name] for row in rows) for name in names}
    return min(worst.items(), key=lambda item: item[1])


def measure(rig: Rig) -> dict[str, Any]:
    """All shapes."""
    tokens = SMALL_TOKENS if rig.is_small else TOKENS
    rows = []
    for ins, outs in SMALL_SHAPES if rig.is_small else SHAPES:
        rows.append(measure_shape(rig, ins, outs, tokens))
        rigs.free_all(rig)
    judged = []
    for name, part in (("exact", "forward.exact"), ("merged", "forward.merged"), ("backward", "backward.")):
        form, percent = best(rows, part)
        judged.append(goals.goal(f"lora.{name}", f"+{percent:.1f} % ({form})", percent <= LIMITS[name]))
    return rigs.finish(rig, "lora_linear", {"tokens": tokens, "rank": rig.rank, "shapes": rows}, judged)


def main(argv: list[str]) -> int:
    """Measure, print and write."""
    rig = rigs.rig_of(rigs.arguments("benchmarks.gpu.lora_linear", __doc__).parse_args(argv))
    rigs.show(measure(rig))
    return 0

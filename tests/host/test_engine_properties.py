"""The engine on sizes that nothing divides, in fp32 and bf16, against the host's own blocks; on the card too where there is one."""

from __future__ import annotations

import random

import pytest

from .passes import differing, error, largest_ratio, load, run
from .quantised_files import write_fp8

pytestmark = pytest.mark.host
# fp32: sums in another order (test_engine.py). The card's products use other orders still.
OTHER_ORDER = {"cpu": 1e-5, "cuda": 1e-4}
# bf16: the engine rounds less often than the plain path; it may not be further from the truth than that, but for chance.
NO_WORSE = 1.15
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def case(number):
    """Sizes and knobs, drawn from the number."""
    draws = random.Random(number)
    sizes = {
        "rank": draws.choice((1, 7, 33)), "batch": draws.choice((1, 3)),
        "size": (draws.choice((1, 2, 3)), draws.choice((3, 5, 7, 11)), draws.choice((3, 5, 9, 13))),
    }  # fmt: skip
    knobs = {
        "resident_blocks": draws.choice((0, 1, -1)), "slots": draws.choice((1, 2, 3)), "keep_place": draws.choice(("device", "host")),
        "keep_attention": draws.random() < 0.5, "ffn_chunk_tokens": draws.choice((0, 1, 5, 17)), "row_chunk_tokens": draws.choice((0, 3, 13)),
        "head_groups": draws.choice((1, 2)), "merges_resident": draws.random() < 0.5, "optimiser_place": draws.choice(("device", "host")),
    }  # fmt: skip
    return sizes, knobs


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("number", range(10))
def test_in_fp32_every_number_is_that_of_the_plain_path(tiny_models, number, device):
    sizes, knobs = case(number)
    wanted = run(load(tiny_models["high"], device=device), **sizes)
    assert largest_ratio(run(load(tiny_models["high"], device=device), knobs, **sizes), wanted) <= OTHER_ORDER[device], (sizes, knobs)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("number", range(100, 105))
def test_in_bf16_the_engine_is_as_close_to_the_truth_as_the_plain_path(tiny_models, number, device):
    import torch

    sizes, knobs = case(number)
    truth = run(load(tiny_models["high"]), **sizes)
    plain = run(load(tiny_models["high"], torch.bfloat16, device), **sizes)
    found = run(load(tiny_models["high"], torch.bfloat16, device), knobs, **sizes)
    assert error(found, truth) <= NO_WORSE * error(plain, truth), (sizes, knobs)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bits_that_no_knob_changes(tiny_models, tmp_path, dtype, device):
    """Streamed in any number of slots, kept here or there, attention kept or run again: the same bits; of an fp8 base also resident or streamed."""
    import torch

    sizes = {"rank": 7, "batch": 3, "size": (2, 5, 9)}
    backbone = load(tiny_models["high"], getattr(torch, dtype), device)
    wanted = run(backbone, {"resident_blocks": 0}, **sizes)
    for knobs in ({"slots": 1}, {"slots": 3, "keep_place": "host"}, {"keep_attention": False}, {"optimiser_place": "host", "keep_place": "host"}):
        assert differing(run(backbone, {"resident_blocks": 0, **knobs}, **sizes), wanted) == [], knobs
    resident = run(backbone, {}, **sizes)
    for knobs in ({"keep_attention": False}, {"keep_place": "host"}):
        assert differing(run(backbone, knobs, **sizes), resident) == [], knobs
    path = tmp_path / "tiny_high_noise.safetensors"
    write_fp8(tiny_models["high"], path, "new")
    backbone = load(path, getattr(torch, dtype), device)
    assert differing(run(backbone, {"resident_blocks": 0}, **sizes), run(backbone, {"resident_blocks": -1}, **sizes)) == []


@pytest.mark.gpu
def test_the_card_is_left_empty(tiny_models):
    import gc

    import torch

    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    run(load(tiny_models["high"], torch.bfloat16, "cuda"), {"resident_blocks": 0, "keep_place": "host"})
    gc.collect()
    # What is outside of the blocks stays with the backbone, which is gone now.
    assert torch.cuda.memory_allocated() <= before


@pytest.mark.parametrize("device", DEVICES)
def test_many_chunks_in_bf16_lose_nothing_of_what_is_summed_over_them(tiny_models, device):
    """Gates, shifts and scales get one sum over all tokens; so does what made them, the time embedding."""
    import torch

    def of_time(backbone, knobs):
        found = run(backbone, knobs, size=(3, 24, 24))
        return {name: value for name, value in found.items() if name.startswith("time_")}

    truth = of_time(load(tiny_models["high"]), {})
    whole, chunked = (of_time(load(tiny_models["high"], torch.bfloat16, device), {"ffn_chunk_tokens": tokens}) for tokens in (0, 1))
    assert truth and error(chunked, truth) <= NO_WORSE * error(whole, truth)

"""Training through quantised bases: output and all LoRA gradients are those of the plain path on the unpacked weights."""

from __future__ import annotations

import json

import pytest

from .conftest import TRANSFORMER, _randomise
from .passes import differing, largest_ratio, load, run
from .quantised_files import GGUF_TYPES, write_fp8, write_gguf

pytestmark = pytest.mark.host
# Streaming puts Linears into their LoRA buffers, whose products add in another order; see test_engine.py.
OTHER_ORDER = 1e-5
KINDS = list(GGUF_TYPES)
FORMS = {
    "old": lambda source, target: write_fp8(source, target, "old"),
    "old with prefix": lambda source, target: write_fp8(source, target, "old", prefix="model.diffusion_model."),
    "new": lambda source, target: write_fp8(source, target, "new"),
    "new metadata": lambda source, target: write_fp8(source, target, "new metadata"),
    "new e5m2": lambda source, target: write_fp8(source, target, "new", "F8_E5M2"),
    "unscaled": lambda source, target: write_fp8(source, target, "unscaled"),
    "gguf": lambda source, target: write_gguf(source, target, lambda key: KINDS[sum(map(ord, key)) % len(KINDS)]),
}


@pytest.fixture(scope="module", params=list(FORMS))
def pair(request, comfyui, tiny_models, tmp_path_factory):
    """(path of a quantised file, path of a plain file of the same numbers)"""
    suffix = "gguf" if request.param == "gguf" else "safetensors"
    target = tmp_path_factory.mktemp("quantised") / f"tiny_high_noise.{suffix}"
    source = _wide_model(target.parent) if suffix == "gguf" else tiny_models["high"]
    return target, FORMS[request.param](source, target)


def _wide_model(folder):
    """A random model whose rows are whole blocks of 256."""
    import comfy.ldm.wan.model
    import comfy.ops
    import torch
    from safetensors.torch import save_file

    sizes = {**TRANSFORMER, "dim": 256, "ffn_dim": 512}
    model = comfy.ldm.wan.model.WanModel(**sizes, device="cpu", dtype=torch.float32, operations=comfy.ops.disable_weight_init)
    save_file(_randomise(model, 5), folder / "wide.safetensors", metadata={"config": json.dumps({"transformer": sizes})})
    return str(folder / "wide.safetensors")


def test_equal_to_the_plain_path_on_the_unpacked_weights(pair):
    import torch

    backbone = load(pair[0])
    assert len(backbone.quantised) == 2 and all(len(weights) == 10 for weights in backbone.quantised.values())
    wanted = run(load(pair[1]))
    assert all(value.abs().sum() > 0 for value in wanted.values())
    streamed = run(backbone, {"resident_blocks": 0})
    assert largest_ratio(streamed, wanted) <= OTHER_ORDER
    assert torch.equal(streamed["base"], wanted["base"])
    # The same executor on the unpacked weights: no bit differs, resident or streamed, in any number of slots.
    unpacked = run(load(pair[1]), {"resident_blocks": 0})
    for knobs in ({"resident_blocks": 0, "slots": 1}, {"resident_blocks": 1, "slots": 3, "keep_place": "host"}, {"resident_blocks": -1}):
        assert differing(run(backbone, knobs), unpacked) == [], knobs


def test_nothing_is_unpacked_for_good(pair):
    import torch

    backbone = load(pair[0])
    before = {(index, path): weight.data.clone() for index, weights in backbone.quantised.items() for path, weight in weights.items()}
    run(backbone, {"resident_blocks": 0})
    for index, block in enumerate(backbone.model.blocks):
        for path in backbone.quantised[index]:
            assert block.get_parameter(path).device.type == "meta"
    assert all(torch.equal(weight.data.view(torch.uint8), before[index, path].view(torch.uint8))
               for index, weights in backbone.quantised.items() for path, weight in weights.items())  # fmt: skip


def test_in_bf16_the_base_is_rounded_once(pair):
    import torch

    wanted = run(load(pair[1], torch.bfloat16), {"resident_blocks": 0})
    found = run(load(pair[0], torch.bfloat16), {"resident_blocks": 0})
    # The plain file's weights are rounded to bf16 when it is loaded, the stored ones where they are used: the same numbers.
    assert differing(found, wanted) in ([], ["rollout"])
    # Merged in fp32 before the one rounding, where the plain path adds to what was rounded before: closer to fp32.
    truth = run(load(pair[1]))["rollout"]
    assert float((found["rollout"] - truth).norm()) <= 1.2 * float((wanted["rollout"] - truth).norm())


@pytest.mark.parametrize("dtype", ["fp8_scaled", "fp8_scaled_old"])
def test_the_pocket_expert_as_merge_lora_writes_it(pocket_models, repo, tmp_path, dtype):
    """A trained model, and files that this pack itself writes; the plain file holds the numbers as `weight_source.py` reads them."""
    import torch
    from safetensors import safe_open
    from safetensors.torch import save_file

    from reward_lab.host.lora_merge import MergeSettings, merge
    from reward_lab.host.weight_source import open_source

    base = repo / "pocket" / "weights" / "pocket_wan2.2_t2v_high_noise_14B.safetensors"
    packed, plain = tmp_path / "pocket_high_noise_fp8.safetensors", tmp_path / "pocket_high_noise.safetensors"
    merge(base, [], packed, MergeSettings(dtype=dtype), expert="high")
    source = open_source(packed)
    with safe_open(base, "pt") as file:
        metadata = file.metadata()
    save_file({name: source.read(name) for name in source.shapes}, plain, metadata=metadata)
    backbone, sizes = load(packed), {"rank": 4, "batch": 1, "size": (3, 8, 8), "text_width": 128}
    assert sum(map(len, backbone.quantised.values())) == 10 * len(backbone.model.blocks)
    wanted = run(load(plain), {"resident_blocks": 0}, **sizes)
    assert differing(run(backbone, {"resident_blocks": 0}, **sizes), wanted) == []
    assert largest_ratio(wanted, run(load(plain), **sizes)) <= OTHER_ORDER
    assert all(torch.isfinite(value).all() for value in wanted.values())

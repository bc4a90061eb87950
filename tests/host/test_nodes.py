"""Every node as the page sees it: ids, tooltips, limits."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.host

RUN_INPUTS = [
    *("wan_files", "prompts", "reward_model", "name", "expert", "preset", "steps", "rank", "alpha", "learning_rate"),
    *("batch", "width", "height", "frames", "sampling_steps", "guidance", "seed", "advanced", "held_out"),
]
NODES = {
    "RewardLabWanModels": ["high_noise_model", "low_noise_model", "text_encoder", "vae", "weight_dtype"],
    "RewardLabInspectLoRA": ["lora", "compare_with", "model_high", "model_low"],
    "RewardLabLoadLoRAs": ["model_high", "model_low", "rows", "application"],
    "RewardLabMergeLoRA": ["base", "rows", "expert", "dtype", "rounding", "seed", "shard_gb", "name", "overwrite"],
    "RewardLabSampleWan22": [
        *("model_high", "model_low", "positive", "negative", "latent", "seed", "steps", "shift"),
        *("guidance_high", "guidance_low", "boundary", "sampler_name", "scheduler"),
    ],
    "RewardLabRewardModel": [
        *("kind", "file", "resize", "antialias", "download", "condition", "threshold", "second_file", "third_file", "generator", "reference", "stability"),
    ],
    "RewardLabMixRewards": [
        *(f"{name}_{number}" for number in range(1, 5) for name in ("reward", "weight", "centre", "scale")),
        *("measure_baseline", "baseline_folder", "baseline_prompts"),
    ],
    "RewardLabScoreVideo": ["images", "reward_model", "prompt", "video", "path", "prompts_file"],
    "RewardLabScoreLatent": ["latent", "positive", "reward_model", "sigmas", "seed"],
    "RewardLabPrompts": ["text", "file", "held_out_share", "split_seed"],
    "RewardLabMemoryPlan": [*RUN_INPUTS, "shape", "card", "card_gb", "ram_gb"],
    "RewardLabTrainLoRA": RUN_INPUTS,
    "RewardLabDataset": [
        *("wan_files", "name", "folder", "prompt", "prompts_file", "frame_rate", "frames", "short_px", "long_px", "width_px", "height_px", "dtype"),
    ],
    "RewardLabTrainPAVRM": [
        *("wan_files", "dataset", "name", "trunk", "pavrm_file", "quality", "loss", "votes", "noise", "blocks", "pooling", "steps", "batch"),
        *("block_lr", "head_lr", "seed", "advanced"),
    ],
    "RewardLabRunResult": ["run", "wait"],
    "RewardLabTestLabCell": ["images", "sweep", "prompt", "reward_model", "frame_rate", "applied"],
    "RewardLabTestLabGrid": ["sweep", "axes"],
}


@pytest.fixture(scope="module")
def info(server) -> dict:
    """The host's description of every node."""
    return server.client().get("/object_info")


def test_every_node_is_registered(info: dict) -> None:
    assert {name for name in info if name.startswith("RewardLab")} == set(NODES)


@pytest.mark.parametrize("node_id", NODES)
def test_schema(info: dict, node_id: str) -> None:
    node = info[node_id]
    inputs = {**node["input"].get("required", {}), **node["input"].get("optional", {})}
    order = [name for group in ("required", "optional") for name in node["input_order"].get(group, [])]
    assert sorted(order) == sorted(NODES[node_id])
    assert node["category"].startswith("Reward Lab/") and node["description"] and node["display_name"] != node_id
    for name, (kind, options) in ((name, entry) for name, entry in inputs.items()):
        assert options.get("tooltip"), f"{node_id}.{name} has no tooltip"
        if kind in ("INT", "FLOAT"):
            assert {"min", "max", "default"} <= set(options), f"{node_id}.{name} has no limits"
    assert all(node["output_tooltips"])


def test_the_extension_of_somebody_else_still_works(client) -> None:
    assert client.run({"1": {"class_type": "OtherPackEcho", "inputs": {"text": "hello"}}})["1"]["text"] == ["hello"]

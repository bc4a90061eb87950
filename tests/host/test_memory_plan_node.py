"""Memory Plan through the real server: verdict, table, JSON and picture of runs that fit and that do not."""

from __future__ import annotations

import io
import json

import pytest

from reward_lab.labtools.client import PromptFailed

pytestmark = pytest.mark.host

SETTINGS = {
    "name": "planned", "expert": "high", "preset": "videox-fun", "steps": 10, "rank": 128, "alpha": 64.0, "learning_rate": 1e-5, "batch": 1, "width": 832,
    "height": 480, "frames": 81, "sampling_steps": 40, "guidance": 6.0, "seed": 0, "advanced": "{}", "shape": "wan-14b", "card": "rtx 4090", "card_gb": 0.0,
    "ram_gb": 128.0,
}  # fmt: skip


def prompt(**changes) -> dict:
    files = {"high_noise_model": "high_noise", "low_noise_model": "low_noise"}
    models = {slot: f"pocket_wan2.2_t2v_{expert}_14B.safetensors" for slot, expert in files.items()}
    reward = {"kind": "hpsv2.1", "file": "pocket_HPS_v2.1.safetensors", "resize": "default", "antialias": True, "download": False, "condition": "overall",
              "threshold": 0.01, "second_file": "(none)", "third_file": "(none)", "generator": "(none)", "reference": "", "stability": False}  # fmt: skip
    encoders = {"text_encoder": "pocket_umt5.safetensors", "vae": "pocket_wan_2.1_vae.safetensors", "weight_dtype": "default"}
    sources = {"wan_files": ["1", 4], "prompts": ["2", 0], "reward_model": ["3", 0]}
    return {
        "1": {"class_type": "RewardLabWanModels", "inputs": {**models, **encoders}},
        "2": {"class_type": "RewardLabPrompts", "inputs": {"text": "a red square", "file": "", "held_out_share": 0.0, "split_seed": 0}},
        "3": {"class_type": "RewardLabRewardModel", "inputs": reward},
        "4": {"class_type": "RewardLabMemoryPlan", "inputs": {**sources, **SETTINGS, **changes}},
        "5": {"class_type": "PreviewAny", "inputs": {"source": ["4", 0]}},
        "6": {"class_type": "PreviewAny", "inputs": {"source": ["4", 1]}},
        "7": {"class_type": "PreviewAny", "inputs": {"source": ["4", 2]}},
        "8": {"class_type": "PreviewImage", "inputs": {"images": ["4", 3]}},
    }


def test_a_run_that_fits(pocket_server):
    from PIL import Image

    client = pocket_server.client()
    outputs = client.run(prompt())
    assert outputs["4"]["text"][0].startswith("Fits: ") and "GB on rtx 4090" in outputs["4"]["text"][0]
    assert "in memory" in outputs["5"]["text"][0] and "knobs: resident_blocks" in outputs["5"]["text"][0]
    assert outputs["6"]["text"][0].lower() == "true"
    plan = json.loads(outputs["7"]["text"][0])
    assert plan["fits"] and plan["tokens_per_video"] == 32760 and plan["gpu_peak_bytes"] <= plan["card"]["usable_bytes"]
    picture = Image.open(io.BytesIO(client.output_file(outputs["4"]["images"][0])))
    assert picture.width == 768 and picture.height > 400 and len(picture.getcolors(1 << 20)) > 20


def test_one_that_does_not_says_what_would(pocket_server):
    outputs = pocket_server.client().run(prompt(width=1280, height=720, card_gb=12.0, ram_gb=64.0))
    shown = outputs["4"]["text"][0]
    assert shown.startswith("Does not fit: ") and "this run needs" in shown and outputs["6"]["text"][0].lower() == "false"
    assert "of memory (" in shown or "on the card, but" in shown


def test_the_chosen_files_on_this_machine(pocket_server):
    files = {"shape": "these files", "card": "this machine", "card_gb": 8.0, "preset": "pocket", "width": 64, "height": 64, "frames": 17, "rank": 4}
    plan = json.loads(pocket_server.client().run(prompt(**files))["7"]["text"][0])
    assert plan["fits"] and plan["experts"]["high"]["parameters"] < 1e7 and plan["tokens_per_video"] == 5 * 4 * 4


def test_settings_that_cannot_work_are_refused(pocket_server):
    with pytest.raises(PromptFailed, match="Wan needs 4n\\+1 frames"):
        pocket_server.client().run(prompt(frames=80))

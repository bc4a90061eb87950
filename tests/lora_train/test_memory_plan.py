"""The plan of knobs, peaks and seconds: choices follow the memory at hand, refusals say what would fit."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from reward_lab.lora_train import plan
from reward_lab.lora_train.planning.memory_plan import refusal
from reward_lab.lora_train.planning.shapes import named_shape, shape_of
from reward_lab.lora_train.planning.speed import CARDS

GB = 10**9


@pytest.fixture
def make(toy):
    def make_plan(width=832, height=480, *, card="rtx 4090", ram=128, shape="wan-14b", weight_bytes=2, **changes):
        config = toy.config(
            video={"width_px": width, "height_px": height, "frames": 81}, batch=1, dtype="bf16", lora={"rank": 128}, sampling={"guidance": 1.0, "steps": 40},
            objective={"mode": "x0", "strategy": "random"}, **changes,
        )  # fmt: skip
        chosen = CARDS[card]
        return plan.plan(config, shape=named_shape(shape, weight_bytes), card=chosen, host_free_bytes=ram * GB)

    return make_plan


def test_a_24_gb_card_takes_480p_and_720p(make):
    small, large = make(), make(1280, 720, ram=160)
    assert small["fits"] and large["fits"]
    assert max(small["gpu_peak_bytes"], large["gpu_peak_bytes"]) <= 24 * GB
    least = make(1280, 720, ram=160, engine={"resident_blocks": 0, "keep_place": "host", "optimiser_place": "host", "head_groups": 4})
    assert least["gpu_peak_bytes"] <= 17 * GB and least["fits"]
    assert small["knobs"]["resident_blocks"] < 40 and large["knobs"]["keep_place"] == "host"
    assert large["seconds_per_step"]["total"] > 3 * small["seconds_per_step"]["total"]
    assert sum(value for name, value in small["seconds_per_step"].items() if name != "total") == pytest.approx(small["seconds_per_step"]["total"], abs=0.01)


def test_a_large_card_keeps_everything(make):
    found = make(card="h200", ram=200)
    assert found["fits"] and found["knobs"]["resident_blocks"] == 40 and found["knobs"]["keep_place"] == "device"
    assert found["seconds_per_step"]["total"] <= min([other["seconds_per_step"] for other in found["alternatives"]], default=1e9)


def test_what_does_not_fit_is_refused_with_what_would(make):
    found = make(1280, 720, ram=90)
    assert not found["fits"] and found["remedies"]
    words = refusal(found)
    assert "GB of memory, but rtx 4090 has" in words and "would fit: " in words and found["remedies"][0] in words
    assert "half of the frames" in found["remedies"]
    assert not make(1280, 720, ram=40)["remedies"] and "a machine with more memory" in refusal(make(1280, 720, ram=40))


def test_knobs_fixed_by_hand_are_kept(make):
    found = make(engine={"head_groups": 5, "keep_attention": "no", "resident_blocks": 7, "keep_place": "host", "optimiser_place": "host"})
    chosen = {name: found["knobs"][name] for name in ("head_groups", "keep_attention", "resident_blocks", "optimiser_place")}
    assert chosen == {"head_groups": 5, "keep_attention": False, "resident_blocks": 7, "optimiser_place": "host"}


def test_shapes_by_name_and_from_a_header(tmp_path):
    import torch

    from reward_lab.lora_train import safetensors_file

    assert named_shape("wan-14b").parameters == pytest.approx(14.29e9, rel=0.001)
    assert named_shape("wan-14b").block_parameters == pytest.approx(351.3e6, rel=0.001)
    shape = replace(named_shape("wan-1.3b"), width=128, ffn=64, blocks=2, heads=1, text_width=32)
    tensors = {f"{path}.weight": torch.zeros(size) for path, size in shape.linears.items()}
    tensors["patch_embedding.weight"] = torch.zeros(128, 16, 1, 2, 2)
    safetensors_file.write(tmp_path / "m.safetensors", tensors, {})
    assert shape_of(str(tmp_path / "m.safetensors")) == replace(shape, weight_bytes=4)
    with pytest.raises(ValueError, match="no model shape is called 'wan-99b'"):
        shape_of("wan-99b")


def test_command_without_weights(toy, tmp_path, capsys):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(toy.settings()))
    assert plan.main([str(path), "--json", "--shape", "wan-14b", "--card", "h200", "--ram-gb", "200"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {"gpu_peak_bytes", "host_peak_bytes", "seconds_per_step", "fits", "knobs", "alternatives"} <= found.keys() and found["fits"]
    assert plan.main([str(path), "--shape", "wan-14b", "--card", "voodoo"]) == 2 and "must be one of" in capsys.readouterr().err
    assert plan.main([str(path), "--shape", "wan-14b", "--card-gb", "3", "--ram-gb", "200"]) == 0
    assert json.loads(capsys.readouterr().out)["fits"] is False


def test_the_5b_model_is_one_and_has_latents_of_its_own(toy, tmp_path, capsys):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(toy.settings()))
    assert plan.main([str(path), "--shape", "wan-5b", "--card", "h200", "--ram-gb", "200"]) == 2
    assert "latents of 48 channels, but video.vae is 'wan2.1', which has 16; Wan2.2 5B needs wan2.2" in capsys.readouterr().err
    size = {"width_px": 1280, "height_px": 704, "frames": 121, "vae": "wan2.2"}
    values = toy.settings(video=size, models={"low": ""}, expert="high")
    del values["sampling"]["boundary"]
    path.write_text(json.dumps(values))
    assert plan.main([str(path), "--shape", "wan-5b", "--card", "rtx 4090", "--ram-gb", "100"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["experts"].keys() == {"high"} and found["tokens_per_video"] == 31 * 22 * 40
    assert found["experts"]["high"]["parameters"] == pytest.approx(5.0e9, rel=0.01)

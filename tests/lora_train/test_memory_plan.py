"""The plan of knobs, peaks and seconds: choices follow the memory at hand, refusals say what would fit."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from reward_lab.lora_train import plan
from reward_lab.lora_train.planning import table
from reward_lab.lora_train.planning.memory_plan import refusal
from reward_lab.lora_train.planning.shapes import named_shape, shape_of
from reward_lab.lora_train.planning.speed import CARDS, GIB

GB = 10**9


@pytest.fixture
def make(toy):
    def make_plan(width=832, height=480, *, card="rtx 4090", card_gb=0.0, ram=128, shape="wan-14b", weight_bytes=2, **changes):
        values = {
            "video": {"width_px": width, "height_px": height, "frames": 81}, "batch": 1, "dtype": "bf16", "lora": {"rank": 128},
            "sampling": {"guidance": 1.0, "steps": 40}, "objective": {"mode": "x0", "strategy": "random"}, **changes,
        }  # fmt: skip
        chosen = replace(CARDS[card], memory_bytes=int(card_gb * GIB)) if card_gb else CARDS[card]
        return plan.plan(toy.config(**values), shape=named_shape(shape, weight_bytes), card=chosen, host_free_bytes=ram * GB)

    return make_plan


PRFL = {"method": "prfl", "reward": {"kind": "pavrm", "path": "absent.safetensors"}, "lora": {"rank": 128, "skip": []}}


@pytest.mark.parametrize(("width", "height", "goal"), [(832, 480, 8), (1280, 720, 14)])
def test_a_prfl_step_can_run_within_the_goals(make, width, height, goal):
    """The goals of a whole PRFL step, rank 128 on every Linear, PAVRM and driver included."""
    least = make(width, height, ram=160, card_gb=goal / (0.94 * GIB / GB), **PRFL)
    assert least["fits"] and least["gpu_peak_bytes"] <= goal * GB
    assert least["seconds_per_step"]["total"] <= 1.12 * make(width, height, ram=160, card="rtx 4090", **PRFL)["seconds_per_step"]["total"]


@pytest.mark.parametrize(("weight_bytes", "ram"), [(2, 82), (1, 65)])
def test_720p_on_a_24_gb_card_within_the_hosts_goals(make, weight_bytes, ram):
    assert make(1280, 720, card="rtx 4090", ram=ram, weight_bytes=weight_bytes, **PRFL)["fits"]


def test_24_and_16_gb_cards_take_480p_and_720p(make):
    for width, height in ((832, 480), (1280, 720)):
        assert make(width, height, ram=160, **PRFL)["gpu_peak_bytes"] <= 24 * GB
        small = make(width, height, ram=160, card="rtx 4080", **PRFL)
        assert small["fits"] and small["gpu_peak_bytes"] <= 0.94 * 15.5 * GIB
    small, large = make(ram=160), make(1280, 720, ram=160)
    assert small["fits"] and large["fits"] and large["knobs"]["keep_place"] == "host"
    assert large["seconds_per_step"]["total"] > 3 * small["seconds_per_step"]["total"]
    assert sum(value for name, value in small["seconds_per_step"].items() if name != "total") == pytest.approx(small["seconds_per_step"]["total"], abs=0.01)


def test_seconds_are_those_of_the_projects_reference(make):
    """Its table of predicted micro-steps with 19 rollout forwards: fused LoRA, merged rollouts, best attention."""
    for card, (small, large) in {"h200": (63, 250), "rtx 4090": (257, 989)}.items():
        for (width, height), wanted in (((832, 480), small), ((1280, 720), large)):
            found = make(width, height, card=card, ram=200, **PRFL)
            passes = found["experts"]["high"]["passes_per_update_and_video"]
            seconds = found["seconds_per_step"]
            total = seconds["total"] - seconds["optimiser"] + (19 - passes["rollout"]) * seconds["rollout"] / passes["rollout"]
            print(card, width, total, wanted)
            assert total == pytest.approx(wanted, rel=0.06)


def test_a_large_card_keeps_everything(make):
    found = make(card="h200", ram=200, **PRFL)
    assert found["fits"] and found["knobs"]["resident_blocks"] == 40 and found["knobs"]["keep_place"] == "device"
    assert found["seconds_per_step"]["total"] <= 1.003 * min([other["seconds_per_step"] for other in found["alternatives"]], default=1e9)


def test_the_feed_forward_is_kept_where_memory_is_ample_and_said_to_save_its_product(make):
    ample = make(256, 256, card="h200", ram=200)
    assert ample["fits"] and ample["knobs"]["keep_feed_forward"]
    again = make(256, 256, card="h200", ram=200, engine={"keep_feed_forward": "no"})
    assert again["knobs"] == {**ample["knobs"], "keep_feed_forward": False}
    tokens, blocks, width, ffn = 5376, 40, 5120, 13824
    branches = ample["kept_activation_bytes"] / (blocks * (tokens * (2 * width + ffn) * 2 + tokens * 40 * 4))
    assert branches == pytest.approx(round(branches)) and ample["gpu_peak_bytes"] > again["gpu_peak_bytes"]
    spared = round(branches) * 2 * tokens * blocks * (width * ffn) / CARDS["h200"].gemm
    assert again["seconds_per_step"]["backward"] - ample["seconds_per_step"]["backward"] == pytest.approx(spared, rel=0.05)
    assert not make()["knobs"]["keep_feed_forward"]


def test_what_does_not_fit_is_refused_with_what_would(make):
    found = make(1280, 720, ram=70)
    assert not found["fits"] and found["remedies"]
    words = refusal(found)
    assert "GB of memory (" in words and "but 70.0 GB are free" in words and "on the card" not in words
    assert "would fit: " in words and found["remedies"][0] in words
    assert found["remedies"] == ["fp8 files of the experts", "640 x 352"]
    assert not make(1280, 720, ram=20)["remedies"] and "a machine with more memory" in refusal(make(1280, 720, ram=20))
    small = make(1280, 720, ram=200, card_gb=8)
    assert "GB on the card, but rtx 4090 has 8.1 GB for it" in refusal(small) and "of memory (" not in refusal(small)


def test_remedies_fit_when_they_are_followed(make):
    found = make(1280, 720, ram=70)
    assert make(1280, 720, ram=70, weight_bytes=1)["fits"] == ("fp8 files of the experts" in found["remedies"])
    assert make(640, 352, ram=70)["fits"]


def test_fp8_files_halve_the_weights(make):
    bf16, fp8 = (make(ram=160, weight_bytes=size, engine={"resident_blocks": 0, "keep_place": "host", "optimiser_place": "host"}, **PRFL) for size in (2, 1))
    assert 13.9 * GB <= bf16["host_part_bytes"]["weights"] - fp8["host_part_bytes"]["weights"] <= 14.1 * GB
    assert 0.6 * GB <= fp8["gpu_peak_bytes"] - bf16["gpu_peak_bytes"] <= 0.8 * GB  # two slots hold the stored bytes as well


def test_what_is_decoded_is_counted(make):
    """One latent, one with its history, all of them; feature caches wait in host memory where activations do."""
    host = {"keep_place": "host", "resident_blocks": 0}
    first, later, whole = (
        make(engine=host, ram=300, objective={"mode": "x0", "strategy": "random", **decode})
        for decode in ({"decode": "first"}, {"decode": "random", "decode_history": 1}, {"decode": "all"})
    )
    assert first["host_part_bytes"]["decoder"] == 0 < later["host_part_bytes"]["decoder"] < whole["host_part_bytes"]["decoder"]
    assert first["gpu_phase_bytes"]["scoring"] < later["gpu_phase_bytes"]["scoring"] < whole["gpu_phase_bytes"]["scoring"] < 24 * GB
    assert "looks" in make(sample_every=5)["gpu_phase_bytes"] and "looks" not in first["gpu_phase_bytes"]


CLIPS = {"method": "one_pass", "expert": "high", "reward": {"kind": "hpsv2.1", "path": "absent.pt"}, "sampling": {"guidance": 3.5, "steps": 20}}


def one_pass_seconds(card):
    """Of one latent at 480p: 1.678 PF, 0.89 of it attention."""
    attention = 40 * 4 * 32760 * (32760 + 512) * 5120
    return (1.678e15 - attention) / card.gemm + attention / card.attention


def test_clips_of_the_base_are_a_phase_of_their_own(make):
    """With guidance two latents go through a pass, where an update has one; there is no LoRA yet; several tries are scored, but one is there at a time."""
    streamed = {**CLIPS, "engine": {"resident_blocks": 0, "keep_place": "host", "optimiser_place": "host"}, "ram": 300}
    own, two, nine = (make(**streamed, real=real) for real in ({"path": "real.safetensors"}, {"replay": 32, "tries": 2}, {"replay": 32, "tries": 9}))
    assert "clips" not in own["gpu_phase_bytes"] and own["host_before_bytes"].keys() == {"loading"}
    assert nine["gpu_phase_bytes"] == two["gpu_phase_bytes"] and two["gpu_phase_bytes"]["clips"] > two["gpu_phase_bytes"]["rollout"]
    unguided = {**streamed, "sampling": {"guidance": 1.0, "steps": 20}}
    seen, unseen = (make(**unguided, real={"replay": 32, "tries": tries})["gpu_phase_bytes"]["clips"] for tries in (2, 1))
    stream = 32760 * 5120 * 2
    assert unseen + 6 * stream <= two["gpu_phase_bytes"]["clips"] <= unseen + 7.5 * stream
    # 81 frames in fp32 beside the decoder are more than a pass of one latent.
    assert seen > unseen and seen > 832 * 480 * (12 * 81 + 6850) + 2 * named_shape("wan-14b").block_parameters * 2
    assert two["host_before_bytes"]["making clips"] == two["host_part_bytes"]["weights"] + 4 * GB + 3 * 32 * 4 * 16 * 21 * 60 * 104


def test_the_time_of_clips_is_told_apart(make):
    changes = {**CLIPS, "engine": {"resident_blocks": 40}, "card": "h200", "ram": 300}
    own, two, nine = (make(**changes, real=real) for real in ({"path": "real.safetensors"}, {"replay": 32, "tries": 2}, {"replay": 16, "tries": 9}))
    assert own["seconds_before_first_step"] == 0 and two["seconds_per_step"] == nine["seconds_per_step"]
    assert nine["seconds_before_first_step"] == pytest.approx(2.25 * two["seconds_before_first_step"])
    decoded = 832 * 480 * 80 * 8.48e6 / CARDS["h200"].gemm
    assert two["seconds_before_first_step"] == pytest.approx(64 * (20 * 2 * one_pass_seconds(CARDS["h200"]) + decoded), rel=0.01)
    shown = table.verdict(two), table.verdict(own)
    assert shown[0].endswith(f"once {two['seconds_before_first_step'] / 60:.1f} min before them") and "once" not in shown[1]


def test_choosing_among_real_clips_is_counted(make, toy, tmp_path):
    """Each is decoded whole and seen by the PAVRM, as many as there are; nothing is sampled."""
    import torch

    from reward_lab.lora_train.real import write_real

    write_real(tmp_path / "real.safetensors", torch.zeros(7, 16, 1, 2, 2), ["x"] * 7)
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "dataset.json").write_text(json.dumps({"videos": [{}] * 14}))
    streamed = {**CLIPS, "engine": {"resident_blocks": 0, "keep_place": "host", "optimiser_place": "host"}, "ram": 300, "card": "h200"}
    pavrm = {"one_pass": {"pavrm": {"kind": "pavrm", "path": "absent.safetensors"}}}
    file, folder, both, every = (
        make(**streamed, **more, real={"path": str(tmp_path / name), "keep": keep})
        for name, keep, more in (("real.safetensors", 0.3, {}), ("set", 0.3, {}), ("real.safetensors", 0.3, pavrm), ("real.safetensors", 1.0, {}))
    )
    assert "clips" not in every["gpu_phase_bytes"] and every["seconds_before_first_step"] == 0
    pixels = 832 * 480
    assert file["gpu_phase_bytes"]["clips"] >= pixels * (6850 + 12 * 81) and "making clips" not in file["host_before_bytes"]
    assert file["seconds_before_first_step"] == pytest.approx(7 * pixels * (4.25e6 + 80 * 8.48e6) / CARDS["h200"].gemm, rel=0.01)
    assert folder["seconds_before_first_step"] == pytest.approx(2 * file["seconds_before_first_step"], abs=0.01)
    # Eight of forty blocks, forward.
    judging = 7 * one_pass_seconds(CARDS["h200"]) * 8 / 40
    assert both["seconds_before_first_step"] - file["seconds_before_first_step"] == pytest.approx(judging, rel=0.01)
    shown = table.text(toy.config(method="one_pass", real={"path": "x", "keep": 0.3}), file)
    assert "for scoring the clips of real.path, of which 30% are learned from" in shown


def test_clips_can_be_what_does_not_fit_and_ones_own_the_remedy(make):
    """Those also need but one of the experts."""
    short = {"width": 1280, "height": 720, "ram": 70, "lora": {"rank": 32, "skip": ["ffn"]}}
    found = make(**short, **CLIPS, real={"replay": 32, "tries": 2})
    assert not found["fits"] and "clips of your own (real.path)" in found["remedies"]
    assert make(**short, **CLIPS, real={"path": "clips"})["fits"]


def test_looks_are_planned_with_their_own_batch_and_guidance(make):
    """They are sampled with guidance whatever the training does, as many at once as the settings say; a held-out video is held whole."""
    streamed = {"engine": {"resident_blocks": 0, "keep_place": "host", "optimiser_place": "device"}, "real": {"path": "real.safetensors"}, "ram": 300}
    samples, held, several = (
        make(**CLIPS, **streamed, **looks)["gpu_phase_bytes"]["looks"]
        for looks in ({"sample_every": 5}, {"held_out": {"every": 5, "prompts": ["x"]}}, {"held_out": {"every": 5, "prompts": ["x"], "batch": 3}})
    )
    stream = 32760 * 5120 * 2
    assert samples == held and 4 * 6 * stream <= several - held <= 4 * 7.5 * stream


def test_knobs_fixed_by_hand_are_kept(make):
    by_hand = {"head_groups": 5, "keep_attention": "no", "keep_feed_forward": "yes", "resident_blocks": 7, "keep_place": "host", "optimiser_place": "host"}
    found = make(engine=by_hand)
    chosen = {name: found["knobs"][name] for name in ("head_groups", "keep_attention", "keep_feed_forward", "resident_blocks", "optimiser_place")}
    assert chosen == {"head_groups": 5, "keep_attention": False, "keep_feed_forward": True, "resident_blocks": 7, "optimiser_place": "host"}


def test_rewards_are_counted_by_their_size(make, tmp_path):
    """A CLIP of the published size where the file is not there, that of a file that is; each of a mix."""
    import torch

    from reward_lab.lora_train import safetensors_file

    small = tmp_path / "small.safetensors"
    safetensors_file.write(small, {"tower": torch.zeros(1000)}, {})
    clip, tiny, none = ({"kind": "hpsv2.1", "path": "absent.pt"}, {"kind": "mps", "path": str(small)}, {"kind": "flicker", "path": ""})
    mix = {"kind": "mix", "path": "", "options": {"rows": [{"reward": reward} for reward in (clip, clip, tiny, none)]}}
    streamed = {"resident_blocks": 0, "optimiser_place": "host", "keep_place": "host"}
    whole = {"mode": "x0", "strategy": "random", "decode": "all"}  # flicker compares frames
    none_bytes, *others = (make(reward=reward, engine=streamed, objective=whole)["gpu_rest_bytes"] for reward in (none, tiny, clip, mix))
    assert [value - none_bytes for value in others] == pytest.approx([4000, 3.944e9, 2 * 3.944e9 + 4000], abs=2)


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
    assert plan.main([str(path), "--shape", "wan-5b"]) == 2
    assert "video.height_px is 16, but it must be a whole number of at least 32" in capsys.readouterr().err
    path.write_text(json.dumps(toy.settings(video={"width_px": 64, "height_px": 32})))
    assert plan.main([str(path), "--json", "--shape", "wan-5b", "--card", "h200", "--ram-gb", "200"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {"gpu_peak_bytes", "host_peak_bytes", "seconds_per_step", "fits", "knobs", "alternatives"} <= found.keys() and found["fits"]
    # The 5B model's VAE has 16 x 16 pixels in a latent, and its passes a quarter of the tokens.
    assert found["tokens_per_video"] == 2 * 1 * 2
    assert plan.main([str(path), "--json", "--shape", "wan-14b", "--card-gb", "3", "--ram-gb", "200"]) == 0
    assert json.loads(capsys.readouterr().out)["fits"] is False
    assert plan.main([str(path), "--shape", "wan-14b", "--base", "fp8", "--card-gb", "3", "--ram-gb", "200"]) == 0
    assert "Does not fit: " in (shown := capsys.readouterr().out) and "This run needs" in shown and "knobs: " in shown


def test_a_pavrm_has_no_plan(tmp_path, capsys):
    path = tmp_path / "config.json"
    path.write_text('{"kind": "pavrm"}')
    assert plan.main([str(path), "--shape", "wan-14b"]) == 2 and "trains a PAVRM" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--card", "voodoo"], "must be one of"),
        (["--card-gb", "-3"], "--card-gb is -3"),
        (["--ram-gb", "nan"], "--ram-gb is nan"),
        (["--shape", "wan-99b"], "no model shape is called 'wan-99b'"),
        (["--shape", "absent.safetensors"], "absent.safetensors"),
        (["--shape", "absent.safetensors", "--base", "fp8"], "goes with a named --shape"),
    ],
)
def test_bad_arguments(toy, tmp_path, capsys, arguments, words):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(toy.settings()))
    assert plan.main([str(path), "--shape", "wan-14b", *arguments]) == 2 and words in capsys.readouterr().err


def test_the_5b_model_is_one_and_has_latents_of_its_own(toy, tmp_path, capsys):
    path = tmp_path / "config.json"
    size = {"width_px": 1280, "height_px": 704, "frames": 121, "vae": "wan2.2"}
    values = toy.settings(video=size, models={"low": ""}, expert="high")
    del values["sampling"]["boundary"]
    path.write_text(json.dumps(values))
    assert plan.main([str(path), "--json", "--shape", "wan-5b", "--card", "rtx 4090", "--ram-gb", "100"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["experts"].keys() == {"high"} and found["tokens_per_video"] == 31 * 22 * 40
    assert found["experts"]["high"]["parameters"] == pytest.approx(5.0e9, rel=0.01)


def test_the_5b_models_decoder_is_counted_by_its_own_figures(make):
    """Caches of a decode with history wait on the host here; without gradient the whole video comes at once."""
    changes = {"engine": {"resident_blocks": 0, "keep_place": "host", "optimiser_place": "host"}, "ram": 300, "sample_every": 5, "batch": 1}
    decode = {"objective": {"mode": "x0", "strategy": "random", "decode": "random", "decode_history": 1}}
    small, large = (make(1280, 704, shape=shape, **changes, **decode) for shape in ("wan-14b", "wan-5b"))
    pixels = 1280 * 704
    assert [found["host_part_bytes"]["decoder"] for found in (small, large)] == [12300 * pixels, 5310 * pixels]
    whole = make(1280, 704, shape="wan-5b", **changes, objective={"mode": "x0", "strategy": "random", "decode": "all"})
    # 21 latents: the caches of each beyond the fourth.
    assert whole["host_part_bytes"]["decoder"] == (16050 + 17 * 3570) * pixels
    merged = 2 * 2 * sum(out * size for out, size in named_shape("wan-5b").outer_linears.values())
    assert large["gpu_phase_bytes"]["looks"] - large["gpu_rest_bytes"] - merged == pytest.approx((7720 + 18 * 25.5) * pixels, rel=0.001)
    assert large["seconds_per_step"]["scoring"] / small["seconds_per_step"]["scoring"] == pytest.approx((38.0 + 4 * 73.6) / (17.2 + 4 * 40.3), rel=0.01)


def test_start_images_of_the_5b_model_are_said_to_take_more(make):
    for image, is_told in (("", False), ("photo.png", True)):
        found = make(1280, 704, shape="wan-5b", ram=300, prompts=[{"text": "a cat", "image": image}])
        assert ("blocks run whole in backward: more than is counted here" in found["note"]) == is_told

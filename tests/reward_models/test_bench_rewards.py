"""The speed benchmark measures what it says: the ways that it times give the same scores, and text is encoded once."""

from __future__ import annotations

import json

import pytest
import torch

from reward_lab.benchmarks import rewards
from reward_lab.reward_models import clip

TINY = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 24, "head_width": 12, "patch_size": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2},
}


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 0.02)])
def test_figures_of_a_tiny_model(tmp_path, dtype, tolerance):
    case = rewards.Case(config=TINY, frames=5, height_px=24, width_px=40, chunk=2, repeats=2, dtype=dtype, singles=3)
    figures = rewards.measure(case, tmp_path)
    assert figures["text_encoder_calls_after_the_first_score"] == 0
    assert figures["pictures_timed"] == {"ours": 5, "bare_tower": 5, "preparation": 5, "per_picture": 3}
    # One picture at a time, read from a file and with both towers, is another way to the same score. bfloat16 has 8 bits; batches round differently.
    assert figures["largest_score_difference"]["per_picture"] < tolerance
    ours, bare = (figures["seconds_per_picture"][name] for name in ("ours", "bare_tower"))
    assert figures["ratios"]["ours_to_bare_tower"] == pytest.approx(ours / bare)
    # 2 layers of width 24 over 17 tokens: 4 x 24^2 + 2 x 4 x 24^2 weights and 2 x 17 x 24 of attention a token, 192 x 24 a patch, 24 x 16 at the end.
    assert figures["tower_flop_per_picture"] == 2 * (2 * 17 * (12 * 24**2 + 2 * 17 * 24) + 16 * 192 * 24 + 24 * 16)
    assert figures["share_of_the_matmul_rate"]["ours"] > 0


def test_flops_of_the_full_size_tower_are_those_of_the_reference():
    """334.59 GFLOP per picture: shared/reference/scorers.md, counted there by other means."""
    from open_clip.model import CLIPTextCfg, CLIPVisionCfg

    config = clip.VIT_H_14
    with torch.device("meta"):
        tower = rewards.CLIP(config["embed_dim"], CLIPVisionCfg(**config["vision_cfg"]), CLIPTextCfg(**config["text_cfg"])).visual.eval()
        assert rewards.tower_flops(tower, torch.empty(1, 3, 224, 224)) == pytest.approx(334.59e9, rel=1e-3)


def test_the_command_writes_what_it_prints(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(rewards.open_clip, "get_model_config", lambda name: {**TINY, "custom": True} if name == "tiny" else None)
    size = ["--frames", "2", "--height", "20", "--width", "30", "--repeats", "1"]
    assert rewards.main(["--size", "tiny", *size, "--out", str(tmp_path / "out" / "r.json")]) == 0
    written = json.loads((tmp_path / "out" / "r.json").read_text(encoding="utf-8"))
    assert json.loads(capsys.readouterr().out) == written
    assert written["model"] == "tiny, random weights" and "torch" in written["hardware"] and written["frames"] == 2
    with pytest.raises(ValueError, match="no model 'ViT-X'"):
        rewards.main(["--size", "ViT-X"])


def test_a_folder_without_the_package_is_named(tmp_path):
    case = rewards.Case(config=TINY, frames=1, height_px=24, width_px=40, chunk=1, repeats=1, package=tmp_path)
    with pytest.raises(ValueError, match="does not hold the hpsv2 package"):
        rewards.measure(case, tmp_path)


def test_the_benchmark_for_cards_runs_end_to_end(tmp_path, capsys):
    from reward_lab.benchmarks.gpu import rewards as on_a_card

    assert on_a_card.main(["--device", "cpu", "--small", "--repeats", "1", "--out", str(tmp_path / "r.json")]) == 0
    written = json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))
    assert json.loads(capsys.readouterr().out) == written
    assert written["torch"] == torch.__version__ and written["card"] == "none, CPU" and len(written["date"]) == 10
    measured = {row["goal"]: row["measured"] for row in written["goals"]}
    assert len(measured) == 5 and all(row["met"] is None for row in written["goals"]), "toy sizes are not judged"
    assert float(measured["HPSv2.1: share by which the chunked gradient differs in float32, at most 1e-05"]) <= 1e-5
    assert measured["HPSv2.1: peak of the chunked gradient in chunks, at most 2"] == "not measured", "a CPU's memory is not measured"
    if not torch.cuda.is_available():
        assert on_a_card.main([]) == 2 and "finds no CUDA device" in capsys.readouterr().err

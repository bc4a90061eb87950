"""Which real clips a run learns from: those that all of its rewards like best, scored once."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from reward_lab.lora_train import identity, learned_from, needs, objectives, picking, replay, run
from reward_lab.lora_train.protocols import Shrunk
from reward_lab.lora_train.real import Chosen, RealLatents, write_real

from .test_prfl import ToyLatentReward

PAVRM = {"kind": "pavrm", "path": "x"}
COUNT = 9


@pytest.fixture
def picked_run(toy, tmp_path):
    """`picked_run(**changes)` -> config and parts of a one-pass run with nine clips."""
    path = tmp_path / "real.safetensors"
    write_real(path, torch.randn(COUNT, 16, 2, 2, 4, generator=torch.Generator().manual_seed(6)), [f"clip {'x' * index}" for index in range(COUNT)])

    def make(**changes):
        config = toy.config(**{"method": "one_pass", "real": {"path": str(path), "keep": 0.33}, **changes})
        models = {} if needs.decodes_training_videos(config) else {"decoder": None, "reward": None}
        models |= {"latent_reward": ToyLatentReward(torch.float32)} if needs.pavrm(config) else {}
        real = RealLatents(path)
        return config, toy.parts(config, more_prompts=[*real.prompts, ""], real=real, **models)

    return make


def _reward(parts, number):
    """The reward of a clip, from the models themselves."""
    latent, prompt = parts.real.clip(number)[None], parts.real.prompts[number]
    return float(parts.reward.score(parts.decoder.decode(latent), [prompt]).per_video)


def test_the_best_by_the_reward_are_kept(picked_run, tmp_path):
    config, parts = picked_run()
    ready = replay.with_clips(config, parts, tmp_path / "run")
    rewards = [_reward(parts, number) for number in range(COUNT)]
    best = sorted(sorted(range(COUNT), key=lambda number: -rewards[number])[:3])
    rows = json.loads((tmp_path / "run" / picking.FILE).read_text())["clips"]
    assert [row["clip"] for row in rows if row["kept"]] == best and [row["caption"] for row in rows] == parts.real.prompts
    assert [row["scores"]["toy"] for row in rows] == pytest.approx(rewards, rel=1e-5)
    assert ready.real.prompts == [parts.real.prompts[number] for number in best] and ready.real.shape == parts.real.shape
    latents, prompts = ready.real.draw(0, 0, 12)
    assert set(prompts) == set(ready.real.prompts)
    for latent, prompt in zip(latents, prompts, strict=True):
        assert torch.equal(latent, parts.real.clip(parts.real.prompts.index(prompt)))
    assert parts.experts.count.total == 0


def test_a_clip_has_to_please_both_rewards(picked_run, tmp_path):
    config, parts = picked_run(one_pass={"pavrm": PAVRM})
    replay.with_clips(config, parts, tmp_path)
    rows = json.loads((tmp_path / picking.FILE).read_text())["clips"]
    table = torch.tensor([[row["scores"]["toy"], row["scores"]["pavrm"]] for row in rows], dtype=torch.float64)
    least = ((table - table.mean(0)) / table.std(0, correction=0)).amin(1)
    kept = torch.tensor([row["kept"] for row in rows])
    assert kept.sum() == 3 and least[kept].min() > least[~kept].max()
    # Neither reward alone chooses these.
    assert any(set(column.topk(3).indices.tolist()) != set(kept.nonzero().flatten().tolist()) for column in table.T)


def test_memory_that_ends_while_clips_are_scored_means_the_next_smaller_plan(picked_run, toy, tmp_path):
    config, parts = picked_run()
    replay.with_clips(config, parts, tmp_path / "whole")
    own, calls = parts.decoder.decode, []

    def decode(*given):
        calls.append(1)
        if len(calls) == 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return own(*given)

    parts.decoder.decode = decode
    smaller = Shrunk(changes="resident_blocks 40 -> 0", masters_on=torch.device("cpu"))
    replay.with_clips(config, replace(parts, shrink=lambda: smaller), tmp_path / "again")
    assert (tmp_path / "again" / picking.FILE).read_bytes() == (tmp_path / "whole" / picking.FILE).read_bytes()
    assert len(calls) == COUNT + 1 and [event.name for event in toy.events if event.name != "preparing"] == ["replanned"]


def test_a_pavrm_alone_needs_no_decoder(picked_run, tmp_path):
    config, parts = picked_run(reward=PAVRM)
    assert parts.decoder is None and parts.reward is None
    replay.with_clips(config, parts, tmp_path)
    rows = json.loads((tmp_path / picking.FILE).read_text())["clips"]
    assert all(set(row["scores"]) == {"pavrm"} for row in rows)


def test_a_resumed_run_goes_on_with_the_same_clips_and_scores_none(picked_run, tmp_path, toy):
    config, parts = picked_run(steps=3)
    ready = replay.with_clips(config, parts, tmp_path / "run")
    run.train(config, ready, objectives.create(config, ready), tmp_path / "run")
    assert [event.step for event in toy.events if event.name == "step"] == [1, 2, 3]
    again = replay.with_clips(config, replace(parts, reward=None, decoder=None), tmp_path / "run")
    assert again.real.prompts == ready.real.prompts


def test_a_run_that_is_stopped_while_clips_are_scored_picks_none(picked_run, tmp_path):
    config, parts = picked_run()
    asked = []
    stopped = replace(parts, stop_requested=lambda: len(asked) > 3 or asked.append(1))
    assert replay.with_clips(config, stopped, tmp_path) is stopped and not (tmp_path / picking.FILE).exists()


def test_all_are_kept_unseen_by_default(picked_run, tmp_path):
    config, parts = picked_run(real={"path": "clips.safetensors", "keep": 1.0})
    assert replay.with_clips(config, replace(parts, reward=None), tmp_path).real is parts.real and not (tmp_path / picking.FILE).exists()


def test_clips_that_score_alike_are_kept_in_their_order(picked_run, tmp_path):
    config, parts = picked_run(real={"path": "clips.safetensors", "keep": 0.01})
    alike = Chosen(parts.real, [2, 2, 2])
    assert replay.with_clips(config, replace(parts, real=alike), tmp_path).real.prompts == [parts.real.prompts[2]]


@pytest.mark.parametrize(("keep", "words"), [(0.0, "real.keep is 0.0, but it must be greater than 0"), (1.5, "real.keep is 1.5, but it must be at most 1")])
def test_a_share_that_cannot_be_is_named(picked_run, keep, words):
    with pytest.raises(ValueError, match=words):
        picked_run(real={"path": "clips.safetensors", "keep": keep})


def _begun(config, parts, folder):
    """The run's clips after a first update."""
    ready = replay.with_clips(config, parts, folder)
    run.train(config, ready, objectives.create(config, ready), folder)
    return ready.real


def test_a_run_goes_on_with_its_picks_though_clips_came_and_went(picked_run, tmp_path):
    """As long as those are there that it picked; nothing is scored anew."""
    config, parts = picked_run(steps=1)
    picked = _begun(config, replace(parts, real=Chosen(parts.real, range(6))), tmp_path)
    others = [number for number in range(6) if parts.real.names[number] not in picked.names]
    moved = Chosen(parts.real, [8, *(number for number in reversed(range(7)) if number != others[0])])
    before = (tmp_path / picking.FILE).read_bytes()
    again = replay.with_clips(config, replace(parts, real=moved, reward=None, decoder=None), tmp_path)
    assert again.real.names == picked.names and torch.equal(again.real.draw(0, 0, 6)[0], picked.draw(0, 0, 6)[0])
    assert again.data_changed == "" and (tmp_path / picking.FILE).read_bytes() == before


def test_picks_that_are_gone_are_named_and_none_is_made_anew(picked_run, tmp_path):
    config, parts = picked_run(steps=1)
    picked = _begun(config, parts, tmp_path)
    before = (tmp_path / picking.FILE).read_bytes()
    rest = Chosen(parts.real, [number for number in range(COUNT) if parts.real.names[number] != picked.names[1]])
    gone = "1 of them are no longer in .*, or have captions that are held out now"
    words = rf"learns from 3 clips that it picked .* but {gone}: {picked.names[1]} \('clip x*'\); put them back"
    with pytest.raises(ValueError, match=words):
        replay.with_clips(config, replace(parts, real=rest), tmp_path)
    assert (tmp_path / picking.FILE).read_bytes() == before


def test_clips_that_changed_between_start_and_resume_are_told(picked_run, toy, tmp_path):
    config, parts = picked_run(real={"path": "clips.safetensors"}, steps=1)
    _begun(config, replace(parts, real=Chosen(parts.real, range(6))), tmp_path)
    assert replay.with_clips(config, replace(parts, real=Chosen(parts.real, range(6))), tmp_path).data_changed == ""
    ready = replay.with_clips(config, replace(parts, real=Chosen(parts.real, range(1, 8))), tmp_path)
    assert ready.data_changed.endswith("uninterrupted one would: 1 gone (0); 2 new (6, 7)")
    run.train(config, ready, objectives.create(config, ready), tmp_path, resume=True)
    assert [event.data_changed for event in toy.events if event.name == "started"] == ["", ready.data_changed]
    assert "another order" in replay.with_clips(config, replace(parts, real=Chosen(parts.real, range(5, -1, -1))), tmp_path).data_changed
    (tmp_path / learned_from.FILE).write_text("")
    assert "is not known" in replay.with_clips(config, parts, tmp_path).data_changed


def test_picks_of_other_settings_or_clips_are_made_anew(picked_run, tmp_path):
    config, parts = picked_run()
    replay.with_clips(config, parts, tmp_path)
    before = json.loads((tmp_path / picking.FILE).read_text())
    other, _ = picked_run(real={**vars(config.real), "keep": 0.5})
    assert len(replay.with_clips(other, parts, tmp_path).real.prompts) == 4
    assert json.loads((tmp_path / picking.FILE).read_text())["made_for"] != before["made_for"]
    fewer = replace(parts, real=Chosen(parts.real, range(4)))
    assert len(replay.with_clips(other, fewer, tmp_path).real.prompts) == 2


def test_picks_that_an_older_version_wrote_down_are_kept(picked_run, tmp_path):
    """It gave the clips no names, and its hash was over whole paths."""
    config, parts = picked_run(steps=1)
    picked = _begun(config, parts, tmp_path)
    found = json.loads((tmp_path / picking.FILE).read_text())
    rows = [{key: value for key, value in row.items() if key != "name"} for row in found["clips"]]
    (tmp_path / picking.FILE).write_text(json.dumps({"made_for": identity.digest(config.deciding()), "clips": rows}))
    assert replay.with_clips(config, parts, tmp_path).real.names == picked.names


def test_a_score_that_is_no_number_picks_nothing(picked_run, tmp_path):
    config, parts = picked_run()
    plain = parts.reward.score
    parts.reward.score = lambda frames, prompts: SimpleNamespace(**{**vars(plain(frames, prompts)), "per_video": torch.full((len(prompts),), float("nan"))})
    with pytest.raises(ValueError, match="gives the clip .* a score of nan, by which none can be picked"):
        picking.with_picked(config, parts, tmp_path / "run")
    assert not (tmp_path / "run" / picking.FILE).exists()


def test_picks_that_cannot_be_read_are_named(picked_run, tmp_path):
    config, parts = picked_run()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / picking.FILE).write_text("")
    with pytest.raises(ValueError, match=r"picked.json, which says what clips the run picked, cannot be read .*; delete it, and clips are picked anew"):
        picking.with_picked(config, parts, tmp_path / "run")

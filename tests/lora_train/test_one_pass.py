"""One pass on the toys: gradients against one plain expression and finite differences in float64, what it costs and loads, and clips that the base makes."""

from __future__ import annotations

import math
from contextlib import ExitStack
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from reward_lab.lora_train import needs, objectives, replay, run
from reward_lab.lora_train.draws import draw_batch, parted, prompt_sampler
from reward_lab.lora_train.objectives.one_pass import OnePass
from reward_lab.lora_train.prompts import derived_seed
from reward_lab.lora_train.protocols import Shrunk
from reward_lab.lora_train.real import RealLatents, write_real

from .gradients import trainee_of
from .test_prfl import ToyLatentReward

PAVRM = {"kind": "pavrm", "path": "x"}
SMALLER = Shrunk(changes="resident_blocks 40 -> 0", masters_on=torch.device("cpu"))


@pytest.fixture
def one_pass(toy, tmp_path):
    """`one_pass(dtype, **changes)` -> config and parts, with rewards as the config needs them."""
    path = tmp_path / "real.safetensors"
    write_real(path, torch.randn(5, 16, 2, 2, 4, generator=torch.Generator().manual_seed(6)), [f"clip {index}" for index in range(5)])

    def make(dtype=torch.float32, **changes):
        config = toy.config(**{"method": "one_pass", "real": {"path": str(path)}, **changes})
        real = RealLatents(path) if needs.real_latents(config) else None
        models = {} if needs.decodes_training_videos(config) else {"decoder": None, "reward": None}
        models |= {"latent_reward": ToyLatentReward(dtype)} if needs.pavrm(config) else {}
        return config, toy.parts(config, dtype, more_prompts=[*(real.prompts if real else ()), ""], real=real, **models)

    return make


def _naive_loss(config, parts, trainee, draw):
    """The loss as one expression in one graph, sample by sample."""
    (sigma, next_sigma), context = draw.sigmas[:2], parts.contexts.batch(draw.prompts)
    backbone, latent = parts.experts.backbones[trainee.expert], draw.start_BCFHW.double()
    velocity = backbone.velocity(latent, sigma, context.prompt_BPD)
    loss = config.one_pass.flow_weight * (velocity - draw.velocity_BCFHW).square().mean()
    told = torch.tensor([prompt != "" for prompt in draw.prompts])
    if needs.decodes_training_videos(config):
        frames = parts.decoder.decode(latent - sigma * velocity, draw.latents)
        loss = loss - config.objective.reward_scale * (1 - sigma) * (parts.reward.score(frames, draw.captions).per_video * told).mean()
    if needs.pavrm(config) and next_sigma > 0:
        logit = parts.latent_reward.score(latent + (next_sigma - sigma) * velocity, next_sigma, context.prompt_BPD).logit_B
        sigmas, steps = config.sampling.sigmas(), config.gradient_steps(trainee.expert)
        even = sum(sigmas[step] - sigmas[step + 1] for step in steps) / len(steps) / (sigma - next_sigma)
        scale = config.objective.reward_scale if config.reward.kind == "pavrm" else config.one_pass.pavrm_scale
        loss = loss - scale * even * (logit * told).mean()
    if config.objective.kl_weight:
        with torch.no_grad(), trainee.switch.disabled():
            base = backbone.velocity(latent, sigma, context.prompt_BPD)
        loss = loss + config.objective.kl_weight * (velocity - base).square().mean() / (2 * max(sigma, 0.1) ** 2)
    return loss


CASES = [
    {"expert": "high", "one_pass": {"null_rate": 0.0}},
    {"expert": "low", "one_pass": {"null_rate": 0.5, "flow_weight": 0.3}, "objective": {"reward_scale": 2.0, "decode": "all"}},
    {"expert": "low", "reward": PAVRM, "one_pass": {"null_rate": 0.5}, "objective": {"reward_scale": 0.4}},
    {"expert": "high", "one_pass": {"pavrm": PAVRM, "pavrm_scale": 0.7, "null_rate": 0.0}, "objective": {"kl_weight": 0.3}},
]


@pytest.mark.parametrize("changes", CASES)
def test_gradient_equals_naive_form_and_finite_differences(one_pass, changes):
    config, parts = one_pass(torch.float64, **changes)
    expert = changes["expert"]
    with ExitStack() as stack:
        trainee = trainee_of(config, parts, expert, stack)
        parameters = trainee.adapter.parameters()
        for step in range(1, 5):
            draw = draw_batch(config, prompt_sampler(config), parts.real, expert, step, 0)
            outcome = OnePass(config, parts).add_gradient(trainee, step, 0)
            found = [parameter.grad.clone() for parameter in parameters]
            trainee.optimiser.zero_grad()
            loss = _naive_loss(config, parts, trainee, draw)
            assert outcome.loss == pytest.approx(float(loss.detach()), rel=1e-5)
            for ours, naive in zip(found, torch.autograd.grad(loss, parameters), strict=True):
                # The clip is noised in fp32, and its velocity is fp32.
                assert (ours - naive).norm() <= 1e-6 * naive.norm()

        parameter, gradient = parameters[1], found[1]
        origin, direction = parameter.detach().clone(), torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        values = []
        for sign in (1, -1):
            parameter.data.copy_(origin + sign * 1e-4 * direction)
            values.append(float(_naive_loss(config, parts, trainee, draw).detach()))
        assert math.isclose(values[0] - values[1], 2e-4 * float((gradient * direction).sum()), rel_tol=1e-5, abs_tol=1e-13)


def test_an_update_costs_three_forwards_a_video_and_one_expert(one_pass, toy, tmp_path):
    config, parts = one_pass(expert="high", steps=3)
    assert needs.experts(config) == ("high",) and needs.decodes(config) and needs.decodes_training_videos(config)
    del parts.experts.backbones["low"]
    run.train(config, parts, objectives.create(config, parts), tmp_path / "run")
    assert [event.forwards for event in toy.events if event.name == "step"] == [3 * config.batch * step for step in (1, 2, 3)]


def test_every_step_is_drawn_and_a_pavrm_never_sees_a_clean_latent(one_pass):
    for changes, wanted in (({}, [3, 4, 5]), ({"reward": PAVRM}, [3, 4])):
        config, parts = one_pass(expert="low", **changes)
        sigmas = config.sampling.sigmas()
        drawn = {sigmas.index(draw_batch(config, prompt_sampler(config), parts.real, "low", step, 0).sigmas[0]) for step in range(1, 60)}
        assert sorted(drawn) == wanted


def test_reward_rises_beyond_flow_matching(one_pass, toy, tmp_path):
    """The toy clips are noise, so flow matching alone does not raise the reward."""
    gains = {}
    for scale in (3.0, 1e-9):
        changes = {"expert": "both", "steps": 60, "optimiser": {"lr": 1e-2}, "objective": {"reward_scale": scale, "decode": "all"}}
        config, parts = one_pass(**changes, held_out={"every": 60, "prompts": ["x", "a red square"], "seeds": 4})
        run.train(config, parts, objectives.create(config, parts), tmp_path / f"run-{scale}")
        last = [event for event in toy.events if event.name == "step"][-1]
        gains[scale] = last.held_out - last.held_out_base
    assert gains[3.0] > gains[1e-9] + 0.01


def test_clips_of_the_base_are_the_best_of_each_prompt_and_are_paid_for(one_pass, toy, tmp_path):
    config, parts = one_pass(real={"path": "", "replay": 3, "tries": 4}, steps=2, expert="low")
    assert needs.experts(config) == ("high", "low") and not needs.real_latents(config) and needs.replays(config)
    ready = replay.with_clips(config, parts, tmp_path / "run")
    made = parts.experts.count.total
    assert ready.clip_forwards == made == 3 * 4 * 6 * 2
    assert len(ready.real.prompts) == 3 and set(ready.real.prompts) == {prompt.text for prompt in config.prompts}
    # The kept one of the first prompt is the best of four by the reward.
    sampler, several = prompt_sampler(config), []
    context = parts.contexts.batch([ready.real.prompts[0]])
    for number in range(4):
        generator = torch.Generator().manual_seed(derived_seed(config.seed, "replay", 0, number))
        several.append(parts.experts.roll(torch.randn(config.video.latent_shape(1), generator=generator), config.sampling.sigmas(), context))
    assert sampler.draw(0, 1)[0].startswith(ready.real.prompts[0])
    rewards = [float(parts.reward.score(parts.decoder.decode(latent), [ready.real.prompts[0]]).per_video) for latent in several]
    kept, _ = ready.real.draw(0, 0, 3)
    best = several[rewards.index(max(rewards))]
    assert min(float((row - best[0]).abs().max()) for row in kept) < 1e-5 and len(set(rewards)) == 4

    run.train(config, ready, objectives.create(config, ready), tmp_path / "run")
    assert [event.forwards for event in toy.events if event.name == "step"] == [made + 6 * step for step in (1, 2)]
    before = (tmp_path / "run" / replay.FILE).read_bytes()
    assert replay.with_clips(config, parts, tmp_path / "run").clip_forwards == made  # a resumed run has paid as much, and makes none again
    assert (tmp_path / "run" / replay.FILE).read_bytes() == before


def test_beside_a_pavrm_a_clip_of_the_base_has_to_please_both(one_pass, tmp_path):
    """Both rewards over all tries, each to mean 0 and deviation 1; of a prompt's tries the one whose lesser score is the greatest."""
    config, parts = one_pass(real={"path": "", "replay": 3, "tries": 4}, expert="high", one_pass={"pavrm": PAVRM})
    ready, drawn = replay.with_clips(config, parts, tmp_path / "run"), prompt_sampler(config)
    latents, by_frames, by_latent = [], [], []
    for index in range(3):
        (prompt,), _ = parted(drawn.draw(index, 1))
        for number in range(4):
            generator = torch.Generator().manual_seed(derived_seed(config.seed, "replay", index, number))
            noise = torch.randn(config.video.latent_shape(1), generator=generator)
            latent = parts.experts.roll(noise, config.sampling.sigmas(), parts.contexts.batch([prompt]))
            judged = torch.randn(latent.shape, generator=torch.Generator().manual_seed(derived_seed(config.seed, "judged", index)))
            with torch.no_grad():
                by_frames.append(float(parts.reward.score(parts.decoder.decode(latent), [prompt]).per_video))
                by_latent.append(float(parts.latent_reward.score(0.5 * latent + 0.5 * judged, 0.5, parts.contexts.batch([prompt]).prompt_BPD).logit_B))
            latents.append(latent)
    scores = np.minimum(*((np.array(values) - np.mean(values)) / np.std(values) for values in (by_frames, by_latent))).reshape(3, 4)
    wanted = torch.cat([latents[4 * index + int(scores[index].argmax())] for index in range(3)])
    found = torch.stack([ready.real.clip(index) for index in range(3)])
    torch.testing.assert_close(found, wanted)
    assert any(scores[index].argmax() != np.array(by_frames).reshape(3, 4)[index].argmax() for index in range(3))


@pytest.mark.parametrize("where", ["roll", "decode"])
def test_a_clip_that_does_not_fit_is_made_again_with_the_next_smaller_plan(one_pass, toy, tmp_path, where):
    """Nothing of the first try stays: the clips, their cost and the run have the same bytes. Only one video is decoded at a time."""
    config, parts = one_pass(real={"path": "", "replay": 3, "tries": 2}, steps=2, expert="low")
    files, shrunk, decoded = {}, [], []
    for name, full_at in (("whole", 0), ("again", 4)):
        part, calls = parts.experts.backbones["low"] if where == "roll" else parts.decoder, []
        own = part.velocity if where == "roll" else part.decode

        def once_full(latent_BCFHW, *others, own=own, calls=calls, full_at=full_at):
            calls.append(latent_BCFHW.shape[0])
            if len(calls) == full_at:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return own(latent_BCFHW, *others)

        setattr(part, "velocity" if where == "roll" else "decode", once_full)
        ready = replay.with_clips(config, replace(parts, shrink=lambda: shrunk.append(1) or SMALLER), tmp_path / name)
        decoded += calls
        setattr(part, "velocity" if where == "roll" else "decode", own)
        assert ready.clip_forwards == parts.experts.count.total
        files[name] = (tmp_path / name / replay.FILE).read_bytes()
        parts.experts.count.total = 0.0
    assert files["whole"] == files["again"] and len(shrunk) == 1
    assert [event.step for event in toy.events if event.name == "replanned"] == [0]
    assert set(decoded) == ({2} if where == "roll" else {1})  # guidance doubles a pass


def test_a_run_that_is_stopped_while_clips_are_made_makes_no_update(one_pass, toy, tmp_path):
    config, parts = one_pass(real={"path": "", "replay": 3}, sample_every=1)
    stopped = replace(parts, stop_requested=lambda: True, writer=SimpleNamespace(write=lambda *videos: []))
    ready = replay.with_clips(config, stopped, tmp_path / "run")
    finished = run.train(config, ready, objectives.create(config, ready), tmp_path / "run")
    assert (finished.reason, finished.step) == ("stopped", 0) and not (tmp_path / "run" / replay.FILE).exists()
    # Nor is the base looked at: who asked to stop waits.
    assert toy.events[-1].name == "finished" and not any(event.name == "sample" for event in toy.events)
    assert len(replay.with_clips(config, parts, tmp_path / "run").real.prompts) == 3


def test_a_base_that_makes_nan_is_told_and_keeps_no_such_clip(one_pass, tmp_path):
    config, parts = one_pass(real={"path": "", "replay": 3, "tries": 2}, expert="low")
    backbone, calls = parts.experts.backbones["low"], []
    plain = backbone.velocity
    backbone.velocity = lambda *given: calls.append(1) or plain(*given) * (float("nan") if len(calls) > 9 else 1.0)
    with pytest.raises(ValueError, match="the base model's video number . of the prompt .* holds NaN or infinity"):
        replay.with_clips(config, parts, tmp_path / "run")
    backbone.velocity = plain
    assert len(replay.with_clips(config, parts, tmp_path / "run").real.prompts) == 3


def test_clips_that_are_made_are_never_made_again(one_pass, toy, tmp_path):
    """A run that is stopped among its clips goes on with the next one, also with another optimiser; only what clips depend on makes them anew."""
    settings = {"real": {"path": "", "replay": 3, "tries": 2}, "expert": "low", "steps": 2}
    config, parts = one_pass(**settings)
    whole = replay.with_clips(config, parts, tmp_path / "whole")
    told = [(event.done, event.total) for event in toy.events if event.name == "preparing"]
    assert told == [(count, 6) for count in range(1, 7)]
    waited = []
    replay.with_clips(config, replace(parts, pause=lambda: waited.append(1)), tmp_path / "waiting")
    assert len(waited) == 6, "the queue goes first, here too"
    parts.experts.count.total = 0.0

    toy.events.clear()
    stopping = replace(parts, stop_requested=lambda: len(toy.events) >= 3)
    ready = replay.with_clips(config, stopping, tmp_path / "run")
    assert ready.real is None and len(list((tmp_path / "run" / replay.TRIES).iterdir())) == 3
    half = tmp_path / "run" / replay.TRIES / "0001-1.safetensors"
    half.write_bytes((tmp_path / "run" / replay.TRIES / "0000-0.safetensors").read_bytes()[:-100])  # of a process that was killed
    config, parts = one_pass(**settings, optimiser={"kind": "adafactor"}, name="other")
    ready = replay.with_clips(config, parts, tmp_path / "run")
    assert parts.experts.count.total == 3 * 6 * 2 and ready.clip_forwards == whole.clip_forwards == 6 * 6 * 2
    assert (tmp_path / "run" / replay.FILE).read_bytes() == (tmp_path / "whole" / replay.FILE).read_bytes()
    assert not (tmp_path / "run" / replay.TRIES).exists()

    for changes, made in (({"optimiser": {"lr": 1e-5}, "steps": 5}, 0), ({"seed": 8}, 6), ({"real": {**settings["real"], "tries": 1}}, 3)):
        config, parts = one_pass(**{**settings, **changes})
        replay.with_clips(config, parts, tmp_path / "run")
        assert parts.experts.count.total == made * 6 * 2, changes


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"real": {"path": ""}}, "real.path is empty; give real videos, or set real.replay to let the base model make so many"),
        ({"real": {"path": ""}, "method": "prfl", "prfl": {"real_weight": 1.0}}, "real.replay .*, or set prfl.real_weight 0"),
        ({"one_pass": {"pavrm": {"kind": "hpsv2.1", "path": "x"}}}, "one_pass.pavrm is a hpsv2.1, but latents are scored by a pavrm"),
        ({"one_pass": {"flow_wait": 1.0}}, "flow_wait.*flow_weight"),
        ({"one_pass": {"null_rate": 1.5}}, "one_pass.null_rate is 1.5"),
        ({"prompts": [{"text": "a cat", "image": "cat.png"}]}, "1 prompts have start images, which a run that starts from clips does not read"),
        ({"real": {"path": "", "replay": 2, "tries": 0}}, "real.tries is 0"),
        ({"reward": PAVRM, "expert": "low", "sampling": {"steps": 2}}, "the PAVRM, which scores no clean latent, leaves the low-noise expert none"),
    ],
)  # fmt: skip
def test_settings_that_cannot_work_are_named(toy, changes, words):
    with pytest.raises(ValueError, match=words):
        toy.config(**{"method": "one_pass", "real": {"path": "clips.safetensors"}, **changes})

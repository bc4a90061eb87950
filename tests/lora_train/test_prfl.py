"""PRFL on the toys: the parts it does without, its draws, real latents, failure. Its gradients: test_gradients.py."""

from __future__ import annotations

from contextlib import ExitStack, nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from reward_lab.lora_train import needs, objectives, run
from reward_lab.lora_train.draws import draw_batch, prompt_sampler, shortened
from reward_lab.lora_train.evaluation import evaluate
from reward_lab.lora_train.objectives.prfl import Prfl
from reward_lab.lora_train.pavrm_data import LatentVideo, Sample
from reward_lab.lora_train.prompts import derived_seed
from reward_lab.lora_train.protocols import LatentScores
from reward_lab.lora_train.real import RealLatents, RealSamples, write_real
from reward_lab.lora_train.rollout import ContextCache
from reward_lab.lora_train.solvers import SOLVERS

from .conftest import TEXT_WIDTH
from .gradients import trainee_of


class ToyLatentReward:
    """A smooth scalar of latent, sigma and text."""

    def __init__(self, dtype):
        self.weights = torch.randn(16, generator=torch.Generator().manual_seed(4), dtype=dtype)

    def score(self, latent_BCFHW, sigma, context_BPD, condition_BCFHW=None):
        mean_BC = torch.tanh(latent_BCFHW.to(self.weights.dtype)).mean((2, 3, 4))
        logit = mean_BC @ self.weights * 3 + (latent_BCFHW**2).mean((1, 2, 3, 4)) * sigma + context_BPD.to(self.weights.dtype).mean((1, 2))
        return LatentScores(logit_B=logit, probability_B=logit.sigmoid())


@pytest.fixture
def prfl(toy, tmp_path):
    """`prfl(dtype, **changes)` -> config and parts of a PRFL run with real latents."""
    path = tmp_path / "real.safetensors"
    write_real(path, torch.randn(5, 16, 2, 2, 4, generator=torch.Generator().manual_seed(6)), [f"clip {index}" for index in range(5)])

    def make(dtype=torch.float32, **changes):
        config = toy.config(**{"method": "prfl", "reward": {"kind": "pavrm", "path": "x"}, "real": {"path": str(path)}, **changes})
        real = RealLatents(path)
        parts = toy.parts(config, dtype, more_prompts=[*real.prompts, ""], latent_reward=ToyLatentReward(dtype), real=real, decoder=None, reward=None)
        return config, parts

    return make


def test_a_boundary_without_real_noise_levels_is_refused(toy):
    values = {"method": "prfl", "expert": "high", "reward": {"kind": "pavrm", "path": "x"}, "real": {"path": "r.safetensors"}, "prfl": {"real_weight": 1.0}}
    with pytest.raises(ValueError, match="sampling.boundary is 1, .* set prfl.real_weight 0"):
        toy.config(**values, sampling={"boundary": 1.0})


def test_flow_matching_trains_at_the_experts_own_noise_levels(prfl):
    config, parts = prfl(torch.float64, prfl={"real_weight": 0.7}, expert="low")
    seen = []
    plain = parts.experts.backbones["low"].velocity
    parts.experts.backbones["low"].velocity = lambda x, sigma, context: seen.append((sigma, context)) or plain(x, sigma, context)
    with ExitStack() as stack:
        trainee = trainee_of(config, parts, "low", stack)
        for step in range(1, 6):
            Prfl(config, parts).add_gradient(trainee, step, 0)
            sigma, context = seen[-1]
            prompts = parts.real.draw(derived_seed(config.seed, "real"), (step - 1) * config.batch, config.batch)[1]
            assert sigma < config.sampling.boundary and torch.equal(parts.contexts.batch(prompts).prompt_BPD, context)


def test_high_noise_training_needs_one_expert_and_no_vae(prfl, tmp_path):
    config, parts = prfl(expert="high", steps=3, held_out={"every": 2, "prompts": ["x"]})
    assert needs.experts(config) == ("high",) and not needs.decodes(config)
    del parts.experts.backbones["low"]
    finished = run.train(config, parts, objectives.create(config, parts), tmp_path / "run")
    assert finished.reason == "completed" and len(finished.files) == 1


@pytest.mark.parametrize(
    ("changes", "experts", "decodes"),
    [
        ({"expert": "low"}, ("high", "low"), False),
        ({"expert": "low", "objective": {"start": "real"}}, ("low",), False),
        ({"expert": "high", "sample_every": 5}, ("high", "low"), True),
        ({"expert": "high", "held_out": {"every": 1, "prompts": ["x"]}, "guards": {"motion_floor": 0.9}}, ("high", "low"), True),
        ({"expert": "high", "method": "reward_backprop"}, ("high", "low"), True),
    ],
)
def test_what_else_is_loaded(prfl, changes, experts, decodes):
    config, _ = prfl(**changes)
    assert needs.experts(config) == experts and needs.decodes(config) is decodes


def test_clean_latent_is_never_scored_and_every_other_step_may_be(prfl):
    config, _ = prfl(expert="low")
    assert list(config.gradient_steps("low")) == [3, 4]
    assert list(prfl(expert="low", prfl={"last_step": 5})[0].gradient_steps("low")) == [3, 4, 5]
    drawn = {draw_batch(config, prompt_sampler(config), None, "high", step, 0).steps[0] for step in range(1, 60)}
    assert drawn == set(config.gradient_steps("high"))


def test_null_prompts_come_at_their_rate(prfl):
    config, _ = prfl(prfl={"null_rate": 0.3})
    prompts = [prompt for step in range(1, 301) for prompt in draw_batch(config, prompt_sampler(config), None, "high", step, 0).prompts]
    # 600 draws: four standard errors are 0.075
    assert abs(prompts.count("") / len(prompts) - 0.3) < 0.075


def test_shortened_rollout_keeps_the_gradient_steps_sigmas():
    sigmas = [1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.0]
    short, steps = shortened(sigmas, [4, 5], 2)
    assert short == [1.0, 0.8, 0.6, 0.5, 0.0] and steps == [2, 3] and [short[step] for step in steps] == [0.6, 0.5]
    assert shortened(sigmas, [1], 2) == (sigmas, [1]) and shortened(sigmas, [4], 0) == (sigmas, [4])


def test_reward_rises(prfl, toy, tmp_path):
    config, parts = prfl(expert="high", steps=30, optimiser={"lr": 3e-2}, held_out={"every": 30, "prompts": ["x", "a red square"], "seeds": 4})
    run.train(config, parts, objectives.create(config, parts), tmp_path / "run")
    last = [event for event in toy.events if event.name == "step"][-1]
    assert last.held_out > last.held_out_base + 0.1


def test_broken_real_latents_are_named(tmp_path):
    from safetensors.torch import save_file

    with pytest.raises(ValueError, match="cannot be read"):
        RealLatents(tmp_path / "none.safetensors")
    save_file({"latents": torch.zeros(3, 16, 2, 2, 2)}, tmp_path / "mute.safetensors")
    with pytest.raises(ValueError, match="N prompts in the metadata"):
        RealLatents(tmp_path / "mute.safetensors")
    latents = torch.zeros(3, 16, 2, 2, 2)
    latents[2, 5, 0, 1, 0] = torch.inf
    write_real(tmp_path / "infinite.safetensors", latents.bfloat16(), ["a", "b", "c"])
    with pytest.raises(ValueError, match=r"infinite\.safetensors hold NaN or infinity in clip 2 \(counted from 0\), 'c'; make the clip again"):
        RealLatents(tmp_path / "infinite.safetensors")
    write_real(tmp_path / "numbers.safetensors", torch.zeros(2, 16, 2, 2, 2), ["a", 1])
    with pytest.raises(ValueError, match="have the prompt 1, which is no text; write 2 texts"):
        RealLatents(tmp_path / "numbers.safetensors")


def test_nan_stops_with_step_sigma_and_rewards_and_keeps_the_checkpoint(prfl, tmp_path):
    config, parts = prfl(expert="high", steps=6)
    plain, calls = parts.latent_reward.score, []

    def score(*arguments):
        calls.append(1)
        scores = plain(*arguments)
        return LatentScores(logit_B=scores.logit_B * float("nan"), probability_B=scores.probability_B) if len(calls) == 4 else scores

    parts.latent_reward.score = score
    with pytest.raises(run.NonFiniteError, match=r"step 4 at sigma 0\.\d+ .*last three rewards: \d\S+, \d\S+, nan|step 4 at sigma 1\.0+ "):
        run.train(config, parts, objectives.create(config, parts), tmp_path / "run")
    from reward_lab.lora_train import checkpoint

    assert [path.name for path in checkpoint.states(tmp_path / "run")] == ["step-000002.state.safetensors"]


def test_dataset_videos_of_one_shape_are_drawn_like_a_files_rows(tmp_path):
    latents = torch.randn(5, 16, 2, 2, 4)
    captions = [f"clip {index}" for index in range(5)]

    def sample(name, latent, caption):
        return Sample(id=name, shape=tuple(latent.shape), read=lambda: LatentVideo(latent_CFHW=latent, texts_PD={}), caption=caption)

    odd = [sample("long", torch.zeros(16, 3, 2, 4), "longer"), sample("mute", latents[0], " ")]
    real = RealSamples([*(sample(str(index), latents[index], captions[index]) for index in range(5)), *odd])
    write_real(tmp_path / "real.safetensors", latents, captions)
    file = RealLatents(tmp_path / "real.safetensors")
    assert real.left_out == 2 and real.prompts == file.prompts and tuple(real.shape) == tuple(file.shape)
    for position in range(7):
        (ours, said), (theirs, wanted) = real.draw(3, position, 2), file.draw(3, position, 2)
        assert torch.equal(ours, theirs) and said == wanted
    with pytest.raises(ValueError, match="none of the dataset's 1 videos has a caption"):
        RealSamples(odd[1:])


@pytest.mark.parametrize("kind", ["conditions", "first_frames"])
def test_with_start_images_the_clips_own_first_frames_are_known(toy, kind):
    """Else the flow-matching half would teach an image-to-video expert to look past its image."""
    latents, conditions = torch.randn(2, 3, 16, 2, 2, 4).unbind()
    samples = [
        Sample(id=str(n), shape=(16, 2, 2, 4), read=lambda n=n: LatentVideo(latent_CFHW=latents[n], texts_PD={}, condition_CFHW=conditions[n]),
               caption=f"clip {n}", has_condition=True)
        for n in range(3)
    ]  # fmt: skip
    config = toy.config(
        method="prfl", reward={"kind": "pavrm", "path": "x"}, real={"path": "x"}, expert="low", prfl={"real_weight": 1.0}, prompts=[{"text": "a", "image": "a"}]
    )
    real = RealSamples(samples)
    parts = toy.parts(config, more_prompts=real.prompts, latent_reward=ToyLatentReward(torch.float32), real=real, decoder=None, reward=None)
    texts = {text: torch.randn(3, TEXT_WIDTH) for text in ["a", *real.prompts]}
    image = {"a": torch.randn(20, 2, 2, 4) if kind == "conditions" else torch.randn(16, 1, 2, 4)}
    parts = replace(parts, contexts=ContextCache(texts, torch.zeros(3, TEXT_WIDTH), torch.device("cpu"), **{kind: image}))
    seen = []
    for backbone in parts.experts.backbones.values():
        backbone.velocity = lambda x, sigma, text, known=None, plain=backbone.velocity: seen.append((x, known)) or plain(x[:, :16], sigma, text)
    with ExitStack() as stack:
        trainee = trainee_of(config, parts, "low", stack)
        Prfl(config, parts).add_gradient(trainee, 1, 0)
    clean, prompts = real.draw(derived_seed(config.seed, "real"), 0, config.batch)
    told, known_BF = seen[-1]
    if kind == "conditions":
        wanted = torch.stack([conditions[int(prompt.split()[1])] for prompt in prompts])
        assert torch.equal(told[:, 20:], wanted) and bool((told[:, 16:20, 0] == 1).all()) and not told[:, 16:20, 1:].any()
        with_mask = parts.contexts.of_clips(prompts, clean, told[:, 16:])
        assert torch.equal(with_mask.condition_BCFHW, told[:, 16:]), "a condition that holds its mask already"
    else:
        assert torch.equal(told[:, :, :1], clean[:, :, :1]) and known_BF.tolist() == [[True, False]] * config.batch


def test_held_out_curve_follows_the_trajectories_that_are_trained(prfl, tmp_path):
    """The look's own rollout, done by hand with PRFL's solver and whole timesteps."""
    config, parts = prfl(prfl={"solver": "unipc"}, expert="high", held_out={"every": 1, "prompts": ["x"]}, steps=1, batch=1)
    context, sigmas, totals = parts.contexts.batch(["x"]), config.sampling.sigmas(), []
    seed = derived_seed(config.seed, "held out", "x", 0)
    latent, solver = torch.randn(config.video.latent_shape(1), generator=torch.Generator().manual_seed(seed)), SOLVERS["unipc"](sigmas)
    for index in config.gradient_steps("high"):
        with torch.no_grad():
            told = int(1000 * sigmas[index] + 1e-6) / 1000
            latent = solver.step(index, latent, parts.experts.velocity(latent, sigmas[index], context, guidance=config.prfl.guidance, told_sigma=told))
        totals.append(parts.latent_reward.score(latent, int(1000 * sigmas[index + 1] + 1e-6) / 1000, context.prompt_BPD).probability_B.item())
    base = evaluate(config, parts, {"high": SimpleNamespace(switch=SimpleNamespace(merged=nullcontext))})
    assert len(totals) <= 4 and base.mean == pytest.approx(sum(totals) / len(totals), rel=1e-6)

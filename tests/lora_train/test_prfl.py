"""PRFL on the toys: gradients against a naive form and finite differences in float64, the parts it does without, and its draws."""

from __future__ import annotations

import math
from contextlib import ExitStack

import pytest
import torch

from reward_lab.lora_train import needs, objectives, run
from reward_lab.lora_train.draws import draw_batch, shortened
from reward_lab.lora_train.lora.adapter import new_adapter
from reward_lab.lora_train.lora.linears import install
from reward_lab.lora_train.lora.targets import select_targets
from reward_lab.lora_train.objectives.prfl import Prfl, told
from reward_lab.lora_train.prompts import PromptSampler
from reward_lab.lora_train.protocols import LatentScores
from reward_lab.lora_train.real import RealLatents, write_real
from reward_lab.lora_train.solvers import SOLVERS, gradient_scale
from reward_lab.lora_train.trainee import new_trainee


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


def _trainee(config, parts, expert, stack):
    linears = parts.experts.backbones[expert].linears()
    adapter = new_adapter(linears, select_targets(linears, (), config.lora.skip), rank=3, alpha=1.5, seed=3, device=torch.device("cpu"))
    for index, layer in enumerate(adapter.layers.values()):
        layer.up_OR.data.normal_(0, 0.3, generator=torch.Generator().manual_seed(index))
        layer.down_RI.data, layer.up_OR.data = layer.down_RI.data.double(), layer.up_OR.data.double()
    return new_trainee(expert, adapter, stack.enter_context(install(linears, adapter)), config.optimiser)


def _naive_loss(config, parts, trainee, draw, before):
    """The loss as one expression, by a solver of its own; steps before the gradient's use the unmoved parameters (`before` puts them in place)."""
    context, sampling = parts.contexts.batch(draw.prompts), config.sampling
    latent, loss = draw.start_BCFHW.double(), 0.0
    solver = SOLVERS[config.prfl.solver](draw.sigmas)
    for index in range(draw.steps[-1] + 1):
        sigma = draw.sigmas[index]
        backbone = parts.experts.backbones["high" if sigma >= sampling.boundary else "low"]
        is_selected = index in draw.steps
        with ExitStack() as stack:
            if not is_selected:
                stack.enter_context(before())
            given = backbone.velocity(latent.detach(), told(config, sigma), context.prompt_BPD)
            if config.prfl.guidance != 1:
                without = backbone.velocity(latent.detach(), told(config, sigma), context.negative_BPD)
                given = without + config.prfl.guidance * (given - without)
        latent = solver.step(index, latent.detach(), given if is_selected else given.detach())
        if is_selected:
            logit = parts.latent_reward.score(latent, told(config, draw.sigmas[index + 1]), context.prompt_BPD).logit_B
            value = torch.relu(config.prfl.hinge_limit - logit.sigmoid()) if config.prfl.loss == "hinge" else -logit
            scales = [gradient_scale(config.prfl.solver, config.sampling.sigmas(), step) for step in config.gradient_steps(trainee.expert)]
            factor = sum(scales) / len(scales) / gradient_scale(config.prfl.solver, draw.sigmas, index) if config.prfl.even_gradient else 1.0
            loss = loss + config.objective.reward_scale * factor * value.mean() / len(draw.steps)
            if config.objective.kl_weight:
                with trainee.switch.disabled():
                    base = backbone.velocity(latent_before(draw, index, solver, given, latent), told(config, sigma), context.prompt_BPD).detach()
                loss = loss + config.objective.kl_weight * (given - base).square().mean() / (2 * max(sigma, 0.1) ** 2) / len(draw.steps)
    return loss


def latent_before(draw, index, solver, velocity, moved):
    """Only for Euler: the latent that the step left from."""
    return (moved - (draw.sigmas[index + 1] - draw.sigmas[index]) * velocity).detach()


CASES = [
    {"prfl": {"solver": "euler", "loss": "logit"}, "expert": "high"},
    {"prfl": {"solver": "unipc", "loss": "hinge", "even_gradient": False}, "expert": "low", "objective": {"reward_scale": 0.1}},
    {"prfl": {"solver": "unipc", "loss": "logit", "points": 2, "guidance": 2.0}, "expert": "low"},
    {"prfl": {"solver": "euler", "points": 2, "whole_timesteps": False}, "expert": "high", "objective": {"kl_weight": 0.4}},
    {"prfl": {"solver": "unipc"}, "expert": "low", "objective": {"rollout_steps": 2}},
    {"prfl": {"solver": "euler"}, "expert": "low", "objective": {"start": "real"}},
]


@pytest.mark.parametrize("changes", CASES)
def test_gradient_equals_naive_form_and_finite_differences(prfl, changes):
    config, parts = prfl(torch.float64, **changes)
    expert = changes["expert"]
    draw = draw_batch(config, PromptSampler(config.prompts, 0), parts.real, expert, 1, 0)
    with ExitStack() as stack:
        trainee = _trainee(config, parts, expert, stack)
        parameters = trainee.adapter.parameters()
        Prfl(config, parts).add_gradient(trainee, 1, 0)
        found = [parameter.grad.clone() for parameter in parameters]

        def unmoved():
            return ExitStack()

        expected = torch.autograd.grad(_naive_loss(config, parts, trainee, draw, unmoved), parameters)
        for ours, naive in zip(found, expected, strict=True):
            # The rollout's latent starts as fp32 noise and the guidance sums in another order.
            assert (ours - naive).norm() <= 1e-6 * naive.norm()

        if config.prfl.points > 1:
            return  # a later point's latent moves with the parameter, which the loss takes for a constant
        parameter, gradient = parameters[1], found[1]
        origin = parameter.detach().clone()
        direction = torch.randn(origin.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        values = []
        for sign in (1, -1):
            moved = origin + sign * 1e-4 * direction
            parameter.data.copy_(moved)
            values.append(float(_naive_loss(config, parts, trainee, draw, lambda moved=moved: _At(parameter, origin, moved)).detach()))
        parameter.data.copy_(origin)
        assert math.isclose(values[0] - values[1], 2e-4 * float((gradient * direction).sum()), rel_tol=1e-5, abs_tol=1e-13)


class _At:
    """Within, the parameter is back where it was."""

    def __init__(self, parameter, origin, moved):
        self.parameter, self.origin, self.moved = parameter, origin, moved

    def __enter__(self):
        self.parameter.data.copy_(self.origin)

    def __exit__(self, *_):
        self.parameter.data.copy_(self.moved)


def test_flow_matching_gradient_is_that_of_its_formula(prfl):
    config, parts = prfl(torch.float64, prfl={"real_weight": 0.7, "loss": "logit"}, objective={"reward_scale": 1e-30}, expert="low")
    seen = []
    plain = parts.experts.backbones["low"].velocity
    parts.experts.backbones["low"].velocity = lambda x, sigma, context: seen.append((x, sigma, context)) or plain(x, sigma, context)
    with ExitStack() as stack:
        trainee = _trainee(config, parts, "low", stack)
        outcome = Prfl(config, parts).add_gradient(trainee, 1, 0)
        found = [parameter.grad.clone() for parameter in trainee.adapter.parameters()]
        noisy, sigma, context = seen[-1]
        assert sigma < config.sampling.boundary
        clean, prompts = parts.real.draw(_real_seed(config), 0, config.batch)
        assert torch.equal(parts.contexts.batch(prompts).prompt_BPD, context)
        noise = (noisy - (1 - sigma) * clean) / sigma
        loss = (plain(noisy, sigma, context) - (noise - clean)).square().mean()
        expected = torch.autograd.grad(0.7 * loss, trainee.adapter.parameters())
    assert outcome.loss == pytest.approx(0.7 * float(loss.detach()), rel=1e-6)
    for ours, naive in zip(found, expected, strict=True):
        assert (ours - naive).norm() <= 1e-5 * naive.norm()  # the noise is recovered from fp32 latents


def _real_seed(config):
    from reward_lab.lora_train.prompts import derived_seed

    return derived_seed(config.seed, "real")


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
    drawn = {draw_batch(config, PromptSampler(config.prompts, 0), None, "high", step, 0).steps[0] for step in range(1, 60)}
    assert drawn == set(config.gradient_steps("high"))


def test_null_prompts_come_at_their_rate(prfl):
    config, _ = prfl(prfl={"null_rate": 0.3})
    prompts = [prompt for step in range(1, 301) for prompt in draw_batch(config, PromptSampler(config.prompts, 0), None, "high", step, 0).prompts]
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

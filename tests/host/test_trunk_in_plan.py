"""Where a latent reward's trunk lies: engine and plan decide alike."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest

from reward_lab.lora_train.config import TrainConfig
from reward_lab.lora_train.planning.job import job_of
from reward_lab.lora_train.planning.memory import Choice, host_parts, rest_bytes
from reward_lab.lora_train.planning.shapes import shape_of
from reward_lab.reward_models.spec import RewardModelSpec

from .quantised_files import write_fp8

pytestmark = pytest.mark.host


@pytest.fixture
def pavrm_file(repo):
    return str(repo / "pocket" / "weights" / "pocket_PAVRM.safetensors")


def config_of(models, high, pavrm, resident_blocks, **options):
    return TrainConfig.from_dict(
        {
            "models": {**models, "high": str(high)}, "reward": {"kind": "pavrm", "path": pavrm, "options": options}, "method": "prfl", "expert": "high",
            "prompts": [{"text": "a red square"}], "video": {"width_px": 32, "height_px": 32, "frames": 5}, "sampling": {"steps": 3}, "lora": {"rank": 2},
            "name": "tiny", "steps": 1, "batch": 1, "dtype": "fp32", "engine": {"resident_blocks": resident_blocks, "slots": 2},
        }
    )  # fmt: skip


@pytest.fixture
def opened(comfyui, monkeypatch):
    """`opened(config, reward)` -> the trunk's executor within the engines of a run, and the plan's figures with the knobs of these."""
    import torch

    from reward_lab.host import engine, latent_reward, wan
    from reward_lab.host.training_mode import training_mode

    made = []

    class Recorded(latent_reward.BlockExecutor):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            made.append(self)

    monkeypatch.setattr(latent_reward, "BlockExecutor", Recorded)

    def run(config, backbones=None):
        cpu, dtype = torch.device("cpu"), torch.float32
        if backbones is None:
            backbones = {"high": wan.load_backbone(config.models.high, dtype=dtype, device=cpu, on_host=True)}
        spec = RewardModelSpec(kind="pavrm", path=config.reward.path, options=dict(config.reward.options))
        reward = latent_reward.load(spec, backbones, {"high": config.models.high}, device=cpu, dtype=dtype)
        job = job_of(config, shape_of(config.models.high))
        with training_mode(), engine.engines(config, backbones, cpu, dtype, latent_reward=reward) as engines:
            choice = Choice(**{entry.name: getattr(engines.knobs, entry.name) for entry in fields(Choice)})
            trunk = made.pop() if made else None
        assert not made
        return trunk, job, choice

    return run


def assert_planned(trunk, job, choice):
    """The trunk's weights are counted once, and where the engine has them."""
    without = replace(job, judged_blocks=0)
    on_host = host_parts(job, choice)["weights"] - host_parts(without, choice)["weights"]
    on_card = rest_bytes(job, choice) - rest_bytes(without, choice)
    assert sorted((on_host, on_card))[0] == 0 < sorted((on_host, on_card))[1]
    assert (on_host > 0) == (trunk.knobs.resident_blocks == 0)


@pytest.mark.parametrize(("is_quantised", "resident_blocks"), [(False, 2), (False, 1), (True, 2), (True, 1)])
def test_a_trunk_of_its_own_is_on_the_card_where_the_plan_has_it(opened, tiny_models, pavrm_file, tmp_path, is_quantised, resident_blocks):
    high = tiny_models["high"]
    if is_quantised:
        write_fp8(high, tmp_path / "fp8.safetensors", "old")
        high = tmp_path / "fp8.safetensors"
    trunk, job, choice = opened(config_of(tiny_models, high, pavrm_file, resident_blocks))
    assert_planned(trunk, job, choice)


@pytest.fixture
def lora_form(repo, comfyui, pavrm_file, tmp_path):
    """The pocket PAVRM as a LoRA over the pocket's low-noise expert, and the paths of both experts."""
    from reward_lab.host import pavrm_lora

    weights = repo / "pocket" / "weights"
    experts = [weights / f"pocket_wan2.2_t2v_{name}_noise_14B.safetensors" for name in ("high", "low")]
    pavrm_lora.convert(pavrm_file, experts[1], tmp_path / "pavrm-lora.safetensors", rank=4)
    return str(tmp_path / "pavrm-lora.safetensors"), *experts


@pytest.mark.parametrize("resident_blocks", [0, -1])
def test_of_a_generator_that_is_no_expert_of_the_run_only_the_used_blocks_are_there_and_planned(opened, tiny_models, lora_form, resident_blocks):
    path, high, generator = lora_form
    blocks = shape_of(str(high)).blocks
    trunk, job, choice = opened(config_of(tiny_models, high, path, blocks if resident_blocks < 0 else 0, generator=str(generator)))
    assert len(trunk.blocks) == job.judged_blocks < shape_of(str(generator)).blocks
    assert trunk.knobs.resident_blocks == resident_blocks
    assert_planned(trunk, job, choice)


def test_an_expert_by_another_path_serves_as_generator(opened, tiny_models, lora_form, tmp_path):
    path, _, generator = lora_form
    (tmp_path / "link.safetensors").symlink_to(generator)
    trunk, job, _ = opened(config_of(tiny_models, generator, path, 0, generator=str(tmp_path / "link.safetensors")))
    assert trunk is None and job.judged_blocks == 0


def test_gradients_through_a_generator_of_its_own_are_those_without_an_engine(lora_form):
    import torch

    from reward_lab.host import latent_reward
    from reward_lab.host.training_mode import training_mode
    from reward_lab.lora_train.offload.executor import Shared
    from reward_lab.lora_train.offload.knobs import Knobs

    path, _, generator = lora_form
    cpu, knobs = torch.device("cpu"), Knobs(resident_blocks=0)
    spec = RewardModelSpec(kind="pavrm", path=path, options={"generator": str(generator)})
    reward = latent_reward.load(spec, {}, {}, device=cpu, dtype=torch.float32)
    latent, text = torch.randn(1, 16, 3, 8, 8, generator=torch.Generator().manual_seed(1)), torch.randn(1, 9, shape_of(str(generator)).text_width)

    def gradient():
        leaf = latent.clone().requires_grad_()
        return torch.autograd.grad(reward.score(leaf, 0.5, text).logit_B.sum(), leaf)[0]

    with training_mode():
        wanted = gradient()
        with reward.engine(knobs, cpu, Shared.of(knobs, cpu), streams=True):
            found = gradient()
    assert wanted.abs().sum() > 0 and torch.equal(found, wanted)

"""A PAVRM trained as a LoRA over a generator's first blocks: only the LoRA and the head learn, and the file scores over the generator as the network did."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")
pytest.importorskip("comfy.ldm.wan.model", reason="needs ComfyUI on the path")

import torch  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

from reward_lab.host import pavrm_lora, pavrm_training  # noqa: E402
from reward_lab.host.training_mode import training_mode  # noqa: E402
from reward_lab.lora_train.pavrm_config import PavrmConfig  # noqa: E402
from reward_lab.lora_train.pavrm_data import Example, LatentVideo, Learnable, Sample  # noqa: E402
from reward_lab.lora_train.pavrm_run import PavrmParts, train  # noqa: E402

pytestmark = pytest.mark.host
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def learnable() -> Learnable:
    """Random latents; the good ones are brighter in every channel, so there is something to learn."""
    generator, found = torch.Generator().manual_seed(3), []
    for index in range(16):
        label = index % 2
        latent, text = torch.randn(16, 2, 4, 4, generator=generator) * 0.3 + (1.0 if label else -1.0), torch.randn(5, 128, generator=generator)
        video = LatentVideo(latent_CFHW=latent, texts_PD={"short": text})
        found.append(Example(sample=Sample(id=f"v{index}", shape=tuple(latent.shape), read=lambda video=video: video, caption="a thing"), label=label))
    return Learnable(train=tuple(found), held_out=())


@pytest.fixture(scope="module")
def expert(repo):
    return repo / "pocket" / "weights" / "pocket_wan2.2_t2v_low_noise_14B.safetensors"


def config_of(expert, **shape) -> PavrmConfig:
    return PavrmConfig.from_dict(
        {
            "name": "small", "models": {"trunk": str(expert)}, "data": {"source": "in memory"}, "shape": {"blocks": 2, "lora_rank": 3, **shape},
            "sigma": {"kind": "uniform", "high": 0.5}, "optimiser": {"block_lr": 2e-3, "head_lr": 1e-3}, "steps": 12, "batch": 4, "validate_every": 0,
            "checkpoint_every": 0,
        }
    )  # fmt: skip


def logits(model, learnable) -> torch.Tensor:
    videos = [example.sample.read() for example in learnable.train]
    with training_mode(), torch.no_grad():
        return model.logits(torch.stack([video.latent_CFHW for video in videos]), torch.full((len(videos),), 200), videos, ["short"] * len(videos))


@pytest.mark.parametrize("train_blocks", [-1, 1])
def test_only_the_lora_and_the_head_learn_and_the_file_scores_as_the_network(expert, learnable, tmp_path, train_blocks):
    config, losses = config_of(expert, train_blocks=train_blocks), []
    model = pavrm_training.load(config, device=CPU, autocast=torch.float32)
    trunk = {name: value.clone() for name, value in model.scorer.model.state_dict().items()}
    untrained = logits(model, learnable)

    def sink(event) -> None:
        if event.name == "step":
            losses.append(event.loss)

    write = lambda target, step: model.write(target, step, name=config.name)  # noqa: E731
    parts = PavrmParts(scorer=model, learnable=learnable, sink=sink, stop_requested=lambda: False, write=write)
    with training_mode():
        train(config, parts, tmp_path)
    assert sum(losses[-3:]) < sum(losses[:3])
    assert all(torch.equal(value, trunk[name]) for name, value in model.scorer.model.state_dict().items())
    path = tmp_path / "small.safetensors"
    names = {key.split(".")[2] for key in load_file(path) if key.startswith("lora.blocks.")}
    assert names == ({"0", "1"} if train_blocks < 0 else {"1"}) and not any(key.startswith(("trunk.", "diff.")) for key in load_file(path))
    ups = [value for key, value in load_file(path).items() if key.endswith("lora_up.weight")]
    assert all(value.abs().max() > 0 for value in ups), "every matrix has learned"
    trained = logits(model, learnable)
    assert (trained - untrained).abs().max() > 0.05
    again = pavrm_lora.load(path, expert)
    videos = [example.sample.read() for example in learnable.train]
    latents, texts = torch.stack([video.latent_CFHW for video in videos]), [video.texts_PD["short"] for video in videos]
    with training_mode(), torch.no_grad():
        found = again.score(latents, torch.full((len(videos),), 200), texts).logit
    torch.testing.assert_close(found, trained, rtol=1e-4, atol=1e-4)


def test_an_untrained_lora_is_the_frozen_trunk(expert, learnable):
    configs = config_of(expert), config_of(expert, lora_rank=0, train_blocks=0)
    as_lora, frozen = (pavrm_training.load(config, device=CPU, autocast=torch.float32) for config in configs)
    torch.testing.assert_close(logits(as_lora, learnable), logits(frozen, learnable), rtol=0, atol=0)
    assert set(as_lora.groups()) == {"blocks", "head"} and all(value.requires_grad for group in as_lora.groups().values() for value in group.values())


def test_what_cannot_be_trained_as_a_lora(expert, tmp_path):
    for shape, message in (({"train_blocks": 0}, "blocks must be trained"), ({"pooling": "mean"}, "pooled by query"), ({"lora_rank": -1}, "lora_rank is -1")):
        with pytest.raises(ValueError, match=message):
            config_of(expert, **shape)
    with pytest.raises(ValueError, match="goes with whole blocks, not with shape.lora_rank 3"):
        PavrmConfig.from_dict({**config_of(expert).to_dict(), "save_upstream": True})
    with pytest.raises(ValueError, match="train_blocks is 3, but the trunk is cut to 2"):
        pavrm_training.load(config_of(expert, train_blocks=3), device=CPU, autocast=torch.float32)

"""PRFL's step against the numbers that the published code gave, with the host's own models. Tolerances are those of the fixtures' README."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("comfy.ldm.wan.model", reason="needs ComfyUI on the path")

import torch  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

from reward_lab.host import latent_reward  # noqa: E402
from reward_lab.host.training_mode import training_mode  # noqa: E402
from reward_lab.host.wan import load_backbone  # noqa: E402
from reward_lab.lora_train.config import TrainConfig  # noqa: E402
from reward_lab.lora_train.objectives.prfl import _rolled, prfl_velocity, reward_step  # noqa: E402
from reward_lab.lora_train.offload.executor import WEIGHTS_IN_USE, Shared  # noqa: E402
from reward_lab.lora_train.offload.knobs import Knobs  # noqa: E402
from reward_lab.lora_train.rollout import ContextCache, Experts  # noqa: E402
from reward_lab.lora_train.run import Parts  # noqa: E402
from reward_lab.lora_train.solvers import SOLVERS, gradient_scale  # noqa: E402
from reward_lab.reward_models.spec import RewardModelSpec  # noqa: E402

pytestmark = pytest.mark.host
TENSOR, LATENT, LOGIT, REWARD, LOSS, GRADIENT = 1e-4, 1e-5, 1e-3, 2e-4, 2e-5, 5e-4
TEXT_LEN = 512
WEIGHTS = ("blocks.0.self_attn.q.weight", "head.head.weight")


def relative(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((got - wanted).norm() / wanted.norm())


@pytest.fixture(scope="module")
def folder(shared_fixtures):
    return shared_fixtures / "pavrm"


@pytest.fixture(scope="module")
def wired(folder):
    """Config and parts as a PRFL run has them, with the recorded generator and PAVRM."""
    values = {
        "models": dict.fromkeys(("high", "low", "text_encoder", "vae"), "none"),
        "reward": {"kind": "pavrm", "path": str(folder / "checkpoints" / "checkpoint-100")},
        "prompts": [{"text": "recorded"}],
        "video": {"width_px": 64, "height_px": 64, "frames": 9},
        "method": "prfl",
        "expert": "high",
        "sampling": {"steps": 40, "shift": 5.0, "boundary": 0.0, "schedule": "unipc"},
        "prfl": {"loss": "hinge", "even_gradient": False},
        "objective": {"reward_scale": 0.1},
    }
    config = TrainConfig.from_dict(values)
    cpu = torch.device("cpu")
    backbone = load_backbone(folder / "generator_comfyui.safetensors", dtype=torch.float32, device=cpu)
    heads = {"query": str(folder / "mlp" / "query_attention_step_100.ckpt"), "head": str(folder / "mlp" / "mlp_step_100.ckpt")}
    spec = RewardModelSpec(kind="pavrm", path=config.reward.path, options=heads)
    reward = latent_reward.load(spec, {}, {}, device=cpu, dtype=torch.float32)

    def parts(text_PD):
        padded = torch.nn.functional.pad(text_PD, (0, 0, 0, TEXT_LEN - len(text_PD)))
        return Parts(
            experts=Experts(backbones={"high": backbone}, sampling=config.sampling),
            contexts=ContextCache({"recorded": padded}, padded, cpu),
            sink=lambda event: None,
            stop_requested=lambda: False,
            latent_reward=reward,
        )

    return config, backbone, parts


def test_schedule_is_the_recorded_one(folder, wired):
    inputs = load_file(folder / "prfl_inputs.safetensors")
    sigmas = wired[0].sampling.sigmas()
    assert torch.allclose(torch.tensor(sigmas), inputs["sigmas"], atol=2e-6)  # theirs are float32 sums
    assert [int(sigma * 1000 + 1e-6) for sigma in sigmas[:-1]] == inputs["timesteps"].tolist()


@pytest.mark.parametrize("run", ["run0", "run1"])
@pytest.mark.parametrize("form", ["euler", "unipc"])
def test_recorded_step(folder, wired, run, form):
    config, backbone, make_parts = wired
    inputs, expected = (load_file(folder / f"prfl_{name}.safetensors") for name in ("inputs", "expected"))
    parts = make_parts(inputs[f"{run}.text"][0])
    context = parts.contexts.batch(["recorded"])
    sigmas, index = config.sampling.sigmas(), int(inputs[f"{run}.step"])
    solver, velocity_of = SOLVERS[form](sigmas), prfl_velocity(config, parts, context)
    named = dict(backbone.model.named_parameters())
    with training_mode():
        latent = _rolled(solver, velocity_of, sigmas, inputs[f"{run}.start_noise"], 0, index)
        assert relative(latent, inputs[f"{run}.{form}.latent_s"]) < LATENT
        for name in WEIGHTS:
            named[name].requires_grad_(True)
        try:
            done = reward_step(config, parts, solver, velocity_of, sigmas, index, latent, context)
            done.next_BCFHW.backward(done.gradient_BCFHW)
            gradients = {name: named[name].grad for name in WEIGHTS}
        finally:
            for name in WEIGHTS:
                named[name].requires_grad_(False).grad = None

    def wanted(name):
        return expected[f"{run}.{form}.{name}"]

    assert relative(done.velocity_BCFHW.detach(), wanted("velocity")) < TENSOR
    assert relative(done.next_BCFHW.detach(), wanted("next_latent")) < LATENT
    assert abs(float(done.logit_B) - float(wanted("logit"))) < LOGIT
    assert abs(float(done.probability_B) - float(wanted("reward"))) < REWARD
    assert abs(done.loss - float(wanted("loss"))) < LOSS
    assert relative(done.gradient_BCFHW, wanted("loss_grad_next_latent")) < GRADIENT
    for name in WEIGHTS:
        assert relative(gradients[name], wanted(f"loss_grad.{name}")) < GRADIENT


def test_gradient_scale_is_the_published_one(wired):
    """The table of the recorded UniPC: |dx_next / dv| over the 40 steps at shift 5."""
    sigmas = wired[0].sampling.sigmas()
    table = {0: 0.0051, 1: 0.0084, 2: 0.0100, 5: 0.0116, 10: 0.0150, 15: 0.0198, 20: 0.0271, 25: 0.0393, 30: 0.0619, 35: 0.1119, 38: 0.1872}
    for step, scale in table.items():
        assert gradient_scale("unipc", sigmas, step) == pytest.approx(scale, abs=6e-5)  # the table has four digits


def test_pavrm_in_lora_form_ignores_the_lora_in_training(folder, wired, tmp_path):
    """A LoRA installed on the generator must not move the score of a PAVRM that runs on the generator's own blocks."""
    from reward_lab.host import pavrm_lora
    from reward_lab.lora_train.lora.adapter import new_adapter
    from reward_lab.lora_train.lora.linears import install

    _, backbone, _ = wired
    generator = folder / "generator_comfyui.safetensors"
    trunk = folder / "trunk_comfyui.safetensors"
    heads = {"query": folder / "mlp" / "query_attention_step_100.ckpt", "head": folder / "mlp" / "mlp_step_100.ckpt"}
    cut = tmp_path / "trunk.safetensors"
    _first_blocks(trunk, cut, 2)
    pavrm_lora.convert(cut, generator, tmp_path / "lora.safetensors", rank=4, **heads)
    # Layers that the file leaves alone must be freed of the trained LoRA as well.
    kept = _without_layer(tmp_path / "lora.safetensors", tmp_path / "sparse.safetensors", "blocks.0.self_attn.q")
    assert kept
    spec = RewardModelSpec(kind="pavrm", path=str(tmp_path / "sparse.safetensors"), options={"generator": str(generator)})
    cpu = torch.device("cpu")
    scorer = latent_reward.load(spec, {"high": backbone}, {"high": str(generator)}, device=cpu, dtype=torch.float32)
    latent, text = torch.randn(1, 16, 3, 8, 8, generator=torch.Generator().manual_seed(1)), torch.randn(1, 9, 48)
    linears = backbone.linears()
    adapter = new_adapter(linears, ["blocks.0.self_attn.q", "blocks.1.cross_attn.o", "time_projection.1"], rank=2, alpha=2.0, seed=0, device=cpu)
    for layer in adapter.layers.values():
        layer.up_OR.data.normal_(0, 1, generator=torch.Generator().manual_seed(2))
    with training_mode():
        plain = scorer.score(latent, 0.5, text).logit_B
        with install(linears, adapter):
            leaf = latent.clone().requires_grad_()
            again = scorer.score(leaf, 0.5, text).logit_B
            (gradient,) = torch.autograd.grad(again.sum(), leaf)
        leaf = latent.clone().requires_grad_()
        (bare,) = torch.autograd.grad(scorer.score(leaf, 0.5, text).logit_B.sum(), leaf)
    assert torch.equal(plain, again) and torch.equal(gradient, bare)
    # Blocks that stream have no weights on the device but while they are asked for.
    knobs = Knobs(resident_blocks=0, keep_place="host")
    with training_mode(), install(linears, adapter), backbone.engine(knobs, shared := Shared.of(knobs, cpu)):
        asked = _record_uses(backbone.model.blocks)
        leaf = latent.clone().requires_grad_()
        with scorer.engine(knobs, cpu, shared, streams=True):
            streamed = scorer.score(leaf, 0.5, text).logit_B
            (gradient,) = torch.autograd.grad(streamed.sum(), leaf)
    assert torch.equal(plain, streamed) and torch.equal(gradient, bare)
    assert asked == [0, 1, 1, 0]


def test_pavrm_in_lora_form_goes_back_through_a_block_while_its_weights_are_there(folder, wired, tmp_path):
    """On a card the slot gets the next block's weights as soon as it is free; here it is filled with NaN then."""
    from reward_lab.host import pavrm_lora

    _, backbone, _ = wired
    generator, cpu = folder / "generator_comfyui.safetensors", torch.device("cpu")
    heads = {"query": folder / "mlp" / "query_attention_step_100.ckpt", "head": folder / "mlp" / "mlp_step_100.ckpt"}
    cut, file = tmp_path / "trunk.safetensors", tmp_path / "lora.safetensors"
    _first_blocks(folder / "trunk_comfyui.safetensors", cut, 2)
    pavrm_lora.convert(cut, generator, file, rank=4, **heads)
    spec = RewardModelSpec(kind="pavrm", path=str(file), options={"generator": str(generator)})
    scorer = latent_reward.load(spec, {"high": backbone}, {"high": str(generator)}, device=cpu, dtype=torch.float32)
    latent, text = torch.randn(1, 16, 3, 8, 8, generator=torch.Generator().manual_seed(1)), torch.randn(1, 9, 48)

    def scored():
        leaf = latent.clone().requires_grad_()
        logit_B = scorer.score(leaf, 0.5, text).logit_B
        return torch.autograd.grad(logit_B.sum(), leaf)[0]

    knobs = Knobs(resident_blocks=0)
    with training_mode():
        wanted = scored()
        with backbone.engine(knobs, shared := Shared.of(knobs, cpu)) as executor, scorer.engine(knobs, cpu, shared, streams=True):
            _spoil_after_use(executor.store, shared.slots)
            found = scored()
    assert torch.equal(found, wanted)


def _spoil_after_use(store, slots):
    """Fill a slot with NaN when its block no longer uses it."""

    def unbind(index, own=store._unbind):
        own(index)
        for slot in slots:
            if slot.index == index:
                slot.index = None
                for view in slot.views.values():
                    view.data.fill_(float("nan"))

    store._unbind = unbind


def _record_uses(blocks):
    """Indices of the blocks whose weights are asked for, in order."""
    asked = []
    for index, block in enumerate(blocks):
        use = block.__dict__[WEIGHTS_IN_USE]
        block.__dict__[WEIGHTS_IN_USE] = lambda use=use, index=index: asked.append(index) or use()
    return asked


@pytest.mark.parametrize("knobs", [{"resident_blocks": 0, "keep_place": "host", "row_chunk_tokens": 8}, {"resident_blocks": -1}], ids=str)
def test_trunk_of_its_own_runs_through_the_engine(knobs):
    """The same score and gradient as the host's own blocks under plain autograd, and nothing left behind."""
    path = Path(__file__).resolve().parents[2] / "pocket" / "weights" / "pocket_PAVRM.safetensors"
    cpu = torch.device("cpu")
    scorer = latent_reward.load(RewardModelSpec(kind="pavrm", path=str(path)), {}, {}, device=cpu, dtype=torch.float32)
    trunk = scorer._model.model
    latent, text = torch.randn(2, 16, 3, 8, 8, generator=torch.Generator().manual_seed(1)), torch.randn(2, 9, trunk.text_embedding[0].weight.shape[1])

    def scored():
        leaf = latent.clone().requires_grad_()
        logit_B = scorer.score(leaf, 0.5, text).logit_B
        return logit_B.detach(), torch.autograd.grad(logit_B.sum(), leaf)[0]

    with training_mode():
        plain, plain_gradient = scored()
        with scorer.engine(Knobs(**knobs), cpu, Shared.of(Knobs(**knobs), cpu), streams=knobs["resident_blocks"] == 0):
            assert all("forward" in block.__dict__ for block in trunk.blocks)
            logit, gradient = scored()
    assert torch.equal(logit, plain) and relative(gradient, plain_gradient) <= 1e-5
    assert not any("forward" in block.__dict__ or WEIGHTS_IN_USE in block.__dict__ for block in trunk.blocks)


def _first_blocks(source, target, count):
    from safetensors import safe_open
    from safetensors.torch import save_file

    with safe_open(source, "pt") as file:
        metadata = file.metadata()
    state = {key: value for key, value in load_file(source).items() if not key.startswith("blocks.") or int(key.split(".")[1]) < count}
    config = json.loads(metadata["config"])
    inner = config.get("transformer", config)
    inner["num_layers"] = count
    save_file(state, target, metadata={**metadata, "config": json.dumps(config)})


def _without_layer(source, target, path):
    from safetensors import safe_open
    from safetensors.torch import save_file

    with safe_open(source, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(source)
    kept = {key: value for key, value in tensors.items() if path not in key or "bias" in key}
    save_file(kept, target, metadata=metadata)
    return len(kept) < len(tensors)

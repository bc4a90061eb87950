"""The Wan2.2 5B model (TI2V): one model for all noise levels, 48 latent channels, the Wan2.2 VAE, start images in place of the first noisy frame."""

from __future__ import annotations

import json
import sys

import pytest

pytest.importorskip("torch")
pytest.importorskip("comfy.ldm.wan.model", reason="needs ComfyUI on the path")

import comfy.latent_formats  # noqa: E402
import comfy.ldm.wan.model  # noqa: E402
import comfy.ldm.wan.vae2_2  # noqa: E402
import comfy.ops  # noqa: E402
import comfy.sd  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

from reward_lab.host import pavrm, preflight, start_images, wan_files  # noqa: E402
from reward_lab.host.latent_reward import PavrmReward  # noqa: E402
from reward_lab.host.training_mode import training_mode  # noqa: E402
from reward_lab.host.vae import load_decoder  # noqa: E402
from reward_lab.host.wan import load_backbone  # noqa: E402
from reward_lab.lora_train import objectives, run  # noqa: E402
from reward_lab.lora_train.config import TrainConfig  # noqa: E402
from reward_lab.lora_train.evaluation import all_prompts  # noqa: E402
from reward_lab.lora_train.flow import x0_from_velocity  # noqa: E402
from reward_lab.lora_train.real import RealLatents, write_real  # noqa: E402
from reward_lab.lora_train.rollout import ContextCache, Experts, FirstFrames, PromptContext  # noqa: E402
from reward_lab.reward_models import pavrm as head_module  # noqa: E402
from reward_lab.reward_models.spec import RewardModelSpec  # noqa: E402
from reward_lab.runs import process  # noqa: E402
from reward_lab.runs.store import RunStore  # noqa: E402

from .conftest import TRANSFORMER, _randomise  # noqa: E402

pytestmark = pytest.mark.host
MIX = {"kind": "mix", "options": {"rows": [{"reward": {"kind": "flicker"}}]}}
CPU = torch.device("cpu")
SIZES = {**TRANSFORMER, "in_dim": 48, "out_dim": 48}
# 64 x 32 pixels and 5 frames: latents [48, 2, 2, 4].
VIDEO = {"width_px": 64, "height_px": 32, "frames": 5, "vae": "wan2.2"}
PROMPTS = ["a red square moves left over white", "a blue circle moves right over black"]


@pytest.fixture(scope="module")
def models(tiny_models, tmp_path_factory) -> dict[str, str]:
    """Random files of the 5B architecture."""
    folder = tmp_path_factory.mktemp("5b")
    files = {"high": str(folder / "tiny_ti2v.safetensors"), "vae": str(folder / "tiny_vae22.safetensors")}
    paths = {**files, "low": "", "text_encoder": tiny_models["text_encoder"]}
    model = comfy.ldm.wan.model.WanModel(**SIZES, device="cpu", dtype=torch.float32, operations=comfy.ops.disable_weight_init)
    save_file(_randomise(model, 1), paths["high"], metadata={"config": json.dumps({"transformer": SIZES})})
    vae = comfy.ldm.wan.vae2_2.WanVAE(dim=8, dec_dim=12, z_dim=48, temperal_downsample=[False, True, True])
    save_file(_randomise(vae, 2), paths["vae"])
    return paths


@pytest.fixture(scope="module")
def backbone(models):
    return load_backbone(models["high"], dtype=torch.float32, device=CPU)


@pytest.fixture
def photo(tmp_path) -> str:
    pixels = np.zeros((40, 90, 3), np.uint8)
    pixels[:, 30:60] = (200, 40, 20)
    Image.fromarray(pixels).save(tmp_path / "start.png")
    return str(tmp_path / "start.png")


@pytest.fixture
def settings(models):
    """Settings of a run of seconds."""
    return {
        "models": models, "reward": {"kind": "flicker"}, "prompts": [{"text": text} for text in PROMPTS], "video": VIDEO,
        "sampling": {"steps": 4, "guidance": 2.0}, "objective": {"decode": "all"}, "lora": {"rank": 2}, "name": "ti2v",
        "steps": 2, "batch": 1, "checkpoint_every": 1, "save_dtype": "fp32",
    }  # fmt: skip


def test_the_host_takes_the_files_for_this_model(models, backbone):
    model = comfy.sd.load_diffusion_model(models["high"], model_options={"dtype": torch.float32}).model
    assert type(model).__name__ == "WAN22" and isinstance(model.latent_format, comfy.latent_formats.Wan22)
    assert backbone.latent_channels == 48


@pytest.mark.parametrize(("selection", "frames"), [(range(1), slice(0, 1)), (range(2), slice(0, 5)), (range(1, 3), slice(1, 9))])
def test_decoded_frames_are_the_networks_own(models, selection, frames):
    decoder = load_decoder(models["vae"], dtype=torch.float32, device=CPU)
    latent = torch.randn(2, 48, 3, 2, 1, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole = decoder.network.decode(comfy.latent_formats.Wan22().process_out(latent))
    wanted = ((whole + 1) / 2).clamp(0, 1).transpose(1, 2)
    assert wanted.shape == (2, 9, 3, 32, 16)
    with torch.no_grad():
        torch.testing.assert_close(decoder.decode(latent, selection), wanted[:, frames], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("selection", [range(1), range(1, 3)])
def test_gradient_through_decode_equals_finite_differences(models, selection):
    """Relative 1e-3: the host's normalisation of latents and the result are fp32 around an fp64 network."""
    decoder = load_decoder(models["vae"], dtype=torch.float64, device=CPU)
    generator = torch.Generator().manual_seed(1)
    latent, direction = (torch.randn(1, 48, 3, 2, 1, generator=generator) for _ in range(2))
    weight = torch.randn(decoder.decode(latent, selection).shape, generator=generator)

    def value(x):
        return (decoder.decode(x, selection).double() * weight).sum()

    leaf = latent.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(value(leaf), leaf)
    difference = (value(latent + 1e-3 * direction) - value(latent - 1e-3 * direction)) / 2e-3
    assert float((gradient * direction).sum()) == pytest.approx(float(difference), rel=1e-3)
    assert gradient[:, :, selection.stop :].abs().sum() == 0


def test_pixels_become_latents_as_the_host_encodes_them(models):
    decoder = load_decoder(models["vae"], dtype=torch.float32, device=CPU)
    pixels = torch.rand(1, 5, 3, 32, 64, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        wanted = comfy.latent_formats.Wan22().process_in(decoder.network.encode(pixels.transpose(1, 2) * 2 - 1))
    assert torch.equal(decoder.encode(pixels), wanted) and wanted.shape == (1, 48, 2, 2, 4)


def test_a_start_image_acts_as_in_the_hosts_sampler(models, backbone):
    """What the host's sampler predicts of x0 with a noise mask over all but the first frame: the frame is put in place, its timestep is 0."""
    model = comfy.sd.load_diffusion_model(models["high"], model_options={"dtype": torch.float32}).model
    generator = torch.Generator().manual_seed(4)
    latent, given = torch.randn(2, 48, 3, 2, 4, generator=generator), torch.randn(1, 48, 1, 2, 4, generator=generator)
    text, sigma = torch.randn(2, 5, 32, generator=generator), 0.7
    mask = torch.ones(1, 1, 3, 2, 4)
    mask[:, :, 0] = 0
    image = torch.cat([given, torch.zeros(1, 48, 2, 2, 4)], dim=2)
    with torch.no_grad():
        seen = latent[:1] * mask + image * (1 - mask)
        theirs = model.apply_model(seen, torch.tensor([sigma]), c_crossattn=text[:1], denoise_mask=mask)
        theirs = theirs * mask + image * (1 - mask)
        plain = model.apply_model(latent[1:], torch.tensor([sigma]), c_crossattn=text[1:])
    first = FirstFrames(latent_BC1HW=torch.cat([given, torch.zeros_like(given)]), is_known_B=torch.tensor([True, False]))
    context = PromptContext(prompt_BPD=text, negative_BPD=text, first=first)
    config = TrainConfig.from_dict({"models": models, "reward": MIX, "prompts": [{"text": "a"}], "video": VIDEO})
    experts = Experts(backbones={"high": backbone}, sampling=config.sampling)
    with training_mode(), torch.no_grad():
        ours = x0_from_velocity(latent, experts.velocity(latent, sigma, context, guidance=1.0), sigma)
        doubled = x0_from_velocity(latent, experts.velocity(latent, sigma, context, guidance=3.0), sigma)
    torch.testing.assert_close(ours, torch.cat([theirs, plain]), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(doubled, ours, atol=1e-4, rtol=1e-4)  # both branches read the same text here
    assert torch.allclose(ours[:1, :, :1], given, atol=1e-6)


def test_fun_inp_5b_is_told_of_an_image_in_both_ways(models, photo, tmp_path):
    """100 input channels: noise with the clean first frame in place, told noise level 0, then mask and latents of the image and grey frames."""
    sizes = {**SIZES, "in_dim": 100}
    made = comfy.ldm.wan.model.WanModel(**sizes, device="cpu", dtype=torch.float32, operations=comfy.ops.disable_weight_init)
    save_file(_randomise(made, 5), tmp_path / "inp.safetensors", metadata={"config": json.dumps({"transformer": sizes})})
    backbone = load_backbone(str(tmp_path / "inp.safetensors"), dtype=torch.float32, device=CPU)
    values = {"models": {**models, "high": str(tmp_path / "inp.safetensors")}, "reward": MIX, "video": VIDEO}
    config = TrainConfig.from_dict({**values, "prompts": [{"text": "a", "image": photo}]})
    preflight.check(config, tmp_path)
    text, latent, sigma = torch.randn(5, 32), torch.randn(config.video.latent_shape(1)), 0.6
    with training_mode(), torch.no_grad():
        told = start_images.given(config, [photo], {"high": backbone}, load_decoder(models["vae"], dtype=torch.float32, device=CPU))
        context = ContextCache({"a": text}, text, CPU, **told).batch(["a"], [photo])
        found = Experts(backbones={"high": backbone}, sampling=config.sampling).velocity(latent, sigma, context, guidance=1.0)
        first = told["first_frames"][photo][None]
        seen = torch.cat([torch.cat([first, latent[:, :, 1:]], dim=2), told["conditions"][photo][None]], dim=1)
        wanted = backbone.model(seen, torch.tensor([[0.0, 1000 * sigma]]), text[None])
    assert seen.shape[1] == 100
    torch.testing.assert_close(found[:, :, 1:], wanted[:, :, 1:], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found[:, :, :1], (latent[:, :, :1] - first) / sigma)


def test_every_solver_ends_at_the_start_image(backbone, models):
    from reward_lab.lora_train.solvers import SOLVERS

    config = TrainConfig.from_dict({"models": models, "reward": MIX, "prompts": [{"text": "a"}], "video": VIDEO, "sampling": {"steps": 4}})
    experts, given = Experts(backbones={"high": backbone}, sampling=config.sampling), torch.randn(48, 1, 2, 4)
    context = ContextCache({"a": torch.randn(5, 32)}, torch.zeros(5, 32), CPU, first_frames={"photo": given}).batch(["a"], ["photo"])
    for solver in SOLVERS.values():
        sigmas, latent = config.sampling.sigmas(), torch.randn(config.video.latent_shape(1))
        stepper = solver(sigmas)
        with training_mode(), torch.no_grad():
            for index in range(len(sigmas) - 1):
                latent = stepper.step(index, latent, experts.velocity(latent, sigmas[index], context, guidance=1.0))
        assert torch.allclose(latent[0, :, :1], given, atol=1e-4)


@pytest.fixture(scope="module")
def pavrm_48(tmp_path_factory):
    """A random PAVRM of 48-channel latents that reads the tiny models' text."""
    sizes = {**SIZES, "num_layers": 1}
    trunk = _randomise(comfy.ldm.wan.model.WanModel(**sizes, device="cpu", dtype=torch.float32, operations=comfy.ops.disable_weight_init), 8)
    tensors = {f"trunk.{key}": value for key, value in trunk.items() if not key.startswith("head.")} | head_module.build_head(48, 8).state_dict()
    path = tmp_path_factory.mktemp("pavrm") / "tiny_PAVRM.safetensors"
    shown = {key: value for key, value in sizes.items() if key != "out_dim"}  # as a trunk that was saved without its output head
    save_file(tensors, path, metadata={"config": json.dumps({"transformer": shown, "feature_layers": [1], "num_heads": 8})})
    return str(path)


def _parts(config, backbone, pavrm_48, events, **changes):
    decoder = load_decoder(config.models.vae, dtype=torch.float32, device=CPU)
    real = RealLatents(config.real.path) if config.real.path else None
    generator = torch.Generator().manual_seed(9)
    texts = {text: torch.randn(5, 32, generator=generator) for text in [*all_prompts(config), *(real.prompts if real else ())]}
    images = [prompt.image for prompt in config.prompts if prompt.image]
    is_latent = config.method == "prfl"
    wiring = {
        "experts": Experts(backbones={"high": backbone}, sampling=config.sampling),
        "contexts": ContextCache(texts, torch.zeros(5, 32), CPU, **start_images.given(config, images, {"high": backbone}, decoder)),
        "sink": events.append, "stop_requested": lambda: False, "decoder": decoder, "real": real, "clock": lambda: 0.0,
        "reward": None if is_latent else RewardModelSpec(kind="flicker", path="").load(),
        "latent_reward": PavrmReward(pavrm.load(pavrm_48)) if is_latent else None,
    }  # fmt: skip
    return run.Parts(**{**wiring, **changes})


METHODS = {
    "reward_backprop": {"objective": {"mode": "chain", "strategy": "random", "grad_steps": 2, "decode": "all", "kl_weight": 0.1}},
    "prfl": {"method": "prfl", "prfl": {"real_weight": 1.0}, "reward": "pavrm", "real": True},
    "reward_flow": {"method": "reward_flow", "reward_flow": {"measure_videos": 4}, "objective": {"decode": "all", "kl_weight": 0.1}},
}


@pytest.fixture
def method_config(settings, pavrm_48, photo, tmp_path):
    """`method_config(name, **changes)`: a run of one method with a start image for one of two prompts."""

    def make(name, **changes):
        values = {**settings, **METHODS[name], "batch": 2, "prompts": [{"text": PROMPTS[0], "image": photo}, {"text": PROMPTS[1]}]}
        if values.pop("real", None) is True:
            write_real(tmp_path / "real.safetensors", torch.randn(2, 48, 2, 2, 4, generator=torch.Generator().manual_seed(2)), PROMPTS)
            values["real"] = {"path": str(tmp_path / "real.safetensors")}
        if values["reward"] == "pavrm":
            values["reward"] = {"kind": "pavrm", "path": pavrm_48}
        return TrainConfig.from_dict({**values, **changes})

    return make


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_it_and_resumes_to_the_same_bytes(method, method_config, backbone, pavrm_48, tmp_path):
    config, events = method_config(method), []
    assert config.sampling.boundary == 0 and config.trained_experts == ("high",)
    preflight.check(config, tmp_path)
    with training_mode():
        parts = _parts(config, backbone, pavrm_48, events)
        finished = run.train(config, parts, objectives.create(config, parts), tmp_path / "whole")
        steps = [event for event in events if event.name == "step"]
        assert len(steps) == 2 and all(step.grad_norm > 0 for step in steps)
        assert [file.rsplit("/", 1)[1].split("-")[0] for file in finished.files] == ["ti2v"] and "noise" not in finished.files[0].rsplit("/", 1)[1]
        short = []
        stopping = _parts(config, backbone, pavrm_48, short, stop_requested=lambda: any(event.name == "step" for event in short))
        run.train(config, stopping, objectives.create(config, stopping), tmp_path / "halves")
        run.train(config, parts, objectives.create(config, parts), tmp_path / "halves", resume=True)
    for name in (finished.files[0].rsplit("/", 1)[1], "checkpoints/step-000002.state.safetensors"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "halves" / name).read_bytes()


@pytest.mark.parametrize("method", METHODS)
def test_gradient_through_everything_equals_finite_differences(method, method_config, backbone, pavrm_48):
    """Of the weight in the output projection, by the objective's own loss. The step with gradient is the first one, so nothing before it moves."""
    changes = {
        "reward_backprop": {"objective": {"mode": "x0", "strategy": "list", "step_list": [0], "decode": "all"}},
        "prfl": {"prfl": {"first_step": 0, "last_step": 0, "solver": "euler", "whole_timesteps": False}},
        "reward_flow": {"reward_flow": {"first_step": 0, "last_step": 0, "measure_videos": 0}},
    }[method]
    config = method_config(method, lora={"rank": 2, "targets": ["head"], "skip": []}, **changes)
    parts = _parts(config, backbone, pavrm_48, [])
    objective = objectives.create(config, parts)
    from contextlib import ExitStack

    with training_mode(), ExitStack() as installed:
        trainee = run._new_trainee(config, parts, "high", installed)
        up_OR = trainee.adapter.layers["head.head"].up_OR
        up_OR.data.normal_(0, 0.3, generator=torch.Generator().manual_seed(0))
        objective.add_gradient(trainee, 1, 0)
        gradient, origin = up_OR.grad.clone(), up_OR.data.clone()
        # Along the gradient: the largest change per step, for fp32 models.
        direction = gradient / gradient.norm()
        losses = []
        for sign in (1, -1):
            up_OR.data.copy_(origin + sign * 3e-2 * direction)
            losses.append(objective.add_gradient(trainee, 1, 0).loss)
    assert losses[0] - losses[1] == pytest.approx(6e-2 * float(gradient.norm()), rel=2e-2)


def test_a_run_through_the_worker(comfyui, settings, photo, tmp_path):
    settings["prompts"][0]["image"] = photo
    settings |= {"batch": 2, "steps": 1, "sample_every": 1, "objective": {"mode": "x0", "strategy": "random", "decode": "all"}}
    store = RunStore(tmp_path / "runs")
    run_id = store.create(TrainConfig.from_dict(settings))
    worker = process.start(store.folder(run_id), comfyui, sys.executable, niceness=0, environment={"CUDA_VISIBLE_DEVICES": ""})
    assert worker.wait(300) == 0, store.log_tail(run_id, 40)
    (step,) = [event for event in store.events(run_id) if event["event"] == "step"]
    assert step["grad_norm"] > 0 and (store.folder(run_id) / "ti2v-flicker.safetensors").is_file()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"video": {**VIDEO, "width_px": 48}}, "video.width_px is 48, but Wan needs a multiple of 32 with the wan2.2 VAE; use 64"),
        ({"video": {**VIDEO, "vae": "wan2.3"}}, "video.vae is 'wan2.3', but it must be one of: wan2.1, wan2.2"),
        ({"expert": "both"}, "models.low is empty, so the model in models.high makes all steps: set expert high"),
        ({"sampling": {"boundary": 0.875}}, "boundary is 0.875, but there is one model .* set 0"),
    ],
)
def test_refused_settings(settings, changes, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig.from_dict({**settings, **changes})


def test_files_that_do_not_fit_are_told_before_any_work(settings, models, tiny_models, photo, tmp_path):
    def check(**changes):
        preflight.check(TrainConfig.from_dict({**settings, **changes}), tmp_path)

    check()
    small = {"width_px": 64, "height_px": 32, "frames": 5}
    with pytest.raises(ValueError, match='has latents of 48 channels, but video.vae is .wan2.1., which has 16: set video.vae to "wan2.2"'):
        check(video=small)
    with pytest.raises(ValueError, match="the VAE has latents of 16 channels, but video.vae is 'wan2.2', which has 48"):
        check(models={**models, "vae": tiny_models["vae"]})
    with pytest.raises(ValueError, match="the VAE has latents of 48 channels, but video.vae is 'wan2.1'"):
        check(video=small, models={**tiny_models, "vae": models["vae"]})
    with pytest.raises(ValueError, match="5B model has no experts.*leave models.low empty"):
        check(models={**models, "low": models["high"]})
    with pytest.raises(ValueError, match="the real latents .* have 16 channels, but video.vae is 'wan2.2'"):
        from reward_lab.host.worker import _open_real

        write_real(tmp_path / "real.safetensors", torch.zeros(1, 16, 2, 4, 8), ["a"])
        _open_real(TrainConfig.from_dict({**settings, "real": {"path": str(tmp_path / "real.safetensors")}}))
    with pytest.raises(ValueError, match=r"the real latents .* are of videos of 256 x 128 px and 5 frames, but video says .*; set video.width_px 256"):
        write_real(tmp_path / "large.safetensors", torch.zeros(1, 48, 2, 8, 16), ["a"])
        _open_real(TrainConfig.from_dict({**settings, "real": {"path": str(tmp_path / "large.safetensors")}}))


def test_the_node_finds_one_model(models, monkeypatch, tmp_path):
    import folder_paths

    for name, file in (("diffusion_models", models["high"]), ("text_encoders", models["text_encoder"]), ("vae", models["vae"])):
        monkeypatch.setitem(folder_paths.folder_names_and_paths, name, ([file.rsplit("/", 1)[0]], {".safetensors"}))
    names = {role: file.rsplit("/", 1)[-1] for role, file in models.items()}
    for low in (wan_files.NO_EXPERT, names["high"]):
        found = wan_files.resolve(names["high"], low, names["text_encoder"], names["vae"])
        assert (found["high"], found["low"], found["latents"]) == (models["high"], "", "wan2.2")
    from reward_lab.host import training

    widgets = {
        "name": "mine", "expert": "low", "preset": "reward-lab", "steps": 7, "rank": 4, "alpha": 2.0, "learning_rate": 1e-3, "batch": 2, "width": 64,
        "height": 64, "frames": 17, "sampling_steps": 12, "guidance": 3.0, "seed": 5, "advanced": "{}",
    }  # fmt: skip
    made = training.make_config(found, [{"text": "a cat"}], RewardModelSpec(kind="hpsv2.1", path="hps.pt"), widgets)
    assert (made.expert, made.sampling.boundary, made.video.vae, made.models.low) == ("high", 0.0, "wan2.2", "")


def test_a_pavrm_of_other_latents_is_refused(pavrm_48):
    model = pavrm.load(pavrm_48)
    assert model.latent_channels == 48
    with pytest.raises(ValueError, match=r"that is the Wan2.1 VAE; a Wan2.2 5B latent \[B, 48, F, H, W\] is needed"):
        model.score(torch.zeros(1, 16, 2, 4, 4), torch.tensor([5]), [torch.zeros(3, 32)])

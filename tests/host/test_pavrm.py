"""PAVRM on the host's WanModel: the recorded numbers through `lab.py score-latent`'s entry, image-to-video, gradients, the LoRA form.

Tolerances are those of the fixtures' README.
"""

from __future__ import annotations

import json
import shutil

import pytest

pytest.importorskip("torch")
pytest.importorskip("comfy.ldm.wan.model", reason="needs ComfyUI on the path")

import comfy.ldm.wan.model  # noqa: E402
import comfy.ops  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

from reward_lab.host import pavrm, pavrm_lora, score_command  # noqa: E402
from reward_lab.host.training_mode import training_mode  # noqa: E402
from reward_lab.reward_models import pavrm as head_module  # noqa: E402

pytestmark = pytest.mark.host
LOGIT, REWARD, TENSOR, GRADIENT = 1e-3, 2e-4, 1e-4, 5e-4


@pytest.fixture(scope="module")
def own(pavrm_folder, pavrm_heads):
    """The recorded PAVRM, loaded."""
    return pavrm.load(pavrm_folder / "checkpoints" / "checkpoint-100", **pavrm_heads)


def relative(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((got - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("trunk", ["checkpoints/checkpoint-100", "trunk_comfyui.safetensors"])
@pytest.mark.parametrize("exact_pooling", [False, True])
def test_recorded_cases(pavrm_folder, pavrm_heads, score_latent, tmp_path, trunk, exact_pooling):
    expected = load_file(pavrm_folder / "expected.safetensors")
    out = tmp_path / "out.safetensors"
    options = {
        "input": str(pavrm_folder / "inputs.safetensors"),
        "trunk": str(pavrm_folder / trunk),
        "tensors": str(out),
        "exact_pooling": exact_pooling,
        **pavrm_heads,
    }
    videos = {video["name"]: video for video in score_latent(**options)["videos"]}
    found = load_file(out)
    assert sorted(videos) == ["case0", "case0.two_layers", "case1", "case2", "case3"]
    for name, video in videos.items():
        assert video["logit"] == pytest.approx(expected[f"{name}.logit"].item(), abs=LOGIT)
        assert video["probability"] == pytest.approx(torch.sigmoid(expected[f"{name}.logit"]).item(), abs=REWARD)
        assert relative(found[f"{name}.pooled"], expected[f"{name}.pooled"]) < TENSOR
        if "." not in name:
            assert video["reward"] == pytest.approx(expected[f"{name}.reward"].item(), abs=REWARD)
            assert relative(found[f"{name}.features"], expected[f"{name}.features"]) < TENSOR
            assert relative(found[f"{name}.logit_grad_latent"], expected[f"{name}.logit_grad_latent"]) < GRADIENT
    assert videos["case0.two_layers"]["layers"] == [2, 3]


def test_every_block_can_be_tapped(pavrm_folder, pavrm_heads):
    inputs, expected = (load_file(pavrm_folder / f"{name}.safetensors") for name in ("inputs", "expected"))
    model = pavrm.load(pavrm_folder / "trunk_comfyui.safetensors", **pavrm_heads, taps=(1, 2, 3))
    with training_mode():
        outputs = model.features(inputs["case0.latent"], inputs["case0.timestep"], [inputs["case0.text"][0]])
    for got, wanted in zip(outputs, expected["case0.block_outputs"], strict=True):
        assert relative(got[0].detach(), wanted) < TENSOR


@pytest.mark.parametrize("run", ["run0", "run1"])
@pytest.mark.parametrize("form", ["euler", "unipc"])
def test_recorded_prfl_rewards(pavrm_folder, pavrm_heads, score_latent, tmp_path, run, form):
    inputs, expected = (load_file(pavrm_folder / f"prfl_{name}.safetensors") for name in ("inputs", "expected"))
    step = int(inputs[f"{run}.step"])
    case = {"latent": expected[f"{run}.{form}.next_latent"], "text": inputs[f"{run}.text"], "timestep": inputs["timesteps"][step + 1 : step + 2].clone()}
    save_file(case, tmp_path / "in.safetensors")
    options = {"trunk": str(pavrm_folder / "trunk_comfyui.safetensors"), "tensors": str(tmp_path / "out.safetensors"), **pavrm_heads}
    (video,) = score_latent(input=str(tmp_path / "in.safetensors"), **options)["videos"]
    assert video["logit"] == pytest.approx(expected[f"{run}.{form}.logit"].item(), abs=LOGIT)
    assert video["reward"] == pytest.approx(expected[f"{run}.{form}.reward"].item(), abs=REWARD)
    # loss = 0.1 relu(2 - reward), so its gradient is -0.1 reward (1 - reward) times that of the logit.
    gradient = -0.1 * video["reward"] * (1 - video["reward"]) * load_file(tmp_path / "out.safetensors")["logit_grad_latent"]
    assert relative(gradient, expected[f"{run}.{form}.loss_grad_next_latent"]) < GRADIENT


def test_recorded_labelled_samples(pavrm_folder, pavrm_heads, score_latent, tmp_path):
    labels = pavrm_folder / "labels"
    expected = load_file(labels / "expected.safetensors")
    tensors = {"timestep": expected["timestep"]}
    for index, line in enumerate((labels / "temp_data" / "temp_data_480.list").read_text().split()):
        meta = json.loads((labels / line).read_text())
        tensors[f"sample{index}.noisy_latent"] = expected[f"sample{index}.noisy_latent"]
        tensors[f"sample{index}.text"] = torch.from_numpy(np.load(labels / meta["textshort_path"]))
    save_file(tensors, tmp_path / "in.safetensors")
    options = {"input": str(tmp_path / "in.safetensors"), "trunk": str(pavrm_folder / "checkpoints" / "checkpoint-100"), **pavrm_heads}
    for video in score_latent(**options)["videos"]:
        assert video["logit"] == pytest.approx(expected[f"{video['name']}.logit"].item(), abs=LOGIT)
        assert video["reward"] == pytest.approx(expected[f"{video['name']}.reward"].item(), abs=REWARD)


def test_single_file_and_head_in_it(pavrm_folder, pavrm_heads, score_latent, tmp_path, own):
    head = head_module.load_head(pavrm_heads["query"], pavrm_heads["head"])
    state = {f"trunk.{key}": value for key, value in load_file(pavrm_folder / "trunk_comfyui.safetensors").items()}
    state.update(head.state_dict())
    sizes = {"dim": 96, "ffn_dim": 72, "num_heads": 4, "num_layers": 3, "freq_dim": 64, "text_dim": 48, "text_len": 512, "in_dim": 16, "out_dim": 16}
    config = json.dumps({"transformer": sizes, "feature_layers": [3], "num_heads": 8})
    save_file({key: value.contiguous() for key, value in state.items()}, tmp_path / "pavrm.safetensors", metadata={"config": config})
    videos = score_latent(input=str(pavrm_folder / "inputs.safetensors"), trunk=str(tmp_path / "pavrm.safetensors"))["videos"]
    expected = load_file(pavrm_folder / "expected.safetensors")
    for video in videos:
        assert video["logit"] == pytest.approx(expected[f"{video['name']}.logit"].item(), abs=LOGIT)


def test_noise_levels_of_a_clean_latent(pavrm_folder, pavrm_heads, score_latent, tmp_path, own):
    latent = torch.randn(1, 16, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    text = torch.randn(9, 48, generator=torch.Generator().manual_seed(2))
    save_file({"latent": latent, "text": text}, tmp_path / "in.safetensors")
    options = {"input": str(tmp_path / "in.safetensors"), "trunk": str(pavrm_folder / "trunk_comfyui.safetensors"), **pavrm_heads}
    videos = score_latent(sigma="0.2, 0.8125", seed=3, **options)["videos"]
    assert [(video["timestep"], video["sigma"]) for video in videos] == [(200, 0.2), (812, 0.8125)]
    noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(3))
    for video in videos:
        noisy = (1 - video["sigma"]) * latent + video["sigma"] * noise
        with torch.no_grad():
            assert video["logit"] == pytest.approx(own.score(noisy, torch.tensor([video["timestep"]]), [text]).logit.item(), abs=1e-4)


I2V = {"dim": 48, "num_heads": 4, "ffn_dim": 64, "freq_dim": 32, "text_dim": 32, "text_len": 16, "in_dim": 36, "out_dim": 16, "model_type": "i2v"}


@pytest.fixture(scope="module")
def image_trunk(tmp_path_factory):
    """A random image-to-video trunk of four blocks as HY-Video-PRFL writes one, heads beside it, and the same host model whole."""
    model = comfy.ldm.wan.model.WanModel(**I2V, num_layers=4, device="cpu", dtype=torch.float32, operations=comfy.ops.disable_weight_init)
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        spread = 0.5 * max(1, parameter[0].numel() if parameter.ndim > 1 else 25) ** -0.5
        parameter.data = (1.0 if parameter.ndim == 1 and name.endswith("weight") else 0.0) + torch.randn(parameter.shape, generator=generator) * spread
    folder = tmp_path_factory.mktemp("i2v")
    save_file({key: value.contiguous() for key, value in model.state_dict().items() if not key.startswith("head.")}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({**I2V, "num_layers": 40, "eps": 1e-6, "_class_name": "WanModel"}))
    head = head_module.build_head(48)
    torch.save(head.query_attention.state_dict(), folder / "query_attention_step_7.ckpt")
    torch.save(head.mlp.state_dict(), folder / "mlp_step_7.ckpt")
    return folder, model


def test_image_to_video_trunk(image_trunk):
    pavrm_folder, whole = image_trunk
    scorer = pavrm.load(pavrm_folder, pavrm_folder / "query_attention_step_7.ckpt", pavrm_folder / "mlp_step_7.ckpt", taps=(2,))
    assert len(scorer.model.blocks) == 2 and scorer.model.model_type == "i2v"
    generator = torch.Generator().manual_seed(6)
    latent, first, clip, text = (torch.randn(shape, generator=generator) for shape in ((1, 16, 3, 4, 6), (1, 16, 3, 4, 6), (1, 257, 1280), (7, 32)))
    image = pavrm.ImageCondition(clip_BPD=clip, latent_BCFHW=first)
    with training_mode():
        leaf = latent.clone().requires_grad_()
        (found,) = scorer.features(leaf, torch.tensor([400]), [text], image)
        outputs = []
        whole.blocks[1].register_forward_hook(lambda _module, _args, output: outputs.append(output))
        mask = torch.zeros(1, 4, 3, 4, 6)
        mask[:, :, 0] = 1
        plain = latent.clone().requires_grad_()
        padded = torch.nn.functional.pad(text, (0, 0, 0, 9))[None]
        whole(torch.cat([plain, mask, first], dim=1), torch.tensor([400.0]), padded, clip_fea=clip)
        weight = torch.randn(found.shape, generator=generator)
        gradients = [torch.autograd.grad((value * weight).sum(), start)[0] for value, start in ((found, leaf), (outputs[0], plain))]
    torch.testing.assert_close(found, outputs[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="CLIP vision tokens of the first frame"):
        scorer.score(latent, torch.tensor([400]), [text])
    for wrong, message in (
        (pavrm.ImageCondition(clip_BPD=clip), "latents of the first frame"),
        (pavrm.ImageCondition(clip_BPD=clip[..., :16], latent_BCFHW=first), r"CLIP vision tokens have shape \(1, 257, 16\)"),
        (pavrm.ImageCondition(clip_BPD=clip, latent_BCFHW=first[:, :, :1]), r"The condition has shape \(1, 16, 1, 4, 6\), the latent \(1, 16, 3, 4, 6\)"),
        (pavrm.ImageCondition(clip_BPD=clip, latent_BCFHW=first[0]), r"The condition has shape \(16, 3, 4, 6\)"),
    ):
        with pytest.raises(ValueError, match=message):
            scorer.score(latent, torch.tensor([400]), [text], wrong)


def test_batch_is_scored_sample_by_sample(pavrm_folder, own):
    inputs = load_file(pavrm_folder / "inputs.safetensors")
    latents = torch.cat([inputs["case0.latent"], inputs["case1.latent"]])
    texts = [inputs["case0.text"][0], inputs["case1.text"][0]]
    with torch.no_grad():
        together = own.score(latents, torch.tensor([201, 1000]), texts).logit
        apart = [own.score(latents[i : i + 1], torch.tensor([time]), texts[i : i + 1]).logit.item() for i, time in enumerate((201, 1000))]
    assert together.tolist() == pytest.approx(apart, abs=1e-4)


def test_loaded_in_inference_mode_still_passes_gradients(pavrm_folder, pavrm_heads):
    inputs = load_file(pavrm_folder / "inputs.safetensors")
    with torch.inference_mode():
        model = pavrm.load(pavrm_folder / "trunk_comfyui.safetensors", **pavrm_heads)
        with training_mode():
            latent = inputs["case0.latent"].clone().requires_grad_()
            model.score(latent, inputs["case0.timestep"], [inputs["case0.text"][0]]).logit.sum().backward()
    assert latent.grad.abs().sum() > 0 and not any(parameter.requires_grad for parameter in model.model.parameters())


# --- stored as a LoRA over a generator ---


@pytest.fixture(scope="module")
def generator_file(pavrm_folder, tmp_path_factory):
    """A Wan generator of five blocks whose first three are near the trunk's."""
    state = load_file(pavrm_folder / "trunk_comfyui.safetensors")
    seed = torch.Generator().manual_seed(11)
    blocks = {key: value for key, value in state.items() if key.startswith("blocks.0.")}
    for extra in (3, 4):
        state.update({key.replace("blocks.0.", f"blocks.{extra}."): value for key, value in blocks.items()})
    for key in state:
        if key.startswith(("blocks.", "time_projection.")):
            state[key] = state[key] + torch.randn(state[key].shape, generator=seed) * 0.02
    config = {"dim": 96, "ffn_dim": 72, "num_heads": 4, "num_layers": 5, "freq_dim": 64, "text_dim": 48, "text_len": 512, "in_dim": 16, "out_dim": 16}
    path = tmp_path_factory.mktemp("generator") / "generator.safetensors"
    save_file({key: value.contiguous() for key, value in state.items()}, path, metadata={"config": json.dumps({"transformer": config})})
    return path


def test_lora_of_full_rank_is_the_pavrm_itself(pavrm_folder, pavrm_heads, score_latent, generator_file, tmp_path):
    out, expected = tmp_path / "pavrm-lora.safetensors", load_file(pavrm_folder / "expected.safetensors")
    report = pavrm_lora.convert(pavrm_folder / "checkpoints" / "checkpoint-100", generator_file, out, rank=96, **pavrm_heads)
    assert report["relative_error"] < 1e-5 and report["matrices"] == 31 and report["feature_layers"] == [3]
    found = tmp_path / "out.safetensors"
    options = {"input": str(pavrm_folder / "inputs.safetensors"), "trunk": str(out), "generator": str(generator_file), "tensors": str(found)}
    for video in score_latent(**options)["videos"]:
        if "." not in video["name"]:
            assert video["logit"] == pytest.approx(expected[f"{video['name']}.logit"].item(), abs=LOGIT)
            gradient = load_file(found)[f"{video['name']}.logit_grad_latent"]
            assert relative(gradient, expected[f"{video['name']}.logit_grad_latent"]) < GRADIENT


def test_lora_error_falls_with_the_rank(pavrm_folder, pavrm_heads, generator_file, tmp_path):
    errors = [
        pavrm_lora.convert(pavrm_folder / "checkpoints" / "checkpoint-100", generator_file, tmp_path / f"{rank}.safetensors", rank=rank, **pavrm_heads)[
            "relative_error"
        ]
        for rank in (2, 16, 64)
    ]
    assert 1 > errors[0] > errors[1] > errors[2] > 0


def test_lora_replaces_no_file_unasked_and_never_one_that_it_reads(pavrm_folder, pavrm_heads, generator_file, tmp_path, capsys):
    trunk, generator = tmp_path / "checkpoint-100", tmp_path / "generator.safetensors"
    shutil.copytree(pavrm_folder / "checkpoints" / "checkpoint-100", trunk)
    shutil.copy(generator_file, generator)
    shard = sorted(trunk.glob("*.safetensors"))[0]
    before = {path: path.read_bytes() for path in (generator, shard)}

    def run(out, **more) -> tuple[int, str]:
        job = {"trunk": str(trunk), "generator": str(generator), "out": str(out), "rank": 2, **{name: str(value) for name, value in pavrm_heads.items()}}
        status = score_command.main(["pavrm-lora", json.dumps({**job, **more})])
        return status, capsys.readouterr().err

    for target in before:
        for force in (False, True):
            status, error = run(target, force=force)
            assert status == score_command.REFUSED and f"{target} is one of the files that are read" in error
            assert target.read_bytes() == before[target]
    out = tmp_path / "lora.safetensors"
    out.write_bytes(b"the only copy of something")
    status, error = run(out)
    assert status == score_command.REFUSED and "is there already" in error and out.read_bytes() == b"the only copy of something"
    assert "must end in .safetensors" in run(tmp_path / "lora.pt")[1]
    assert run(out, force=True)[0] == 0 and "blocks.0.self_attn.q" in str(sorted(load_file(out)))


def test_lora_leaves_the_generator_and_its_own_lora_alone(pavrm_folder, pavrm_heads, generator_file, tmp_path):
    from reward_lab.host.wan import load_backbone
    from reward_lab.lora_train.lora.adapter import new_adapter
    from reward_lab.lora_train.lora.linears import install
    from reward_lab.lora_train.offload.knobs import Knobs

    out = tmp_path / "pavrm-lora.safetensors"
    pavrm_lora.convert(pavrm_folder / "checkpoints" / "checkpoint-100", generator_file, out, rank=96, **pavrm_heads)
    inputs, expected = (load_file(pavrm_folder / f"{name}.safetensors") for name in ("inputs", "expected"))
    backbone = load_backbone(generator_file, dtype=torch.float32, device=torch.device("cpu"))
    scorer = pavrm_lora.load(out, backbone.model)
    linears = backbone.linears()
    adapter = new_adapter(linears, [path for path in linears if "self_attn.q" in path], rank=2, alpha=2, seed=0, device=torch.device("cpu"))
    for layer in adapter.layers.values():
        layer.up_OR.data.normal_(0, 0.3, generator=torch.Generator().manual_seed(3))
    context = torch.nn.functional.pad(inputs["case0.text"], (0, 0, 0, 505))

    with training_mode(), install(linears, adapter), backbone.engine(Knobs()):

        def velocity():
            return backbone.velocity(inputs["case0.latent"], 0.2, context)

        before = velocity().detach()
        latent = inputs["case0.latent"].clone().requires_grad_()
        logit = scorer.score(latent, inputs["case0.timestep"], [inputs["case0.text"][0]]).logit
        # The blocks run again here, after the context has ended; the generator's own weights are back by then.
        (gradient,) = torch.autograd.grad(logit.sum(), latent)
        assert torch.equal(velocity().detach(), before)
    assert logit.item() == pytest.approx(expected["case0.logit"].item(), abs=LOGIT)
    assert relative(gradient, expected["case0.logit_grad_latent"]) < GRADIENT
    assert not any("forward" in module.__dict__ for module in backbone.model.modules())


def test_parts_that_do_not_belong_together_are_named(pavrm_folder, pavrm_heads, image_trunk):
    other = image_trunk[0]
    with pytest.raises(ValueError, match="The trunk is 96 wide, the head 48"):
        pavrm.load(pavrm_folder / "trunk_comfyui.safetensors", other / "query_attention_step_7.ckpt", other / "mlp_step_7.ckpt")
    with pytest.raises(ValueError, match="not a Wan transformer"):
        pavrm.load(pavrm_heads["query"], **pavrm_heads)
    with pytest.raises(ValueError, match="Tapped blocks are \\[4\\]"):
        pavrm.load(pavrm_folder / "trunk_comfyui.safetensors", **pavrm_heads, taps=(4,))

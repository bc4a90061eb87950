"""Image-to-video training: what the experts are told of the start image, InP's all-zero form, and a run of the real worker."""

from __future__ import annotations

import json
import sys

import pytest

pytest.importorskip("torch")
pytest.importorskip("comfy.ldm.wan.model", reason="needs ComfyUI on the path")

import numpy as np  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402

from reward_lab.host import preflight, start_images  # noqa: E402
from reward_lab.host.training_mode import training_mode  # noqa: E402
from reward_lab.host.vae import load_decoder  # noqa: E402
from reward_lab.host.wan import load_backbone  # noqa: E402
from reward_lab.lora_train.config import TrainConfig  # noqa: E402
from reward_lab.lora_train.rollout import ContextCache, Experts  # noqa: E402
from reward_lab.runs import process  # noqa: E402
from reward_lab.runs.store import RunStore  # noqa: E402

pytestmark = pytest.mark.host
MIX = {"kind": "mix", "options": {"rows": [{"reward": {"kind": "flicker"}}]}}
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def image_models(tiny_models, tmp_path_factory) -> dict[str, str]:
    """The tiny models, with experts of 36 input channels as Wan2.2 I2V and Fun-InP have."""
    import comfy.ldm.wan.model
    import comfy.ops
    from safetensors.torch import save_file

    from .conftest import TRANSFORMER, _randomise

    folder, sizes, paths = tmp_path_factory.mktemp("i2v"), {**TRANSFORMER, "in_dim": 36}, dict(tiny_models)
    for seed, expert in enumerate(("high", "low")):
        paths[expert] = str(folder / f"tiny_i2v_{expert}_noise.safetensors")
        model = comfy.ldm.wan.model.WanModel(**sizes, device="cpu", dtype=torch.float32, operations=comfy.ops.disable_weight_init)
        save_file(_randomise(model, seed), paths[expert], metadata={"config": json.dumps({"transformer": sizes})})
    return paths


@pytest.fixture
def photo(tmp_path):
    pixels = np.zeros((40, 90, 3), np.uint8)
    pixels[:, 30:60] = (200, 40, 20)
    path = tmp_path / "start.png"
    Image.fromarray(pixels).save(path)
    return str(path)


def test_picture_covers_the_video_and_keeps_its_middle(photo):
    cut = start_images.picture(photo, 32, 32)
    assert cut.shape == (3, 32, 32) and float(cut.min()) >= 0
    # 90 x 40 grows to 72 x 32; of its middle 32 columns, 24 in the middle are red.
    assert torch.allclose(cut[:, 16, 16], torch.tensor([200, 40, 20]) / 255, atol=0.01)
    assert float(cut[:, :, 0].max()) < 0.1


def test_condition_is_mask_then_the_latents_of_image_and_grey(tiny_models, photo):
    """The same channels as the host's own WanImageToVideo node feeds its sampler."""
    decoder = load_decoder(tiny_models["vae"], dtype=torch.float32, device=CPU)
    cut = start_images.picture(photo, 32, 32)
    with training_mode():
        found = start_images.condition(cut, 9, decoder)
    assert found.shape == (20, 3, 4, 4)
    assert bool((found[:4, 0] == 1).all()) and bool((found[:4, 1:] == 0).all())
    grey = torch.full((1, 9, 3, 32, 32), 0.5)
    grey[0, 0] = cut
    with training_mode():
        expected = decoder.encode(grey)[0]
    assert torch.equal(found[4:], expected)


def test_host_node_gives_the_same_condition(tiny_models, photo):
    import comfy.sd
    import comfy.utils
    from comfy_extras.nodes_wan import WanImageToVideo

    decoder = load_decoder(tiny_models["vae"], dtype=torch.float32, device=CPU)
    cut = start_images.picture(photo, 32, 32)
    with training_mode():
        found = start_images.condition(cut, 9, decoder)
    vae = comfy.sd.VAE(sd=comfy.utils.load_torch_file(tiny_models["vae"]), device=CPU, dtype=torch.float32)
    cond = [[torch.zeros(1, 1, 32), {}]]
    positive = WanImageToVideo.execute(cond, cond, vae, 32, 32, 9, 1, start_image=cut.permute(1, 2, 0)[None])[0]
    extras = positive[0][1]
    latents = comfy.latent_formats.Wan21().process_in(extras["concat_latent_image"].float())[0]
    # The host's VAE wrapper rounds pixels on its way; equal up to float32.
    assert torch.allclose(found[4:], latents, atol=1e-4)
    # The host's mask is 0 where the video is known, and its model turns it round.
    assert bool((extras["concat_mask"][0, 0, 0] == 0).all()) and bool((extras["concat_mask"][0, 0, 1:] == 1).all())


def test_zero_mask_form_is_what_missing_channels_become(image_models):
    backbone = load_backbone(image_models["high"], dtype=torch.float32, device=CPU)
    latent, text = torch.randn(1, 16, 2, 4, 4), torch.randn(1, 5, 32)
    with training_mode(), torch.no_grad():
        implicit = backbone.velocity(latent, 0.9, text)
        explicit = backbone.velocity(torch.cat([latent, torch.zeros(1, 20, 2, 4, 4)], 1), 0.9, text)
        other = backbone.velocity(torch.cat([latent, torch.ones(1, 20, 2, 4, 4)], 1), 0.9, text)
    assert torch.equal(implicit, explicit) and implicit.shape == latent.shape and not torch.allclose(implicit, other, atol=1e-3)


def test_batch_mixes_prompts_with_and_without_images(image_models):
    config = TrainConfig.from_dict({
        "models": image_models, "reward": MIX, "prompts": [{"text": "a"}], "video": {"width_px": 32, "height_px": 32, "frames": 5},
        "sampling": {"guidance": 2.0},
    })  # fmt: skip
    backbones = {expert: load_backbone(image_models[expert], dtype=torch.float32, device=CPU) for expert in ("high", "low")}
    text, condition = torch.randn(5, 32), torch.randn(20, 2, 4, 4)
    cache = ContextCache({"a": text, "b": text}, torch.zeros(5, 32), CPU, {"photo": condition})
    experts, latent = Experts(backbones=backbones, sampling=config.sampling), torch.randn(1, 16, 2, 4, 4).repeat(2, 1, 1, 1, 1)
    with training_mode(), torch.no_grad():
        mixed = experts.velocity(latent, 0.9, cache.batch(["a", "b"], ["photo", ""]))
        plain = experts.velocity(latent[:1], 0.9, cache.batch(["b"], [""]))
    assert cache.batch(["a"], [""]).condition_BCFHW is None
    assert torch.allclose(mixed[1:], plain, atol=1e-5) and not torch.allclose(mixed[:1], plain, atol=1e-3)


def test_worker_trains_image_to_video(comfyui, image_models, pocket_models, photo, repo, tmp_path):
    settings = {
        "models": image_models,
        "reward": {"kind": "hpsv2.1", "path": str(repo / "pocket" / "weights" / "pocket_HPS_v2.1.safetensors")},
        "prompts": [{"text": "a red square moves left over white", "image": photo}, {"text": "a blue circle moves right over black"}],
        "video": {"width_px": 32, "height_px": 32, "frames": 5},
        "sampling": {"steps": 4, "guidance": 2.0},
        "lora": {"rank": 2}, "expert": "low", "name": "i2v", "steps": 2, "batch": 2, "checkpoint_every": 0,
    }  # fmt: skip
    store = RunStore(tmp_path / "runs")

    def run(values):
        run_id = store.create(TrainConfig.from_dict(values))
        worker = process.start(store.folder(run_id), comfyui, sys.executable, niceness=0, environment={"CUDA_VISIBLE_DEVICES": ""})
        return worker.wait(300), run_id

    code, run_id = run(settings)
    assert code == 0, store.log_tail(run_id, 40)
    steps = [event for event in store.events(run_id) if event["event"] == "step"]
    assert len(steps) == 2 and all(step["grad_norm"] > 0 for step in steps)


def test_text_to_video_experts_refuse_images(tiny_models, photo, tmp_path):
    config = TrainConfig.from_dict({
        "models": tiny_models, "reward": MIX, "prompts": [{"text": "a", "image": photo}],
        "video": {"width_px": 32, "height_px": 32, "frames": 5},
    })  # fmt: skip
    backbone = load_backbone(tiny_models["high"], dtype=torch.float32, device=CPU)
    with pytest.raises(ValueError, match="reads 16 channels, not 36"):
        start_images.given(config, [photo], {"high": backbone}, None)
    with pytest.raises(ValueError, match="the high-noise expert reads 16 channels, not 36: use Wan2.2 I2V"):
        preflight.check(config, tmp_path)


def test_missing_image_is_named_before_any_work(image_models, tmp_path):
    config = TrainConfig.from_dict({
        "models": image_models, "reward": MIX, "prompts": [{"text": "a", "image": str(tmp_path / "gone.png")}],
        "video": {"width_px": 32, "height_px": 32, "frames": 5},
    })  # fmt: skip
    with pytest.raises(ValueError, match="1 start images do not exist, the first is .*gone.png"):
        preflight.check(config, tmp_path)


def _prfl(image_models, pavrm_path, photo, **changes):
    return TrainConfig.from_dict({
        "models": image_models, "method": "prfl", "reward": {"kind": "pavrm", "path": pavrm_path}, "prompts": [{"text": "a", "image": photo}],
        "video": {"width_px": 32, "height_px": 32, "frames": 5}, "sampling": {"steps": 4}, **changes,
    })  # fmt: skip


def _pavrm(path, more=()):
    """The header of a PAVRM that reads images."""
    from safetensors.torch import save_file

    shapes = {"trunk.patch_embedding.weight": (8, 36, 1, 2, 2), "trunk.text_embedding.0.weight": (8, 32), **dict(more)}
    save_file({name: torch.zeros(shape) for name, shape in shapes.items()}, path)
    return str(path)


def test_a_pavrm_of_image_models_asks_for_an_image_of_every_prompt(image_models, photo, tmp_path):
    scorer = _pavrm(tmp_path / "i2v_pavrm.safetensors")
    preflight.check(_prfl(image_models, scorer, photo), tmp_path)
    looked_at = {"every": 1, "prompts": [{"text": "b", "image": photo}]}
    preflight.check(_prfl(image_models, scorer, photo, held_out=looked_at), tmp_path)
    with pytest.raises(ValueError, match="but 1 of 2 prompts have none, the first is 'b'"):
        preflight.check(_prfl(image_models, scorer, photo, prompts=[{"text": "a", "image": photo}, "b"]), tmp_path)
    clip = _pavrm(tmp_path / "clip_pavrm.safetensors", [("trunk.img_emb.proj.1.weight", (8, 8))])
    with pytest.raises(ValueError, match="CLIP vision tokens of start images"):
        preflight.check(_prfl(image_models, clip, photo), tmp_path)


def test_clips_without_images_are_not_learned_beside_prompts_with_images(image_models, photo, tmp_path):
    from reward_lab.lora_train.real import RealLatents, write_real

    scorer = _pavrm(tmp_path / "i2v_pavrm.safetensors")
    with pytest.raises(ValueError, match="clips of real.replay would be learned without theirs"):
        preflight.check(_prfl(image_models, scorer, photo, prfl={"real_weight": 1.0}, real={"replay": 4}), tmp_path)
    path = tmp_path / "real.safetensors"
    write_real(path, torch.zeros(1, 16, 2, 4, 4), ["clip"])
    config = _prfl(image_models, scorer, photo, prfl={"real_weight": 1.0}, real={"path": str(path)})
    with pytest.raises(ValueError, match="come without theirs .*lab.py preprocess --hy"):
        start_images.check_clips(config, RealLatents(path), {"conditions": {}})
    start_images.check_clips(config, RealLatents(path), {"first_frames": {}})

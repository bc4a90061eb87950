"""PAVRMs of other shapes than the recorded one through `lab.py score-latent`: widths, heads, kept blocks, pooling, image-to-video, batches, 48 channels.

Expected numbers come from the published forms written out: torch's own multi-head attention and the MLP on what a hook sees of an uncut host model.
"""

from __future__ import annotations

import json

import pytest

pytest.importorskip("torch")
pytest.importorskip("comfy.ldm.wan.model", reason="needs ComfyUI on the path")

import comfy.ldm.wan.model  # noqa: E402
import comfy.ops  # noqa: E402
import torch  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

from reward_lab.host import score_command  # noqa: E402
from reward_lab.host.training_mode import training_mode  # noqa: E402
from reward_lab.reward_models import pavrm as head_module  # noqa: E402

from .conftest import _randomise  # noqa: E402

pytestmark = pytest.mark.host
BASE = {"ffn_dim": 72, "freq_dim": 32, "text_dim": 40, "text_len": 24, "out_dim": 16, "model_type": "t2v"}
# name: sizes of the trunk, kept block, heads of the query attention, pooling, shape of the latents
SHAPES = {
    "narrow, one head": ({"dim": 36, "num_heads": 3, "in_dim": 16}, 1, 1, "query", (1, 3, 4, 6)),
    "wide, 16 heads, last of four": ({"dim": 128, "num_heads": 2, "in_dim": 16}, 4, 16, "query", (3, 2, 6, 4)),
    "mean": ({"dim": 48, "num_heads": 4, "in_dim": 16}, 2, 8, "mean", (2, 1, 4, 4)),
    "max": ({"dim": 48, "num_heads": 4, "in_dim": 16}, 3, 8, "max", (1, 2, 4, 4)),
    "Wan2.2 image-to-video": ({"dim": 48, "num_heads": 4, "in_dim": 36}, 2, 4, "query", (2, 3, 4, 6)),
    "Wan2.1 image-to-video": ({"dim": 48, "num_heads": 4, "in_dim": 36, "model_type": "i2v"}, 2, 8, "query", (2, 2, 4, 4)),
    "5B": ({"dim": 48, "num_heads": 4, "in_dim": 48, "out_dim": 48}, 2, 8, "query", (2, 2, 2, 4)),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_score_latent(shape, tmp_path, capsys):
    sizes, kept, heads, pooling, (batch, *size) = SHAPES[shape]
    sizes = {**BASE, **sizes}
    model = comfy.ldm.wan.model.WanModel(**sizes, num_layers=4, device="cpu", dtype=torch.float32, operations=comfy.ops.disable_weight_init)
    state = _randomise(model, 5)
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    is_above = [f"blocks.{index}." for index in range(kept, 4)]
    trunk = {key: value for key, value in state.items() if not key.startswith(("head.", *is_above))}
    save_file(trunk, folder / "diffusion_pytorch_model.safetensors")
    (folder / "config.json").write_text(json.dumps({key: value for key, value in sizes.items() if key != "text_dim"} | {"num_layers": 40}))
    torch.manual_seed(3)
    head = head_module.build_head(sizes["dim"], heads, pooling=pooling)
    torch.save(head.mlp.state_dict(), tmp_path / "mlp_step_5.ckpt")
    options = {"trunk": str(folder), "head": str(tmp_path / "mlp_step_5.ckpt"), "num_heads": heads, "pooling": pooling}
    if pooling == "query":
        torch.save(head.query_attention.state_dict(), tmp_path / "query_attention_step_5.ckpt")
        options["query"] = str(tmp_path / "query_attention_step_5.ckpt")

    latent, text = torch.randn(batch, sizes["out_dim"], *size), torch.randn(batch, 7, sizes["text_dim"])
    timestep = torch.arange(100, 100 + 200 * batch, 200)
    case = {"latent": latent, "text": text, "timestep": timestep}
    seen, extra = latent.clone().requires_grad_(), {}
    whole = seen
    if sizes["in_dim"] == 36:
        case["condition"] = torch.randn(batch, 16, *size)
        mask = torch.zeros(batch, 4, *size)
        mask[:, :, 0] = 1
        whole = torch.cat([seen, mask, case["condition"]], dim=1)
    if sizes["model_type"] == "i2v":
        case["image_embeds"] = torch.randn(batch, 257, 1280)
        extra = {"clip_fea": case["image_embeds"]}
    features = []
    model.blocks[kept - 1].register_forward_hook(lambda _module, _args, output: features.append(output))
    with training_mode():
        model(whole, timestep.float(), torch.nn.functional.pad(text, (0, 0, 0, sizes["text_len"] - 7)), **extra)
        if pooling == "query":
            query = head.query_attention.queries.expand(batch, 1, -1)
            pooled = (head.query_attention.multihead_attn(query, features[0], features[0], need_weights=False)[0] + query)[:, 0]
        else:
            pooled = features[0].mean(1) if pooling == "mean" else features[0].max(1).values
        logit = head.mlp(pooled)
        (gradient,) = torch.autograd.grad(logit.sum(), seen)

    save_file({name: value.contiguous() for name, value in case.items()}, tmp_path / "in.safetensors")
    job = {"json": True, "input": str(tmp_path / "in.safetensors"), "tensors": str(tmp_path / "out.safetensors"), **options}
    assert score_command.main(["score-latent", json.dumps(job)]) == 0, capsys.readouterr().err
    videos = json.loads(capsys.readouterr().out)["videos"]
    found = load_file(tmp_path / "out.safetensors")
    assert [video["timestep"] for video in videos] == timestep.tolist() and len(videos) == batch
    assert [video["logit"] for video in videos] == pytest.approx(logit.tolist(), abs=1e-4)
    assert [video["reward"] for video in videos] == pytest.approx(logit.sigmoid().tolist(), abs=1e-4)
    for name, wanted in (("features", features[0].detach()), ("pooled", pooled.detach()), ("logit_grad_latent", gradient)):
        assert float((found[name] - wanted).norm() / wanted.norm()) < 1e-4, name


def test_what_does_not_go_together_is_told(shared_fixtures, tmp_path, capsys):
    folder = shared_fixtures / "pavrm"
    options = {"input": str(folder / "inputs.safetensors"), "trunk": str(folder / "trunk_comfyui.safetensors"), "json": True}
    heads = {"query": str(folder / "mlp" / "query_attention_step_100.ckpt"), "head": str(folder / "mlp" / "mlp_step_100.ckpt")}
    for changes, message in (
        ({"head": heads["head"]}, "needs both heads: give the query attention"),
        ({**heads, "pooling": "mean"}, "only then"),
        ({**heads, "num_heads": 5}, "width 96 is not a multiple of 5 heads"),
    ):
        assert score_command.main(["score-latent", json.dumps({**options, **changes})]) != 0
        assert message in capsys.readouterr().err
    tensors = {"latent": torch.zeros(3, 16, 2, 4, 4), "text": torch.zeros(2, 48), "timestep": torch.tensor([1, 2])}
    save_file(tensors, tmp_path / "in.safetensors")
    assert score_command.main(["score-latent", json.dumps({**options, **heads, "input": str(tmp_path / "in.safetensors")})]) != 0
    assert "each of 3 latents" in capsys.readouterr().err

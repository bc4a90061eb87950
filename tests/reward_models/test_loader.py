"""Finding the config, naming wrong files, the torch-free spec, and every key of the full-size models on the meta device."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from reward_lab.reward_models import aesthetic, clip, hpsv2, layouts, loader, mps
from reward_lab.reward_models.loader import load_reward_model
from reward_lab.reward_models.spec import KINDS, OPTIONS, OPTIONS_OF, SIZES, RewardModelSpec
from reward_lab.reward_models.weights import load_into


@pytest.fixture
def hps_file(scorers, tmp_path):
    """A copy of the tiny HPS in a folder of its own, without any config."""
    return shutil.copy(scorers.folder / "hps" / "hps_tiny.safetensors", tmp_path / "hps.safetensors")


@pytest.fixture
def hps_config(scorers):
    """Sizes of the tiny HPS."""
    return json.loads((scorers.folder / "hps" / "config.json").read_text())


def test_config_may_be_a_dict_a_file_or_text(scorers, hps_file, hps_config):
    for config in (hps_config, scorers.folder / "hps" / "config.json", json.dumps(hps_config), {"model_cfg": hps_config}):
        assert load_reward_model("hpsv2.1", hps_file, config=config).name == "hpsv2.1"


def test_config_from_metadata_then_from_the_file_beside(scorers, hps_file, hps_config, tmp_path):
    with pytest.raises(ValueError, match="not the full-size model.*hps.json beside it"):
        load_reward_model("hpsv2.1", hps_file)
    (tmp_path / "hps.json").write_text("\ufeff" + json.dumps(hps_config))
    load_reward_model("hpsv2.1", hps_file)
    (tmp_path / "hps.json").write_text("{")
    with pytest.raises(ValueError, match="hps.json is not JSON"):
        load_reward_model("hpsv2.1", hps_file)
    save_file(load_file(hps_file), hps_file, metadata={"config": json.dumps(hps_config)})
    load_reward_model("hpsv2.1", hps_file)


def test_wrong_config_is_told_by_key(hps_file, hps_config):
    hps_config["vision_cfg"]["layers"] = 3
    with pytest.raises(ValueError, match="missing: visual.transformer.resblocks.2"):
        load_reward_model("hpsv2.1", hps_file, config=hps_config)
    with pytest.raises(ValueError, match="vision_cfg.depth"):
        load_reward_model("hpsv2.1", hps_file, config={**hps_config, "vision_cfg": {"depth": 2}})
    with pytest.raises(ValueError, match="lacks embed_dim, vision_cfg, text_cfg"):
        load_reward_model("hpsv2.1", hps_file, config={})
    with pytest.raises(ValueError, match="no config file nowhere.json"):
        load_reward_model("hpsv2.1", hps_file, config="nowhere.json")
    with pytest.raises(ValueError, match="not the full-size|does not fit|ViT"):
        load_reward_model("hpsv2.1", hps_file, config="ViT-H-14")


def test_missing_keys_are_named(hps_file, hps_config, tmp_path):
    state = load_file(hps_file)
    del state["visual.ln_post.weight"], state["text_projection"]
    save_file(state, tmp_path / "less.safetensors")
    with pytest.raises(ValueError, match="missing: text_projection, visual.ln_post.weight"):
        load_reward_model("hpsv2.1", tmp_path / "less.safetensors", config=hps_config)


def test_wrong_model_under_the_right_name(scorers, shared_fixtures):
    with pytest.raises(ValueError, match="is an MPS model.*Load it with kind mps"):
        load_reward_model("hpsv2.1", scorers.folder / "mps" / "mps_tiny_whole.pth")
    with pytest.raises(ValueError, match="is a CLIP in open_clip's layout.*Load it with kind hpsv2.1"):
        load_reward_model("mps", scorers.folder / "hps" / "hps_tiny.pt")
    with pytest.raises(ValueError, match="is a Wan video model"):
        load_reward_model("hpsv2.1", shared_fixtures / "pavrm" / "trunk_comfyui.safetensors")
    lora = next((shared_fixtures / "videoxfun_lora").glob("*HPS2.1*.safetensors"), None)
    if lora is not None:
        with pytest.raises(ValueError, match="is a LoRA"):
            load_reward_model("hpsv2.1", lora)


def test_unknown_kind_and_foreign_options(hps_file):
    with pytest.raises(ValueError, match="'hpsv3' is unknown; choose one of hpsv2.1, mps"):
        load_reward_model("hpsv3", hps_file)
    with pytest.raises(ValueError, match="threshold cannot be set for hpsv2.1"):
        load_reward_model("hpsv2.1", hps_file, threshold=0.3)


def test_hf_config_refusals():
    sizes = {"projection_dim": 8, "vision_config": {"hidden_act": "gelu"}, "text_config": {"hidden_act": "gelu_new"}}
    with pytest.raises(ValueError, match="hidden_act"):
        clip.from_hf_config(sizes)
    with pytest.raises(ValueError, match="lacks 'image_size'"):
        clip.from_hf_config({"projection_dim": 8, "vision_config": {"hidden_act": "gelu"}, "text_config": {"hidden_act": "gelu"}})


def test_spec_round_trip_and_load(hps_file, hps_config):
    spec = RewardModelSpec(kind="hpsv2", path=str(hps_file), options={"config": hps_config, "resize": "squash"})
    again = RewardModelSpec.from_dict(json.loads(json.dumps(spec.to_dict())))
    assert again == spec
    assert again.load("cpu").prepare.resize == "squash"
    with pytest.raises(ValueError, match="'size' is unknown; the nearest known name is 'resize'"):
        RewardModelSpec(kind="mps", path="x", options={"size": 1})
    with pytest.raises(ValueError, match="'pth' is unknown; the nearest known name is 'path'"):
        RewardModelSpec.from_dict({"kind": "mps", "pth": "x"})
    with pytest.raises(ValueError, match="lacks path"):
        RewardModelSpec.from_dict({"kind": "mps"})


def test_spec_imports_no_torch(repo):
    code = (
        f"import sys; sys.path.insert(0, {str(repo / 'reward_models')!r}); import spec; spec.RewardModelSpec(kind='mps', path='x');"
        " assert 'torch' not in sys.modules and 'open_clip' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def _tower_keys(layers_name: str, layers: int, width: int, mlp: int) -> dict[str, tuple[int, ...]]:
    keys = {}
    for index in range(layers):
        prefix = f"{layers_name}.{index}"
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            keys |= {f"{prefix}.self_attn.{part}.weight": (width, width), f"{prefix}.self_attn.{part}.bias": (width,)}
        for norm in ("layer_norm1", "layer_norm2"):
            keys |= {f"{prefix}.{norm}.weight": (width,), f"{prefix}.{norm}.bias": (width,)}
        keys |= {f"{prefix}.mlp.fc1.weight": (mlp, width), f"{prefix}.mlp.fc1.bias": (mlp,)}
        keys |= {f"{prefix}.mlp.fc2.weight": (width, mlp), f"{prefix}.mlp.fc2.bias": (width,)}
    return keys


def full_size_hf_keys(embed: int = 1024, text: tuple = (1024, 24, 4096), vision: tuple = (1280, 32, 5120)) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a CLIP in Hugging Face layout, written from the published list and not from our code; by default laion's ViT-H/14.

    Towers are given as (width, layers, MLP width).
    """
    keys = {"logit_scale": (), "text_projection.weight": (embed, text[0]), "visual_projection.weight": (embed, vision[0])}
    keys |= {"text_model.embeddings.token_embedding.weight": (49408, text[0]), "text_model.embeddings.position_embedding.weight": (77, text[0])}
    keys |= {"text_model.final_layer_norm.weight": (text[0],), "text_model.final_layer_norm.bias": (text[0],)}
    keys |= {"vision_model.embeddings.class_embedding": (vision[0],), "vision_model.embeddings.position_embedding.weight": (257, vision[0])}
    keys |= {"vision_model.embeddings.patch_embedding.weight": (vision[0], 3, 14, 14)}
    for norm in ("pre_layrnorm", "post_layernorm"):
        keys |= {f"vision_model.{norm}.weight": (vision[0],), f"vision_model.{norm}.bias": (vision[0],)}
    towers = (("text_model.encoder.layers", text), ("vision_model.encoder.layers", vision))
    return keys | {key: shape for name, (width, layers, mlp) in towers for key, shape in _tower_keys(name, layers, width, mlp).items()}


def full_size_mps_keys() -> dict[str, tuple[int, ...]]:
    """Names and shapes of MPS_overall, from the published list."""
    keys = {f"model.{key}": shape for key, shape in full_size_hf_keys().items()}
    for index in range(4):
        cross, block = f"cross_model.layers.{index}.0.fn", f"cross_model.layers.{index}.1.fn"
        keys |= {f"{part}.norm.{kind}": (1024,) for part in (cross, block) for kind in ("weight", "bias")}
        keys |= {f"{cross}.to_q.weight": (1024, 1024), f"{cross}.to_kv.weight": (128, 1024), f"{cross}.to_out.weight": (1024, 1024)}
        keys |= {f"{cross}.ff.0.weight": (8192, 1024), f"{cross}.ff.2.weight": (1024, 4096)}
        keys |= {f"{block}.rotary_emb.inv_freq": (32,), f"{block}.fused_attn_ff_proj.weight": (9344, 1024)}
        keys |= {f"{block}.attn_out.weight": (1024, 1024), f"{block}.ff_out.1.weight": (1024, 4096)}
    return keys


def on_meta(keys: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """Tensors without memory."""
    return {key: torch.empty(shape, device="meta", dtype=torch.float16) for key, shape in keys.items()}


def test_full_size_hps_takes_every_published_key():
    with torch.device("meta"):
        network = hpsv2.build(clip.VIT_H_14)
    published = on_meta(full_size_hf_keys())
    assert len(published) == 910
    state = layouts.hf_to_open_clip(published)
    assert len(state) == len(network.state_dict()) == 686
    assert clip.config_from_shapes(state) is clip.VIT_H_14
    load_into(network, state, "full size")
    assert sum(parameter.numel() for parameter in network.parameters()) == 986_109_441
    assert sum(parameter.numel() for parameter in network.visual.parameters()) == 632_076_800
    assert {key: tuple(value.shape) for key, value in layouts.open_clip_to_hf(network.state_dict()).items()} == full_size_hf_keys()


def test_full_size_mps_takes_every_published_key():
    with torch.device("meta"):
        network = mps.build(clip.VIT_H_14)
    keys = full_size_mps_keys()
    assert len(keys) == 962
    extra = {f"model.{tower}.embeddings.position_ids": (1, 77) for tower in ("text_model", "vision_model")}
    for published in (keys, keys | extra):
        load_into(network, layouts.mps_to_own(on_meta(published)), "full size")
    assert sum(parameter.numel() for parameter in network.cross_model.parameters()) == 118_497_280
    assert sum(parameter.numel() for parameter in network.parameters()) == 1_104_606_721
    assert {key: tuple(value.shape) for key, value in mps.export_state_dict(network).items()} == keys


def test_full_size_pickscore_and_aesthetic_take_every_published_key():
    """PickScore is laion's ViT-H/14; the aesthetic predictor stands on OpenAI's ViT-L/14 and brings ten tensors of its own."""
    with torch.device("meta"):
        network, predictor = hpsv2.build(clip.VIT_H_14), aesthetic.build(clip.VIT_L_14)
    load_into(network, layouts.hf_to_open_clip(on_meta(full_size_hf_keys())), "PickScore")
    state = layouts.hf_to_open_clip(on_meta(full_size_hf_keys(768, (768, 12, 3072), (1024, 24, 4096))))
    assert clip.is_vit_l_14(state) and clip.config_from_shapes(state) is None
    sizes, places = (768, 1024, 128, 64, 16, 1), (0, 2, 4, 6, 7)
    head = {f"layers.{place}.weight": (sizes[i + 1], sizes[i]) for i, place in enumerate(places)}
    head |= {f"layers.{place}.bias": (sizes[i + 1],) for i, place in enumerate(places)}
    tower = {key: value for key, value in state.items() if key.startswith("visual.")}
    load_into(predictor, {**tower, **on_meta(head)}, "aesthetic")
    assert sum(parameter.numel() for parameter in predictor.visual.parameters()) == 303_966_208


def test_full_size_is_recognised_only_when_whole():
    state = layouts.hf_to_open_clip(on_meta(full_size_hf_keys()))
    shorter = {key: value for key, value in state.items() if not key.startswith("visual.transformer.resblocks.31.")}
    assert clip.config_from_shapes(shorter) is None
    assert set(layouts.strip_wrappers({f"model.{key}": value for key, value in state.items()})) == set(state)
    assert set(layouts.strip_wrappers({f"mps.{key}": None for key in full_size_mps_keys()})) == set(full_size_mps_keys())


def test_the_bundled_config_is_open_clips_own():
    import open_clip

    config = open_clip.get_model_config("ViT-H-14")
    assert {key: config[key] for key in clip.VIT_H_14} == dict(clip.VIT_H_14)


def test_sizes_with_a_name_are_the_loaders():
    assert set(SIZES) == set(loader._NAMED)


def test_every_kind_has_its_options_and_says_what_it_cannot_take():
    assert set(OPTIONS_OF) == {*KINDS, "pavrm"} and {name for names in OPTIONS_OF.values() for name in names} <= set(OPTIONS)
    with pytest.raises(ValueError, match="condition cannot be set for hpsv2.1"):
        load_reward_model("hpsv2", "x.pt", condition="overall")
    with pytest.raises(ValueError, match="scores latents, not frames"):
        load_reward_model("pavrm", "x.safetensors")
    with pytest.raises(ValueError, match="mps needs a weight file"):
        load_reward_model("mps")

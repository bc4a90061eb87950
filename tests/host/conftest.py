"""A whole set of random model files, small enough for a second, in the formats of the real ones."""

from __future__ import annotations

import io
import itertools
import json
from pathlib import Path

import pytest

TRANSFORMER = {
    "dim": 48, "num_heads": 4, "ffn_dim": 64, "num_layers": 2, "freq_dim": 32, "text_dim": 32, "text_len": 16, "in_dim": 16, "out_dim": 16, "model_type": "t2v",
}  # fmt: skip
_WORDS = (("red", "green", "blue"), ("square", "circle"), ("left", "right"), ("white", "black"))
SENTENCES = ["a {} {} moves {} over {}".format(*words) for words in itertools.product(*_WORDS)]


def _randomise(module, seed):
    import torch

    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        is_gain = parameter.ndim == 1 and not name.endswith("bias") or name.endswith("gamma")
        fan = max(1, parameter[0].numel()) if parameter.ndim > 1 else 25
        parameter.data = (torch.ones if is_gain else torch.zeros)(parameter.shape) + torch.randn(parameter.shape, generator=generator) * 0.5 * fan**-0.5
    return {key: value.detach().contiguous() for key, value in module.state_dict().items()}


def _vocabulary() -> bytes:
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES), model_writer=model, vocab_size=60, hard_vocab_limit=False, pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2
    )
    return model.getvalue()


def _text_encoder(path: Path) -> None:
    import comfy.ops
    import comfy.text_encoders.t5
    import torch
    from safetensors.torch import save_file

    vocabulary = _vocabulary()
    config = {
        "d_ff": 48, "d_kv": 8, "d_model": 32, "decoder_start_token_id": 0, "dropout_rate": 0.0, "eos_token_id": 1, "dense_act_fn": "gelu_pytorch_tanh",
        "initializer_factor": 1.0, "is_encoder_decoder": True, "is_gated_act": True, "layer_norm_epsilon": 1e-6, "model_type": "umt5",
        "num_decoder_layers": 1, "num_heads": 4, "num_layers": 1, "output_past": True, "pad_token_id": 0, "relative_attention_num_buckets": 32,
        "tie_word_embeddings": False, "vocab_size": 96,
    }  # fmt: skip
    tensors = _randomise(comfy.text_encoders.t5.T5(config, torch.float32, "cpu", comfy.ops.disable_weight_init), 7)
    tensors["spiece_model"] = torch.frombuffer(bytearray(vocabulary), dtype=torch.uint8)
    save_file(tensors, path, metadata={"config": json.dumps({"umt5xxl_model_config": config, "text_len": 16})})


@pytest.fixture(scope="session")
def tiny_models(comfyui, tmp_path_factory) -> dict[str, str]:
    """Paths of random `high`, `low`, `text_encoder` and `vae` files."""
    import comfy.ldm.wan.model
    import comfy.ldm.wan.vae
    import comfy.ops
    import torch
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("models")
    paths = {
        "high": folder / "tiny_t2v_high_noise.safetensors",
        "low": folder / "tiny_t2v_low_noise.safetensors",
        "text_encoder": folder / "tiny_umt5.safetensors",
        "vae": folder / "tiny_vae.safetensors",
    }
    for seed, expert in enumerate(("high", "low")):
        model = comfy.ldm.wan.model.WanModel(**TRANSFORMER, device="cpu", dtype=torch.float32, operations=comfy.ops.disable_weight_init)
        save_file(_randomise(model, seed), paths[expert], metadata={"config": json.dumps({"transformer": TRANSFORMER})})
    vae = comfy.ldm.wan.vae.WanVAE(dim=8, z_dim=16, dim_mult=[1, 2, 4, 4], num_res_blocks=2, temperal_downsample=[False, True, True])
    save_file(_randomise(vae, 4), paths["vae"])
    _text_encoder(paths["text_encoder"])
    return {name: str(path) for name, path in paths.items()}


PEFT_DOUBLE = '''
"""Stands in for the package: a LoRA layer as PEFT's documentation has it, base + lora_B(lora_A(x)) * alpha / r, put in the place of the targets."""
import torch
__version__ = "double"

class LoraConfig:
    def __init__(self, r, lora_alpha, lora_dropout, target_modules):
        self.r, self.alpha, self.targets = r, lora_alpha, set(target_modules)

class Layer(torch.nn.Module):
    def __init__(self, base, config):
        super().__init__()
        self.base_layer, self.scaling = base, SCALE * config.alpha / config.r
        self.lora_A = torch.nn.ModuleDict({"default": torch.nn.Linear(base.in_features, config.r, bias=False)})
        self.lora_B = torch.nn.ModuleDict({"default": torch.nn.Linear(config.r, base.out_features, bias=False)})

    def forward(self, x):
        return self.base_layer(x) + self.lora_B["default"](self.lora_A["default"](x)) * self.scaling

class Model:
    def __init__(self, model, names):
        self.model, self.names = model, names

    def unload(self):
        for name in self.names:
            owner, _, leaf = name.rpartition(".")
            setattr(self.model.get_submodule(owner), leaf, self.model.get_submodule(name).base_layer)

def get_peft_model(model, config, autocast_adapter_dtype):
    assert autocast_adapter_dtype is False
    for name in sorted(config.targets):
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, Layer(model.get_submodule(name), config))
    return Model(model, sorted(config.targets))
'''


@pytest.fixture
def peft_double(tmp_path, monkeypatch):
    """Makes a folder with a stand-in for PEFT, whose LoRA is `scale` times what it should be; forgotten at the end of the test."""
    import sys

    monkeypatch.setattr(sys, "path", list(sys.path))

    def make(scale: float = 1.0) -> Path:
        folder = tmp_path / "peft-double"
        folder.mkdir()
        (folder / "peft.py").write_text(f"SCALE = {scale}\n{PEFT_DOUBLE}", encoding="utf-8")
        monkeypatch.delitem(sys.modules, "peft", raising=False)
        return folder

    yield make
    sys.modules.pop("peft", None)


@pytest.fixture(scope="module")
def pavrm_folder(shared_fixtures):
    """Recorded PAVRM folder."""
    return shared_fixtures / "pavrm"


@pytest.fixture(scope="module")
def pavrm_heads(pavrm_folder):
    """The two head files, as options."""
    return {"query": str(pavrm_folder / "mlp" / "query_attention_step_100.ckpt"), "head": str(pavrm_folder / "mlp" / "mlp_step_100.ckpt")}


@pytest.fixture
def score_latent(capsys):
    """Run score-latent; returns its JSON document."""

    from reward_lab.host import score_command

    def run(**options) -> dict:
        assert score_command.main(["score-latent", json.dumps({"json": True, **options})]) == 0, capsys.readouterr().err
        return json.loads(capsys.readouterr().out)

    return run

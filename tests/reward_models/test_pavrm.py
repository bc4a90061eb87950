"""The PAVRM head against the recorded outputs of the published modules."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from reward_lab.reward_models import pavrm

CASES = ("case0", "case1", "case2", "case3")


@pytest.fixture(scope="module")
def folder(shared_fixtures):
    """Recorded PAVRM folder."""
    return shared_fixtures / "pavrm"


@pytest.fixture(scope="module")
def files(folder):
    """Query attention and score head as upstream writes them, tensors marked cuda:0."""
    return folder / "mlp" / "query_attention_step_100.ckpt", folder / "mlp" / "mlp_step_100.ckpt"


@pytest.fixture(scope="module")
def expected(folder):
    """Recorded features and scores."""
    return load_file(folder / "expected.safetensors")


def assert_near(got, wanted, limit):
    assert (got - wanted).norm() < limit * wanted.norm()


@pytest.mark.parametrize("use_folded", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_head_of_recorded_features(files, expected, case, use_folded):
    output = pavrm.load_head(*files, use_folded=use_folded)(expected[f"{case}.features"])
    assert_near(output.pooled, expected[f"{case}.pooled"], 1e-4)
    assert output.logit.item() == pytest.approx(expected[f"{case}.logit"].item(), abs=1e-3)
    assert output.probability.item() == pytest.approx(expected[f"{case}.reward"].item(), abs=2e-4)


@pytest.mark.parametrize("use_folded", [True, False])
def test_two_tapped_layers_are_pooled_apart_and_averaged(files, folder, expected, use_folded):
    taps = load_file(folder / "inputs.safetensors")["case0.two_layers.feature_layers"].tolist()
    layers = [expected["case0.block_outputs"][tap - 1][None] for tap in taps]
    output = pavrm.load_head(*files, use_folded=use_folded)(layers)
    assert_near(output.pooled, expected["case0.two_layers.pooled"], 1e-4)
    assert output.logit.item() == pytest.approx(expected["case0.two_layers.logit"].item(), abs=1e-3)


@pytest.mark.parametrize("pooling", ["mean", "max"])
def test_several_layers_without_a_query(pooling):
    """As train_pavrm.py reduces [layer, sample, token, feature]: over the tokens, then over the layers, twice the same way."""
    torch.manual_seed(0)
    layers = [torch.randn(2, 5, 16) for _ in range(3)]
    output = pavrm.build_head(16, pooling=pooling)(layers)
    expected = torch.stack(layers)
    expected = expected.mean(dim=2).mean(dim=0) if pooling == "mean" else expected.max(dim=2).values.max(dim=0).values
    torch.testing.assert_close(output.pooled, expected)


def test_samples_of_a_batch_do_not_mix(files, expected):
    head = pavrm.load_head(*files)
    batch = torch.cat([expected["case0.features"], expected["case1.features"]])
    together = head(batch).logit
    torch.testing.assert_close(together, torch.cat([head(batch[:1]).logit, head(batch[1:]).logit]), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("dim", "heads", "tokens"), [(24, 8, 5), (30, 3, 17), (16, 1, 1)])
def test_folded_equals_exact_with_all_gradients(dim, heads, tokens):
    torch.manual_seed(dim)
    head = pavrm.QueryAttention(dim, heads).double()
    torch.nn.init.normal_(head.multihead_attn.in_proj_bias)
    features = torch.randn(2, tokens, dim, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, dim, dtype=torch.float64)
    inputs = [features, *head.parameters()]
    exact, folded = head(features), head.folded(features)
    torch.testing.assert_close(folded, exact, rtol=1e-12, atol=1e-12)
    names = ["features", *(name for name, _ in head.named_parameters())]
    pairs = [torch.autograd.grad((value * weight).sum(), inputs) for value in (exact, folded)]
    for name, one, other in zip(names, *pairs, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-10, atol=1e-12, msg=name)


def test_half_precision_features_are_scored_in_float32(files, expected):
    output = pavrm.load_head(*files)(expected["case0.features"].bfloat16())
    assert output.logit.dtype == torch.float32


def test_single_file_form(files, expected, tmp_path):
    parts = pavrm.load_head(*files)
    state = {key: value.contiguous() for key, value in parts.state_dict().items()}
    state["trunk.blocks.0.self_attn.q.weight"] = torch.zeros(1)
    save_file(state, tmp_path / "pavrm.safetensors", metadata={"config": json.dumps({"num_heads": 8, "feature_layers": [3], "transformer": {}})})
    got = pavrm.load_head(tmp_path / "pavrm.safetensors")(expected["case0.features"])
    torch.testing.assert_close(got.logit, parts(expected["case0.features"]).logit, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="single-file PAVRM"):
        pavrm.load_head(tmp_path / "pavrm.safetensors", files[1])


def test_a_single_file_knows_its_pooling(files, tmp_path):
    state = {f"mlp.{key}": value.contiguous() for key, value in pavrm.load_head(*files).mlp.state_dict().items()}
    state["trunk.patch_embedding.weight"] = torch.zeros(1)
    save_file(state, tmp_path / "pavrm.safetensors", metadata={"config": json.dumps({"pooling": "mean", "feature_layers": [3], "transformer": {}})})
    for pooling in (None, "mean"):
        assert pavrm.load_head(tmp_path / "pavrm.safetensors", pooling=pooling).pooling == "mean"
    for pooling in ("max", "query"):
        with pytest.raises(ValueError, match=f"was trained with pooling 'mean', not '{pooling}'"):
            pavrm.load_head(tmp_path / "pavrm.safetensors", pooling=pooling)


def test_numbers_of_heads_that_cannot_be(files):
    for number in (0, -8, 7):
        with pytest.raises(ValueError, match=f"width 96 is not a multiple of {number} heads"):
            pavrm.load_head(*files, num_heads=number)


def test_wrong_files_are_named(files, shared_fixtures):
    query, mlp = files
    with pytest.raises(ValueError, match="is the score head of a PAVRM, but the query attention"):
        pavrm.load_head(mlp, query)
    with pytest.raises(ValueError, match="give the score head"):
        pavrm.load_head(query)
    with pytest.raises(ValueError, match="a Wan video model"):
        pavrm.load_head(shared_fixtures / "pavrm" / "trunk_comfyui.safetensors", mlp)


def test_wrong_feature_width_is_named(files):
    with pytest.raises(ValueError, match=r"\[batch, tokens, 96\].*\(1, 4, 95\)"):
        pavrm.load_head(*files)(torch.zeros(1, 4, 95))


def test_head_loaded_in_inference_mode_passes_gradients(files, expected):
    with torch.inference_mode():
        head = pavrm.load_head(*files)
    features = expected["case0.features"].clone().requires_grad_()
    head(features).logit.sum().backward()
    assert features.grad.abs().sum() > 0
    assert not any(parameter.requires_grad for parameter in head.parameters())

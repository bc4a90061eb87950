"""Small umT5 encoders as the host's CLIP objects."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.host


def test_works_with_the_core_node_and_fills_up_with_zeros(tiny_models):
    import nodes
    import torch

    from reward_lab.host.text import PromptEncoder, load_text_encoder

    clip = load_text_encoder(tiny_models["text_encoder"])
    prompt = "a red"
    ((cond, _),) = nodes.CLIPTextEncode().encode(clip, prompt)[0]
    (ours, empty) = PromptEncoder(clip).encode([prompt, ""])
    assert cond.shape == (1, 16, 32) and torch.equal(cond[0].float(), ours) and torch.isfinite(ours).all()
    # A longer prompt is not cut.
    assert PromptEncoder(clip).encode(["a red square moves left over white"])[0].shape[0] > 16
    # An empty prompt is the end token alone.
    assert empty[0].abs().sum() > 0 and empty[1:].abs().sum() == 0


def test_small_encoder_without_sizes_is_refused(tiny_models, tmp_path):
    from safetensors.torch import load_file, save_file

    from reward_lab.host.text import load_text_encoder

    tensors = load_file(tiny_models["text_encoder"])
    save_file(tensors, tmp_path / "bare.safetensors")
    with pytest.raises(ValueError, match="is 32 wide instead of 4096 and lacks its sizes"):
        load_text_encoder(tmp_path / "bare.safetensors")
    with pytest.raises(ValueError, match="is not a umT5"):
        load_text_encoder(tiny_models["high"])

"""The switch that makes the host differentiable."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.host


def test_restores_everything_also_after_an_error(comfyui):
    import comfy.model_management
    import torch

    from reward_lab.host.training_mode import training_mode

    with torch.inference_mode(), pytest.raises(KeyError), training_mode():
        assert comfy.model_management.in_training and torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
        raise KeyError
    assert not comfy.model_management.in_training and not torch.is_inference_mode_enabled()


@pytest.mark.parametrize("mask", [None, "LS", "BLS", "BNLS"])
def test_attention_equals_the_hosts(comfyui, mask):
    import comfy.ldm.modules.attention
    import torch

    from reward_lab.host.training_mode import attention

    torch.manual_seed(0)
    q, k, v = torch.randn(2, 6, 8), torch.randn(2, 5, 8), torch.randn(2, 5, 8)
    masks = {None: None, "LS": torch.randn(6, 5), "BLS": torch.randn(2, 6, 5), "BNLS": torch.randn(2, 4, 6, 5)}
    theirs = comfy.ldm.modules.attention.attention_pytorch(q, k, v, 4, mask=masks[mask])
    torch.testing.assert_close(attention(None, q, k, v, 4, mask=masks[mask]), theirs)
    heads = [x.unflatten(-1, (4, -1)).transpose(1, 2) for x in (q, k, v)]
    torch.testing.assert_close(attention(None, *heads, 4, mask=masks[mask], skip_reshape=True), theirs)

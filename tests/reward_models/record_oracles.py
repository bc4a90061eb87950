"""Asks imscore (and transformers' CLIP under its cross model) for the scores of the tiny models in `oracle_cases.py` and writes `oracles.json`.

    pip install --no-deps imscore==0.0.11 && pip install loguru
    python labtools/launch.py tests.reward_models.record_oracles

Only needed when the cases change. imscore's whole MPS class cannot run: it loads the full-size CLIP by name and halves pixels and mask, which CPU kernels
refuse; its parts are joined here as its forward does.
"""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path
from typing import Any

import torch
import transformers
from imscore.hps import model as imscore_hps
from imscore.mps import cross
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
from open_clip.tokenizer import SimpleTokenizer
from torch.nn import functional

from . import oracle_cases as cases

FILE = Path(__file__).with_name("oracles.json")
# MPS's condition text and its end id, from the published README; not taken from the pack.
CONDITION = (
    "light, color, clarity, tone, style, ambiance, artistry, shape, face, hair, hands, limbs, structure, instance, texture, quantity, attributes, position, "
    "number, location, word, things."
)
END_ID = 49407


def hps(sizes: dict[str, Any]) -> dict[str, Any]:
    """Scores of imscore's HPSv2 with open_clip's model of these sizes."""
    config = cases.imscore_config(sizes)
    tower = CLIP(config["embed_dim"], CLIPVisionCfg(**config["vision_cfg"]), CLIPTextCfg(**config["text_cfg"]), output_dict=True).eval()
    tower.load_state_dict(cases.fill(tower.state_dict(), 0.4), strict=False)
    oracle = imscore_hps.HPSv2.__new__(imscore_hps.HPSv2)
    torch.nn.Module.__init__(oracle)
    oracle.model, oracle.tokenizer = tower, SimpleTokenizer()
    oracle.resize = imscore_hps.ResizeMaxSize(cases.IMSCORE_PX)
    oracle.normalize = imscore_hps.torchvision.transforms.Normalize((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
    leaf = cases.frames(2, 180, 301)[:, 0].requires_grad_()
    scores = oracle.score(leaf, cases.PROMPTS)
    (gradient,) = torch.autograd.grad(scores.sum(), leaf)
    return {"scores": scores.tolist(), "gradient": cases.digest(gradient)}


def mps(sizes: dict[str, Any], threshold: float) -> dict[str, Any]:
    """Scores of imscore's cross model on transformers' CLIP, joined as its published forward does, one maximum per prompt."""
    towers = transformers.CLIPModel(transformers.CLIPConfig(**cases.hugging_face_config(sizes))).eval()
    oracle = cross.CrossModel(dim=sizes["embed"], **cases.CROSS).eval()
    for module, prefix in ((towers, "model."), (oracle, "cross_model.")):
        weights = cases.fill({f"{prefix}{name}": value for name, value in module.state_dict().items()}, 0.35)
        module.load_state_dict({key.removeprefix(prefix): value for key, value in weights.items()}, strict=False)
    pixels = cases.prepared(sizes["vision"][0]).requires_grad_()
    tokenizer = SimpleTokenizer()
    ids, condition = (_padded(tokenizer(texts)) for texts in (cases.PROMPTS, [CONDITION]))

    def states(tokens: torch.Tensor) -> torch.Tensor:
        return towers.text_projection(towers.text_model(input_ids=tokens).last_hidden_state)

    text = states(ids)
    likeness = (text @ states(condition).transpose(1, 2)).amax(-1)
    hidden = torch.zeros_like(likeness).masked_fill(likeness / likeness.amax(-1, keepdim=True) <= threshold, float("-inf"))
    image = towers.visual_projection(towers.vision_model(pixel_values=pixels).last_hidden_state)
    picture = oracle(image, text, hidden[:, None].expand(-1, image.shape[1], -1))[:, 0]
    end = text[torch.arange(2), (ids == END_ID).int().argmax(-1)]
    scores = towers.logit_scale.exp() * functional.cosine_similarity(end, picture)
    (gradient,) = torch.autograd.grad(scores.sum(), pixels)
    return {"scores": scores.tolist(), "masked": int(hidden.isinf().sum()), "gradient": cases.digest(gradient)}


def _padded(ids: torch.Tensor) -> torch.Tensor:
    """Every position after the end id is the end id, as Hugging Face's tokenizer of MPS pads."""
    return ids.masked_fill((ids == END_ID).cumsum(1) > 0, END_ID)


def main(_argv: list[str]) -> int:
    """Record everything."""
    names = ("imscore", "transformers", "open_clip_torch", "torch", "torchvision")
    recorded = {
        "made_by": "tests/reward_models/record_oracles.py",
        "versions": {name: importlib.metadata.version(name) for name in names},
        "hps": [hps(sizes) for sizes in cases.CONFIGS],
        "mps": [{str(threshold): mps(sizes, threshold) for threshold in cases.THRESHOLDS} for sizes in cases.CONFIGS],
    }
    FILE.write_text(json.dumps(recorded, indent=1) + "\n", encoding="utf-8")
    print(FILE)
    return 0

"""Attacks frames by gradient ascent on one pocket reward and asks the others: `lab.py bench adversarial [--picture FILE] [--out FILE]`.

Each frame gets a caption that is wrong in one property (a blue square is called red). Ascent changes pixels by at most 24 of 255 until the attacked
reward is as pleased as with the right caption. It is noticed when another judge disagrees: the other reward model is less pleased than with an honest
caption, or the oracle, which no reward model sees, reads that the frame still does not show what the caption says.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from ..reward_models.base import RewardModel, reward_and_frame_gradient
from ..reward_models.loader import load_reward_model
from . import oracle, quality, world
from .stages import hps, mps

WEIGHTS = Path(__file__).resolve().parent / "weights"
RESULT = Path(__file__).resolve().parent.parent / "benchmarks" / "results" / "adversarial.json"
STEPS = 40
# Largest change of a pixel: 24 of 255.
REACH = 24 / 255


def attack(model: RewardModel, frames_BFCHW: torch.Tensor, prompts: Sequence[str], steps: int = STEPS, reach: float = REACH) -> torch.Tensor:
    """Frames within `reach` of the given ones whose reward is as high as sign-gradient ascent makes it (Madry et al. 2018, arXiv 1706.06083)."""
    attacked = frames_BFCHW.clone()
    for _ in range(steps):
        _, gradient = reward_and_frame_gradient(model, attacked, prompts, len(attacked))
        attacked = attacked + gradient.sign() * (2.5 * reach / steps)
        attacked = torch.minimum(torch.maximum(attacked, frames_BFCHW - reach), frames_BFCHW + reach).clamp(0, 1)
    return attacked


def measure(weights: Path, count: int = 24, steps: int = STEPS, attacked_kind: str = "hpsv2.1") -> dict:
    """Attack still frames of held-out scenes under wrong captions.

    Returns:
        Rewards for the wrong caption before and after, beside the honest one (same frame, right caption); shares of frames that are `fooled` (attacked
        reward at or above honest), on which the `oracle_agrees` with the wrong caption afterwards, and of fooled frames that are `noticed`.
    """
    rng = random.Random(211)
    scenes = quality.held_out_scenes(count, 212, two_share=0.0)
    wrong = [hps.wrong_scene(scene, rng) for scene in scenes]
    frames = torch.from_numpy(np.stack([hps.frame_of(scene, rng) for scene in scenes])).permute(0, 3, 1, 2)[:, None].float()
    honest, prompts = [world.caption(scene) for scene in scenes], [world.caption(scene) for scene in wrong]
    models = {kind: load_reward_model(kind, weights / name) for kind, name in {"hpsv2.1": hps.FILE_NAME, "mps": mps.FILE_NAME}.items()}
    attacked = attack(models[attacked_kind], frames, prompts, steps)
    result: dict = {"attacked": attacked_kind, "frames": count, "reach_of_255": REACH * 255, "steps": steps}
    pleased, scores = {}, {}
    for kind, model in models.items():
        with torch.no_grad():
            level, before, after = (model.score(x, texts).per_video for x, texts in ((frames, honest), (frames, prompts), (attacked, prompts)))
        pleased[kind] = after >= level
        scores[kind] = {"honest": level, "before": before, "after": after}
        result[kind] = {name: float(value.mean()) for name, value in scores[kind].items()} | {"pleased": float(pleased[kind].float().mean())}
    agrees = torch.tensor([_shows(frame, scene) for frame, scene in zip(attacked[:, 0], wrong, strict=True)])
    other = next(kind for kind in models if kind != attacked_kind)
    fooled = pleased[attacked_kind]
    noticed = fooled & ~(pleased[other] & agrees)
    result |= {"fooled": float(fooled.float().mean()), "oracle_agrees": float(agrees.float().mean())}
    result |= {"noticed": float(noticed.sum() / fooled.sum().clamp_min(1)), "noticed_by_other_reward": float((fooled & ~pleased[other]).sum() / fooled.sum())}
    result["psnr_db"] = float(-10 * torch.log10((attacked - frames).square().mean()))
    # For the picture: a frame on which the attack turned the attacked reward round and was noticed, where there is one.
    turned = noticed & (scores[attacked_kind]["before"] < scores[attacked_kind]["honest"])
    shown = int(turned.int().argmax())
    rewards = {kind: {name: float(value[shown]) for name, value in values.items()} for kind, values in scores.items()}
    result["_pictures"] = (frames[shown, 0], attacked[shown, 0], prompts[shown], rewards, bool(agrees[shown]))
    return result


def _shows(frame_CHW: torch.Tensor, scene: world.Scene) -> bool:
    """Whether the oracle reads colour, shape and background of a scene in a still frame."""
    clip = frame_CHW.permute(1, 2, 0).numpy()[None].repeat(4, axis=0)
    judged = oracle.judge(oracle.read(clip), scene)
    return min(judged[part] for part in ("colour", "shape", "background")) == 1.0


def picture(clean_CHW: torch.Tensor, attacked_CHW: torch.Tensor, prompt: str, rewards: dict, is_shown: bool, size_px: int = 240) -> Image.Image:
    """The frame, the attacked frame and ten times their difference, with what every judge says of the (wrong) caption."""
    from ..testlab.fonts import font
    from ..testlab.plot import BACKGROUND, BEST, MUTED, TEXT, WORST

    shown = [clean_CHW, attacked_CHW, ((attacked_CHW - clean_CHW) * 10 + 0.5).clamp(0, 1)]
    sheet = Image.new("RGB", (size_px * 3 + 80, size_px + 160), BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    draw.text((20, 14), f"caption (wrong): {prompt}", font=font(15), fill=TEXT)
    for index, (pixels, label) in enumerate(zip(shown, ("frame", "after gradient ascent on HPS", "difference x 10"), strict=True)):
        array = (pixels.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
        x = 20 + index * (size_px + 20)
        sheet.paste(Image.fromarray(array).resize((size_px, size_px), Image.Resampling.NEAREST), (x, 66))
        draw.text((x, 44), label, font=font(13), fill=MUTED)
    lines = [
        (f"{kind}: {value['before']:.3f} -> {value['after']:.3f} (right caption: {value['honest']:.3f})", value["after"] >= value["honest"])
        for kind, value in rewards.items()
    ]
    lines.append(("oracle: the frame " + ("shows" if is_shown else "does not show") + " what the caption says", is_shown))
    for index, (line, is_pleased) in enumerate(lines):
        draw.text((20, size_px + 76 + index * 24), line, font=font(15), fill=BEST if is_pleased else WORST)
    return sheet


def main(argv: list[str]) -> int:
    """Measure, print and write; the picture when asked."""
    parser = argparse.ArgumentParser(prog="lab.py bench adversarial", description=__doc__.split("\n")[0])
    parser.add_argument("--picture", metavar="FILE", help="write the picture of the help page")
    parser.add_argument("--count", type=int, default=24, help="frames (default: 24)")
    parser.add_argument("--out", type=Path, default=RESULT, help="JSON file")
    options = parser.parse_args(argv)
    results = []
    for kind in ("hpsv2.1", "mps"):
        measured = measure(WEIGHTS, options.count, attacked_kind=kind)
        shown = measured.pop("_pictures")
        results.append(measured)
        if kind == "hpsv2.1" and options.picture:
            picture(*shown).save(options.picture, optimize=True)
    document = {"benchmark": "adversarial", "models": "pocket", "hardware": f"CPU, torch {torch.__version__}", "attacks": results}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(document, indent=1))
    return 0

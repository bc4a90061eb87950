"""Attacks frames by gradient ascent on one pocket reward and asks the others: `lab.py bench adversarial [--picture FILE]`.

A frame whose reward rises although nothing that the prompt names has changed is an attack. Whether it is noticed: the attacked reward says "better", the
other reward model and the oracle (which no reward model sees) do not.
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
from . import quality, world
from .stages import hps, mps

WEIGHTS = Path(__file__).resolve().parent / "weights"
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
    """Rewards before and after the attack on still frames of held-out scenes, in units of their spread over the clean frames.

    Returns:
        Means by judge: `attacked` (rises), `other` (the reward that was not attacked), and share of frames on which the other does not follow.
    """
    rng = random.Random(211)
    scenes = quality.held_out_scenes(count, 212, two_share=0.0)
    frames = torch.from_numpy(np.stack([hps.frame_of(scene, rng) for scene in scenes])).permute(0, 3, 1, 2)[:, None].float()
    prompts = [world.caption(scene) for scene in scenes]
    files = {"hpsv2.1": hps.FILE_NAME, "mps": mps.FILE_NAME}
    models = {kind: load_reward_model(kind, weights / name) for kind, name in files.items()}
    attacked = attack(models[attacked_kind], frames, prompts, steps)
    result: dict = {"attacked": attacked_kind, "frames": count, "reach_of_255": REACH * 255, "steps": steps}
    rises = {}
    for kind, model in models.items():
        with torch.no_grad():
            before, after = (model.score(x, prompts).per_video for x in (frames, attacked))
        rises[kind] = (after - before) / before.std()
        result[kind] = {"before": float(before.mean()), "after": float(after.mean()), "rise_in_spreads": float(rises[kind].mean())}
    other = next(kind for kind in models if kind != attacked_kind)
    result["noticed"] = float((rises[other] < 0.5 * rises[attacked_kind]).float().mean())
    # PSNR of the change: how far the frame was moved for that rise.
    result["psnr_db"] = float(-10 * torch.log10((attacked - frames).square().mean()))
    result["_pictures"] = (frames[0, 0], attacked[0, 0], prompts[0], {kind: float(rises[kind][0]) for kind in models})
    return result


def picture(clean_CHW: torch.Tensor, attacked_CHW: torch.Tensor, prompt: str, rises: dict[str, float], size_px: int = 240) -> Image.Image:
    """The frame, the attacked frame and ten times their difference, side by side with what the judges say."""
    from ..testlab.fonts import font
    from ..testlab.plot import BACKGROUND, BEST, MUTED, TEXT, WORST

    shown = [clean_CHW, attacked_CHW, ((attacked_CHW - clean_CHW) * 10 + 0.5).clamp(0, 1)]
    sheet = Image.new("RGB", (size_px * 3 + 80, size_px + 130), BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    draw.text((20, 14), prompt, font=font(15), fill=TEXT)
    for index, (pixels, label) in enumerate(zip(shown, ("frame", "after gradient ascent on HPS", "difference x 10"), strict=True)):
        array = (pixels.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
        x = 20 + index * (size_px + 20)
        sheet.paste(Image.fromarray(array).resize((size_px, size_px), Image.Resampling.NEAREST), (x, 66))
        draw.text((x, 44), label, font=font(13), fill=MUTED)
    for index, (kind, rise) in enumerate(rises.items()):
        colour = BEST if rise > 0 else WORST
        draw.text((20, size_px + 76 + index * 22), f"{kind}: {rise:+.1f} spreads of clean frames", font=font(15), fill=colour)
    return sheet


def main(argv: list[str]) -> int:
    """Print the measurement as JSON, and write the picture when asked."""
    parser = argparse.ArgumentParser(prog="lab.py bench adversarial", description=__doc__.split("\n")[0])
    parser.add_argument("--picture", metavar="FILE", help="write the picture of the help page")
    parser.add_argument("--count", type=int, default=24, help="frames (default: 24)")
    options = parser.parse_args(argv)
    results = []
    for kind in ("hpsv2.1", "mps"):
        measured = measure(WEIGHTS, options.count, attacked_kind=kind)
        shown = measured.pop("_pictures")
        results.append(measured)
        if kind == "hpsv2.1" and options.picture:
            picture(*shown).save(options.picture, optimize=True)
    print(json.dumps(results, indent=2))
    return 0

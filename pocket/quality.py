"""How good the pocket models are: each function measures one of them on held-out scenes and returns plain numbers.

The trained models are read by the pack's own loaders, not by their trainers.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from ..host import pavrm as host_pavrm
from ..host.training_mode import training_mode
from ..reward_models.loader import load_reward_model
from . import oracle, world
from .generate import Generator, as_clips
from .stages import dit, hps, latents, mps, pavrm, text, vae

ORACLE_PARTS = ("colour", "shape", "motion", "direction", "background", "dynamic_degree", "flicker")


def held_out_scenes(count: int, seed: int, *, two_share: float = 0.3) -> list[world.Scene]:
    rng = random.Random(seed)
    return [world.sample_scene(rng, held_out=True, two_share=two_share) for _ in range(count)]


def judged(clips: np.ndarray, scenes: Sequence[world.Scene]) -> dict[str, np.ndarray]:
    """Oracle scores of every clip, [N] per part."""
    rows = [oracle.judge(oracle.read(clip), scene) for clip, scene in zip(clips, scenes, strict=True)]
    return {part: np.array([row[part] for row in rows]) for part in ORACLE_PARTS}


def oracle_accuracy(count: int = 300) -> dict[str, float]:
    """Right readings of rendered ground truth."""
    scenes = held_out_scenes(count, 101)
    scores = judged(np.stack([world.render(scene) for scene in scenes]), scenes)
    return {part: float(scores[part].mean()) for part in ("colour", "shape", "motion", "background")}


def vae_quality(weights: Path, count: int = 60) -> dict[str, float]:
    """PSNR of held-out clips after a round trip, and what the oracle still reads right."""
    scenes = held_out_scenes(count, 102)
    module = latents.load_vae(weights)
    squared, parts = [], []
    for start in range(0, count, 12):
        chosen = scenes[start : start + 12]
        clips = np.stack([world.render(scene) for scene in chosen])
        decoded = latents.decode(module, latents.encode(module, clips))
        squared.append(((clips - decoded) ** 2).mean((1, 2, 3, 4)))
        parts.append(judged(decoded, chosen))
    psnr = -10 * np.log10(np.concatenate(squared))
    right = np.concatenate([np.stack([part[name] for name in ("colour", "shape", "motion", "background")], 1) for part in parts])
    return {"psnr_db": float(psnr.mean()), "psnr_db_worst": float(psnr.min()), "oracle_right": float(right.mean())}


def preference_accuracy(weights: Path, kind: str, count: int = 240) -> dict[str, float]:
    """How often a reward model prefers the right caption to a wrong one, and a clean frame to a spoiled one."""
    rng = random.Random(103)
    scenes = held_out_scenes(count, 104)
    model = load_reward_model(kind, weights / {"hpsv2.1": hps.FILE_NAME, "mps": mps.FILE_NAME}[kind])
    frames = torch.from_numpy(np.stack([hps.frame_of(scene, rng) for scene in scenes])).permute(0, 3, 1, 2)
    spoiled = hps.spoil(frames, rng).clamp(0, 1)
    right = [world.caption(scene) for scene in scenes]
    wrong = [world.caption(hps.wrong_scene(scene, rng)) for scene in scenes]
    with torch.no_grad():
        scores = [model.score(images[:, None], texts).per_video for images, texts in ((frames, right), (frames, wrong), (spoiled, right))]
    return {"right_caption": float((scores[0] > scores[1]).float().mean()), "clean_frame": float((scores[0] > scores[2]).float().mean())}


@torch.no_grad()
def pavrm_accuracy(weights: Path, count: int = 320, models: Sequence[host_pavrm.Pavrm] = ()) -> dict[str, float] | list[dict[str, float]]:
    """Share of held-out latents whose motion is judged right, by noise level.

    Args:
        models: PAVRMs to measure on the same latents, a result each; none measures the pocket one as the pack loads it.
    """
    rng = random.Random(105)
    torch.manual_seed(105)
    scenes = [scene for scene in held_out_scenes(3 * count, 106) if any(thing.motion != "still" for thing in scene.things)][:count]
    module, encode_text = latents.load_vae(weights), text.Encoder(weights)
    measured = list(models) or [host_pavrm.load(weights / pavrm.FILE_NAME)]
    kinds = [("flicker", "frozen", "wrong_way")[index // 2 % 3] if index % 2 else "good" for index in range(count)]
    clips, texts = [], []
    for scene, kind in zip(scenes, kinds, strict=True):
        clip = world.render(scene)
        clips.append(latents.flickering(clip, rng) if kind == "flicker" else latents.frozen(clip, rng) if kind == "frozen" else clip)
        texts.append(world.caption(pavrm.wrong_way(scene, rng) if kind == "wrong_way" else scene))
    x0 = torch.cat([latents.encode(module, np.stack(clips[start : start + 20])) for start in range(0, count, 20)])
    label, context = torch.tensor([kind == "good" for kind in kinds]), encode_text(texts)
    results: list[dict[str, float]] = [{} for _ in measured]
    for sigma in (0.05, 0.2, 0.4, 0.6, 0.8, 0.9):
        noisy = (1 - sigma) * x0 + sigma * torch.randn_like(x0)
        for model, result in zip(measured, results, strict=True):
            with training_mode(), torch.no_grad():
                logit = model.score(noisy, torch.full((count,), round(sigma * host_pavrm.TIMESTEPS)), list(context)).logit
            result[f"sigma {sigma}"] = float(((logit > 0) == label).float().mean())
    return results if models else results[0]


def generator_quality(weights: Path, count: int = 128, seed: int = 107) -> dict[str, float]:
    """What the oracle reads in videos of the base generator for held-out prompts."""
    scenes = held_out_scenes(count, seed, two_share=0.0)
    generator = Generator(weights)
    clips = as_clips(generator.frames(generator.latents([world.caption(scene) for scene in scenes], range(count))))
    return {part: float(values.mean()) for part, values in judged(clips, scenes).items()}


def expert_loss(weights: Path, scratch: Path) -> dict[str, float]:
    """Flow-matching loss of both experts on both noise ranges: each must win on its own."""
    x0, scenes = latents.load(scratch, "held_out")
    encode_text = text.Encoder(weights)
    context = encode_text([world.caption(scene) for scene in scenes])
    result = {}
    for expert in ("high", "low"):
        module = dit.load_expert(weights, expert)
        for part in ("high", "low"):
            torch.manual_seed(108)
            sigma, noise = dit.sample_sigma(part, len(x0)), torch.randn_like(x0)
            level = sigma.view(-1, 1, 1, 1, 1)
            with torch.no_grad():
                velocity = module((1 - level) * x0 + level * noise, sigma * 1000, context)
            result[f"{expert} expert on {part} noise"] = float((velocity - (noise - x0)).square().mean())
    return result


def vocabulary_size(weights: Path) -> int:
    from safetensors import safe_open

    with safe_open(weights / text.FILE_NAME, "pt") as file:
        return file.get_slice("shared.weight").get_shape()[0]


FILES = {"vae": vae.FILE_NAME, "text_encoder": text.FILE_NAME, **dit.FILE_NAMES}

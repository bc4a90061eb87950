"""Options of `lab.py score`, `score-latent` and `pavrm-lora`, and how they are handed to the process that scores. Standard library only."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

KINDS = "hpsv2 | mps | pickscore | aesthetic | face | dynamic_degree | flicker | drift | mix"
_PATHS = (
    *("weights", "clip", "detector", "landmarks", "reference", "prompts", "results", "csv", "gradients", "baseline"),
    *("trunk", "query", "head", "generator", "input", "tensors", "out"),
)


def arguments_score(parser: argparse.ArgumentParser) -> None:
    """Add the options of `score`."""
    parser.add_argument("paths", nargs="+", metavar="PATH", help="pictures, videos, folders, or tensor files (.safetensors, .npy) of frames")
    parser.add_argument("--kind", required=True, help=KINDS)
    parser.add_argument("--weights", metavar="FILE", help="weight file of the reward model")
    parser.add_argument("--config", metavar="JSON", help="sizes of the CLIP (JSON file or ViT-H-14); not needed for full-size files. With --kind mix: the mix")
    prompt = parser.add_mutually_exclusive_group()
    prompt.add_argument("--prompt", metavar="TEXT", help="one prompt for all videos")
    prompt.add_argument("--prompts", metavar="FILE", help="a prompt per video: .txt in the order of the videos, or .csv / .json / .jsonl, also by file name")
    parser.add_argument("--resize", choices=["letterbox", "crop", "squash"], help="how frames become square (default: as the model's authors)")
    parser.add_argument("--antialias", choices=["on", "off"], help="smooth while shrinking (default: on)")
    parser.add_argument("--condition", metavar="NAME|TEXT", help="mps: overall (default), aesthetics, quality, semantic, a text, or aesthetics=0.3,quality=0.7")
    parser.add_argument("--threshold", type=float, metavar="X", help="mps: mask threshold, 0.01 (default) or 0.3")
    parser.add_argument("--normalise", choices=["sample", "batch"], help="mps: mask normalised per prompt (default) or over all prompts of this call")
    parser.add_argument("--scale", choices=["raw", "cosine"], help="mps, pickscore: exp(logit scale) x cosine (default), or the cosine, as the reward")
    parser.add_argument("--clip", metavar="FILE", help="aesthetic: OpenAI's CLIP ViT-L/14")
    parser.add_argument("--detector", metavar="FILE", help="face: RetinaFace mobilenet0.25_Final.pth")
    parser.add_argument("--landmarks", metavar="FILE", help="face: landmarks [F, 5, 2] of the frames (.safetensors) instead of a detector")
    parser.add_argument("--reference", metavar="PATH", help="face: picture, video or folder with the face (default: the video's own first face)")
    parser.add_argument("--missing", choices=["skip", "zero"], help="face: frames without a face are left out (default) or count as 0")
    parser.add_argument("--stability", action="store_true", help="also tell how much the reward falls on slightly changed frames: a sign that it was fooled")
    parser.add_argument("--dtype", choices=["fp32", "fp16", "bf16"], help="of the towers (default: fp32)")
    parser.add_argument("--as-video", action="store_true", help="the pictures of a folder are the frames of one video")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument("--csv", metavar="FILE", help="also write a table")
    parser.add_argument("--results", metavar="FILE", help="keep finished scores in this .jsonl, and take them from it (folders: kept in the cache by default)")
    parser.add_argument("--no-resume", action="store_true", help="score everything anew; nothing is taken from --results, and new scores still go there")
    parser.add_argument("--gradients", metavar="FILE", help="write d(video reward)/d(frames) per video to a .safetensors")
    parser.add_argument("--baseline", metavar="FILE", help="write mean and standard deviation over the videos, for a mix")


def arguments_score_latent(parser: argparse.ArgumentParser) -> None:
    """Add the options of `score-latent`."""
    parser.add_argument("input", metavar="IN.safetensors", help="tensors latent, text and timestep, or several cases as NAME.latent, NAME.text, ...")
    parser.add_argument("--trunk", metavar="PATH", required=True, help="checkpoint folder of HY-Video-PRFL, a Wan file, or our single PAVRM file")
    parser.add_argument("--query", metavar="FILE", help="query_attention_step_N.ckpt")
    parser.add_argument("--head", metavar="FILE", help="mlp_step_N.ckpt")
    parser.add_argument("--num-heads", type=int, metavar="N", help="heads of the query attention; its file does not tell (default: 8, as published)")
    parser.add_argument("--pooling", choices=["query", "mean", "max"], help="mean, max: with --head alone (default: query)")
    parser.add_argument("--generator", metavar="FILE", help="the generator whose first blocks a PAVRM in LoRA form stands on")
    parser.add_argument("--sigma", metavar="LIST", help="noise levels, such as 0.2,0.5,0.8: the latents are clean and get this much noise")
    parser.add_argument("--seed", type=int, default=0, help="of that noise (default: 0)")
    parser.add_argument("--layers", metavar="LIST", help="tapped blocks counted from 1 (default: what the file says, else the last one)")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], help="of the trunk (default: fp32)")
    parser.add_argument("--exact-pooling", action="store_true", help="keys and values for every token instead of the folded query (same numbers)")
    parser.add_argument("--tensors", metavar="FILE", help="write features, pooled vectors and d(logit)/d(latent) to a .safetensors")
    parser.add_argument("--json", action="store_true", help="print one JSON document")


def arguments_pavrm_lora(parser: argparse.ArgumentParser) -> None:
    """Add the options of `pavrm-lora`."""
    parser.add_argument("trunk", metavar="PAVRM", help="checkpoint folder, Wan file or single PAVRM file")
    parser.add_argument("--query", metavar="FILE", help="query_attention_step_N.ckpt")
    parser.add_argument("--head", metavar="FILE", help="mlp_step_N.ckpt")
    parser.add_argument("--generator", metavar="FILE", required=True, help="Wan file whose first blocks the LoRA stands on")
    parser.add_argument("--out", metavar="FILE", required=True, help="file to write (.safetensors)")
    parser.add_argument("--rank", type=int, default=64, help="of the matrices (default: 64); higher is larger and closer")
    parser.add_argument("--force", action="store_true", help="replace the file when it is there")


def job(options: argparse.Namespace, cache_root: Path) -> list[str]:
    """Arguments for `host.score_command`: the command's name and its options as JSON, with absolute paths."""
    values = {name: value for name, value in vars(options).items() if name not in ("comfyui", "verbose", "device")}
    for name in _PATHS:
        if values.get(name):
            values[name] = str(Path(values[name]).expanduser().absolute())
    config = values.get("config")
    if config and Path(config).expanduser().is_file():
        values["config"] = str(Path(config).expanduser().absolute())
    os.environ.setdefault("REWARD_LAB_SCORES", str(cache_root / "scores"))
    return [options.command, json.dumps(values)]

"""Options of `lab.py preprocess`, and how they are handed to the process that encodes. Standard library only."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

_PATHS = ("source", "out", "vae", "text_encoder", "prompts", "hy")


def arguments_preprocess(parser: argparse.ArgumentParser) -> None:
    """Add the options of `preprocess`."""
    parser.add_argument("source", metavar="FOLDER", help="folder of videos, folder of a TestLab sweep, or a JSON list of {video_path, short_caption, ...}")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="dataset folder; what is cached there is used")
    parser.add_argument("--vae", required=True, metavar="FILE", help="wan_2.1_vae.safetensors")
    parser.add_argument("--text-encoder", required=True, metavar="FILE", help="umT5 of the model")
    captions = parser.add_mutually_exclusive_group()
    captions.add_argument("--prompts", metavar="FILE", help="caption per video: .txt in the order of the videos, or .csv / .json / .jsonl, also by file name")
    captions.add_argument("--prompt", metavar="TEXT", help="one caption for all; default: <video>.txt beside each video")
    parser.add_argument("--fps", dest="frame_rate", type=float, metavar="N", help="frames per second (default: 16)")
    parser.add_argument("--frames", type=int, metavar="N", help="at most so many frames, 4n+1 (default: 81); shorter videos are cut to 4n+1")
    parser.add_argument("--short-side", dest="short_px", type=int, metavar="PX", help="short side (default: 480)")
    parser.add_argument("--long-side", dest="long_px", type=int, metavar="PX", help="most that the long side may be (default: 832)")
    parser.add_argument("--width", dest="width_px", type=int, metavar="PX", help="exact width, with --height; the rest is cut off around the centre")
    parser.add_argument("--height", dest="height_px", type=int, metavar="PX", help="exact height")
    parser.add_argument("--multiple", dest="multiple_px", type=int, metavar="PX", help="sides are multiples of this (default: 32)")
    parser.add_argument("--start", dest="start_s", type=float, metavar="S", help="seconds to leave out at the beginning")
    parser.add_argument("--dtype", choices=["bf16", "fp16", "fp32"], help="of the caches (default: bf16)")
    parser.add_argument("--hy", metavar="FOLDER", help="also write HY-Video-PRFL's .npy + meta layout there, for its text-to-video tasks")
    parser.add_argument("--hy-absolute", action="store_true", help="whole paths in it, so that HY-Video-PRFL's scripts run from their own folder")
    parser.add_argument("--json", action="store_true", help="print one JSON document")


def job(options: argparse.Namespace) -> list[str]:
    """Arguments for `host.preprocess_command`, with absolute paths."""
    values = {name: value for name, value in vars(options).items() if name not in ("comfyui", "verbose", "device", "command")}
    for name in _PATHS:
        if values.get(name):
            values[name] = str(Path(values[name]).expanduser().absolute())
    return [json.dumps(values)]

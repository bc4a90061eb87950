"""`lab.py preprocess` and the Video Dataset node: the encoders of the host behind `preprocess.make`. Entry of a process started by launch.py."""

from __future__ import annotations

import gc
import json
import logging
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..lora_train import recovery
from . import preprocess, prfl_layout
from .video_clips import ClipSettings

if TYPE_CHECKING:
    from .vae import WanDecoder

logger = logging.getLogger("reward_lab")


def main(argv: list[str]) -> int:
    """Run with the options as a JSON object; returns the exit status. Failures that are foreseen end with one sentence and status 1; with `json`, stdout
    then has `"verdict": "refused"` and the sentence as `reason`."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s", stream=sys.stderr)
    options = json.loads(argv[0])
    has_gpu = torch.cuda.is_available() and os.environ.get("REWARD_LAB_CPU") != "1"

    def show(done: int, total: int) -> None:
        print(f"{done}/{total}", file=sys.stderr, flush=True)

    try:
        summary = run(options, torch.device("cuda" if has_gpu else "cpu"), show)
    except (ValueError, OSError) as error:
        print(f"Error: {error}", file=sys.stderr)
        if options.get("json"):
            print(json.dumps({"verdict": "refused", "reason": str(error)}))
        return 1
    if options.get("json"):
        print(json.dumps({"folder": str(summary.folder), "videos": summary.videos, "encoded": summary.encoded, "skipped": summary.skipped}))
    else:
        print(summary.text())
    return 0


def run(options: Mapping[str, Any], device: torch.device, progress: Callable[[int, int], None]) -> preprocess.Summary:
    """Make a dataset.

    Args:
        options: `source`, `out`, `vae`, `text_encoder` (paths), `prompts`, `prompt`, `dtype`, `hy` (a folder), `hy_absolute` and the names of `ClipSettings`.
        device: where to encode.
        progress: see `preprocess.make`.

    Raises:
        ValueError: wrong settings, missing files, no usable video, or the disk is full.
    """
    try:
        return _run(options, device, progress)
    except OSError as error:
        if not recovery.is_disk_full(error):
            raise
        folders = [Path(folder) for folder in (options["out"], options.get("hy")) if folder]
        free = " and ".join(f"{folder} has {shutil.disk_usage(folder).free / 1e9:.3f} GB free" for folder in folders if folder.is_dir())
        raise ValueError(
            f"there is no room to write more ({error}): {free}. What is encoded is kept; make room or raise the quota and run the same again, it goes on there"
        ) from error


def _run(options: Mapping[str, Any], device: torch.device, progress: Callable[[int, int], None]) -> preprocess.Summary:
    clip = {entry.name: options[entry.name] for entry in fields(ClipSettings) if options.get(entry.name) is not None}
    settings = ClipSettings(**clip)
    sources = preprocess.find_sources(Path(options["source"]), prompts=options.get("prompts") or "", prompt=options.get("prompt") or "")
    folder = Path(options["out"])
    encoders = _Encoders(Path(options["text_encoder"]), Path(options["vae"]), device)
    made = preprocess.make(
        sources,
        folder,
        preprocess.Encoders(
            text=encoders.text, video=encoders.video_pieces, text_sha256=encoders.sha256("text", folder), vae_sha256=encoders.sha256("vae", folder)
        ),
        settings,
        dtype=options.get("dtype") or "bf16",
        progress=progress,
    )
    if options.get("hy"):
        made_list = prfl_layout.export(folder, Path(options["hy"]), encoders.video, is_absolute=bool(options.get("hy_absolute")))
        logger.warning("wrote HY-Video-PRFL's layout for its text-to-video tasks (zeros for CLIP vision embeddings, which image-to-video reads): %s", made_list)
    return made


class _Encoders:
    """Text encoder and VAE, each loaded when it is first needed; the text encoder is dropped when it has done its work."""

    def __init__(self, text_encoder: Path, vae: Path, device: torch.device) -> None:
        for path, what in ((text_encoder, "text encoder"), (vae, "VAE")):
            if not path.is_file():
                raise ValueError(f"the {what} {path} does not exist; check the path")
        self._paths = {"text": text_encoder, "vae": vae}
        self._device = device
        self._decoder = None

    def sha256(self, which: str, folder: Path) -> str:
        return preprocess.model_sha256(self._paths[which], folder)

    def text(self, prompts: Sequence[str]) -> list[torch.Tensor]:
        import comfy.model_management

        from .text import PromptEncoder, load_text_encoder

        encoder = PromptEncoder(load_text_encoder(self._paths["text"]))
        try:
            return encoder.encode(prompts)
        finally:
            del encoder
            comfy.model_management.unload_all_models()
            gc.collect()
            comfy.model_management.soft_empty_cache()

    def video(self, frames_BTCHW: torch.Tensor) -> torch.Tensor:
        return self._vae().encode(frames_BTCHW)

    def video_pieces(self, pieces: Iterable[torch.Tensor]) -> torch.Tensor:
        return self._vae().encode_pieces(pieces)

    def _vae(self) -> WanDecoder:
        from .vae import load_decoder

        if self._decoder is None:
            dtype = torch.bfloat16 if self._device.type == "cuda" else torch.float32
            self._decoder = load_decoder(self._paths["vae"], dtype=dtype, device=self._device)
        return self._decoder

"""Writes a dataset in HY-Video-PRFL's layout, which its training scripts read: fp32 .npy arrays, one meta a video, a list file.

Source: Tencent-Hunyuan/HY-Video-PRFL@59ab9d7:scripts/preprocess/gen_wanx_latent.py, diffusers_lite/datasets/image2video_dataset.py (Apache-2.0).
Its readers (CE, BT, PRFL) open the CLIP vision embedding of every video and drop it for text-to-video tasks, so each gets one of zeros: Wan2.2 has no such
encoder to make it with. Served by what is written: the t2v tasks. Not served: i2v tasks, whose network reads the embedding (make `<id>_img_clip.npy` with
their script; the condition latents are right), and flf2v tasks, which also want the last frame in both. `datasets.py` takes an embedding of zeros for none.
Their `motion_quality` is computed of physics and human quality, and a label that is missing is "bad" to them: a video that was labelled good in motion only
has both written as good, which that means; one without any label counts as bad there, so export what is labelled.
Their scripts look up paths, and null texts, from the folder they run in. With `is_absolute` they run from their repository's root.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..lora_train import annotations
from ..lora_train.labels import MOTION, PARTS, QUALITIES, read_value
from .datasets import read_index, read_tensor
from .video_clips import ClipSettings, read_clip

LIST = "all.list"
# Of CLIP ViT-H/14's last layer but one, as Wan2.1's image-to-video models read it: tokens and width.
CLIP_SHAPE = (1, 257, 1280)


def export(folder: Path, out: Path, encode: Callable[[torch.Tensor], torch.Tensor], *, is_absolute: bool = False) -> Path:
    """Write every video of a dataset folder.

    Args:
        folder: a dataset of our own form.
        out: folder to write `latents/`, `meta_v1/`, `first_frame/` and the list into.
        encode: frames [B, T, 3, H, W] in [0, 1] to latents in model space, for the first frame followed by zeros.
        is_absolute: write whole paths into list and metas; else they are relative to `out`, which can then be moved.

    Returns:
        The list file.

    Raises:
        ValueError: the dataset, a cache file or a source video cannot be read, or a label is none.
    """
    index = read_index(folder)
    labels = annotations.read(folder / annotations.FILE_NAME) if (folder / annotations.FILE_NAME).is_file() else {}
    for name in ("latents", "meta_v1", "first_frame"):
        (out / name).mkdir(parents=True, exist_ok=True)
    metas = []
    for video in index["videos"]:
        name = video["id"]
        arrays = _arrays(video, folder, encode, out / "first_frame" / f"{name}.jpg", index.get("settings", {}).get("start_s", 0.0))
        files = {ending: out / "latents" / f"{name}{ending}.npy" for ending in arrays}
        for ending, array in arrays.items():
            np.save(files[ending], array.float().numpy())
        told = {ending: str(path.absolute()) if is_absolute else path.relative_to(out).as_posix() for ending, path in files.items()}
        long = "_textlong" if "_textlong" in arrays else "_textshort"
        meta = {
            "source_id": name,
            "short_caption": video["caption"],
            "long_caption": video.get("long_caption") or video["caption"],
            "video_path": video["file"],
            "vae_latent_path": told[""],
            "f1_black_path": told["_f1_black"],
            "imgclip_path": told["_img_clip"],
            "latent_shape": list(arrays[""].shape),
            "textshort_path": told["_textshort"],
            "text_states_short_shape": list(arrays["_textshort"].shape),
            "textlong_path": told[long],
            "text_states_long_shape": list(arrays[long].shape),
            **_labels({**video.get("labels", {}), **labels.get(name, {})}, name),
        }
        path = out / "meta_v1" / f"{name}_meta_v1.json"
        path.write_text(json.dumps(meta, indent=1, ensure_ascii=False), encoding="utf-8")
        metas.append(str(path.absolute()) if is_absolute else path.relative_to(out).as_posix())
    (out / LIST).write_text("".join(f"{meta}\n" for meta in metas), encoding="utf-8")
    return out / LIST


def _arrays(
    video: Mapping[str, Any], folder: Path, encode: Callable[[torch.Tensor], torch.Tensor], picture: Path, start_s: float
) -> dict[str, torch.Tensor]:
    """Arrays of a video by the ending of their file names; its first frame, at `start_s` of the source as in the latent, becomes `picture`."""
    settings = ClipSettings(width_px=video["width_px"], height_px=video["height_px"], frames=1, frame_rate=video["frame_rate"], start_s=start_s)
    first_CHW = read_clip(Path(video["file"]), settings).frames_FCHW[0]
    Image.fromarray((first_CHW * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()).save(picture, quality=95)
    # Zeros of [-1, 1], in which upstream fills up, are grey here.
    frames_1TCHW = torch.full((1, video["frames"], *first_CHW.shape), 0.5)
    frames_1TCHW[0, 0] = first_CHW
    arrays = {
        "": read_tensor(folder / video["latent"], "latent")[None],
        "_f1_black": encode(frames_1TCHW).cpu(),
        "_img_clip": torch.zeros(CLIP_SHAPE),
        "_textshort": read_tensor(folder / video["text"], "short")[None],
    }
    if video.get("long_text"):
        arrays["_textlong"] = read_tensor(folder / video["long_text"], "long")[None]
    return arrays


def _labels(values: Mapping[str, Any], name: str) -> dict[str, str]:
    read = {quality: read_value(values.get(quality), f"{quality} of {name}") for quality in QUALITIES}
    if read[MOTION] == 1:
        # Their readers know the parts only.
        read |= {part: 1 for part in PARTS if read[part] is None}
    return {quality: "good" if label else "poor" for quality, label in read.items() if label is not None}

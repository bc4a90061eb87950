"""Writes a dataset in HY-Video-PRFL's layout, which its training scripts read: fp32 .npy arrays, one meta a video, a list file.

Source: Tencent-Hunyuan/HY-Video-PRFL@59ab9d7:scripts/preprocess/gen_wanx_latent.py (Apache-2.0). Differs in: no CLIP vision embedding is written (Wan2.2 has
none); its image-to-video readers ask for it, and need it from their own script.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

from ..lora_train import annotations
from .datasets import read_index
from .video_clips import ClipSettings, read_clip

LIST = "all.list"


def export(folder: Path, out: Path, encode: Callable[[torch.Tensor], torch.Tensor]) -> Path:
    """Write every video of a dataset folder.

    Args:
        folder: a dataset of our own form.
        out: folder to write `latents/`, `meta_v1/`, `first_frame/` and the list into; paths in them are relative to it.
        encode: frames [B, T, 3, H, W] in [0, 1] to latents in model space, for the first frame followed by zeros.

    Returns:
        The list file.

    Raises:
        ValueError: the dataset or a source video cannot be read.
    """
    index = read_index(folder)
    labels = annotations.read(folder / annotations.FILE_NAME) if (folder / annotations.FILE_NAME).is_file() else {}
    for name in ("latents", "meta_v1", "first_frame"):
        (out / name).mkdir(parents=True, exist_ok=True)
    metas = []
    for video in index["videos"]:
        name = video["id"]
        latent_CFHW = load_file(folder / video["latent"])["latent"].float()
        settings = ClipSettings(width_px=video["width_px"], height_px=video["height_px"], frames=1, frame_rate=video["frame_rate"])
        first_CHW = read_clip(Path(video["file"]), settings).frames_FCHW[0]
        picture = (first_CHW * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
        Image.fromarray(picture).save(out / "first_frame" / f"{name}.jpg", quality=95)
        # Zeros of [-1, 1], in which upstream fills up, are grey here.
        frames_1TCHW = torch.full((1, video["frames"], *first_CHW.shape), 0.5)
        frames_1TCHW[0, 0] = first_CHW
        arrays = {"": latent_CFHW[None], "_f1_black": encode(frames_1TCHW).float().cpu(), "_textshort": load_file(folder / video["text"])["text"][None]}
        if video.get("long_text"):
            arrays["_textlong"] = load_file(folder / video["long_text"])["text"][None]
        for ending, array in arrays.items():
            np.save(out / "latents" / f"{name}{ending}.npy", array.float().numpy())
        meta = {
            "source_id": name,
            "short_caption": video["caption"],
            "long_caption": video.get("long_caption") or video["caption"],
            "video_path": video["file"],
            "vae_latent_path": f"latents/{name}.npy",
            "f1_black_path": f"latents/{name}_f1_black.npy",
            "latent_shape": [1, *latent_CFHW.shape],
            "textshort_path": f"latents/{name}_textshort.npy",
            "text_states_short_shape": list(arrays["_textshort"].shape),
            "textlong_path": f"latents/{name}_text{'long' if '_textlong' in arrays else 'short'}.npy",
            "text_states_long_shape": list(arrays.get("_textlong", arrays["_textshort"]).shape),
            **{quality: value for quality, value in {**video.get("labels", {}), **labels.get(name, {})}.items() if value != "skip"},
        }
        path = out / "meta_v1" / f"{name}_meta_v1.json"
        path.write_text(json.dumps({key: "poor" if value == "bad" else value for key, value in meta.items()}, indent=1, ensure_ascii=False), encoding="utf-8")
        metas.append(path.relative_to(out).as_posix())
    (out / LIST).write_text("".join(f"{meta}\n" for meta in metas), encoding="utf-8")
    return out / LIST

"""Published weight files: where they are, how big, their hashes and licences. No torch.

Does: tell a known file by its size (a renamed file cannot pass for another model). Does not: download (host/downloads.py), read tensors.
Source of sizes and hashes: the model pages named in `url`, read in 2025 and 2026; a hash that is not published is empty, and is then not checked.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from .spec import ALIASES


@dataclasses.dataclass(frozen=True, kw_only=True)
class PublishedFile:
    """One published weight file.

    Attributes:
        name: file name in models/reward_models.
        kind: the reward model it belongs to.
        what: in words.
        url: https address of the file itself.
        size_bytes: exact; 0 where it is not known.
        sha256, md5: lower case; empty where not published.
        licence: of the weights, as far as stated.
    """

    name: str
    kind: str
    what: str
    url: str
    size_bytes: int
    sha256: str = ""
    md5: str = ""
    licence: str = ""


_HUB = "https://huggingface.co"


def _hps(name: str, kind: str, what: str, size_bytes: int, sha256: str, md5: str) -> PublishedFile:
    """A file of Hugging Face's xswu/HPSv2, at a fixed revision."""
    url = f"{_HUB}/xswu/HPSv2/resolve/697403c/{name}"
    return PublishedFile(name=name, kind=kind, what=what, url=url, size_bytes=size_bytes, sha256=sha256, md5=md5, licence="apache-2.0 (model card)")


FILES: tuple[PublishedFile, ...] = (
    _hps(
        "HPS_v2.1_compressed.pt",
        "hpsv2.1",
        "HPS v2.1",
        1_972_490_005,
        "c57a38fb4a2f7e7c15bf00da2ea377cdf165448b4dd1052a484c215a998c9837",
        "4067542e34ba2553a738c5ac6c1d75c0",
    ),
    _hps(
        "HPS_v2_compressed.pt",
        "hpsv2",
        "HPS v2.0, whose scores are not comparable with those of v2.1",
        1_972_484_501,
        "07cb0d20626232204ca3a6ec53ff5984e7e53212a8a7b0e0ec2bac1bdaf125a1",
        "fd9180de357abf01fdb4eaad64631db4",
    ),
    PublishedFile(
        name="MPS_overall.pth",
        kind="mps",
        what="MPS, overall condition (plain state dict from VideoX-Fun)",
        url="https://pai-aigc-photog.oss-cn-hangzhou.aliyuncs.com/easyanimate/Third_Party/MPS_overall.pth",
        size_bytes=0,
        md5="1491cbbbd20565747fe07e7572e2ac56",
        licence="MIT (code); none stated for the weights",
    ),
    PublishedFile(
        name="PickScore_v1.safetensors",
        kind="pickscore",
        what="PickScore v1",
        url=f"{_HUB}/yuvalkirstain/PickScore_v1/resolve/main/model.safetensors",
        size_bytes=0,
        licence="none stated",
    ),
    PublishedFile(
        name="sac+logos+ava1-l14-linearMSE.pth",
        kind="aesthetic",
        what="LAION aesthetic predictor v2 (the head; it also needs OpenAI's CLIP ViT-L/14)",
        url="https://github.com/christophschuhmann/improved-aesthetic-predictor/raw/main/sac%2Blogos%2Bava1-l14-linearMSE.pth",
        size_bytes=0,
        md5="b1047fd767a00134b8fd6529bf19521a",
        licence="apache-2.0 (unverified)",
    ),
    PublishedFile(
        name="clip-vit-large-patch14.safetensors",
        kind="clip",
        what="OpenAI CLIP ViT-L/14 in Hugging Face's layout, for the aesthetic predictor",
        url=f"{_HUB}/openai/clip-vit-large-patch14/resolve/main/model.safetensors",
        size_bytes=0,
        licence="MIT (code); see the model card",
    ),
)


def known_file(path: str | Path) -> PublishedFile | None:
    """The published file that has exactly this size, whatever this one is called; None when there is none."""
    path = Path(path)
    size_bytes = path.stat().st_size if path.is_file() else 0
    # A size that is not known tells nothing, of an empty file least of all.
    return next((entry for entry in FILES if entry.size_bytes and entry.size_bytes == size_bytes), None)


def file_warning(kind: str, path: str | Path) -> str:
    """What to tell of a weight file that its kind's name does not tell; empty where there is nothing.

    Raises:
        ValueError: it has the size of a published file of another kind.
    """
    kind, known = ALIASES.get(kind, kind), known_file(path)
    if known is None or known.kind == kind:
        return ""
    known_kind = ALIASES.get(known.kind, known.kind)
    if known_kind != kind:
        raise ValueError(f"{path} has the size of the published {known.what}; load it with kind {known_kind}, or choose the file of {kind}.")
    return f"{path} has the size of the published {known.what}; it is used all the same."


def of_kind(kind: str) -> list[PublishedFile]:
    """Published files of a kind."""
    return [entry for entry in FILES if entry.kind == kind]

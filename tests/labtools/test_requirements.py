"""Requirement lines and versions."""

from __future__ import annotations

from pathlib import Path

import pytest

from reward_lab.labtools import requirements


@pytest.mark.parametrize(
    ("specifier", "version", "expected"),
    [
        ("", "1.0", True),
        ("==2.11.0", "2.11.0+cu130", True),
        ("==2.11.0", "2.11.1", False),
        ("==2.11", "2.11.0", True),
        (">=4.50.3", "5.0", True),
        (">=16.0.0", "9.1", False),
        ("~=2.0", "2.14.3", True),
        ("~=2.0", "3.0", False),
        ("~=2.4.1", "2.5.0", False),
        (">=3.3.0,<4", "3.3.0", True),
        (">=3.3.0,<4", "4.0", False),
        ("!=1.5", "1.5", False),
        ("==1.*", "1.9", True),
        ("===1.0", "1.0", False),
    ],
)
def test_is_met(specifier: str, version: str, expected: bool) -> None:
    assert requirements.is_met(specifier, version) is expected


def test_split_normalises_names() -> None:
    assert requirements.split("Open_CLIP.torch[extra] >=3.3.0,<4 ; python_version > '3'") == ("open-clip-torch", ">=3.3.0,<4")
    with pytest.raises(ValueError, match="not a requirement"):
        requirements.split("-r other.txt")


def test_unmet_says_what_is_there() -> None:
    assert requirements.unmet(["numpy>=2", "einops", "av==1"], {"numpy": "1.26", "av": "1.0"}) == ["numpy>=2 (installed: 1.26)", "einops (not installed)"]


def test_read_and_without_torch(tmp_path: Path) -> None:
    path = tmp_path / "requirements.txt"
    path.write_text("# head\ntorch\n\ntorchsde  # why\n--extra-index-url x\ntorchvision>=0.1\n", encoding="utf-8")
    assert requirements.without_torch(requirements.read(path)) == ["torchsde"]

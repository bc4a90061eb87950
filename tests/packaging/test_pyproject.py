"""The package's description, as the ComfyUI registry and ComfyUI itself read it."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

if sys.version_info < (3, 11):
    pytest.skip("tomllib comes with Python 3.11", allow_module_level=True)
import tomllib


@pytest.fixture(scope="module")
def project(repo: Path) -> dict:
    """The parsed pyproject.toml."""
    return tomllib.loads((repo / "pyproject.toml").read_text(encoding="utf-8"))


def lines(path: Path) -> set[str]:
    found = (line.split("#")[0].strip() for line in path.read_text(encoding="utf-8").splitlines())
    return {line for line in found if line}


def test_requirement_files_and_pyproject_agree(project: dict, repo: Path) -> None:
    assert set(project["project"]["dependencies"]) == lines(repo / "requirements.txt")
    assert set(project["project"]["optional-dependencies"]["dev"]) == lines(repo / "requirements-dev.txt")


def test_the_registrys_rules(project: dict) -> None:
    name, comfy = project["project"]["name"], project["tool"]["comfy"]
    assert "comfyui" not in name.lower()
    assert re.fullmatch(r"[a-z0-9][a-z0-9-]*", name)
    assert re.fullmatch(r"\d+\.\d+\.\d+", project["project"]["version"])
    assert comfy["PublisherId"] and comfy["DisplayName"]
    # Under another name than the folder's, the front-end would not find the node help.
    assert "web" not in comfy


def test_comfyui_reads_it(comfyui: Path, repo: Path) -> None:
    from comfy_config import config_parser

    found = config_parser.extract_node_configuration(str(repo))
    assert found.project.name == "reward-lab"
    assert found.tool_comfy.display_name == "Reward Lab"


def test_version_is_in_the_changelog(project: dict, repo: Path) -> None:
    assert f"## [{project['project']['version']}]" in (repo / "CHANGELOG.md").read_text(encoding="utf-8")


def test_what_the_registry_must_not_get_is_left_out(repo: Path) -> None:
    # A published node may not install packages at run time; lab.py's set-up does, so it stays in the repository.
    left_out = lines(repo / ".comfyignore")
    assert {"lab.py", "labtools/environment.py", "labtools/host.py", "tests/", ".lab/"} <= left_out
    # The training process needs this one.
    assert not {"labtools/", "labtools/alias.py"} & left_out
    assert "alias.py" in (repo / "host" / "worker.py").read_text(encoding="utf-8")


def test_examples_go_where_their_models_go(repo: Path) -> None:
    """The archive has no pocket models, so it has none of the examples that need them, and all others."""
    left_out = lines(repo / ".comfyignore")
    assert "pocket/" in left_out
    examples = sorted((repo / "example_workflows").glob("*.json"))
    assert len(examples) >= 6
    for example in examples:
        needs_pocket = "pocket_" in example.read_text(encoding="utf-8")
        for file in (example, example.with_suffix(".jpg")):
            assert (f"example_workflows/{file.name}" in left_out) == needs_pocket, file.name


def test_nothing_generated_is_committed(repo: Path) -> None:
    ignored = lines(repo / ".gitignore")
    assert {".lab/", "demo_out/", "__pycache__/"} <= ignored


def test_the_licence_is_the_gpl(repo: Path) -> None:
    text = (repo / "LICENSE").read_text(encoding="utf-8")
    assert "GNU GENERAL PUBLIC LICENSE" in text and "Version 3, 29 June 2007" in text

"""Checks on the page's files that need no browser: who imports the host, what mirrors Python, help pages and English strings."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest

from reward_lab.lora_train.events import EVENTS
from reward_lab.tests.browser.locale_strings import doc_tables, fill_doc, node_strings

IMPORT = re.compile(r"""(?:\bfrom|\bimport)\s*\(?\s*["']([^"']+)["']""")


@pytest.fixture(scope="module")
def modules(repo: Path) -> dict[str, str]:
    return {path.relative_to(repo / "web").as_posix(): path.read_text(encoding="utf-8") for path in sorted((repo / "web").rglob("*.js"))}


@pytest.fixture(scope="module")
def node_ids(repo: Path) -> list[str]:
    text = "\n".join(path.read_text(encoding="utf-8") for path in sorted((repo / "nodes").glob("*.py")))
    return sorted(re.findall(r'node_id="(RewardLab\w+)"', text))


def test_only_host_js_imports_the_front_end(modules: dict[str, str]) -> None:
    for name, text in modules.items():
        outside = [target for target in IMPORT.findall(text) if not re.fullmatch(r"\./[a-z_]+\.js", target)]
        expected = ["../../scripts/api.js", "../../scripts/app.js"] if name == "host.js" else []
        assert sorted(outside) == expected, name


def test_imports_exist(modules: dict[str, str]) -> None:
    for name, text in modules.items():
        for target in IMPORT.findall(text):
            assert not target.startswith("./") or target.removeprefix("./") in modules, f"{name} imports {target}"


def test_modules_are_checked_small_and_never_write_markup(modules: dict[str, str]) -> None:
    for name, text in modules.items():
        assert text.startswith("// @ts-check\n"), name
        assert text.count("\n") <= 400, name
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", text), name


def test_only_the_extension_acts_on_import(modules: dict[str, str]) -> None:
    statement = re.compile(r"^(?!import|export|const|let|function|async function|class|//|/\*|\s|\*|\}|\)|\]|$)", re.MULTILINE)
    for name, text in modules.items():
        if name != "extension.js":
            assert not statement.findall(text), name


def test_events_mirror_python(modules: dict[str, str]) -> None:
    block = re.search(r"EVENT_FIELDS = Object\.freeze\((\{.*?\})\);", modules["events.js"], re.DOTALL)
    assert block
    text = re.sub(r"//.*", "", block[1])
    text = re.sub(r",(\s*[\]}])", r"\1", re.sub(r"(\w+):", r'"\1":', text))
    assert json.loads(text) == {name: [field.name for field in dataclasses.fields(kind)] for name, kind in EVENTS.items()}


def test_the_event_name_is_the_one_the_server_sends(repo: Path, modules: dict[str, str]) -> None:
    sent = re.search(r'^RUN_EVENT = "([^"]+)"', (repo / "host" / "events.py").read_text(encoding="utf-8"), re.MULTILINE)
    assert sent
    assert f'RUN_EVENT = "{sent[1]}"' in modules["events.js"]


def test_every_node_has_a_help_page_and_english_strings(repo: Path, node_ids: list[str]) -> None:
    strings = json.loads((repo / "locales" / "en" / "nodeDefs.json").read_text(encoding="utf-8"))
    assert len(node_ids) >= 10
    assert sorted(strings) == node_ids
    for node_id in node_ids:
        page = (repo / "web" / "docs" / f"{node_id}.md").read_text(encoding="utf-8")
        assert page.startswith(f"# {strings[node_id]['display_name']}\n"), node_id
        assert "## Limits" in page, node_id
        for name, entry in strings[node_id]["inputs"].items():
            assert entry["tooltip"], f"{node_id}.{name} has no tooltip"
            assert f"`{name}`" in page, f"{node_id}.md does not name {name}"
    assert sorted(path.stem for path in (repo / "web" / "docs").glob("*.md")) == node_ids


@pytest.mark.host
def test_strings_and_tables_are_those_of_the_nodes(repo: Path, server) -> None:
    """Stale? `python tests/browser/locale_strings.py URL` against a running server rewrites both."""
    nodes = {name: node for name, node in server.client().get("/object_info", limit_s=120).items() if name.startswith("RewardLab")}
    strings = json.loads((repo / "locales" / "en" / "nodeDefs.json").read_text(encoding="utf-8"))
    assert strings == {name: node_strings(node) for name, node in nodes.items()}
    for name, node in nodes.items():
        page = (repo / "web" / "docs" / f"{name}.md").read_text(encoding="utf-8")
        # File choices depend on the machine; their defaults are not compared.
        assert re.sub(r"`[^`]*\.(safetensors|pt|pth)`", "", page) == re.sub(r"`[^`]*\.(safetensors|pt|pth)`", "", fill_doc(page, doc_tables(node))), name

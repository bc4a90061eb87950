"""English strings and help-page tables from the node schemas, so that node, locale and help page never disagree.

`python tests/browser/locale_strings.py URL` asks a running server for its nodes, rewrites `locales/en/nodeDefs.json` and the tables between the
`<!-- inputs -->` / `<!-- outputs -->` marks of `web/docs/*.md`. `test_js.py` checks that both are up to date.
"""

from __future__ import annotations

import json
import sys
import urllib.request
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[2]
LOCALE = REPO / "locales" / "en" / "nodeDefs.json"
DOCS = REPO / "web" / "docs"


def fetch_nodes(url: str) -> dict[str, dict[str, Any]]:
    """Return the pack's entries of the server's /object_info, by node id."""
    with urllib.request.urlopen(f"{url}/object_info", timeout=60) as answer:
        nodes = json.load(answer)
    return {name: node for name, node in sorted(nodes.items()) if name.startswith("RewardLab")}


def _inputs(node: dict[str, Any]) -> list[tuple[str, Any, dict[str, Any], bool]]:
    rows = []
    for part in ("required", "optional"):
        for name, spec in node["input"].get(part, {}).items():
            rows.append((name, spec[0], spec[1] if len(spec) > 1 else {}, part == "optional"))
    return rows


def node_strings(node: dict[str, Any]) -> dict[str, Any]:
    """Return the locale entry of one node."""
    tooltips = node.get("output_tooltips") or [None] * len(node["output"])
    return {
        "display_name": node["display_name"],
        "description": node["description"],
        "inputs": {name: {"name": name, "tooltip": options.get("tooltip", "")} for name, _, options, _ in _inputs(node)},
        "outputs": {str(i): {"name": name, "tooltip": tip or ""} for i, (name, tip) in enumerate(zip(node["output_name"], tooltips, strict=True))},
    }


def _kind(kind: Any, options: dict[str, Any]) -> str:
    if kind == "COMBO":
        choices = [str(choice) for choice in options.get("options", [])]
        is_short = 0 < len(choices) <= 6 and not any(choice.endswith((".safetensors", ".pt", ".pth")) for choice in choices)
        return " / ".join(choices) if is_short else "choice"
    return str(kind)


def _range(options: dict[str, Any]) -> str:
    default = options.get("default")
    if default is None or default == "":
        return ""
    text = json.dumps(default) if isinstance(default, bool) else str(default)
    return f"`{text}`"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def doc_tables(node: dict[str, Any]) -> dict[str, str]:
    """Return the Markdown tables of a node's inputs and outputs, by mark."""
    inputs = ["| input | type | default | |", "|---|---|---|---|"]
    for name, kind, options, is_optional in _inputs(node):
        optional = " (optional)" if is_optional else ""
        inputs.append(f"| `{name}`{optional} | {_cell(_kind(kind, options))} | {_cell(_range(options))} | {_cell(options.get('tooltip', ''))} |")
    outputs = ["| output | type | |", "|---|---|---|"]
    for name, kind, tip in zip(node["output_name"], node["output"], node.get("output_tooltips") or [""] * len(node["output"]), strict=True):
        outputs.append(f"| `{name}` | {_cell(str(kind))} | {_cell(tip or '')} |")
    return {"inputs": "\n".join(inputs), "outputs": "\n".join(outputs)}


def fill_doc(text: str, tables: dict[str, str]) -> str:
    """Return a help page with the tables between its marks replaced.

    Raises:
        ValueError: a mark is missing.
    """
    for mark, table in tables.items():
        start, end = f"<!-- {mark} -->", f"<!-- end of {mark} -->"
        if start not in text or end not in text:
            raise ValueError(f"the page lacks {start} ... {end}")
        head, rest = text.split(start, 1)
        text = f"{head}{start}\n{table}\n{end}{rest.split(end, 1)[1]}"
    return text


def main() -> None:
    """Rewrite locale and tables from the server at the URL given on the command line."""
    nodes = fetch_nodes(sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8188")
    LOCALE.write_text(json.dumps({name: node_strings(node) for name, node in nodes.items()}, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    for name, node in nodes.items():
        page = DOCS / f"{name}.md"
        page.write_text(fill_doc(page.read_text(encoding="utf-8"), doc_tables(node)), encoding="utf-8")
    print(f"wrote {LOCALE.relative_to(REPO)} and the tables of {len(nodes)} help pages")


if __name__ == "__main__":
    main()

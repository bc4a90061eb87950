"""`lab.py bench` without a name: one table of all committed results, `benchmarks/results/*.json`: what, measured, goal met or missed, where and when.

A goal that only a card can settle and that no result file settles is marked *predicted*, with the plan's figure. A file without goals is named with its date.
"""

from __future__ import annotations

import argparse
import json
import textwrap
from pathlib import Path
from typing import Any

from .gpu import goals

RESULTS = Path(__file__).parent / "results"
_WORDS_WIDTH, _MEASURED_WIDTH = 74, 52
_VERDICTS = {True: "met", False: "MISSED", None: "not judged"}


def rows(folder: Path) -> list[dict[str, str]]:
    """The table's lines: benchmark, goal, measured, verdict, where."""
    found, settled = [], set()
    for path in sorted(folder.glob("*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        if result.get("is_rehearsal"):
            continue
        # Several of both, where a result was made in pieces.
        hardware = result.get("hardware", "hardware not told")
        dates = result.get("dates", [result.get("date", "date not told")])
        where = ", ".join([*([hardware] if isinstance(hardware, str) else hardware), *dates])
        name = path.stem
        for one in result.get("goals", []):
            settled.add(one.get("key"))
            found.append({"name": name, "goal": one["goal"], "measured": one["measured"], "verdict": _VERDICTS[one["met"]], "where": where})
        for missing, error in result.get("failed", {}).items():
            found.append({"name": name, "goal": missing, "measured": error, "verdict": "failed", "where": where})
        if not result.get("goals"):
            found.append({"name": name, "goal": "(figures without a goal)", "measured": "see the file", "verdict": "", "where": where})
    predicted = goals.predictions()
    for key, words in goals.WORDS.items():
        if key not in settled:
            verdict = "predicted" if key in predicted else "not measured"
            found.append({"name": "gpu", "goal": words, "measured": predicted.get(key, ""), "verdict": verdict, "where": "no card measured"})
    return found


def text(lines: list[dict[str, str]]) -> str:
    """The table for a terminal, grouped by file; long cells go on below."""
    out, last = [], None
    for row in lines:
        if (row["name"], row["where"]) != last:
            last = (row["name"], row["where"])
            out += ["", f"{row['name']}  ({row['where']})"]
        words, measured = textwrap.wrap(row["goal"], _WORDS_WIDTH) or [""], textwrap.wrap(row["measured"], _MEASURED_WIDTH) or [""]
        for index in range(max(len(words), len(measured))):
            left, middle = (cells[index] if index < len(cells) else "" for cells in (words, measured))
            out.append(f"  {left:<{_WORDS_WIDTH}}  {middle:<{_MEASURED_WIDTH}}  {row['verdict'] if index == 0 else ''}".rstrip())
    return "\n".join(out[1:])


def main(argv: list[str]) -> int:
    """Print it."""
    parser = argparse.ArgumentParser(prog="lab.py bench", description=__doc__.split("\n")[0])
    parser.add_argument("--json", action="store_true", help="the lines as JSON")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of result files (default: benchmarks/results)")
    options = parser.parse_args(argv)
    lines: Any = rows(options.results)
    print(json.dumps(lines, indent=1) if options.json else text(lines))
    return 0

"""The demo's report: one self-contained page with the table, the reward curve and the grid."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape
from pathlib import Path

from . import table as comparison

_STYLE = """
body{font:16px/1.5 system-ui,sans-serif;background:#16181d;color:#e8eaf0;max-width:1080px;margin:2rem auto;padding:0 1rem}
h1{font-size:1.6rem}h2{font-size:1.15rem;margin-top:2rem}p,li{color:#b9c0cd}table{border-collapse:collapse;width:100%}
table{font-variant-numeric:tabular-nums}
th,td{padding:.45rem .7rem;border-bottom:1px solid #2b2f38;text-align:right;white-space:nowrap}
th:first-child{text-align:left}thead th{color:#9aa2b1;font-weight:500}
tbody tr:last-child{background:#1f2a22}img,video{max-width:100%;border-radius:8px}.verdict{font-size:1.1rem;color:#7bd88f}
"""


def verdict(rows: Sequence[comparison.Row]) -> str:
    """What the last row did to the reward and to the motion, in a sentence with its numbers."""
    base, trained = rows[0], rows[-1]
    gain, error = trained.gain("reward", base)
    motion, motion_error = trained.gain("motion", base)
    colour, colour_error = trained.gain("colour", base)
    return (
        f"Against the base the trained LoRA changes the held-out HPS reward by {gain:+.4f} ({gain / max(error, 1e-12):.1f} standard errors), the oracle's "
        f"colour score by {100 * colour:+.1f} ± {100 * colour_error:.1f} points and its motion score by {100 * motion:+.1f} ± {100 * motion_error:.1f} points."
    )


def _inline(path: Path, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"


def write_report(out: Path, run: dict, rows: Sequence[comparison.Row], seconds: dict[str, float]) -> None:
    """Write `report.html` beside the pictures that are in `out` already."""
    timing = "".join(f"<li>{escape(name)}: {value:.0f} s</li>" for name, value in seconds.items())
    grid, poster = _inline(out / "grid.mp4", "video/mp4"), _inline(out / "grid.png", "image/png")
    page = f"""<!doctype html><html lang="en"><meta charset="utf-8"><title>Reward Lab demo</title><style>{_STYLE}</style>
<h1>Reward Lab demo</h1><p class="verdict">{escape(verdict(rows))}</p>
<h2>Held-out comparison</h2>{comparison.as_html(rows)}
<p>{rows[0].pairs} held-out prompt/seed pairs, the same in every row; ± is half of the 95 % interval, of gains that of the paired difference. The reward is
what the LoRA was trained on; the other columns come from the oracle, which reads pixels and is seen by no reward model.</p>
<h2>Reward during training</h2><img src="{_inline(out / "reward.png", "image/png")}" alt="reward curve">
<h2>TestLab: strengths side by side</h2><video src="{grid}" poster="{poster}" autoplay loop muted controls></video>
<h2>What ran</h2><ul>{timing}</ul><p>Training run: {escape(run["id"])}, {run["steps"]} updates. Files: {escape(", ".join(run.get("files") or []))}</p></html>"""
    (out / "report.html").write_text(page, encoding="utf-8")

from __future__ import annotations
PRESETS = ("reward-lab", "videox-fun")

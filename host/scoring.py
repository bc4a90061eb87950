from __future__ import annotations
REWARD_KINDS = ("hpsv2.1", "mps")
RESIZE_MODES = ("default", "letterbox", "crop", "squash")

"""What `lab.py` stands on: finding ComfyUI, building an environment, booting the server. Standard library only.

Nothing in the node pack imports this folder; `lab.py`, the tests and `pocket/` do.
"""

from __future__ import annotations

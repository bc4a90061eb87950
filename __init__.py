"""Reward Lab: a ComfyUI node pack that loads, scores, compares and trains reward LoRAs for Wan2.2.

Importing this file only defines names. Folders and routes are registered in `on_load`, when the host asks for the extension.
There is no NODE_CLASS_MAPPINGS on purpose: exporting it would make the host ignore the V3 entry point.
"""

from __future__ import annotations

WEB_DIRECTORY = "./web"


async def comfy_entrypoint():
    """Return the extension object that the host loads nodes from."""
    from .nodes import extension

    return extension()

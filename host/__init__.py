"""The only part that imports ComfyUI. Everything the pack needs from the host goes through here."""

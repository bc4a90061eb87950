"""One readable font in any size, and text fitted into a width. Uses the font that pillow carries, so no file is needed."""

from __future__ import annotations

from functools import lru_cache

from PIL import ImageFont


@lru_cache(maxsize=32)
def font(size_px: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Return pillow's own font in a size.

    Args:
        size_px: Height in pixels.
    """
    return ImageFont.load_default(max(8, size_px))


def text_width(text: str, size_px: int) -> int:
    """Return the width of a line of text in pixels."""
    return int(font(size_px).getlength(text)) + 1


def shorten(text: str, size_px: int, width_px: int) -> str:
    """Cut the middle out of a line of text until it fits; both ends of a file name tell something.

    Args:
        text: One line.
        size_px: Font size.
        width_px: Room.
    """
    text = " ".join(text.split())
    if text_width(text, size_px) <= width_px:
        return text
    for kept in range(len(text) - 1, 1, -1):
        head = (kept + 1) // 2
        candidate = f"{text[:head]}…{text[len(text) - (kept - head) :]}"
        if text_width(candidate, size_px) <= width_px:
            return candidate
    return text[:1]


def wrap(text: str, size_px: int, width_px: int, max_lines: int) -> list[str]:
    """Break a line of text into lines that fit; the last one is shortened when there is not enough room.

    Args:
        text: Words separated by blanks.
        size_px: Font size.
        width_px: Room for each line.
        max_lines: At most so many lines.
    """
    lines: list[str] = []
    words = text.split()
    while words:
        if len(lines) == max_lines - 1:
            lines.append(shorten(" ".join(words), size_px, width_px))
            break
        line = words.pop(0)
        while words and text_width(f"{line} {words[0]}", size_px) <= width_px:
            line += " " + words.pop(0)
        lines.append(shorten(line, size_px, width_px))
    return lines

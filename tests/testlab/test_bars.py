"""Bars against a limit: what is over it is red, everything has its place, any number of rows is drawn."""

from __future__ import annotations

from reward_lab.testlab.bars import Bars, bar_chart
from reward_lab.testlab.plot import BACKGROUND, COLOURS, WORST


def chart(rows, limit=10.0, notes=()):
    group = Bars(title="On the card", unit="GB", rows=rows, limit=limit, limit_label=f"{limit} GB")
    return bar_chart([group, group], title="A run", verdict="Fits: everything", is_good=True, notes=notes)


def colours(picture):
    return {colour for _, colour in picture.getcolors(1 << 20)}


def rgb(code):
    return tuple(int(code[index : index + 2], 16) for index in (1, 3, 5))


def test_bars_over_the_limit_are_red():
    within, over = chart((("rollout", 3.0), ("backward", 9.9))), chart((("rollout", 3.0), ("backward", 10.1)))
    assert rgb(COLOURS[0]) in colours(within) and rgb(WORST) not in colours(within)
    assert rgb(COLOURS[0]) in colours(over) and rgb(WORST) in colours(over)
    assert rgb(BACKGROUND) == over.getpixel((2, 2)) and over.width == 768


def test_length_follows_the_value():
    picture = chart((("small", 2.0), ("large", 8.0)))
    blue = rgb(COLOURS[0])
    lengths = [sum(picture.getpixel((x, y)) == blue for x in range(picture.width)) for y in range(picture.height)]
    small, large = min(length for length in lengths if length > 20), max(lengths)
    assert 3.6 <= large / small <= 4.4


def test_height_follows_rows_and_notes():
    few, many = chart((("a", 1.0),)), chart(tuple((f"row {index}", float(index)) for index in range(9)))
    assert many.height > few.height + 2 * 8 * 20
    assert chart((("a", 1.0),), notes=["word " * 200]).height > few.height
    assert chart((("nothing", 0.0),), limit=0.0).height == few.height

"""Labels of videos for PAVRM: reading them from meta files and annotations, per quality. No torch, no files.

Values: 1, 1.0, true, "good" / 0, 0.0, false, "bad", "poor" / null, "skip" or nothing at all, which is no label. `motion_quality` is good when physics and human
quality both are, unless it is given itself. Source of names and rule: Tencent-Hunyuan/HY-Video-PRFL@59ab9d7 (Apache-2.0).
Differs in: a label that is not there is not taken for "bad" unless that is asked for (`missing="bad"`, as upstream does without a word).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

PARTS = ("physics_quality", "human_quality")
MOTION = "motion_quality"
QUALITIES = (*PARTS, "text_alignment", "blur_quality", MOTION)
MISSING = ("skip", "bad")
MIXED = ("bad", "skip")
# "1.0": pandas and numpy make floats of labels as soon as one of a column is missing.
_GOOD, _BAD, _NONE = ("good", "1", "1.0", "true"), ("bad", "poor", "0", "0.0", "false"), ("", "skip", "null", "none")


def read_value(value: Any, where: str) -> int | None:
    """One label: 1 good, 0 bad, None no label.

    Raises:
        ValueError: anything else; `where` names the place.
    """
    if value is None:
        return None
    text = str(value).strip().lower()
    for words, label in ((_GOOD, 1), (_BAD, 0), (_NONE, None)):
        if text in words:
            return label
    raise ValueError(f"{where} is {value!r}; a label is 1 or 'good', 0, 'bad' or 'poor', or null")


def label_of(values: Mapping[str, Any], quality: str, *, missing: str = "skip", mixed: str = "bad", where: str = "the label") -> int | None:
    """The label of a video for one quality.

    Args:
        values: labels by quality, in any of the forms above; other keys are passed over.
        quality: one of QUALITIES.
        missing: `skip` leaves a video without the label out; `bad` takes it for bad, as upstream does.
        mixed: for `motion_quality`: a video with one good and one bad part is `bad` (upstream's code) or left out, `skip` (the paper).

    Returns:
        1, 0, or None to leave the video out.

    Raises:
        ValueError: unknown quality or option, or a value that is no label.
    """
    for name, given, allowed in (("quality", quality, QUALITIES), ("missing", missing, MISSING), ("mixed", mixed, MIXED)):
        if given not in allowed:
            raise ValueError(f"{name} is {given!r}, but it must be one of: {', '.join(allowed)}")
    fallback = 0 if missing == "bad" else None

    def single(name: str) -> int | None:
        label = read_value(values.get(name), f"{name} of {where}")
        return fallback if label is None else label

    own = read_value(values.get(quality), f"{quality} of {where}")
    if quality != MOTION or own is not None:
        return fallback if own is None else own
    parts = [single(name) for name in PARTS]
    if 0 in parts and 1 in parts and mixed == "skip":
        return None
    if 0 in parts:
        return 0  # whatever the other part would be
    return None if None in parts else 1

"""What is told beside scores: the settings that they were made with, and weight files that are not what their kind says.

Needs no ComfyUI and loads no model.
"""

from __future__ import annotations

from typing import Any

from ..reward_models import hpsv2, mps, preprocess, published
from ..reward_models.spec import RewardModelSpec


def described(spec: RewardModelSpec) -> dict[str, Any]:
    """The settings that scores are made with, as JSON values: weights, options with their defaults, and the rows of a mix.

    Raises:
        ValueError: a resize mode or a condition that there is not.
    """
    settings: dict[str, Any] = {name: value for name, value in spec.options.items() if name != "rows"}
    if spec.kind in ("hpsv2.1", "mps", "pickscore", "aesthetic"):
        settings = {"resize": hpsv2.DEFAULT_RESIZE if spec.kind == "hpsv2.1" else "crop", "antialias": True, **settings}
        if settings["resize"] not in preprocess.RESIZES:
            raise ValueError(f"resize is {settings['resize']!r}; choose one of {', '.join(preprocess.RESIZES)}.")
    if spec.kind == "mps":
        name = settings.get("condition", "overall")
        texts = [text for _, text, _ in mps.parse_condition(name)]
        settings = {"threshold": 0.01, "normalise": "sample", "scale": "raw", **settings, "condition": name, "condition_text": " + ".join(texts)}
        settings["condition_is_experimental"] = texts != [mps.CONDITIONS["overall"]]
    rows = {"rows": spec.options["rows"]} if spec.kind == "mix" else {}
    return {"weights": spec.path, "options": settings, **rows}


def about_files(spec: RewardModelSpec) -> list[str]:
    """What to tell of the weight files at every score: a model is loaded once only, and not at all where its scores are kept.

    Raises:
        ValueError: a file of another kind, see `published.file_warning`.
    """
    models = [row.reward for row in spec.rows()] or [spec]
    return list(dict.fromkeys(filter(None, (published.file_warning(model.kind, model.path) for model in models))))

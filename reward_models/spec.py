"""What a REWARD_MODEL socket, a training config and a command line carry: which reward model, which file, which options. No torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .base import RewardModel

# Kinds without weights of their own.
PATHLESS = ("dynamic_degree", "flicker", "drift", "mix")
KINDS = ("hpsv2.1", "mps", "pickscore", "aesthetic", "face", *PATHLESS)
ALIASES: Mapping[str, str] = {"hpsv2": "hpsv2.1", "hps": "hpsv2.1", "aesthetic_v2": "aesthetic", "laion_aesthetic": "aesthetic"}

_PICTURE = ("config", "resize", "antialias", "stability")
# Which options a kind understands; any other that is given is an error, so that nothing is left out in silence. A PAVRM scores latents (host/pavrm.py).
OPTIONS_OF: Mapping[str, tuple[str, ...]] = {
    "hpsv2.1": _PICTURE,
    "mps": (*_PICTURE, "condition", "threshold", "normalise", "scale"),
    "pickscore": (*_PICTURE, "scale"),
    "aesthetic": (*_PICTURE, "clip"),
    "face": ("detector", "landmarks", "reference", "missing"),
    "pavrm": ("query", "head", "generator", "num_heads", "pooling"),
    **dict.fromkeys(PATHLESS, ()),
    "mix": ("rows",),
}
OPTIONS = tuple(dict.fromkeys(name for names in OPTIONS_OF.values() for name in names))
_FILE_OPTIONS = ("clip", "detector", "landmarks", "reference", "query", "head", "generator")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RewardModelSpec:
    """A reward model by name.

    Attributes:
        kind: one of `KINDS`, or "pavrm" (which scores latents, host/pavrm.py).
        path: weight file; empty for the kinds in `PATHLESS`.
        options: keyword arguments of `loader.load_reward_model`, of the names in `OPTIONS`; JSON values only.
    """

    kind: str
    path: str
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.kind or not (self.path or self.kind in PATHLESS):
            raise ValueError(f"A reward model needs a kind and a file, got kind {self.kind!r} and file {self.path!r}.")
        unknown = sorted(set(self.options) - set(OPTIONS))
        if unknown:
            raise ValueError(f"Reward model options {', '.join(unknown)} are unknown; allowed are {', '.join(OPTIONS)}.")

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dict; `from_dict` takes it back."""
        return {"kind": self.kind, "path": str(self.path), "options": dict(self.options)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> RewardModelSpec:
        """Read what `to_dict` wrote.

        Raises:
            ValueError: an entry is missing or unknown.
        """
        unknown = sorted(set(data) - {"kind", "path", "options"})
        missing = [name for name in ("kind", "path") if name not in data and not (name == "path" and data.get("kind") in PATHLESS)]
        if unknown or missing:
            raise ValueError(f"Reward model entry: missing {missing or 'nothing'}, unknown {unknown or 'nothing'}; it takes kind, path, options.")
        return cls(kind=data["kind"], path=str(data.get("path", "")), options=dict(data.get("options") or {}))

    def files(self) -> list[str]:
        """Every file that the model is made of, those of a mix's rewards included."""
        own = [self.path] if self.path else []
        own += [str(self.options[name]) for name in _FILE_OPTIONS if self.options.get(name)]
        return own + [file for row in self.options.get("rows", ()) for file in RewardModelSpec.from_dict(row["reward"]).files()]

    def stamp(self) -> list:
        """What changes when a file changes that decides the numbers: the model's own, files in its folders, and where its sizes are looked up."""
        files: list[Path] = []
        for name in (*self.files(), *self._config_files()):
            path = Path(name)
            beside = path.with_suffix(".json")
            files += [file for file in sorted(path.rglob("*")) if file.is_file()] if path.is_dir() else [path]
            files += [beside] if beside.is_file() and beside != path else []
        return [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in files if file.exists()]

    def _config_files(self) -> list[str]:
        config = self.options.get("config")
        own = [str(config)] if config and not isinstance(config, Mapping) and not str(config).lstrip().startswith("{") else []
        return own + [file for row in self.options.get("rows", ()) for file in RewardModelSpec.from_dict(row["reward"])._config_files()]

    def load(self, device: Any = "cpu", dtype: Any = None) -> RewardModel:
        """Load the model.

        Args:
            device: torch device.
            dtype: torch dtype of the matrices; None is float32.

        Raises:
            ValueError: see `loader.load_reward_model`.
        """
        from . import loader

        extra = {} if dtype is None else {"dtype": dtype}
        return loader.load_reward_model(self.kind, self.path, device=device, **extra, **self.options)

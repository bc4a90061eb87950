"""What a REWARD_MODEL socket, a training config and a command line carry: which reward model, which file, which options. No torch."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .base import RewardModel

# Kinds without weights of their own.
PATHLESS = ("dynamic_degree", "flicker", "drift", "mix")
KINDS = ("hpsv2.1", "mps", "pickscore", "aesthetic", "face", *PATHLESS)
ALIASES: Mapping[str, str] = {"hpsv2": "hpsv2.1", "hps": "hpsv2.1", "aesthetic_v2": "aesthetic", "laion_aesthetic": "aesthetic"}

# Kinds whose rewards compare frames with a text.
_TEXT_KINDS = ("hpsv2.1", "mps", "pickscore")
# Sizes of CLIPs that have a name: where a config file may be given, these are none.
SIZES = ("ViT-H-14", "ViT-L-14")

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
FILE_OPTIONS = ("clip", "detector", "landmarks", "reference", "query", "head", "generator")


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
        refuse_unknown(self.options, OPTIONS, "Reward model options")

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dict; `from_dict` takes it back."""
        return {"kind": self.kind, "path": str(self.path), "options": dict(self.options)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> RewardModelSpec:
        """Read what `to_dict` wrote.

        Raises:
            ValueError: an entry is missing or unknown.
        """
        refuse_unknown(data, ("kind", "path", "options"), "The reward model entry")
        missing = [name for name in ("kind", "path") if name not in data and not (name == "path" and data.get("kind") in PATHLESS)]
        if missing:
            raise ValueError(f"The reward model entry lacks {' and '.join(missing)}; it takes kind, path, options.")
        if not isinstance(data["kind"], str) or not isinstance(data.get("options") or {}, Mapping):
            raise ValueError(f"The reward model entry has kind {data['kind']!r} and options {data.get('options')!r}; a name and an object are needed.")
        return cls(kind=data["kind"], path=str(data.get("path", "")), options=dict(data.get("options") or {}))

    def files(self) -> list[str]:
        """Every file that the model is made of, those of a mix's rewards included."""
        own = [self.path] if self.path else []
        own += [str(self.options[name]) for name in FILE_OPTIONS if self.options.get(name)]
        return own + [file for row in self.rows() for file in row.reward.files()]

    def rows(self) -> list[MixRow]:
        """The rewards of a mix, none of any other kind; see `read_rows`."""
        return read_rows(self.options["rows"]) if "rows" in self.options else []

    @property
    def reads_text(self) -> bool:
        """Whether the rewards depend on the prompt."""
        return ALIASES.get(self.kind, self.kind) in _TEXT_KINDS or any(row.reward.reads_text for row in self.rows())

    def beside(self, folder: Path) -> RewardModelSpec:
        """The same reward model with relative file names looked up in a folder: that of the file which names them."""

        def is_file(name: str, value: Any) -> bool:
            return bool(value) and (name in FILE_OPTIONS or name == "config" and _is_config_file(value))

        options = {name: str(folder / value) if is_file(name, value) else value for name, value in self.options.items()}
        return dataclasses.replace(self, path=str(folder / self.path) if self.path else "", options=options)

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
        return [*([config] if _is_config_file(config) else []), *(file for row in self.rows() for file in row.reward._config_files())]

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


@dataclasses.dataclass(frozen=True, kw_only=True)
class MixRow:
    """One reward of a mix, which counts as weight x (reward - centre) / scale; see `mix.Component`.

    Attributes:
        name: unique in the mix.
    """

    name: str
    reward: RewardModelSpec
    weight: float = 1.0
    centre: float = 0.0
    scale: float = 1.0

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dict; `read_rows` takes a list of them."""
        return {**dataclasses.asdict(self), "reward": self.reward.to_dict()}


def read_rows(values: Any) -> list[MixRow]:
    """The rows of a mix from JSON values: of the node's socket, a training config, or the file of `lab.py score --kind mix`.

    Args:
        values: list of {"name", "reward": spec as dict, "weight", "centre", "scale"}; all but reward may be left out.

    Raises:
        ValueError: names the row and what is wrong with it.
    """
    if not isinstance(values, Sequence) or isinstance(values, str) or not values:
        raise ValueError(f"The rows of a mix are {values!r}; give a list with at least one reward.")
    rows = [_row(value, f"Row {number} of the mix") for number, value in enumerate(values, 1)]
    names = [row.name for row in rows]
    if len(set(names)) != len(names):
        raise ValueError(f"Rewards of a mix must have different names, got {', '.join(names)}; give each row a name.")
    return rows


def _row(value: Any, where: str) -> MixRow:
    refuse_unknown(value, [field.name for field in dataclasses.fields(MixRow)], where)
    if "reward" not in value:
        raise ValueError(f'{where} lacks reward; give {{"reward": {{"kind": ..., "path": ...}}, "weight": 1}}.')
    numbers = {name: value[name] for name in ("weight", "centre", "scale") if name in value}
    for name, number in numbers.items():
        if isinstance(number, bool) or not isinstance(number, (int, float)) or not math.isfinite(number):
            raise ValueError(f"{where}: {name} is {number!r}; give a finite number.")
        if name == "scale" and number <= 0:
            raise ValueError(f"{where}: scale is {number:g}; it must be above 0. 1 leaves the reward as it is.")
    try:
        reward = RewardModelSpec.from_dict(value["reward"])
        reward = dataclasses.replace(reward, kind=ALIASES.get(reward.kind, reward.kind))
        _check_mixable(reward)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    return MixRow(name=str(value.get("name") or reward.kind), reward=reward, **{name: float(number) for name, number in numbers.items()})


def _check_mixable(reward: RewardModelSpec) -> None:
    if reward.kind in ("mix", "pavrm"):
        reason = "it scores latents, not frames" if reward.kind == "pavrm" else "give its rewards one by one"
        raise ValueError(f"A {reward.kind} cannot be part of a mix: {reason}.")
    check_kind(reward)
    if reward.path and reward.kind in PATHLESS:
        raise ValueError(f"{reward.kind} has no weights, but path is {reward.path}; leave it out.")


def check_kind(reward: RewardModelSpec) -> None:
    """Check by name, without its files, what the loader would refuse: a kind that there is not, options that it does not have, rows of a mix.

    Raises:
        ValueError: names it, and what there is.
    """
    kind = ALIASES.get(reward.kind, reward.kind)
    if kind not in OPTIONS_OF:
        raise ValueError(f"Reward model kind {reward.kind!r} is unknown; choose one of {', '.join(OPTIONS_OF)}.")
    refuse_unknown({name: value for name, value in reward.options.items() if value is not None}, OPTIONS_OF[kind], f"The options of {reward.kind}")
    if kind == "mix":
        read_rows(reward.options.get("rows"))


def refuse_unknown(values: Any, known: Sequence[str], where: str) -> None:
    """Refuse what is no object, and names that nobody would read.

    Raises:
        ValueError: such a name, with the nearest known one.
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"{where}: {values!r} is not an object; it takes {', '.join(known)}.")
    for name in values:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.0)
            raise ValueError(
                f"{where}: {name!r} is unknown{f'; the nearest known name is {near[0]!r}' if near else ''}. Known are {', '.join(known) or 'none'}."
            )


def _is_config_file(config: Any) -> bool:
    return isinstance(config, str) and config not in ("", *SIZES) and not config.lstrip().startswith("{")

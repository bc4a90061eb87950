"""The settings of a PAVRM training run (`"kind": "pavrm"`): frozen, checked when made, read from and written to JSON. No torch.

The defaults follow HY-Video-PRFL's recipe (Tencent-Hunyuan/HY-Video-PRFL@59ab9d7, Apache-2.0, and arXiv 2511.21541): shift-5 noise, learning rate 1e-6
for blocks and 1e-5 for the head, AdamW, clip 1. Differs in: clipping takes the heads in, accumulation is real, missing labels are not "bad".
"""

from __future__ import annotations

import json
import math
import random
from dataclasses import asdict, dataclass, field
from typing import Any

from . import checks, identity
from .checks import choice, number, require, whole
from .config_reader import build
from .flow import shift_sigma
from .labels import MISSING, MIXED, QUALITIES
from .method_config import OPTIMISERS, Updates

KIND = "pavrm"
LOSSES = ("ce", "bt", "both")
SIGMA_KINDS = ("shifted", "uniform", "logit_normal", "list")
POOLINGS = ("query", "mean", "max")
HEADS = ("file", "fresh")
# Muon takes matrices only, but a PAVRM has biases and norms too.
PAVRM_OPTIMISERS = tuple(kind for kind in OPTIMISERS if kind != "muon")
PAIRINGS = ("caption", "any")
CAPTIONS = ("short", "long", "either")
DTYPES = ("auto", "fp32", "bf16")
SAVE_DTYPES = ("fp32", "bf16", "fp16")
TIMESTEPS = 1000
_LARGEST_EXPONENT = 700.0  # exp() of more than 709 overflows; a sigma is 0 long before
# Noise levels that accuracy is told for, as in the paper's table 5.
BUCKETS = ((0.0, 0.2), (0.2, 0.4), (0.4, 0.6), (0.6, 0.8), (0.8, 1.0))


@dataclass(frozen=True, kw_only=True)
class Models:
    """trunk: a Wan file, a checkpoint folder of HY-Video-PRFL, or a PAVRM file; query, head: HY-Video-PRFL's two head files (else empty)."""

    trunk: str
    query: str = ""
    head: str = ""

    def __post_init__(self) -> None:
        require(bool(self.trunk.strip()), "models.trunk is empty; give a Wan model, a PAVRM file or a checkpoint folder")
        require(bool(self.query) == bool(self.head), "models.query and models.head belong together; give both or neither")


@dataclass(frozen=True, kw_only=True)
class Data:
    """What is learned from.

    source: dataset folder (made by `lab.py preprocess` or Video Dataset), or HY-Video-PRFL's list file of metas.
    annotations: JSONL of labels laid over those of the dataset; empty takes `annotations.jsonl` of the dataset folder, where there is one.
    pairs: for the pair loss: `votes.sqlite` of a TestLab sweep, or JSONL of `{"winner", "loser"}`; empty makes pairs of good and bad videos.
    losers: HY-Video-PRFL's second list: any video of `source` wins over any of these, whose ids become `loser/<id>`.
    pairing: partners of good videos are bad ones of the same caption where there are such (`caption`), or any (`any`).
    balance: draw good and bad videos equally often.
    validation_share: share of the videos (of captions, when `split_by_caption`) that are never trained on; validation: another dataset, with labels, instead.
    """

    source: str
    annotations: str = ""
    pairs: str = ""
    losers: str = ""
    quality: str = "motion_quality"
    missing: str = "skip"
    mixed: str = "bad"
    caption: str = "short"
    pairing: str = "caption"
    balance: bool = False
    validation_share: float = 0.1
    split_by_caption: bool = False
    validation: str = ""

    def __post_init__(self) -> None:
        require(bool(self.source.strip()), "data.source is empty; give a dataset folder or a list file of metas")
        choice("data.quality", self.quality, QUALITIES)
        choice("data.missing", self.missing, MISSING)
        choice("data.mixed", self.mixed, MIXED)
        choice("data.caption", self.caption, CAPTIONS)
        choice("data.pairing", self.pairing, PAIRINGS)
        number("data.validation_share", self.validation_share, least=0, most=0.9)


@dataclass(frozen=True, kw_only=True)
class SigmaDraw:
    """How the noise level of a training sample is drawn.

    kind: `shifted` (uniform, then shifted: upstream), `uniform`, `logit_normal` or `list` (cycles by sample).
    mean, std: of the normal number z of `logit_normal`, whose sigma is 1 - sigmoid(z), then shifted: a mean above 0 draws less noise. Upstream picks the entry
        floor(1000 sigmoid(z)) of a table that falls from sigma 1 to 0 (scheduling_flow_match_discrete.py, `get_train_timestep_and_sigma`).
    low, high: the drawn sigma is mapped into this range (not for `list`).
    """

    kind: str = "shifted"
    shift: float = 5.0
    low: float = 0.0
    high: float = 1.0
    mean: float = 0.0
    std: float = 1.0
    sigmas: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        choice("sigma.kind", self.kind, SIGMA_KINDS)
        number("sigma.shift", self.shift, above=0)
        number("sigma.low", self.low, least=0, most=1)
        number("sigma.high", self.high, least=0, most=1)
        require(self.low < self.high, f"sigma.low is {self.low}, but it must be below sigma.high, {self.high}")
        number("sigma.mean", self.mean)
        number("sigma.std", self.std, above=0)
        require(bool(self.sigmas) == (self.kind == "list"), "sigma.sigmas goes with kind 'list': give both or neither")
        for value in self.sigmas:
            number("sigma.sigmas", value, least=0, most=1)

    def draw(self, rng: random.Random, position: int) -> float:
        """A sigma in [0, 1] for sample number `position`."""
        if self.kind == "list":
            return self.sigmas[position % len(self.sigmas)]
        u = rng.random()
        if self.kind == "logit_normal":
            u = 1 / (1 + math.exp(min(rng.gauss(self.mean, self.std), _LARGEST_EXPONENT)))  # 1 - sigmoid
        sigma = u if self.kind == "uniform" else shift_sigma(u, self.shift)
        return self.low + (self.high - self.low) * sigma


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Which network is trained.

    blocks: kept blocks of the trunk; 0 keeps what the file says (8 of an uncut 14B model). taps: pooled blocks counted from 1; empty: the last.
    train_blocks: how many of the last kept blocks are trained; -1 all, 0 none (a probe: only the head learns).
    lora_rank: 0 trains whole blocks; above, a LoRA of this rank on each of their Linears, saved as a PAVRM in LoRA form that needs no trunk of its own.
    head: `file` goes on with the head of models.trunk or of models.query and models.head; `fresh` begins a new one.
    """

    blocks: int = 0
    taps: tuple[int, ...] = ()
    train_blocks: int = -1
    lora_rank: int = 0
    pooling: str = "query"
    num_heads: int = 8
    head: str = "fresh"

    def __post_init__(self) -> None:
        whole("shape.blocks", self.blocks, 0)
        whole("shape.train_blocks", self.train_blocks, -1)
        whole("shape.lora_rank", self.lora_rank, 0)
        whole("shape.num_heads", self.num_heads, 1)
        choice("shape.pooling", self.pooling, POOLINGS)
        choice("shape.head", self.head, HEADS)
        require(
            not self.lora_rank or (self.train_blocks != 0 and self.pooling == "query"),
            f"shape.lora_rank is {self.lora_rank}, so blocks must be trained (train_blocks {self.train_blocks}) and pooled by query (pooling {self.pooling!r})",
        )
        require(all(tap >= 1 for tap in self.taps), f"shape.taps is {list(self.taps)}, but blocks are counted from 1")
        require(not self.blocks or all(tap <= self.blocks for tap in self.taps), f"shape.taps {list(self.taps)} lie above shape.blocks {self.blocks}")


@dataclass(frozen=True, kw_only=True)
class Optimiser(Updates):
    """Updates of a PAVRM, with a learning rate for the trunk's blocks and one for the head; the norm of all gradients together is clipped. Without Muon, which
    takes matrices only."""

    block_lr: float = 1e-6
    head_lr: float = 1e-5

    def __post_init__(self) -> None:
        super().__post_init__()
        choice("optimiser.kind", self.kind, PAVRM_OPTIMISERS)
        number("optimiser.block_lr", self.block_lr, least=0, most=1)
        number("optimiser.head_lr", self.head_lr, least=0, most=1)


@dataclass(frozen=True, kw_only=True)
class PavrmConfig:
    """A whole run. `save_upstream`: write HY-Video-PRFL's folder form beside the single file; `output_folder`: where the file is copied to."""

    models: Models
    data: Data
    kind: str = KIND
    name: str = "my_pavrm"
    loss: str = "ce"
    sigma: SigmaDraw = field(default_factory=SigmaDraw)
    shape: Shape = field(default_factory=Shape)
    optimiser: Optimiser = field(default_factory=Optimiser)
    steps: int = 1000
    batch: int = 1
    seed: int = 0
    validate_every: int = 100
    validation_draws: int = 1
    checkpoint_every: int = 100
    keep_checkpoints: int = 3
    output_folder: str = ""
    dtype: str = "auto"
    save_dtype: str = "fp32"
    save_upstream: bool = False
    gradient_checkpointing: bool = True

    def __post_init__(self) -> None:
        require(self.kind == KIND, f"kind is {self.kind!r}, but a PAVRM run has the kind {KIND!r}")
        checks.name(self.name)
        choice("loss", self.loss, LOSSES)
        choice("dtype", self.dtype, DTYPES)
        choice("save_dtype", self.save_dtype, SAVE_DTYPES)
        for name, least in (("steps", 1), ("batch", 1), ("validate_every", 0), ("validation_draws", 1), ("checkpoint_every", 0), ("keep_checkpoints", 1)):
            whole(name, getattr(self, name), least)
        require(0 <= self.seed < 2**63, f"seed is {self.seed}, but it must be from 0 to 2^63 - 1")
        has_pairs = bool(self.data.pairs or self.data.losers)
        require(self.loss != "ce" or not has_pairs, "data.pairs and data.losers need loss 'bt' (or 'both'): 'ce' learns from labels")
        require(
            not (self.save_upstream and self.shape.lora_rank),
            f"save_upstream goes with whole blocks, not with shape.lora_rank {self.shape.lora_rank}: HY-Video-PRFL's files hold whole trunks",
        )
        require(
            not (self.save_upstream and self.shape.pooling != "query"),
            f"save_upstream needs pooling 'query', not {self.shape.pooling!r}: HY-Video-PRFL's files have no other",
        )

    @property
    def trains_pairs(self) -> bool:
        """Whether the pair loss is part of it."""
        return self.loss != "ce"

    @property
    def trains_labels(self) -> bool:
        """Whether the cross-entropy is part of it."""
        return self.loss != "bt"

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> PavrmConfig:
        """Read settings.

        Raises:
            ValueError: an unknown key (with the nearest known one), a wrong type, or a value out of range.
        """
        return build(cls, values, "")

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON values; `from_dict` of it gives an equal config."""
        return json.loads(json.dumps(asdict(self)))

    def deciding(self) -> dict[str, Any]:
        """The settings that change what is trained, as JSON values; a checkpoint of others is not resumed (`checkpoint.check_settings`)."""
        # A falling learning rate depends on the number of updates.
        free = _FREE_TO_CHANGE - ({"steps"} if self.optimiser.schedule != "constant" else set())
        return {key: value for key, value in self.to_dict().items() if key not in free}

    def digest(self) -> str:
        """Hash of `deciding()`, wherever its files lie."""
        return identity.digest(identity.portable(self.deciding()))


_FREE_TO_CHANGE = frozenset(
    {"steps", "validate_every", "validation_draws", "checkpoint_every", "keep_checkpoints", "output_folder", "save_upstream", "gradient_checkpointing"}
)

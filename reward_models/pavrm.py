"""PAVRM's head: one learned query attends over the features of a truncated Wan trunk, a small MLP turns the result into a logit.

The trunk (the host's WanModel cut to its first blocks) lives in host/wan.py; features are given here. Reward = sigmoid(logit).
Source: Tencent-Hunyuan/HY-Video-PRFL@59ab9d7:scripts/pavrm/train_pavrm.py (Apache-2.0); parameter names are those of its checkpoints.
Differs in: samples of a batch are pooled separately (upstream mixes them for batch > 1); always float32; the logit is given too.

Shape letters: T tapped blocks, B samples, L video tokens, D trunk width, N heads, K head width.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from . import layouts
from .weights import Weights, load_into, read_weights

HEADS = 8
POOLINGS = ("query", "mean", "max")
_HIDDEN = (1024, 512)


class QueryAttention(nn.Module):
    """Pooling by one learned query over all tokens; keys and values are the features, the query is added to the result.

    Args:
        dim: trunk width (5120 in Wan 14B).
        num_heads: 8 upstream; cannot be read off the weights.
    """

    def __init__(self, dim: int, num_heads: int = HEADS):
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"PAVRM width {dim} is not a multiple of {num_heads} heads; their number must be 1 or more and divide it ({HEADS} as published).")
        self.queries = nn.Parameter(torch.empty(1, dim))
        nn.init.xavier_uniform_(self.queries)
        self.multihead_attn = nn.MultiheadAttention(dim, num_heads, batch_first=True)

    def forward(self, features_BLD: Tensor) -> Tensor:
        """Pooled features [B, D]; the computation as published, with keys and values for every token."""
        query_B1D = self.queries.expand(len(features_BLD), -1, -1)
        pooled_B1D, _ = self.multihead_attn(query_B1D, features_BLD, features_BLD, need_weights=False)
        return (pooled_B1D + query_B1D)[:, 0]

    def folded(self, features_BLD: Tensor) -> Tensor:
        """The same value without keys and values: the query is pulled through W_K, and W_V is applied after pooling.

        softmax(q (W_K h + b_K)) = softmax((W_K^T q) h) since b_K adds a constant per head, and attention weights sum to 1. At 75,600 tokens of
        width 5120 this saves 7.9 TFLOP and 1.55 GB (bf16).
        """
        attention = self.multihead_attn
        heads, dim = attention.num_heads, features_BLD.shape[-1]
        w_q, w_k, w_v = attention.in_proj_weight.chunk(3)
        b_q, _, b_v = attention.in_proj_bias.chunk(3)
        query_NK = functional.linear(self.queries[0], w_q, b_q).view(heads, -1) * (dim // heads) ** -0.5
        key_ND = torch.einsum("nk,nkd->nd", query_NK, w_k.view(heads, -1, dim))
        weights_BNL = (features_BLD @ key_ND.t()).transpose(1, 2).softmax(dim=-1)
        pooled_BNK = torch.einsum("bnd,nkd->bnk", weights_BNL @ features_BLD, w_v.view(heads, -1, dim)) + b_v.view(heads, -1)
        return attention.out_proj(pooled_BNK.flatten(1)) + self.queries


class ScoreHead(nn.Module):
    """MLP D -> 1024 -> 512 -> 1 with ReLU; the output is the logit."""

    def __init__(self, dim: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, _HIDDEN[0])
        self.fc2 = nn.Linear(_HIDDEN[0], _HIDDEN[1])
        self.fc3 = nn.Linear(_HIDDEN[1], 1)
        for layer in (self.fc1, self.fc2, self.fc3):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, pooled_BD: Tensor) -> Tensor:
        """Logit [B]."""
        return self.fc3(functional.relu(self.fc2(functional.relu(self.fc1(pooled_BD)))))[:, 0]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PavrmOutput:
    """Score of latents; higher is better.

    Attributes:
        logit: [B] float32, unbounded; train with this: in low precision the sigmoid is flat above about 6.
        probability: [B] float32 in [0,1], the published reward.
        pooled: [B, D] float32.
    """

    logit: Tensor
    probability: Tensor
    pooled: Tensor


class PavrmHead(nn.Module):
    """Query attention and score head together.

    Args:
        query_attention: pooling; None for `mean` and `max`.
        mlp: score head.
        use_folded: compute the pooling in its folded form (equal up to rounding).
        pooling: one of POOLINGS; the published models have `query`, the others are the paper's comparisons (table 5).
    """

    def __init__(self, query_attention: QueryAttention | None, mlp: ScoreHead, *, use_folded: bool = True, pooling: str = "query"):
        super().__init__()
        if pooling not in POOLINGS or (pooling == "query") != (query_attention is not None):
            raise ValueError(f"pooling is {pooling!r}; it must be one of {', '.join(POOLINGS)}, and 'query' alone has a query attention.")
        self.query_attention = query_attention
        self.mlp = mlp
        self.use_folded = use_folded
        self.pooling = pooling

    @property
    def dim(self) -> int:
        """Width of the features that it reads."""
        return self.mlp.fc1.in_features

    def forward(self, features: Tensor | Sequence[Tensor]) -> PavrmOutput:
        """Score trunk features.

        Args:
            features: residual stream [B, L, D] after the tapped block, no norm applied; or one such tensor per tapped block (each is pooled
                on its own; of the results `max` takes the maximum, the other poolings the mean). Any float dtype; computed in the dtype of the head,
                float32.

        Raises:
            ValueError: no features, or of another width.
        """
        layers = [features] if isinstance(features, Tensor) else list(features)
        dim = self.dim
        if not layers or any(x.ndim != 3 or x.shape[-1] != dim for x in layers):
            raise ValueError(f"PAVRM features must be [batch, tokens, {dim}] (one tensor per tapped block), got {[tuple(x.shape) for x in layers]}.")
        dtype = self.mlp.fc1.weight.dtype
        pooled_TBD = torch.stack([self._pooled(x.to(dtype)) for x in layers])
        pooled_BD = pooled_TBD.amax(dim=0) if self.pooling == "max" else pooled_TBD.mean(dim=0)
        logit_B = self.mlp(pooled_BD)
        return PavrmOutput(logit=logit_B, probability=logit_B.sigmoid(), pooled=pooled_BD)

    def _pooled(self, features_BLD: Tensor) -> Tensor:
        if self.pooling == "mean":
            return features_BLD.mean(dim=1)
        if self.pooling == "max":
            return features_BLD.amax(dim=1)
        return self.query_attention.folded(features_BLD) if self.use_folded else self.query_attention(features_BLD)


def build_head(dim: int, num_heads: int = HEADS, *, pooling: str = "query") -> PavrmHead:
    """A trainable head with the published initialisation."""
    return PavrmHead(QueryAttention(dim, num_heads) if pooling == "query" else None, ScoreHead(dim), pooling=pooling)


def load_head(
    query: str | Path | None, mlp: str | Path | None = None, *, num_heads: int | None = None, pooling: str | None = None, use_folded: bool = True
) -> PavrmHead:
    """Read a frozen head, float32 on the CPU.

    Args:
        query: HY-Video-PRFL's `query_attention_step_N.ckpt` (tensors in it may be marked `cuda:0`), or our single file with the prefixes
            `trunk.`, `query_attention.`, `mlp.`; None where `pooling` has no query.
        mlp: `mlp_step_N.ckpt`; None for the single file.
        num_heads: of the query attention; None takes the single file's metadata, else 8, as published. The weights do not show it.
        pooling: of HY-Video-PRFL's files, which do not tell it (None: "query"); our single file does.
        use_folded: see `PavrmHead`.

    Raises:
        ValueError: a file is unreadable or is something else, or was trained with another pooling; the two belong to different widths; keys are missing; a
            number of heads that cannot be.
    """
    first = read_weights(query) if query else None
    if first is not None and first.kind == "pavrm":
        if mlp is not None:
            raise ValueError(f"{query} is a single-file PAVRM and holds its score head already; give no second file.")
        config = json.loads(first.metadata.get("config", "{}"))
        told = config.get("pooling", pooling)
        if pooling not in (None, told):
            raise ValueError(f"{query} was trained with pooling {told!r}, not {pooling!r}; leave pooling out.")
        num_heads, pooling = config.get("num_heads") if num_heads is None else num_heads, told or "query"
        query_state, mlp_state = split_single_file(first.state)
    else:
        pooling = pooling or "query"
        query_state, mlp_state = _two_files(query, first, mlp, pooling)
    with torch.inference_mode(False):
        with torch.device("meta"):
            head = build_head(mlp_state["fc1.weight"].shape[1], HEADS if num_heads is None else int(num_heads), pooling=pooling)
        if head.query_attention is not None:
            load_into(head.query_attention, query_state, f"{query} (query attention)")
        load_into(head.mlp, mlp_state, f"{mlp or query} (score head)")
        head.use_folded = use_folded
        return head.float().eval().requires_grad_(False)


def _two_files(query: str | Path | None, first: Weights | None, mlp: str | Path | None, pooling: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Query attention (empty without one) and score head of HY-Video-PRFL's files."""
    if first is not None:
        _expect(first.kind, "pavrm_query", query)
    if mlp is None:
        raise ValueError(f"{query} holds the query attention only; give the score head (mlp_step_N.ckpt) as well.")
    if (first is None) == (pooling == "query"):
        raise ValueError(f"{mlp} with pooling {pooling!r}: give query_attention_step_N.ckpt as well for 'query', and only then.")
    second = read_weights(mlp)
    _expect(second.kind, "pavrm_mlp", mlp)
    return (first.state if first else {}), second.state


def split_single_file(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Query attention and score head of our single-file form, prefixes removed; the trunk (`trunk.`) is the host's business."""
    parts = [{key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)} for prefix in ("query_attention.", "mlp.")]
    return parts[0], parts[1]


def _expect(kind: str, wanted: str, path: str | Path) -> None:
    if kind != wanted:
        raise ValueError(f"{path} is {layouts.DESCRIPTIONS[kind]}, but {layouts.DESCRIPTIONS[wanted]} is needed here.")

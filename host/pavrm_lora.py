"""A frozen PAVRM stored as a LoRA over the generator's own first blocks: no second trunk in memory, and a small file.

The difference between PAVRM trunk and generator is taken weight by weight: matrices as a truncated singular value decomposition (the best
approximation of that rank, Eckart and Young 1936), vectors and the patch embedding in full; what does not differ is left out. The head is kept whole.
File: `lora.<path>.lora_down.weight`, `lora.<path>.lora_up.weight`, `diff.<name>`, `query_attention.*`, `mlp.*`; metadata "config".

While the PAVRM runs, the generator's blocks use their own weights plus these, whatever LoRA is being trained on them. Each block puts them in place itself, and
once more in backward for running again and for going back through what it ran: around the whole pass, or with torch's `checkpoint`, which leaves them in
between, gradients would be wrong without a word.

Shapes: R rank, I in features, O out features.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional

from ..lora_train.offload.executor import WEIGHTS_IN_USE
from ..lora_train.safetensors_file import read_header
from ..lora_train.weight_formats import quantised_weights
from ..reward_models import pavrm as head_module
from ..reward_models.weights import load_into, read_weights
from . import pavrm_files
from .lora_convert import check_target, save_whole
from .pavrm import Pavrm, build_trunk, cast_trunk

_EXACT_SVD = 1024
_BLOCK = re.compile(r"blocks\.(\d+)\.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Delta:
    """What turns generator weights into trunk weights.

    Attributes:
        lora: (down [R, I], up [O, R]) by path of the Linear.
        diff: whole differences by parameter name.
        relative_error: norm of what the truncation lost over the norm of all differences; 0 is exact.
    """

    lora: dict[str, tuple[torch.Tensor, torch.Tensor]]
    diff: dict[str, torch.Tensor]
    relative_error: float


def extract(trunk: Mapping[str, torch.Tensor], generator: Mapping[str, torch.Tensor], rank: int) -> Delta:
    """The difference of two trunks at a rank.

    Args:
        trunk: PAVRM weights in Wan's names.
        generator: at least the same names.
        rank: of the matrices.

    Raises:
        ValueError: rank below 1, or the generator lacks a name or has another shape.
    """
    if rank < 1:
        raise ValueError(f"The rank is {rank}; it must be at least 1.")
    lora, diff, lost, whole = {}, {}, 0.0, 0.0
    for key, value in trunk.items():
        if key not in generator or generator[key].shape != value.shape:
            found = tuple(generator[key].shape) if key in generator else "missing"
            raise ValueError(f"{key} is {tuple(value.shape)} in the PAVRM and {found} in the generator; they must be of one architecture.")
        change = value.float() - generator[key].float()
        size = float(change.square().sum())
        if size == 0:
            continue
        whole += size
        if key.endswith(".weight") and change.ndim == 2:
            down, up = _low_rank(change, min(rank, *change.shape))
            lora[key.removesuffix(".weight")] = (down, up)
            lost += float((change - up @ down).square().sum())
        else:
            diff[key] = change
    return Delta(lora=lora, diff=diff, relative_error=(lost / whole) ** 0.5 if whole else 0.0)


def _low_rank(change_OI: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    if min(change_OI.shape) <= _EXACT_SVD:
        u, s, vh = torch.linalg.svd(change_OI, full_matrices=False)
    else:
        # Exact enough and a hundred times faster on 5120-wide matrices (Halko, Martinsson and Tropp 2011).
        u, s, v = torch.svd_lowrank(change_OI, q=min(rank + 16, *change_OI.shape), niter=4)
        vh = v.t()
    root = s[:rank].sqrt()
    return root[:, None] * vh[:rank], u[:, :rank] * root


def tensors_of(delta: Delta, head: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Everything that goes into the file.

    Args:
        delta: from `extract`.
        head: state dict of the PAVRM's head.
    """
    tensors = {**head, **named_matrices(delta), **{f"diff.{name}": value for name, value in delta.diff.items()}}
    return {name: value.detach().contiguous() for name, value in tensors.items()}


def named_matrices(delta: Delta) -> dict[str, torch.Tensor]:
    """The low-rank matrices by their names in the file."""
    named = {}
    for path, (down, up) in delta.lora.items():
        named |= {f"lora.{path}.lora_down.weight": down, f"lora.{path}.lora_up.weight": up}
    return named


def file_config(head: head_module.PavrmHead, taps: tuple[int, ...], *, rank: int, relative_error: float, generator: str | Path) -> dict[str, Any]:
    """What the metadata of a file in this form tell."""
    heads = head.query_attention.multihead_attn.num_heads
    return {"feature_layers": list(taps), "num_heads": heads, "rank": rank, "relative_error": relative_error, "generator": Path(generator).name}


class Adapted:
    """A generator that can act as the trunk for a while.

    Args:
        model: WanModel.
        delta: what its weights become.
        blocks: how many blocks are used.

    Raises:
        ValueError: the delta names something that the model lacks, or of another shape.
    """

    def __init__(self, model: torch.nn.Module, delta: Delta, blocks: int):
        self._model = model
        self._blocks = blocks
        self._modules = dict(model.named_modules())
        self._parts: dict[int | None, _Part] = {}
        for path, (down, up) in delta.lora.items():
            weight = getattr(self._modules.get(path), "weight", None)
            if weight is None or weight.shape != (up.shape[0], down.shape[1]):
                raise ValueError(f"The PAVRM's LoRA names {path} of {(up.shape[0], down.shape[1])}; this generator has no such weight.")
            self._part(path).lora[path] = (down, up)
        for name, value in delta.diff.items():
            path, _, leaf = name.rpartition(".")
            own = getattr(self._modules.get(path), leaf, None)
            if own is None or own.shape != value.shape:
                raise ValueError(f"The PAVRM's LoRA names {name} of {tuple(value.shape)}; this generator has no such weight.")
            self._part(name).diff[name] = value
        for path, module in self._modules.items():
            match = _BLOCK.match(path)
            is_used = int(match.group(1)) < blocks if match else not path.startswith("head.")
            if is_used and isinstance(module, torch.nn.Linear) and path not in delta.lora:
                self._part(path).plain.append(module)

    def _part(self, name: str) -> _Part:
        match = _BLOCK.match(name)
        return self._parts.setdefault(int(match.group(1)) if match else None, _Part())

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Within, the first blocks and the embeddings compute the trunk."""
        kept = [(block, block.__dict__.get("forward")) for block in self._model.blocks[: self._blocks]]
        try:
            for index, (block, _) in enumerate(kept):
                block.forward = self._forward(block, self._parts.get(index, _Part()))
            with self._in_place(self._parts.get(None, _Part())):
                yield
        finally:
            for block, before in kept:
                _restore(block, before)

    def _forward(self, block: torch.nn.Module, part: _Part):
        matrices = [matrix for pair in part.lora.values() for matrix in pair]

        @contextmanager
        def in_place() -> Iterator[None]:
            # Within a block executor (`lora_train/offload`) a block's weights are on the device only while they are asked for.
            with block.__dict__.get(WEIGHTS_IN_USE, nullcontext)(), self._in_place(part):
                yield

        def forward(x, e, freqs, context, context_img_len=None, transformer_options: Mapping = {}):  # noqa: B006 (the host's signature; never written to)
            options = dict(transformer_options)

            def compute(x: torch.Tensor, e: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
                return type(block).forward(block, x, e, freqs, context, context_img_len=context_img_len, transformer_options=options)

            return _RunsAgain.apply(compute, in_place, x, e, context, *matrices)

        return forward

    @contextmanager
    def _in_place(self, part: _Part) -> Iterator[None]:
        linears, parameters = [], []
        try:
            for linear in part.plain:
                linears.append((linear, linear.__dict__.pop("forward", None)))
            for path, (down, up) in part.lora.items():
                linear = self._modules[path]
                linears.append((linear, linear.__dict__.get("forward")))
                linear.forward = _adapted_linear(linear, down, up)
            for name, value in part.diff.items():
                path, _, leaf = name.rpartition(".")
                module = self._modules[path]
                own = module._parameters[leaf]
                parameters.append((module, leaf, own))
                changed = (own.detach().float() + value.to(own.device)).to(own.dtype)
                module._parameters[leaf] = torch.nn.Parameter(changed, requires_grad=False)
            yield
        finally:
            for linear, before in linears:
                _restore(linear, before)
            for module, leaf, own in parameters:
                module._parameters[leaf] = own


class _RunsAgain(torch.autograd.Function):
    """A block that keeps its inputs only. Going back happens within the contexts, as all of running again does: what that saved are views of weights that
    are someone else's afterwards. The matrices that `compute` uses are inputs of their own, so that they can learn."""

    @staticmethod
    def forward(ctx, compute: Callable, in_place: Callable, x, e, context, *matrices):
        kind = x.device.type
        ctx.calls = compute, in_place
        ctx.autocast = partial(torch.autocast, kind, dtype=torch.get_autocast_dtype(kind), enabled=torch.is_autocast_enabled(kind))
        ctx.save_for_backward(x, e, context, *matrices)
        with in_place():
            return compute(x, e, context)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        compute, in_place = ctx.calls
        needs = ctx.needs_input_grad[2:]
        *inputs, matrices = *ctx.saved_tensors[:3], ctx.saved_tensors[3:]
        leaves = [value.detach().requires_grad_(needed) for value, needed in zip(inputs, needs, strict=False)]
        wanted = [value for value, needed in zip((*leaves, *matrices), needs, strict=True) if needed]
        with in_place():
            with torch.enable_grad(), ctx.autocast():
                out = compute(*leaves)
            found = iter(torch.autograd.grad(out, wanted, grad))
        return None, None, *(next(found) if needed else None for needed in needs)


@dataclasses.dataclass(kw_only=True)
class _Part:
    """The delta of one block, or of everything outside blocks."""

    lora: dict[str, tuple[torch.Tensor, torch.Tensor]] = dataclasses.field(default_factory=dict)
    diff: dict[str, torch.Tensor] = dataclasses.field(default_factory=dict)
    # Linears that the delta leaves as they are: a LoRA in training that is installed on them must go as well.
    plain: list[torch.nn.Module] = dataclasses.field(default_factory=list)


def _adapted_linear(linear: torch.nn.Module, down_RI: torch.Tensor, up_OR: torch.Tensor):
    # The class's forward, not the instance's: a LoRA in training may be installed there, and it is no part of the PAVRM.
    def forward(x: torch.Tensor) -> torch.Tensor:
        hidden = functional.linear(x, down_RI.to(x.device, x.dtype))
        return type(linear).forward(linear, x) + functional.linear(hidden, up_OR.to(x.device, x.dtype))

    return forward


def _restore(module: torch.nn.Module, before) -> None:
    if before is None:
        module.__dict__.pop("forward", None)
    else:
        module.forward = before


def load(
    path: str | Path,
    generator: str | Path | torch.nn.Module,
    *,
    taps: tuple[int, ...] | None = None,
    use_folded: bool = True,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Pavrm:
    """Load a PAVRM in LoRA form.

    Args:
        path: the file.
        generator: the Wan file it was made for, of which the used blocks are read; or its WanModel where one is loaded anyway (with fresh, frozen parameters).
        taps: tapped blocks counted from 1, up to the last that the file changes; None takes the file's own.
        use_folded: see `reward_models.pavrm.PavrmHead`.
        device: where to put it.
        dtype: of the generator when it is read from a file.

    Raises:
        ValueError: another kind of file, or it does not fit the generator.
    """
    content = read_weights(path)
    if content.kind != "pavrm_lora":
        raise ValueError(f"{path} is not a PAVRM in LoRA form; give a file that `lab.py pavrm-lora` made, or leave --generator out.")
    config = json.loads(content.metadata.get("config", "{}"))
    taps_of_file = tuple(config.get("feature_layers") or ())
    if not taps_of_file:
        raise ValueError(f"{path} does not tell its tapped blocks: its metadata config lacks feature_layers.")
    last = max(taps_of_file)
    taps = tuple(taps or taps_of_file)
    if not all(1 <= tap <= last for tap in taps):
        raise ValueError(f"Tapped blocks are {list(taps)}, counted from 1, but {path} was made for {last} blocks; choose among 1 to {last}.")
    state = {key.removeprefix("lora."): value for key, value in content.state.items() if key.startswith("lora.")}
    paths = sorted({key.removesuffix(".lora_down.weight") for key in state if key.endswith(".lora_down.weight")})
    lora = {name: (state[f"{name}.lora_down.weight"].float(), state[f"{name}.lora_up.weight"].float()) for name in paths}
    diff = {key.removeprefix("diff."): value.float() for key, value in content.state.items() if key.startswith("diff.")}
    with torch.inference_mode(False):
        model = generator if isinstance(generator, torch.nn.Module) else _generator(generator, last, dtype)
        adapted = Adapted(model, Delta(lora=lora, diff=diff, relative_error=0.0), last)
        head = _head(content.state, int(config.get("num_heads", head_module.HEADS)), str(path))
        head.use_folded = use_folded
        own = model.patch_embedding.weight.device
        scorer = Pavrm(model, head.to(own), taps, adapted, dtype=model.blocks[0].self_attn.q.weight.dtype)
        return scorer if isinstance(generator, torch.nn.Module) else scorer.to(device)


def _generator(path: str | Path, blocks: int, dtype: torch.dtype) -> torch.nn.Module:
    """The first blocks of a generator, on the host; the others are never in memory."""
    if quantised_weights(path, read_header(path, "generator"), "generator"):
        raise ValueError(f"The generator {path} is quantised; a PAVRM in LoRA form needs the bf16, fp16 or fp32 file.")
    return cast_trunk(build_trunk(pavrm_files.read_trunk(path, taps=(blocks,)), str(path)), dtype)


def _head(state: Mapping[str, torch.Tensor], num_heads: int, what: str) -> head_module.PavrmHead:
    query, mlp = head_module.split_single_file(state)
    with torch.device("meta"):
        head = head_module.build_head(query["queries"].shape[-1], num_heads)
    load_into(head.query_attention, query, f"{what} (query attention)")
    load_into(head.mlp, mlp, f"{what} (score head)")
    return head.float().eval().requires_grad_(False)


def convert(
    source: str | Path,
    generator: str | Path,
    out: str | Path,
    *,
    rank: int,
    query: str | Path | None = None,
    head: str | Path | None = None,
    overwrite: bool = False,
) -> dict:
    """Write a PAVRM in LoRA form.

    Args:
        source: trunk or single file, see `pavrm.load`.
        generator: Wan file of the same architecture; the closer it is to what the PAVRM was trained from, the less is lost.
        out: file to write.
        rank: of the matrices.
        query, head: upstream's head files.
        overwrite: whether a file that is there already is replaced.

    Returns:
        rank, relative_error of the weights, bytes of the file, number of matrices and of whole differences.

    Raises:
        ValueError: see `lora_convert.check_target`, `extract` and `pavrm.load`.
    """
    check_target(Path(out), overwrite=overwrite)
    read = pavrm_files.read_trunk(source)
    base = pavrm_files.read_trunk(generator, taps=(max(read.taps),))
    delta = extract(read.state, base.state, rank)
    query, head = pavrm_files.find_heads(source, query, head)
    scorer = head_module.load_head(query or source, head)
    if scorer.query_attention is None:
        raise ValueError(f"{source} pools by {scorer.pooling}; the LoRA form knows query attention only. Use the file as it is.")
    config = file_config(scorer, read.taps, rank=rank, relative_error=delta.relative_error, generator=generator)
    save_whole(tensors_of(delta, scorer.state_dict()), Path(out), {"format": "pt", "config": json.dumps(config)})
    return {**config, "bytes": Path(out).stat().st_size, "matrices": len(delta.lora), "whole": len(delta.diff)}

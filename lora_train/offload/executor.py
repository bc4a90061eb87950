"""Runs the blocks of a model through the store: every block's `forward` is replaced for the time of a context and put back afterwards.

A pass with gradient keeps each block's input (and attention output) and nothing else; a block runs again in backward, in backward order, with the
weights and kept tensors of the next one already on their way. Passes without gradient stream through the same slots with merged LoRAs, unless the exact
form is asked for.

Blocks that are not plain Wan blocks, and passes with patches inside of attention, run as a whole by their own `forward`: streamed and checkpointed too,
but without keeping attention and without chunks.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from ..kernels import attention
from ..kernels.lora_linear import QuantisedWeight
from ..lora.linears import LoraForward, exact_form, is_exact
from .block import BlockArithmetic, SelfAttended
from .keeper import Kept
from .knobs import Knobs
from .ownership import is_alone
from .store import BlockStore, Slot
from .transfers import Transfers

logger = logging.getLogger("reward_lab.offload")
# Attribute of an installed block: a context in which its weights, without a LoRA, are on the device; for who runs the block in another way.
WEIGHTS_IN_USE = "weights_in_use"


@dataclass(frozen=True)
class Shared:
    """What executors have in common that never run at the same time: device slots, and the streams that fill them.

    With streams of its own each could copy into a slot that another still fills, and would hold pinned memory for a whole pass of kept activations."""

    transfers: Transfers
    slots: list[Slot]

    @classmethod
    def of(cls, knobs: Knobs, device: torch.device) -> Shared:
        return cls(Transfers(device), [Slot() for _ in range(knobs.slots)])


@dataclass(kw_only=True)
class Call:
    """One block in one pass; tensors that carry gradient are not in here."""

    index: int
    freqs: torch.Tensor
    arguments: dict[str, Any]
    is_plain: bool
    kept: Kept | None = None
    extra: tuple = ()
    before: Call | None = None


class BlockExecutor:
    """See the module's docstring.

    Attributes:
        store: the blocks' weights, for figures of what was copied.
        kept_bytes: bytes of kept activations of the pass with gradient that was made last.
        copied_gradients: how often a block's backward could not use the gradient's own memory, since somebody else held it.
    """

    def __init__(
        self,
        blocks: list[torch.nn.Module],
        knobs: Knobs,
        device: torch.device,
        is_plain: Callable[[torch.nn.Module], bool],
        quantised: Mapping[int, dict[str, QuantisedWeight]] | None = None,
        shared: Shared | None = None,
    ) -> None:
        """Args:
        is_plain: whether a block has exactly the arithmetic of `BlockArithmetic`.
        quantised: see `BlockStore`.
        shared: with other executors; by default its own.
        """
        self.blocks, self.knobs, self.device = blocks, knobs, device
        self._is_plain = [is_plain(block) for block in blocks]
        shared = Shared.of(knobs, device) if shared is None else shared
        self._transfers = shared.transfers
        self.store = BlockStore(
            blocks, shared.transfers, resident_blocks=knobs.resident_blocks, slots=shared.slots, merges_resident=knobs.merges_resident, quantised=quantised
        )
        self._forwards: list[Callable] = []
        self._last: Call | None = None
        self._backend: str | None = None
        self._rollout_backend = ""
        self.kept_bytes = self.copied_gradients = 0

    @contextmanager
    def installed(self) -> Iterator[BlockExecutor]:
        """Run the blocks through this executor; everything is put back and freed at the end, also after an error."""
        try:
            self.store.open()
            for index, block in enumerate(self.blocks):
                self._forwards.append(block.forward)
                block.forward = self._forward_of(index)
                block.__dict__[WEIGHTS_IN_USE] = partial(self.store.use, index, merge=False)
            yield self
        finally:
            for block, _ in zip(self.blocks, self._forwards, strict=False):
                del block.__dict__["forward"], block.__dict__[WEIGHTS_IN_USE]
            self._forwards = []
            self._last = None
            self.store.close()

    def _forward_of(self, index: int) -> Callable:
        def forward(x, e, freqs, context, context_img_len=None, transformer_options: Mapping = {}):  # noqa: B006 (the host's signature; never written to)
            # The first block gets a transposed view; kept and streamed copies are contiguous, and sums over another layout would differ in the last bit.
            x = x.contiguous()
            # The host changes this dictionary from block to block; a second run must see what the first one saw.
            options = dict(transformer_options)
            arguments = {"context_img_len": context_img_len, "transformer_options": options}
            is_plain = self._is_plain[index] and e.ndim == 4 and e.shape[1] == 1 and not options.get("patches")
            call = Call(index=index, freqs=freqs, arguments=arguments, is_plain=is_plain)
            if torch.is_grad_enabled():
                return self._with_gradient(call, x, e, context)
            with self.store.use(index, merge=not is_exact(), then=(index + 1) % len(self.blocks)):
                if not is_plain:
                    return self._forwards[index](x, e, freqs, context, **arguments)
                is_rollout = not is_exact() and not lora_is_off(self.blocks[index])
                return self.arithmetic(index, x, is_rollout=is_rollout).forward(x, e, freqs, context)[0]

        return forward

    def pinned(self, data: torch.Tensor) -> torch.Tensor:
        """`data` in host memory, pinned where that is possible."""
        return self._transfers.pinned(data.to("cpu"))

    def plain_forward(self, index: int) -> Callable:
        """The block's own forward; call it while its weights are in use."""
        return self._forwards[index]

    def arithmetic(self, index: int, x: torch.Tensor, *, is_rollout: bool = False) -> BlockArithmetic:
        """The block's arithmetic with the attention that was chosen for this device."""
        if self._backend is None:
            width = x.shape[-1] // self.blocks[index].self_attn.num_heads
            self._backend = attention.choose_backend(self.knobs.attention, x.device, x.dtype, width)
            self._rollout_backend = attention.choose_rollout_backend(self.knobs.rollout_attention, self._backend, x.device, x.dtype, width)
        return BlockArithmetic(self.blocks[index], self.knobs, self._backend, self._rollout_backend if is_rollout else self._backend)

    def _with_gradient(self, call: Call, x: torch.Tensor, e: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        if call.index == 0:
            self._last, self.kept_bytes = None, 0
        call.before, self._last = self._last, call
        return _Block.apply(self, call, x, e, context, *lora_parameters(self.blocks[call.index]))

    def next_of(self, call: Call) -> int | None:
        """The block that a pass with gradient needs after this one: the next, and the last one again when backward is about to begin."""
        return call.index + 1 if call.index + 1 < len(self.blocks) else None

    def run(self, call: Call, x: torch.Tensor, e: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        """The forward of a pass with gradient; keeps what backward needs in `call`."""
        with exact_form(), self.store.use(call.index, merge=False, then=self.next_of(call)):
            keep = [x]
            if call.is_plain:
                knobs = self.knobs
                out, attended, wide = self.arithmetic(call.index, x).forward(
                    x, e, call.freqs, context, keep=knobs.keep_attention, keep_wide=knobs.keep_feed_forward
                )
                if attended is not None:
                    keep += [attended.out, attended.lse]
                    call.extra = attended.extra
                if wide is not None:
                    keep.append(wide)
            else:
                out = self._forwards[call.index](x, e, call.freqs, context, **call.arguments)
            call.kept = Kept(tuple(keep), self._transfers, self.knobs.keep_place == "host")
            self.kept_bytes += call.kept.nbytes
        return out

    def pull(self, call: Call, grad: torch.Tensor, e: torch.Tensor, context: torch.Tensor, parameters: tuple[torch.Tensor, ...], needs: tuple[bool, ...]):
        """The backward: gradients of x, e, context and the parameters."""
        before = call.before
        x, *rest = call.kept.take()
        with exact_form(), self.store.use(call.index, merge=False, then=None if before is None else before.index):
            if not call.is_plain:
                return self._whole(call, grad, x, e, context, parameters, needs)
            wide = rest.pop() if self.knobs.keep_feed_forward else None
            attended = SelfAttended(out=rest[0], lse=rest[1], extra=call.extra) if rest else None
            del rest
            prefetch = (lambda: None) if before is None else before.kept.prefetch
            near = lora_parameters(self.blocks[call.index], near=True)
            *grads, found = self.arithmetic(call.index, x).backward(grad, x, e, call.freqs, context, attended, wide, needs[:3], prefetch)
        found_near = [found.of(matrix) if needed else None for matrix, needed in zip(near, needs[3:], strict=True)]
        return *grads, *self._transfers.home(found_near, parameters)

    def _whole(self, call, grad, x, e, context, parameters, needs):
        leaves = [value.detach().requires_grad_(needed) for value, needed in zip((x, e, context), needs, strict=False)]
        with torch.enable_grad():
            out = self._forwards[call.index](leaves[0], leaves[1], call.freqs, leaves[2], **call.arguments)
        values = (*leaves, *lora_parameters(self.blocks[call.index], near=True))
        wanted = [value for value, needed in zip(values, needs, strict=True) if needed]
        found = iter(torch.autograd.grad(out, wanted, grad, allow_unused=True))
        grads = [next(found) if needed else None for needed in needs]
        return *grads[:3], *self._transfers.home(grads[3:], parameters)


class _Block(torch.autograd.Function):
    """One block of a pass with gradient. LoRA masters are inputs of their own, so that they get gradients although nothing else needs any."""

    @staticmethod
    def forward(ctx, executor: BlockExecutor, call: Call, x, e, context, *parameters):
        ctx.executor, ctx.call = executor, call
        ctx.save_for_backward(e, context, *parameters)
        return executor.run(call, x, e, context)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        e, context, *parameters = ctx.saved_tensors
        # The block writes over the gradient that it is given.
        if not is_alone(grad):
            grad = grad.clone()
            ctx.executor.copied_gradients += 1
        return None, None, *ctx.executor.pull(ctx.call, grad, e, context, tuple(parameters), ctx.needs_input_grad[2:])


def lora_is_off(block: torch.nn.Module) -> bool:
    """Whether a LoRA is installed and switched off: a pass of the base, with which passes with gradient are compared; so it is no rollout."""
    forwards = (module.__dict__.get("forward") for module in block.modules())
    return any(isinstance(forward, LoraForward) and not forward.switch.is_enabled for forward in forwards)


def lora_parameters(block: torch.nn.Module, *, near: bool = False) -> list[torch.Tensor]:
    """Masters of the LoRAs in force in a block, in order; `near`: what the block computes with while it is in use."""
    found = []
    for module in block.modules():
        forward = module.__dict__.get("forward")
        if isinstance(forward, LoraForward) and forward.switch.is_enabled:
            found += forward.matrices if near else (forward.layer.down_RI, forward.layer.up_OR)
    return found

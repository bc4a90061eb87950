"""The arithmetic of one Wan block in three parts, forward and backward, so that each part's intermediates exist for a while only.

    part 1  norm, modulation, q k v, RMS norm, rotary embedding -> self-attention (out and log-sum-exp can be kept)
    part 2  output projection, gate, cross-attention
    part 3  feed-forward in token chunks; its last product runs again in backward only if the gate's gradient is wanted

Backward goes 3, 2, 1. Parts 1 and 2 run again under autograd; the feed-forward's last Linear and self-attention have their backward called directly.

Source of the formulas: Wan-Video/Wan2.1 wan/modules/model.py (Apache-2.0), in the host's order of operations, so that an fp32 forward has the host's bits.

Shapes: B batch, L video tokens, P prompt tokens, D width, N heads, K head width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.autograd.graph import get_gradient_edge
from torch.nn import functional

from ..kernels import attention
from ..kernels.lora_linear import Operands
from ..kernels.rowwise import Gated, Modulated, Rotated, pieces, rowwise, rowwise_backward
from ..lora.linears import lora_of
from .knobs import Knobs


@dataclass(frozen=True, kw_only=True)
class SelfAttended:
    """What self-attention leaves: output [B, L, D], log-sum-exp [B, N, L] and what the backend wants besides."""

    out: torch.Tensor
    lse: torch.Tensor
    extra: tuple


class Gradients:
    """Sums of gradients by parameter, over the parts and chunks of a block: in fp32, as small parts are lost in a large bf16 sum, and rounded at the end."""

    def __init__(self) -> None:
        self._sums: dict[int, torch.Tensor] = {}

    def add(self, parameter: torch.Tensor, value: torch.Tensor | None) -> None:
        if value is not None:
            value = value.to(_wide(value.dtype))
            known = self._sums.get(id(parameter))
            self._sums[id(parameter)] = value if known is None else known + value

    def of(self, parameter: torch.Tensor) -> torch.Tensor | None:
        found = self._sums.get(id(parameter))
        return None if found is None else found.to(parameter.dtype)


class BlockArithmetic:
    """One plain Wan block: self-attention, text cross-attention, feed-forward. `own_backend` is the kernel of self-attention where it differs."""

    def __init__(self, block: torch.nn.Module, knobs: Knobs, backend: str, own_backend: str = "") -> None:
        self.block, self.knobs, self.backend, self.own_backend = block, knobs, backend, own_backend or backend
        self.heads = block.self_attn.num_heads

    def modulation(self, e: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Shift, scale, gate of self-attention and of the feed-forward, [B, 1, D] each, from e [B, 1, 6, D]."""
        return (self.block.modulation.to(e.dtype).unsqueeze(0) + e).unbind(2)

    def forward(
        self, x: torch.Tensor, e: torch.Tensor, freqs: torch.Tensor, context: torch.Tensor, *, keep: bool = False, keep_wide: bool = False
    ) -> tuple[torch.Tensor, SelfAttended | None, torch.Tensor | None]:
        """Output [B, L, D]; what self-attention leaves, and the feed-forward's wide tensor before GELU [B, L, F], if they are to be kept; no gradient."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(e)
        attended = self.self_attention(x, shift1, scale1, freqs)
        y = _apply(self.block.self_attn.o, attended.out)
        if not keep:
            attended = None
        x = self.cross_attention(rowwise(Gated(), [x, y], [gate1], chunk=self.knobs.row_chunk_tokens), context)
        del y
        wide = x.new_empty((*x.shape[:2], self.block.ffn[0].out_features)) if keep_wide else None
        return self.feed_forward(x, shift2, scale2, gate2, wide), attended, wide

    def modulated_input(self, x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """What q, k and v read: one tensor for the three."""
        return rowwise(Modulated(self.block.norm1), [x], [shift, scale], chunk=self.knobs.row_chunk_tokens, room=_room(self.block.self_attn.q))

    def turned(self, q: torch.Tensor, norm: torch.nn.Module, freqs: torch.Tensor) -> torch.Tensor:
        return rowwise(Rotated(norm, self.heads), [q, freqs], chunk=self.knobs.row_chunk_tokens)

    def self_attention(self, x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor, freqs: torch.Tensor) -> SelfAttended:
        own = self.block.self_attn
        h = self.modulated_input(x, shift, scale)
        q = self.turned(_apply(own.q, h, True), own.norm_q, freqs)
        k = self.turned(_apply(own.k, h, True), own.norm_k, freqs)
        v = _apply(own.v, h, True)
        del h
        out, lse, extra = attention.forward(self._split(q), self._split(k), self._split(v), self.own_backend)
        return SelfAttended(out=_join(out), lse=lse, extra=extra)

    def after_attention(self, x: torch.Tensor, out: torch.Tensor, gate: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        """The stream after output projection, gate and cross-attention."""
        y = _apply(self.block.self_attn.o, out)
        return self.cross_attention(rowwise(Gated(), [x, y], [gate], chunk=self.knobs.row_chunk_tokens), context)

    def cross_attention(self, x: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        cross, chunk = self.block.cross_attn, self.knobs.row_chunk_tokens
        h = rowwise(self.block.norm3, [x], chunk=chunk, room=_room(cross.q))
        q = _apply(cross.q, h, True)
        del h
        q = rowwise(cross.norm_q, [q], chunk=chunk)
        k, v = cross.norm_k(_apply(cross.k, context)), _apply(cross.v, context)
        joined = _join(attention.Attention.apply(self._split(q), self._split(k), self._split(v), self.backend, self.knobs.head_groups))
        del q, k, v
        return x + _apply(cross.o, joined)

    def feed_forward(
        self, x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor, gate: torch.Tensor, wide: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Part 3; what GELU gets is written to `wide`."""
        out = torch.empty_like(x)
        for start, stop in pieces(x.shape[1], self.knobs.ffn_chunk_tokens):
            part = x[:, start:stop]
            before = _apply(self.block.ffn[0], self._feed_input(part, shift, scale), True)
            if wide is not None:
                wide[:, start:stop] = before
            y = _apply(self.block.ffn[2], _gelu(before))
            del before
            torch.addcmul(part, y, gate, out=out[:, start:stop])
        return out

    def _feed_input(self, x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return rowwise(Modulated(self.block.norm2), [x], [shift, scale], room=_room(self.block.ffn[0]))

    def backward(
        self,
        grad: torch.Tensor,
        x: torch.Tensor,
        e: torch.Tensor,
        freqs: torch.Tensor,
        context: torch.Tensor,
        attended: SelfAttended | None,
        wide: torch.Tensor | None,
        needs: tuple[bool, bool, bool],
        memory_is_free: Callable[[], None] = lambda: None,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None, Gradients]:
        """Gradients of x, e and context (as `needs` says), and of the LoRAs.

        Args:
            grad: of the output; its memory is used for the result.
            attended: as kept; None: self-attention runs again.
            wide: as kept; None: ffn.0 runs again.
            memory_is_free: called once the largest tensors are gone.
        """
        found = Gradients()
        modulation = tuple(part.detach().requires_grad_(needs[1]) for part in self.modulation(e))
        if attended is None:
            with torch.no_grad():
                attended = self.self_attention(x, modulation[0], modulation[1], freqs)
        grad = grad.contiguous()
        out_leaf, x_leaf = attended.out.detach().requires_grad_(), x.detach().requires_grad_()
        context_leaf = context.detach().requires_grad_(needs[2])
        with torch.enable_grad():
            middle = self.after_attention(x_leaf, out_leaf, modulation[2], context_leaf)
        # Backward through part 2 asks for the graph only; its result is not needed beyond part 3.
        edge, middle = get_gradient_edge(middle), middle.detach()
        self._feed_forward_backward(grad, middle, modulation[3:], wide, found)
        del middle, wide
        parameters = _parameters(self.block.self_attn.o, self.block.cross_attn)
        grad_x, grad_out = _pull(edge, grad, [x_leaf, out_leaf], [modulation[2], context_leaf, *parameters], found)
        # Whoever called holds `grad` to the end; so it carries on what is needed, and the other copy goes.
        grad.copy_(grad_x)
        del edge, grad_x, x_leaf, out_leaf
        more = self._attention_backward(grad_out, x, modulation, freqs, attended, needs, found, memory_is_free)
        grad_e = torch.stack([_or_zero(found.of(part), part) for part in modulation], dim=2) if needs[1] else None
        return grad.add_(more) if needs[0] else None, grad_e, found.of(context_leaf), found

    def _attention_backward(self, grad_out, x, modulation, freqs, attended, needs, found, memory_is_free):
        """Part 1 backward; q, k and v one after the other, so that each is gone before the next needs room."""
        own = self.block.self_attn
        x_leaf = x.detach().requires_grad_(needs[0])
        parameters = _parameters(own.q, own.k, own.v)
        if not (needs[0] or needs[1] or any(parameter.requires_grad for parameter in parameters)):
            return None
        with torch.enable_grad():
            h = self.modulated_input(x_leaf, modulation[0], modulation[1])
            h_leaf = h.detach().requires_grad_(h.requires_grad)
            q_plain, k_plain, v = (_apply(linear, h_leaf, True) for linear in (own.q, own.k, own.v))
        with torch.no_grad():
            q, k = self.turned(q_plain, own.norm_q, freqs), self.turned(k_plain, own.norm_k, freqs)
        # Overwritten by their gradients. `data` has a version counter of its own: the graph of v is still needed, its values are not.
        values = [self._split(value) for value in (q, k, v.data)]
        grads = attention.backward(
            self._split(grad_out), *values, self._split(attended.out), attended.lse, attended.extra, self.backend, self.knobs.head_groups,
            into=values,
        )  # fmt: skip
        del grad_out, attended, values, q, k
        grad_q, grad_k, grad_v = (_join(value) for value in grads)
        del grads
        grad_h = self._one_backward(v, grad_v, h_leaf, own.v, None, found)
        del v, grad_v
        memory_is_free()
        waiting = [(q_plain, grad_q, own.q, own.norm_q), (k_plain, grad_k, own.k, own.norm_k)]
        del q_plain, grad_q, k_plain, grad_k
        while waiting:
            plain, grad, linear, norm = waiting.pop()
            grad = rowwise_backward(Rotated(norm, self.heads), plain.detach(), freqs, grad, self.knobs.row_chunk_tokens)
            grad_h = self._one_backward(plain, grad, h_leaf, linear, grad_h, found)
        del plain, grad
        return _pull(h, grad_h, [x_leaf], list(modulation[:2]), found)[0] if h.requires_grad else None

    def _one_backward(self, output, grad, h_leaf, linear, total, found):
        """Backward of one of q, k, v; the gradient of their common input so far."""
        if not output.requires_grad:
            return total
        (more,) = _pull(output, grad, [h_leaf], _parameters(linear), found)
        return more if total is None or more is None else total.add_(more)

    def _feed_forward_backward(
        self, grad: torch.Tensor, x: torch.Tensor, modulation: tuple[torch.Tensor, ...], wide: torch.Tensor | None, found: Gradients
    ) -> None:
        """Turn `grad` from that of part 3's output into that of its input x, chunk by chunk in its own memory."""
        shift, scale, gate = modulation
        first, last = self.block.ffn[0], self.block.ffn[2]
        for start, stop in pieces(x.shape[1], self.knobs.ffn_chunk_tokens):
            leaf, part = x[:, start:stop].detach().requires_grad_(), grad[:, start:stop]
            with torch.enable_grad():
                h = self._feed_input(leaf, shift, scale)
            with torch.no_grad():
                before = _apply(first, h.detach(), True) if wide is None else wide[:, start:stop]
                inner = _gelu(before)
                if gate.requires_grad:
                    found.add(gate, (part * _apply(last, inner)).sum(1, keepdim=True, dtype=_wide(part.dtype)))
            grad_wide = _linear_backward(last, part * gate.detach(), inner, found)
            del inner
            grad_wide = torch.ops.aten.gelu_backward(grad_wide, before, approximate="tanh")
            del before
            grad_h = _linear_backward(first, grad_wide, h.detach(), found)
            del grad_wide
            (more,) = _pull(h, grad_h, [leaf], [shift, scale], found)
            part += more

    def _split(self, value: torch.Tensor) -> torch.Tensor:
        return value.unflatten(-1, (self.heads, -1)).transpose(1, 2)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _gelu(x: torch.Tensor) -> torch.Tensor:
    return functional.gelu(x, approximate="tanh")


def _join(value_BNLK: torch.Tensor) -> torch.Tensor:
    return value_BNLK.transpose(1, 2).flatten(2)


def _room(linear: torch.nn.Module) -> int:
    """Room that rows need before this Linear: its LoRA's rank, where its weight lies in a buffer."""
    lora = lora_of(linear)
    return 0 if lora is None or lora.buffer is None else lora.layer.down_RI.shape[0]


def _apply(linear: torch.nn.Module, x: torch.Tensor, has_room: bool = False) -> torch.Tensor:
    """The Linear as it is called now; rows with room are handed on to the exact form."""
    lora = lora_of(linear)
    if has_room and lora is not None and lora.buffer is not None and not lora.is_merged_in_place:
        return lora.exact(x, has_room=True)
    return linear(x)


def _linear_backward(linear: torch.nn.Module, grad: torch.Tensor, x: torch.Tensor, found: Gradients) -> torch.Tensor:
    """dX of a Linear without its forward; adds the LoRA's gradients to `found`."""
    lora = lora_of(linear)
    if lora is None:
        return grad @ linear.weight.to(grad.dtype)
    matrices = lora.matrices
    operands = Operands(linear.weight.to(grad.dtype), None, *matrices, lora.layer.factor, lora.buffer)
    hidden = x.reshape(-1, x.shape[-1]) @ operands.down.t()
    grad_x, *grads = operands.backward(grad, x, hidden, (True, *(matrix.requires_grad for matrix in matrices)))
    for matrix, value in zip(matrices, grads, strict=True):
        found.add(matrix, None if value is None else value.to(matrix.device, matrix.dtype))
    return grad_x.view(x.shape)


def _parameters(*modules: torch.nn.Module) -> list[torch.Tensor]:
    """Matrices of the LoRAs in force within the modules."""
    loras = (lora_of(linear) for module in modules for linear in module.modules())
    return [matrix for lora in loras if lora is not None for matrix in lora.matrices]


def _pull(outputs, grads, inputs: list[torch.Tensor], summed: list[torch.Tensor], found: Gradients) -> list[torch.Tensor | None]:
    """Gradients of `inputs`; those of `summed` go to `found`. Tensors that need none are passed over."""
    wanted = [value for value in (*inputs, *summed) if value.requires_grad]
    values = iter(torch.autograd.grad(outputs, wanted, grads, allow_unused=True) if wanted else ())
    results = [next(values) if value.requires_grad else None for value in inputs]
    for value in summed:
        if value.requires_grad:
            found.add(value, next(values))
    return results


def _or_zero(value: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(like) if value is None else value

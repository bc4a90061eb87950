"""The weights of a model's blocks: some stay on the device, the others wait on the host and rotate through device slots.

A slot holds one block in the form in which it is used: each Linear with a LoRA inside its buffer (`kernels.lora_linear.rows`), quantised weights
dequantised, and for passes without gradient the LoRA merged in. While a block is in use its parameters point into its slot; afterwards they point to
their masters again, so that a failure at any instant leaves the model as it was.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from ..kernels.lora_linear import QuantisedWeight
from ..kernels.lora_linear.rows import weight_buffer
from ..lora.linears import LoraForward, lora_of
from .transfers import Transfers


@dataclass(kw_only=True)
class Slot:
    """A device copy of one block; `index` and `owner` say of which, None of none. Models of one size can share slots."""

    index: int | None = None
    owner: object = None
    views: dict[str, torch.Tensor] = field(default_factory=dict)
    buffers: dict[str, torch.Tensor] = field(default_factory=dict)
    raw: dict[str, torch.Tensor] = field(default_factory=dict)
    ready: object = None
    free: object = None
    used_at: int = 0


class BlockStore:
    """See the module's docstring. Use it as: `open`, `use` for each block, `close`."""

    def __init__(
        self,
        blocks: list[torch.nn.Module],
        transfers: Transfers,
        *,
        resident_blocks: int,
        slots: list[Slot],
        merges_resident: bool = True,
        quantised: Mapping[int, Mapping[str, QuantisedWeight]] | None = None,
    ) -> None:
        """Args:
        blocks: their parameters are the masters.
        slots: may be shared with other stores.
        quantised: stored weights by block and path (`ffn.0.weight`); these blocks always go through slots.
        """
        self._blocks = blocks
        self._transfers = transfers
        self._quantised = quantised or {}
        count = len(blocks) if resident_blocks < 0 else min(resident_blocks, len(blocks))
        self._resident = {index for index in range(count) if index not in self._quantised}
        self._masters: dict[int, dict[str, torch.Tensor]] = {}
        self._merges_resident = merges_resident
        self._slots = slots
        self.copied_bytes = 0

    def open(self) -> None:
        """Put resident weights on the device, the others into pinned host memory."""
        is_near = self._transfers.device.type == "cpu"
        for index, block in enumerate(self._blocks):
            is_resident = index in self._resident
            for module in block.modules():
                if isinstance(module, torch.nn.Linear) and not (is_resident and self._merges_resident):
                    module.__dict__[LoraForward.NO_COPY] = True
            masters = {}
            for path, parameter in list(block.named_parameters()):
                if path in self._quantised.get(index, {}):
                    continue
                if is_resident:
                    data = parameter.data.to(self._transfers.device)
                else:
                    data = parameter.data if is_near else self._transfers.pinned(parameter.data.to("cpu"))
                masters[path] = data
                _point(block, path, parameter, data)
            self._masters[index] = masters

    def close(self) -> None:
        """Drop slots and marks; the weights stay where their masters are."""
        self._transfers.stop()
        for slot in self._slots:
            if slot.owner is self:
                slot.__dict__.update(Slot().__dict__)
        for index, block in enumerate(self._blocks):
            self._unbind(index)
            for module in block.modules():
                module.__dict__.pop(LoraForward.NO_COPY, None)

    def is_streamed(self, index: int) -> bool:
        return index not in self._resident

    def prefetch(self, index: int) -> None:
        """Start bringing a block, if there is a slot that is not in use."""
        if index in self._resident or self._holding(index) is not None or len(self._slots) < 2:
            return
        self._fill(self._victim(), index)

    @contextmanager
    def use(self, index: int, *, merge: bool, then: int | None = None) -> Iterator[None]:
        """The block's weights on the device for the time of the context.

        Args:
            merge: no gradient is needed: merge LoRAs whose switch asks for it.
            then: the block that comes next; its transfer starts now.
        """
        if index in self._resident:
            if then is not None:
                self.prefetch(then)
            yield
            return
        slot = self._holding(index)
        if slot is None or not self._fits(slot, index):
            slot = slot or self._victim()
            self._fill(slot, index)
        slot.used_at = 1 + max(other.used_at for other in self._slots)
        self._transfers.wait(slot.ready)
        was_merged = False
        try:
            was_merged = self._bind(slot, index, merge)
            if then is not None and then != index:
                self.prefetch(then)
            yield
        finally:
            self._unbind(index)
            slot.free = self._transfers.mark_compute()
            if was_merged:
                slot.index = None

    def _holding(self, index: int) -> Slot | None:
        return next((slot for slot in self._slots if slot.index == index and slot.owner is self), None)

    def _victim(self) -> Slot:
        """The slot whose last use is longest ago."""
        return min(self._slots, key=lambda slot: (slot.index is not None, slot.used_at))

    def _fits(self, slot: Slot, index: int) -> bool:
        """Whether a LoRA was installed, removed or changed in rank since the slot was filled."""
        return all((slot.buffers[path].shape if path in slot.buffers else None) == shape for path, shape in self._buffer_shapes(index).items())

    def _buffer_shapes(self, index: int) -> dict[str, tuple[int, int] | None]:
        shapes = {}
        for path, linear in self._linears(index).items():
            forward = linear.__dict__.get("forward")
            rank = forward.layer.down_RI.shape[0] if isinstance(forward, LoraForward) else 0
            shapes[f"{path}.weight"] = (linear.out_features + rank, linear.in_features + rank) if rank else None
        return shapes

    def _linears(self, index: int) -> dict[str, torch.nn.Linear]:
        return {path: module for path, module in self._blocks[index].named_modules() if isinstance(module, torch.nn.Linear)}

    def _fill(self, slot: Slot, index: int) -> None:
        self._transfers.in_after(slot.free)
        slot.index = None
        shapes = self._buffer_shapes(index)
        for path, master in self._masters[index].items():
            target = self._target(slot, path, tuple(master.shape), master.dtype, shapes.get(path))
            self._transfers.start_copy(target, master)
            self.copied_bytes += master.numel() * master.element_size()
        for path, weight in self._quantised.get(index, {}).items():
            dtype = next(iter(self._masters[index].values())).dtype
            self._target(slot, path, weight.shape, dtype, shapes.get(path))
            if path not in slot.raw or slot.raw[path].shape != weight.data.shape:
                slot.raw[path] = torch.empty_like(weight.data, device=self._transfers.device)
                self._transfers.in_after(self._transfers.mark_compute())
            self._transfers.start_copy(slot.raw[path], weight.data)
            self.copied_bytes += weight.nbytes
        slot.index, slot.owner = index, self
        slot.ready = self._transfers.mark_in()

    def _target(self, slot: Slot, path: str, shape: tuple[int, ...], dtype: torch.dtype, buffer_shape: tuple[int, int] | None) -> torch.Tensor:
        """Where a parameter lies in the slot; made anew when its shape, type or LoRA rank changed."""
        view, buffer = slot.views.get(path), slot.buffers.get(path)
        if view is not None and view.shape == shape and view.dtype == dtype and (None if buffer is None else tuple(buffer.shape)) == buffer_shape:
            return view
        slot.buffers.pop(path, None)
        if buffer_shape is None:
            slot.views[path] = torch.empty(shape, dtype=dtype, device=self._transfers.device)
        else:
            slot.buffers[path] = weight_buffer(*shape, buffer_shape[0] - shape[0], dtype=dtype, device=self._transfers.device)
            slot.views[path] = slot.buffers[path][: shape[0], : shape[1]]
        # New memory may still be in use by what was computed in it before.
        self._transfers.in_after(self._transfers.mark_compute())
        return slot.views[path]

    def _bind(self, slot: Slot, index: int, merge: bool) -> bool:
        """Let the parameters point into the slot; merge or dequantise. Returns whether the slot's weights now hold a LoRA."""
        for path, parameter in list(self._blocks[index].named_parameters()):
            _point(self._blocks[index], path, parameter, slot.views[path])
        merged_any = False
        for path, linear in self._linears(index).items():
            name = f"{path}.weight"
            stored = self._quantised.get(index, {}).get(name)
            base = None if stored is None else QuantisedWeight(data=slot.raw[name], kind=stored.kind, scale=stored.scale, shape=stored.shape)
            lora = lora_of(linear)
            is_merged = merge and lora is not None and lora.switch.is_merging
            if is_merged:
                lora.merge(slot.views[name], slot.views[name] if base is None else base)
                merged_any = True
            elif base is not None:
                slot.views[name].copy_(base.dequantised(slot.views[name].dtype))
            if lora is not None:
                lora.is_merged_in_place, lora.buffer = is_merged, slot.buffers.get(name)
        return merged_any

    def _unbind(self, index: int) -> None:
        block = self._blocks[index]
        for path, parameter in list(block.named_parameters()):
            if index in self._masters and path in self._masters[index]:
                _point(block, path, parameter, self._masters[index][path])
            elif path in self._quantised.get(index, {}):
                _point(block, path, parameter, torch.empty(parameter.shape, dtype=parameter.dtype, device="meta"))
        for linear in self._linears(index).values():
            forward = linear.__dict__.get("forward")
            if isinstance(forward, LoraForward):
                forward.is_merged_in_place, forward.buffer = False, None


def place(module: torch.nn.Module, device: torch.device, leave: str) -> None:
    """Move every parameter and buffer to `device`, except those whose path begins with `leave`; one by one, so that nothing is there twice."""
    for path, parameter in list(module.named_parameters()):
        if not path.startswith(leave) and parameter.device != device:
            _point(module, path, parameter, parameter.data.to(device))
    for path, buffer in list(module.named_buffers()):
        if not path.startswith(leave) and buffer.device != device:
            owner, _, name = path.rpartition(".")
            module.get_submodule(owner)._buffers[name] = buffer.to(device)


def _point(block: torch.nn.Module, path: str, parameter: torch.nn.Parameter, data: torch.Tensor) -> None:
    """Let a parameter stand for other memory. `data` of another device type cannot be assigned, so then the module gets a new parameter."""
    if parameter.device.type == data.device.type:
        parameter.data = data
        return
    owner, _, name = path.rpartition(".")
    block.get_submodule(owner)._parameters[name] = torch.nn.Parameter(data, requires_grad=False)

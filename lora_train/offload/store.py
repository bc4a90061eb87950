"""The weights of a model's blocks: some stay on the device, the others wait on the host and rotate through device slots.

A slot holds one block in the form in which it is used: each Linear with a LoRA inside its buffer (`kernels.lora_linear.rows`), quantised weights
dequantised, and for passes without gradient the LoRA merged in. While a block is in use it has the slot's parameters; afterwards it has its own again, by
nothing but assignments, so that a failure at any instant leaves the model as it was.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace

import torch

from ..kernels.lora_linear import QuantisedWeight, dequantise_into
from ..kernels.lora_linear.rows import weight_buffer
from ..lora.linears import LoraForward, lora_of
from .transfers import Transfers


@dataclass(kw_only=True)
class Slot:
    """A device copy of one block; `index` and `owner` say of which, None of none. Models of one size can share slots.

    `raw` are quantised weights as stored; `is_unpacked`: `views` hold their numbers, with no LoRA inside. `masters` are copies of LoRA masters that live on
    the host, of the `versions` that are told.
    """

    index: int | None = None
    owner: object = None
    views: dict[str, torch.nn.Parameter] = field(default_factory=dict)
    buffers: dict[str, torch.Tensor] = field(default_factory=dict)
    raw: dict[str, torch.Tensor] = field(default_factory=dict)
    is_unpacked: bool = False
    masters: dict[str, tuple[torch.nn.Parameter, torch.nn.Parameter]] = field(default_factory=dict)
    versions: dict[str, tuple] = field(default_factory=dict)
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
        quantised: Mapping[int, dict[str, QuantisedWeight]] | None = None,
    ) -> None:
        """Args:
        blocks: their parameters are the masters.
        transfers, slots: may be shared with other stores, the one with the other.
        quantised: stored weights by block and path (`ffn.0.weight`). They stay stored, on the host or, of resident blocks, on the device, and are
            unpacked in a slot where their block runs. Entries are replaced by those in pinned memory.
        """
        self._blocks = blocks
        self._linears = [{path: module for path, module in block.named_modules() if isinstance(module, torch.nn.Linear)} for block in blocks]
        self._transfers = transfers
        self._quantised = quantised or {}
        count = len(blocks) if resident_blocks < 0 else min(resident_blocks, len(blocks))
        # Blocks that are used where they lie, and quantised ones whose stored bytes are on the device.
        self._resident = {index for index in range(count) if index not in self._quantised}
        self._near = {index for index in range(count) if index in self._quantised}
        self._stored: dict[int, dict[str, QuantisedWeight]] = {}
        # A block's own parameters: masters, and those without memory that stand for stored weights.
        self._own: dict[int, dict[str, torch.nn.Parameter]] = {}
        self._merges_resident = merges_resident
        self._slots = slots
        self.brings_masters = transfers.device.type != "cpu"
        self.copied_bytes = 0

    def open(self) -> None:
        """Put resident weights on the device, the others into pinned host memory."""
        is_near = self._transfers.device.type == "cpu"
        for index, block in enumerate(self._blocks):
            is_resident = index in self._resident
            for module in block.modules():
                if isinstance(module, torch.nn.Linear) and not (is_resident and self._merges_resident):
                    module.__dict__[LoraForward.NO_COPY] = True
            for path, parameter in list(block.named_parameters()):
                if path in self._quantised.get(index, {}):
                    continue
                if is_resident:
                    data = parameter.data.to(self._transfers.device)
                else:
                    data = parameter.data if is_near else self._transfers.pinned(parameter.data.to("cpu"))
                _put(block, path, torch.nn.Parameter(data, requires_grad=False))
            self._own[index] = dict(block.named_parameters())
            self._stored[index] = {path: self._placed(index, path) for path in self._quantised.get(index, {})}

    def _placed(self, index: int, path: str) -> QuantisedWeight:
        """A stored weight where it waits: on the device, or in pinned memory, which takes the place of the memory it was read into."""
        weight = self._quantised[index][path]
        if index in self._near:
            return replace(weight, data=weight.data.to(self._transfers.device))
        if self._transfers.device.type != "cpu":
            weight = self._quantised[index][path] = replace(weight, data=self._transfers.pinned(weight.data))
        return weight

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
        self._stored = {}

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
            # Rollouts use merged copies of resident weights.
            with nullcontext() if merge and self._merges_resident else self._masters_beside_resident(index):
                if then is not None:
                    self.prefetch(then)
                yield
            return
        slot = self._holding(index)
        if slot is None or not self._fits(slot, index):
            slot = slot or self._victim()
            self._fill(slot, index)
        elif self._bring_masters(slot, index):
            slot.ready = self._transfers.mark_in()
        slot.used_at = 1 + max(other.used_at for other in self._slots)
        self._transfers.wait(slot.ready)
        is_spoilt = True
        try:
            is_spoilt = self._bind(slot, index, merge)
            if then is not None and then != index:
                self.prefetch(then)
            yield
        finally:
            self._unbind(index)
            slot.free = self._transfers.mark_compute()
            if is_spoilt:
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
        for path, linear in self._linears[index].items():
            forward = linear.__dict__.get("forward")
            rank = forward.layer.down_RI.shape[0] if isinstance(forward, LoraForward) else 0
            shapes[f"{path}.weight"] = (linear.out_features + rank, linear.in_features + rank) if rank else None
        return shapes

    def _fill(self, slot: Slot, index: int) -> None:
        self._transfers.in_after(slot.free)
        # A block that was brought for nothing may still be on its way into memory that is given up here, and that the computation gets next.
        self._transfers.wait(slot.ready)
        slot.index = None
        shapes = self._buffer_shapes(index)
        for path, master in self._masters(index).items():
            target = self._target(slot, path, tuple(master.shape), master.dtype, shapes.get(path))
            self._transfers.start_copy(target, master)
            self.copied_bytes += master.numel() * master.element_size()
        for path, weight in self._stored[index].items():
            self._target(slot, path, weight.shape, self._own[index][path].dtype, shapes.get(path))
            if index in self._near:
                slot.raw.pop(path, None)
                continue
            if path not in slot.raw or slot.raw[path].shape != weight.data.shape or slot.raw[path].dtype != weight.data.dtype:
                slot.raw[path] = torch.empty_like(weight.data, device=self._transfers.device)
                self._transfers.in_after(self._transfers.mark_compute())
            self._transfers.start_copy(slot.raw[path], weight.data)
            self.copied_bytes += weight.nbytes
        slot.versions = {}
        self._bring_masters(slot, index)
        slot.index, slot.owner, slot.is_unpacked = index, self, not self._stored[index]
        slot.ready = self._transfers.mark_in()

    def _far(self, index: int) -> dict[str, LoraForward]:
        """LoRAs of a block whose masters live elsewhere than its weights."""
        forwards = {path: linear.__dict__.get("forward") for path, linear in self._linears[index].items()} if self.brings_masters else {}
        device = self._transfers.device.type
        return {
            path: forward for path, forward in forwards.items()
            if isinstance(forward, LoraForward) and (forward.layer.up_OR.device.type != device or device == "cpu")
        }  # fmt: skip

    def _bring_masters(self, slot: Slot, index: int) -> bool:
        """Start copies of a block's masters into the slot, if they changed since the last time; whether there were any."""
        is_new = False
        for path, forward in self._far(index).items():
            masters = (forward.layer.down_RI, forward.layer.up_OR)
            version = (forward, *(master._version for master in masters), *(master.requires_grad for master in masters))
            if slot.versions.get(path) == version:
                continue
            if not is_new:
                self._transfers.in_after(slot.free)
            known = slot.masters.get(path)
            if known is None or any(one.shape != other.shape or one.requires_grad != other.requires_grad for one, other in zip(known, masters, strict=True)):
                known = slot.masters[path] = tuple(self._beside(master) for master in masters)
                self._transfers.in_after(self._transfers.mark_compute())
            for target, master in zip(known, masters, strict=True):
                self._transfers.start_copy(target.data, master.data)
            slot.versions[path], is_new = version, True
        return is_new

    def _beside(self, master: torch.nn.Parameter) -> torch.nn.Parameter:
        return torch.nn.Parameter(torch.empty_like(master.data, device=self._transfers.device), requires_grad=master.requires_grad)

    @contextmanager
    def _masters_beside_resident(self, index: int) -> Iterator[None]:
        """The same for a block that has no slot: for the time of the context."""
        far = self._far(index)
        try:
            for forward in far.values():
                near = []
                for master in (forward.layer.down_RI, forward.layer.up_OR):
                    near.append(self._beside(master))
                    near[-1].data.copy_(master.data, non_blocking=True)
                forward.near = tuple(near)
            yield
        finally:
            for forward in far.values():
                forward.near = None

    def _masters(self, index: int) -> dict[str, torch.nn.Parameter]:
        return {path: parameter for path, parameter in self._own[index].items() if path not in self._stored[index]}

    def _target(self, slot: Slot, path: str, shape: tuple[int, ...], dtype: torch.dtype, buffer_shape: tuple[int, int] | None) -> torch.Tensor:
        """Where a parameter lies in the slot; made anew when its shape, type or LoRA rank changed."""
        view, buffer = slot.views.get(path), slot.buffers.get(path)
        if view is not None and view.shape == shape and view.dtype == dtype and (None if buffer is None else tuple(buffer.shape)) == buffer_shape:
            return view
        slot.buffers.pop(path, None)
        if buffer_shape is None:
            view = torch.empty(shape, dtype=dtype, device=self._transfers.device)
        else:
            slot.buffers[path] = weight_buffer(*shape, buffer_shape[0] - shape[0], dtype=dtype, device=self._transfers.device)
            view = slot.buffers[path][: shape[0], : shape[1]]
        slot.views[path] = torch.nn.Parameter(view, requires_grad=False)
        # New memory may still be in use by what was computed in it before.
        self._transfers.in_after(self._transfers.mark_compute())
        return slot.views[path]

    def _bind(self, slot: Slot, index: int, merge: bool) -> bool:
        """Let the parameters point into the slot; merge or unpack. Returns whether the slot has to be filled again before its next use."""
        block, is_unpacked = self._blocks[index], slot.is_unpacked
        # Until all of it is done the slot holds nothing that could be used again.
        slot.index, slot.is_unpacked = None, False
        for path in self._own[index]:
            _put(block, path, slot.views[path])
        is_spoilt = merged_stored = False
        for path, linear in self._linears[index].items():
            name = f"{path}.weight"
            base = self._stored[index].get(name)
            if base is not None and name in slot.raw:
                base = replace(base, data=slot.raw[name])
            if path in slot.masters and slot.versions.get(path):
                linear.__dict__["forward"].near = slot.masters[path]
            lora = lora_of(linear)
            is_merged = merge and lora is not None and lora.switch.is_merging
            if is_merged:
                lora.merge(slot.views[name], slot.views[name] if base is None else base)
                is_spoilt, merged_stored = is_spoilt or base is None, merged_stored or base is not None
            elif base is not None and not is_unpacked:
                dequantise_into(slot.views[name], base)
            if lora is not None:
                lora.is_merged_in_place, lora.buffer = is_merged, slot.buffers.get(name)
        slot.index, slot.is_unpacked = index, not merged_stored
        return is_spoilt

    def _unbind(self, index: int) -> None:
        for path, parameter in self._own.get(index, {}).items():
            _put(self._blocks[index], path, parameter)
        for linear in self._linears[index].values():
            forward = linear.__dict__.get("forward")
            if isinstance(forward, LoraForward):
                forward.is_merged_in_place, forward.buffer, forward.near = False, None, None


def place(module: torch.nn.Module, device: torch.device, leave: str) -> None:
    """Move every parameter and buffer to `device`, except those whose path begins with `leave`; one by one, so that nothing is there twice."""
    for path, parameter in list(module.named_parameters()):
        if not path.startswith(leave) and parameter.device != device:
            _put(module, path, torch.nn.Parameter(parameter.data.to(device), requires_grad=False))
    for path, buffer in list(module.named_buffers()):
        if not path.startswith(leave) and buffer.device != device:
            owner, _, name = path.rpartition(".")
            module.get_submodule(owner)._buffers[name] = buffer.to(device)


def _put(module: torch.nn.Module, path: str, parameter: torch.nn.Parameter) -> None:
    """Give the module below `path` another parameter; an assignment and no operation on tensors."""
    owner, _, name = path.rpartition(".")
    module.get_submodule(owner)._parameters[name] = parameter

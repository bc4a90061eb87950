"""Executors that share slots, on a card whose copies end as late as they may: into memory that is still there, and in the order in which it is used."""

from __future__ import annotations

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from reward_lab.lora_train.kernels.lora_linear.rows import weight_buffer
from reward_lab.lora_train.offload.executor import Shared
from reward_lab.lora_train.offload.knobs import Knobs
from reward_lab.lora_train.offload.store import BlockStore
from reward_lab.lora_train.offload.transfers import Transfers

CPU = torch.device("cpu")


class LateCard(Transfers):
    """Copies to the device wait in the order of their stream until somebody waits for them; those of other streams may end at that moment as well, or at any
    later one, and do so then. As on a card, nothing keeps the memory alive that a copy goes to."""

    streams: list[LateCard] = []

    def __init__(self, device):
        super().__init__(device)
        self.under_way, self.done = [], 0
        self.streams.append(self)

    def start_copy(self, target, source, after=None):
        assert after is None
        self.under_way.append((StorageWeakRef(target.untyped_storage()), target.storage_offset(), target.size(), target.stride(), source))

    def mark_in(self):
        return self, self.done + len(self.under_way)

    def wait(self, mark):
        if mark is None:
            return
        stream, count = mark
        stream.end(count - stream.done)
        for other in self.streams:
            if other is not stream:
                other.end(len(other.under_way))

    def in_after(self, mark):
        """Computation is over when the program goes on; a mark of another stream orders the copies behind it."""
        if mark is not None:
            self.wait(mark)

    def end(self, count):
        for reference, *layout, source in self.under_way[: max(0, count)]:
            assert not reference.expired(), "a copy goes into memory that was given up"
            storage = torch.UntypedStorage._new_with_weak_ptr(reference.cdata)
            torch.empty(0, dtype=source.dtype).set_(storage, *layout).copy_(source)
        del self.under_way[: max(0, count)]
        self.done += max(0, count)


@pytest.fixture
def late(monkeypatch):
    from reward_lab.lora_train.offload import executor

    monkeypatch.setattr(LateCard, "streams", [])
    monkeypatch.setattr(executor, "Transfers", LateCard)


def stores(shared, widths):
    """One store for each width, of three blocks with numbers that tell them apart."""
    made = []
    for number, width in enumerate(widths):
        blocks = [torch.nn.Sequential(torch.nn.Linear(width, width)).requires_grad_(False) for _ in range(3)]
        for index, block in enumerate(blocks):
            block[0].weight.fill_(10 * number + index)
        made.append((blocks, BlockStore(blocks, shared.transfers, resident_blocks=0, slots=shared.slots)))
        made[-1][1].open()
    return made


def passed(blocks, store):
    """A pass over all blocks, each bringing the next one and the last one the first; the numbers that were there."""
    seen = []
    for index, block in enumerate(blocks):
        with store.use(index, merge=False, then=(index + 1) % len(blocks)):
            seen += block[0].weight.unique().tolist()
    return seen


@pytest.mark.parametrize("widths", [(4, 4), (4, 6)], ids=["alike", "unlike"])
@pytest.mark.parametrize("slots", [2, 3])
def test_a_block_that_was_brought_for_nothing_spoils_no_other(late, widths, slots):
    """The last block of a pass brings the first; where the other expert goes on, that one's block takes the slot, or the memory."""
    high, low = stores(Shared.of(Knobs(slots=slots), CPU), widths)
    for _ in range(3):
        assert passed(*high) == [0, 1, 2]
        assert passed(*low) == [10, 11, 12]


def test_a_new_rank_waits_for_the_copy_under_way(late):
    """A LoRA of another rank is installed while its block is on its way: the buffer is made anew, and the old one must not be written to afterwards."""
    ((blocks, store),) = stores(Shared.of(Knobs(slots=2), CPU), (4,))
    store.prefetch(0)
    (slot,) = (slot for slot in store._slots if slot.index == 0)
    store._buffer_shapes = lambda index: {"0.weight": (6, 6)}
    assert passed(blocks, store) == [0, 1, 2]
    assert slot.buffers["0.weight"].shape == weight_buffer(4, 4, 2, dtype=torch.float32, device=CPU).shape


def test_memory_of_kept_activations_serves_all_executors():
    """Two experts in training take turns; pinned memory for one of them is enough for both."""
    from reward_lab.lora_train.offload.executor import BlockExecutor

    shared = Shared.of(Knobs(), CPU)
    first, second = (BlockExecutor([], Knobs(), CPU, bool, shared=shared) for _ in range(2))
    assert first._transfers is second._transfers

"""Copies between host and device: what happens where the system refuses pinned memory, and where a card no longer answers."""

from __future__ import annotations

import logging

import pytest
import torch

from reward_lab.lora_train.offload.store import BlockStore, Slot
from reward_lab.lora_train.offload.transfers import Transfers


def test_refused_pinned_memory_becomes_pageable_with_one_warning(monkeypatch, caplog):
    transfers, empty = Transfers(torch.device("cpu")), torch.empty
    transfers.can_pin = True  # as on a card

    def refuse(*args, pin_memory=False, **kwargs):
        if pin_memory:
            raise RuntimeError("CUDA error: out of memory (cudaHostAlloc)")
        return empty(*args, **kwargs)

    monkeypatch.setattr(torch, "empty", refuse)
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda self: False)
    first, second = torch.arange(6.0), torch.arange(3.0)
    with caplog.at_level(logging.WARNING, logger="reward_lab.offload"):
        assert transfers.pinned(first) is first and transfers.pinned(second) is second
        made = transfers.host_like(first)
    assert made.shape == first.shape and made.device.type == "cpu" and not transfers.can_pin
    assert len(caplog.records) == 1 and "refuses pinned memory (CUDA error: out of memory (cudaHostAlloc)); going on with pageable" in caplog.text
    host, mark = transfers.to_host(first)
    assert torch.equal(transfers.fetch(host, mark)[0], first)


def test_buffers_that_cannot_be_pinned_are_pageable(monkeypatch, caplog):
    transfers, empty = Transfers(torch.device("cpu")), torch.empty
    transfers.can_pin = True

    def refuse(*args, pin_memory=False, **kwargs):
        if pin_memory:
            raise RuntimeError("cannot lock more memory")
        return empty(*args, **kwargs)

    monkeypatch.setattr(torch, "empty", refuse)
    with caplog.at_level(logging.WARNING, logger="reward_lab.offload"):
        assert transfers.host_like(torch.zeros(2)).shape == transfers.host_like(torch.zeros(2)).shape
    assert len(caplog.records) == 1 and "cannot lock more memory" in caplog.text


class DeadCard(Transfers):
    """Copies as on the CPU, but waiting for the card fails, as after a driver error."""

    def stop(self) -> None:
        self.is_async = True

        class Stream:
            def synchronize(self):
                raise torch.AcceleratorError("CUDA error: unspecified launch failure")

        self._in = self._out = Stream()
        super().stop()


def test_a_card_that_does_not_answer_keeps_nothing_from_being_put_back(caplog):
    block = torch.nn.Sequential(torch.nn.Linear(4, 4)).requires_grad_(False)
    before = block[0].weight.data_ptr()
    slots = [Slot()]
    store = BlockStore([block], DeadCard(torch.device("cpu")), resident_blocks=0, slots=slots)
    store.open()
    with pytest.raises(torch.AcceleratorError), store.use(0, merge=False):
        assert block[0].weight.data_ptr() != before
        raise torch.AcceleratorError("CUDA error: unspecified launch failure")
    with caplog.at_level(logging.WARNING, logger="reward_lab.offload"):
        store.close()
    assert "the card does not answer" in caplog.text
    assert block[0].weight.data_ptr() == before and slots[0].views == {} and "holds_no_merged_copy" not in block[0].__dict__
